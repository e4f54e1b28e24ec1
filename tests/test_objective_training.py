"""Objectives of terms in DistillationTrainer: against loops in plain torch, with micro-batches, schedules and bf16."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_berts import Sides, bert, collate, logged, masked_lm, moved, plain_loop, rows, same, trainer
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import BertModel, TrainerCallback

from kdfast.objective import (
    CLS,
    Attention,
    Cosine,
    Embedding,
    Hidden,
    Labels,
    LinearSchedule,
    Logits,
    Relations,
    StageSchedule,
    Terms,
)

STEPS, BATCH = 20, 4


def batches(given: list[Any], size: int = BATCH) -> list[dict[str, Tensor]]:
    return [collate(given[i : i + size]) for i in range(0, len(given), size)]


def linear(seed: int = 5) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(16, 24)


def narrow(projection: nn.Linear) -> Terms:
    """For a student of another width than its teacher."""
    return Terms(
        kl=Logits(temperature=2.0, weight=0.7),
        ce=Labels(weight=0.3),
        hidden=Hidden(projection=projection, weight=LinearSchedule(1.0, 0.2)),
        embedding=Embedding(projection=projection, weight=0.5),
        attention=Attention(weight=0.1),
        relations=Relations(weight=0.4),
    )


def wide() -> Terms:
    return Terms(
        kl=Logits(temperature=10.0, per_class=True, weight=0.7),
        ce=Labels(weight=0.3),
        cls=CLS(weight=20.0),
        cosine=Cosine(),
    )


def narrow_by_hand(of: Sides, step: int, projection: nn.Linear) -> dict[str, Tensor]:
    pairs = {1: 2, 2: 4}
    return {
        "kl": 0.7 * of.kl(2.0),
        "ce": 0.3 * of.ce(),
        "hidden": (1 - 0.8 * step / STEPS) * of.hidden(pairs, projection),
        "embedding": 0.5 * of.hidden({0: 0}, projection),
        "attention": 0.1 * of.attention(pairs),
        "relations": 0.4 * of.relations(),
    }


def wide_by_hand(of: Sides, step: int) -> dict[str, Tensor]:
    return {"kl": 0.7 / 3 * of.kl(10.0), "ce": 0.3 * of.ce(), "cls": 20 * of.cls({1: 2}), "cosine": of.cosine()}


@pytest.mark.parametrize("width", [24, 16], ids=["narrow student", "equal widths"])
def test_follows_a_plain_loop(tmp_path: Path, width: int) -> None:
    teacher, student, projection = bert(0, width=width, layers=4), bert(1), linear()
    start, by_hand, by_hand_projection = (copy.deepcopy(x) for x in (student, student, projection))
    given = rows(STEPS * BATCH)
    objective = wide() if width == 16 else narrow(projection)
    it = trainer(tmp_path, student, given, objective, teacher=teacher)
    it.train()
    terms: list[dict[str, float]] = []

    def loss_of(batch: dict[str, Tensor], step: int) -> Tensor:
        of = Sides(by_hand, teacher, batch)
        values = wide_by_hand(of, step) if width == 16 else narrow_by_hand(of, step, by_hand_projection)
        terms.append({name: value.item() for name, value in values.items()})
        return torch.stack(list(values.values())).sum()

    trained = [*by_hand.parameters(), *(by_hand_projection.parameters() if width == 24 else ())]
    expected = plain_loop(trained, batches(given), loss_of)
    torch.testing.assert_close(logged(it), expected, rtol=0, atol=1e-5)
    for name in objective.terms:
        torch.testing.assert_close(logged(it, name), [of[name] for of in terms], rtol=0, atol=1e-5)
        assert max(logged(it, name)) > 1e-2
    same(student, by_hand, 1e-5)
    moved(student, start)
    assert expected[-1] < expected[0]
    if width == 24:
        same(projection, by_hand_projection, 1e-5)
        moved(projection, linear())


def targets(projection: nn.Linear) -> Terms:
    """Means over tokens, targets and pairs of tokens, of which micro-batches have unequal numbers."""
    return Terms(
        kl=Logits(temperature=2.0, tokens="labels", weight=0.7),
        mlm=Labels("tokens", weight=0.3),
        hidden=Hidden(projection=projection),
        attention=Attention(weight=0.1),
        relations=Relations(relations=("qq", "kk", "vv"), weight=0.4),
    )


def test_unequal_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    teacher, start, given = masked_lm(0, width=24, layers=4), masked_lm(1), rows(41, tokens=True)
    counts = [int((batch["labels"] != -100).sum()) for batch in batches(given, 3)]
    assert len(set(counts[:4])) > 2
    assert len(given) % 12 == 5  # the last step is a micro-batch of 3 rows and one of 2
    one, many, projections = copy.deepcopy(start), copy.deepcopy(start), (linear(), linear())
    whole = trainer(tmp_path, one, given, targets(projections[0]), teacher=teacher, per_device_train_batch_size=12)
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    parts = trainer(tmp_path, many, given, targets(projections[1]), teacher=teacher, **sizes)
    whole.train()
    parts.train()
    for name in ("loss", *whole.objective.terms):
        assert len(logged(whole, name)) == 4
        torch.testing.assert_close(logged(parts, name), logged(whole, name), rtol=0, atol=1e-5)
    same(many, one, 1e-5)
    same(projections[1], projections[0], 1e-5)
    moved(one.bert.encoder, start.bert.encoder)

    def loss_of(batch: dict[str, Tensor], step: int) -> Tensor:
        of = Sides(by_hand, teacher, batch)
        pairs, relations = {1: 2, 2: 4}, of.relations(("qq", "kk", "vv"))
        soft = 0.7 * of.kl_of_targets(2.0) + 0.3 * of.ce()
        return soft + of.hidden(pairs, projection) + 0.1 * of.attention(pairs) + 0.4 * relations

    by_hand, projection = copy.deepcopy(start), linear()
    expected = plain_loop([*by_hand.parameters(), *projection.parameters()], batches(given, 12), loss_of)
    torch.testing.assert_close(logged(parts), expected, rtol=0, atol=1e-5)
    same(many, by_hand, 1e-5)


def test_stages_of_hidden_states_then_logits(tmp_path: Path) -> None:
    teacher, student, projection, given = bert(0, width=24, layers=4), bert(1), linear(), rows(STEPS * BATCH)
    by_hand, by_hand_projection = copy.deepcopy(student), copy.deepcopy(projection)
    objective = Terms(
        hidden=Hidden(projection=projection, weight=StageSchedule({0.0: 1.0, 0.5: 0.0})),
        kl=Logits(temperature=2.0, weight=StageSchedule({0.0: 0.0, 0.5: 1.0})),
    )
    it = trainer(tmp_path, student, given, objective, teacher=teacher)
    it.train()
    events = [event for event in it.state.log_history if "loss" in event]
    assert ["hidden" if "hidden" in event else "kl" for event in events] == ["hidden"] * 10 + ["kl"] * 10
    assert all(
        event.get("hidden", 0) + event.get("kl", 0) == pytest.approx(event["loss"], abs=1e-5) for event in events
    )

    def loss_of(batch: dict[str, Tensor], step: int) -> Tensor:
        of = Sides(by_hand, teacher, batch)
        return of.hidden({1: 2, 2: 4}, by_hand_projection) if step < 10 else of.kl(2.0)

    # As where a term is off, the weights that it alone reaches have no gradient and no step.
    expected = plain_loop([*by_hand.parameters(), *by_hand_projection.parameters()], batches(given), loss_of)
    torch.testing.assert_close(logged(it), expected, rtol=0, atol=1e-5)
    same(student, by_hand, 1e-5)
    same(projection, by_hand_projection, 1e-5)


class Reports(TrainerCallback):  # type: ignore[misc]
    """What every reporter gets, TensorBoard's among them."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_every_term_is_reported(tmp_path: Path) -> None:
    reports = Reports()
    it = trainer(
        tmp_path, bert(1), rows(36), narrow(linear()), teacher=bert(0, width=24), logging_steps=2, callbacks=[reports],
        per_device_train_batch_size=2, gradient_accumulation_steps=3,
    )  # fmt: skip
    it.train()
    events = [logs for logs in reports.logs if "loss" in logs]
    assert len(events) == 3
    for event in events:
        values = [event[name] for name in it.objective.terms]
        assert all(type(value) is float and value > 0 for value in values)
        assert sum(values) == pytest.approx(event["loss"], abs=1e-5)


@pytest.mark.parametrize("width", [24, 16], ids=["narrow student", "equal widths"])
def test_trains_in_bf16(tmp_path: Path, width: int) -> None:
    teacher, start, given = bert(0, width=width, layers=4), bert(1), rows(STEPS * BATCH)
    losses = []
    for bf16 in (False, True):
        student, projection = copy.deepcopy(start), linear()
        objective = wide() if width == 16 else narrow(projection)
        it = trainer(tmp_path, student, given, objective, teacher=teacher, bf16=bf16, eval_dataset=given[:6])
        it.train()
        losses.append([*logged(it), it.evaluate()["eval_kl"]])
        assert all(p.dtype == torch.float32 for p in (*student.parameters(), *projection.parameters()))
        moved(student, start)
    torch.testing.assert_close(losses[1], losses[0], rtol=0.03, atol=0.01)
    assert losses[1] != losses[0]
    assert sum(losses[1][15:20]) < 0.9 * sum(losses[1][:5])


def test_base_model_without_labels(tmp_path: Path) -> None:
    """As MiniLM trains: relations on plain text, students and teachers without heads; evaluated too."""
    teacher, student = (bert(seed, kind=BertModel, width=width) for seed, width in ((0, 24), (1, 16)))
    given = [{"input_ids": row["input_ids"]} for row in rows(12)]
    it = trainer(tmp_path, student, given, Terms(rel=Relations()), teacher=teacher, eval_dataset=given[:4])
    before = it.evaluate()
    with torch.no_grad():
        expected = Sides(student, teacher, collate(given[:4])).relations()
    assert before["eval_rel"] == pytest.approx(expected.item(), abs=1e-5)
    assert before["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)
    it.train()
    assert 0 < it.evaluate()["eval_rel"] < before["eval_rel"]


# ---- evaluation ----
def test_evaluation_compares_student_and_teacher(tmp_path: Path) -> None:
    """10 rows in batches of 4, 4 and 2; dropout must be off on both sides."""
    teacher, student = bert(0, layers=4, dropout=0.5).train(), bert(1, dropout=0.5)
    given = rows(10)
    it = trainer(tmp_path, student, rows(8), wide(), teacher=teacher, eval_dataset=given, eval_strategy="epoch")
    it.train()
    during, after = logged(it, "eval_kl"), it.evaluate()
    with torch.no_grad():
        of = Sides(student.eval(), teacher, collate(given))
        log_s, log_t = (x.logits.log_softmax(-1) for x in (of.s, of.t))
        expected = {f"eval_{name}": value.item() for name, value in wide_by_hand(of, 0).items()}
    expected["eval_loss"] = sum(expected.values())
    expected["eval_kl_to_teacher"] = (log_t.exp() * (log_t - log_s)).sum(-1).mean().item()
    expected["eval_agreement"] = (log_s.argmax(-1) == log_t.argmax(-1)).float().mean().item()
    assert 0 < expected["eval_agreement"] < 1
    assert min(expected.values()) > 1e-3
    for name, value in expected.items():
        assert after[name] == pytest.approx(value, abs=2e-6), name
    assert during == pytest.approx([after["eval_kl"]], abs=2e-6)


def test_predictions_are_logits_alone(tmp_path: Path) -> None:
    seen: list[Any] = []

    def metrics(predicted: Any) -> dict[str, float]:
        seen.append(predicted)
        return {"right": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}

    student, given = bert(1), rows(10)
    it = trainer(tmp_path, student, given, narrow(linear()), teacher=bert(0, width=24), compute_metrics=metrics)
    predicted = it.predict(given)
    with torch.no_grad():
        expected = student(**{k: v for k, v in collate(given).items() if k != "labels"}).logits
    torch.testing.assert_close(torch.tensor(predicted.predictions), expected, rtol=0, atol=1e-5)
    assert seen[0].predictions.shape == (10, 3)
    assert seen[0].label_ids.tolist() == [row["labels"] for row in given]
    names = ("kl", "ce", "hidden", "embedding", "attention", "relations", "kl_to_teacher", "agreement")
    assert {f"test_{name}" for name in (*names, "right", "loss")} <= set(predicted.metrics)


@pytest.mark.parametrize("source", ["rows for evaluation alone", "streamed"])
def test_stored_teacher_is_found(tmp_path: Path, source: str) -> None:
    """The Trainer drops columns that the student does not name; the objective's must stay."""
    given, student = rows(8), bert(1)
    generator = torch.Generator().manual_seed(0)
    for i, row in enumerate(given):
        row["teacher_cls_3"] = torch.randn(16, generator=generator).tolist()
        row |= {"teacher_logits": [1.0, 0.0, -i / 4], "sample_weight": i / 4, "note": 0}
    objective = Terms(kl=Logits(), cls=CLS({1: 3}))
    batch = collate(given)
    with torch.no_grad():
        outputs = student(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        )
        h = F.normalize(outputs.hidden_states[1][:, 0], dim=-1) - F.normalize(batch["teacher_cls_3"], dim=-1)
        t = batch["teacher_logits"].softmax(-1)
        kl = (batch["sample_weight"] * (t * (t.log() - outputs.logits.log_softmax(-1))).sum(-1)).mean().item()
        cls = (batch["sample_weight"] * h.square().mean(-1)).mean().item()
    if source == "streamed":

        class Stream(IterableDataset):  # type: ignore[type-arg]
            def __iter__(self) -> Iterator[Any]:
                yield from given

        it = trainer(tmp_path, student, Stream(), objective, max_steps=1, per_device_train_batch_size=8)
        it.train()
        got = it.state.log_history[0]["kl"], it.state.log_history[0]["cls"]
    else:
        metrics = trainer(tmp_path, student, None, objective, eval_dataset={"dev": given}).evaluate()
        got = metrics["eval_dev_kl"], metrics["eval_dev_cls"]
    assert got == pytest.approx((kl, cls), abs=2e-6)
