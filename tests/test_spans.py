"""Question answering: logits of starts and ends, their labels; and models that return tuples or have no logits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from objective_outputs import BATCH, LENGTH, LENGTHS, MASK, PRECISIONS, WEIGHTED, batch, compare, kl
from test_objective import DIVERGENCES, SETTINGS
from tiny_berts import bert, collate, logged, moved, plain_loop, rows, same, trainer
from torch import Tensor, nn
from transformers import BertForQuestionAnswering

from kdfast.objective import CLS, Cosine, Hidden, Labels, Logits, Spans, Terms, model_inputs

NAMES = ("start_logits", "end_logits")
STARTS, ENDS = torch.tensor([0, 2, 0, -1]), torch.tensor([5, 6, 0, 9])  # of 6 tokens: -1 is 0, 6 and 9 do not count


def side(seed: int, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(BATCH, LENGTH, generator=generator, dtype=torch.float64).float().to(dtype) for _ in NAMES]
    return SimpleNamespace(**{name: x.requires_grad_(seed == 0) for name, x in zip(NAMES, drawn, strict=True)})


def spans_by_hand(term: Spans, student: Any, teacher: Any, inputs: Any) -> Tensor:
    """Sequence by sequence, without its padding."""
    weights = inputs.get("sample_weight", torch.ones(BATCH)).double()
    temperatures = inputs.get("sample_temperature", torch.full((BATCH,), term.temperature, dtype=torch.float64))
    total = torch.zeros((), dtype=torch.float64)
    for b, n in enumerate(LENGTHS.tolist()):
        for name in NAMES:
            s, t = (getattr(x, name)[b, :n].double() / temperatures[b] for x in (student, teacher))
            loss = DIVERGENCES[term.divergence](s.log_softmax(-1), t.log_softmax(-1))
            total = total + weights[b] * (temperatures[b] ** 2 if term.t_squared else 1) * loss / 2 / BATCH
    return total


@WEIGHTED
@PRECISIONS
@pytest.mark.parametrize("tempered", [False, True], ids=["", "sample_temperature"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_spans(divergence: str, tempered: bool, dtype: torch.dtype, tolerance: float, weighted: bool) -> None:
    term = Spans(divergence, temperature=1.7, t_squared=not weighted, **SETTINGS.get(divergence, {}))
    student, teacher, inputs = side(0, dtype), side(1, dtype), batch(weighted, tempered)
    for name in NAMES:
        getattr(teacher, name).data[~MASK] = 50.0  # positions that are none
    leaves = [getattr(student, name) for name in NAMES]
    compare(term(student, teacher, inputs), spans_by_hand(term, student, teacher, inputs), leaves, tolerance)
    stored = {f"teacher_{name}": getattr(teacher, name) for name in NAMES}
    objective = Terms(it=term)
    compare(objective(student, None, inputs | stored)["it"], term(student, teacher, inputs), leaves, 1e-12)


def qa(seed: int, **options: Any) -> Any:
    return bert(seed, kind=BertForQuestionAnswering, classes=2, **options)


def answers(count: int) -> list[dict[str, Any]]:
    """Rows of 3 to 12 tokens; some answers lie beyond what is left of their texts."""
    given = [{"input_ids": row["input_ids"]} for row in rows(count)]
    for i, row in enumerate(given):
        row |= {"start_positions": i % 3, "end_positions": 40 if i % 4 == 3 else 2}
        row["start_positions"] = 40 if i % 8 == 7 else row["start_positions"]
    return given


@pytest.mark.parametrize("aligned", [True, False], ids=["as many starts as ends", "an end cut off"])
def test_labels_of_spans_are_those_of_transformers(aligned: bool) -> None:
    """Without padding: its mean of both means, where as many starts as ends count; else the mean of all that count."""
    model, inputs = qa(0), batch(input_ids=torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 40)
    inputs["attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.long)
    labels = {"start_positions": STARTS.clone(), "end_positions": ENDS.clone()}
    if aligned:
        labels["start_positions"][1] = LENGTH
        labels["end_positions"][3] = LENGTH - 2
    outputs = model(**inputs, **labels)
    if aligned:
        value = Labels("spans")(model(**inputs), None, inputs | labels)
        compare(value, model(**inputs, **labels).loss, list(model.parameters()), 2e-5)
    logs = [getattr(outputs, name).log_softmax(-1) for name in NAMES]
    counted = [(0, b, int(x)) for b, x in enumerate(labels["start_positions"].clamp(min=0)) if x < LENGTH]
    counted += [(1, b, int(x)) for b, x in enumerate(labels["end_positions"].clamp(min=0)) if x < LENGTH]
    assert len(counted) == 6
    assert Labels("spans").count(inputs | labels) == len(counted)
    by_hand = -torch.stack([logs[n][b, x] for n, b, x in counted]).mean()
    compare(Labels("spans")(outputs, None, inputs | labels), by_hand, [outputs.start_logits, outputs.end_logits], 2e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("left", [False, True], ids=["", "padded on the left"])
def test_labels_of_spans_row_by_row(smoothing: float, left: bool) -> None:
    """Rows of 6, 3, 1 and 5 tokens, without their padding; with weights. Labels on padding do not count."""
    labels = {"start_positions": STARTS, "end_positions": ENDS} if not left else {
        "start_positions": torch.tensor([0, 2, 5, -1]), "end_positions": torch.tensor([5, 4, 4, 3])
    }  # fmt: skip
    student, inputs = side(0), batch(True, **labels)
    inputs["sample_weight"][2] = 0.75
    inputs["attention_mask"] = MASK.flip(1).long() if left else MASK.long()
    total, counted = torch.zeros((), dtype=torch.float64), []
    for name, of in zip(NAMES, labels.values(), strict=True):
        for b, (x, n) in enumerate(zip(of.clamp(min=0).tolist(), LENGTHS.tolist(), strict=True)):
            first = LENGTH - n if left else 0
            if first <= x < first + n:
                log = getattr(student, name)[b, first : first + n].log_softmax(-1)
                total -= inputs["sample_weight"][b] * ((1 - smoothing) * log[x - first] + smoothing * log.mean())
                counted.append((name[0], b))
    starts, ends = ([0, 2], [0, 1, 3]) if left else ([0, 1, 2, 3], [0, 2])
    assert counted == [("s", b) for b in starts] + [("e", b) for b in ends]
    term = Labels("spans", label_smoothing=smoothing)
    assert term.count(inputs) == len(counted)
    compare(term(student, None, inputs), total / len(counted), [student.start_logits, student.end_logits], 1e-6)


def objective() -> Terms:
    return Terms(
        kl=Spans(temperature=2.0, weight=0.7), ce=Labels("spans", weight=0.3), cls=CLS("uniform"), hidden=Hidden()
    )


def by_hand(student: Any, teacher: Any, inputs: Any) -> Tensor:
    own = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    s = student(**own, output_hidden_states=True)
    with torch.no_grad():
        t = teacher(**own, output_hidden_states=True)
    on, total = own["attention_mask"].bool(), torch.zeros(())
    for name in NAMES:
        log_s, log_t = ((getattr(x, name) / 2).masked_fill(~on, -1e4).log_softmax(-1) for x in (s, t))
        total = total + 0.7 * 4 * kl(log_t, log_s).mean() / 2
    logs, ends = (
        torch.cat([s.start_logits, s.end_logits]),
        torch.cat([inputs["start_positions"], inputs["end_positions"]]),
    )
    logs = logs.masked_fill(~on.repeat(2, 1), -1e4)
    ends = torch.where(ends < on.sum(-1).repeat(2), ends, -100)
    total = total + 0.3 * nn.functional.cross_entropy(logs, ends)
    for i in (1, 2):
        a, b = (nn.functional.normalize(x.hidden_states[i][:, 0], dim=-1) for x in (s, t))
        total = total + (a - b).square().mean() / 2
        total = total + (s.hidden_states[i] - t.hidden_states[i])[on].square().mean()
    return total


def test_training_follows_a_plain_loop_and_evaluation_gives_both_logits(tmp_path: Path) -> None:
    student, teacher, given = qa(1), qa(0), answers(24)
    hand = qa(1)
    it = trainer(tmp_path, student, given, objective(), teacher=teacher)
    it.train()
    batches = [collate(given[i : i + 4]) for i in range(0, 24, 4)]
    expected = plain_loop(list(hand.parameters()), batches, lambda inputs, _: by_hand(hand, teacher, inputs))
    torch.testing.assert_close(logged(it), expected, rtol=0, atol=1e-5)
    same(student, hand, 1e-5)
    moved(student.bert.encoder, qa(1).bert.encoder)

    def metrics(predicted: Any) -> dict[str, float]:
        starts, ends = predicted.predictions
        of_labels = [labels.sum() for labels in predicted.label_ids]
        return {"shape": float(starts.size + ends.size), "labels": float(sum(of_labels))}

    found = []
    for size in (3, 24):
        options = {"per_device_eval_batch_size": size, "eval_dataset": given, "compute_metrics": metrics}
        it = trainer(tmp_path, student, None, objective(), teacher=teacher, **options)
        found.append(it.evaluate())
    for name in ("kl", "ce", "cls", "hidden"):
        assert found[0][f"eval_{name}"] == pytest.approx(found[1][f"eval_{name}"], rel=1e-5)
        assert found[0][f"eval_{name}"] > 1e-3
    assert found[1]["eval_shape"] == 2 * 24 * 12
    assert found[1]["eval_labels"] == sum(row["start_positions"] + row["end_positions"] for row in given)
    with pytest.warns(
        UserWarning, match="without ce: Labels: inputs: expected rows with start_positions, end_positions, got "
    ):
        predicted = it.predict([{"input_ids": row["input_ids"]} for row in given])
    with torch.no_grad():
        wanted = student(**model_inputs(student, collate(given)))
    for got, name in zip(predicted.predictions, NAMES, strict=True):
        np.testing.assert_allclose(got, getattr(wanted, name).numpy(), atol=1e-5)


# ---- tuples, and outputs without logits ----
def test_models_that_are_set_to_return_tuples(tmp_path: Path) -> None:
    teacher, students, losses = bert(0), [bert(1), bert(1)], []
    for student, named in zip(students, (True, False), strict=True):
        student.config.return_dict = teacher.config.return_dict = named
        it = trainer(
            tmp_path, student, rows(8), Terms(kl=Logits(), cosine=Cosine()), teacher=teacher, eval_dataset=rows(4)
        )
        it.train()
        losses.append([*logged(it), it.evaluate()["eval_kl"]])
    assert losses[0] == losses[1]
    assert min(losses[0]) > 1e-3
    assert it.predict(rows(4)).predictions.shape == (4, 3)


class Tuples(nn.Module):
    """No model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 3)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> tuple[Tensor]:
        return (self.head(input_ids.float().mean(-1, keepdim=True)),)


def test_outputs_without_logits_are_named(tmp_path: Path) -> None:
    teacher = qa(0)
    spans = r"\(of question answering: kdfast.objective.Spans, and Labels\('spans'\)\)"
    of_qa = "got QuestionAnsweringModelOutput of start_logits, end_logits"
    for term in (Logits(), Labels()):
        name = type(term).__name__
        with pytest.raises(ValueError, match=rf"{name}: outputs: expected a student's with .logits {spans}, {of_qa}"):
            trainer(tmp_path, qa(1), rows(4), Terms(it=term), teacher=bert(0)).train()
    with pytest.raises(ValueError, match=rf"Logits: outputs: expected a teacher's with .logits, {of_qa}"):
        trainer(tmp_path, bert(1), rows(4), Terms(it=Logits()), teacher=teacher).train()
    with pytest.raises(ValueError, match=r"Spans: outputs: expected a student's with .start_logits, got SequenceClass"):
        trainer(tmp_path, bert(1), rows(4), Terms(it=Spans()), teacher=teacher).train()
    with pytest.raises(
        ValueError, match="Spans: teacher: expected one, or rows with a teacher_start_logits column, got neither"
    ):
        trainer(tmp_path, qa(1), rows(4), Terms(it=Spans())).train()
    with pytest.raises(ValueError, match=r"Labels: outputs: expected a student's with .logits .*, got tuple$"):
        trainer(tmp_path, Tuples(), rows(4), Terms(it=Labels())).train()
    with pytest.raises(
        ValueError, match=r"kdfast.hf: outputs: expected some by name, with .hidden_states .*, got tuple"
    ):
        trainer(tmp_path, Tuples(), rows(4), Terms(it=Hidden()), teacher=teacher).train()
    with pytest.raises(ValueError, match="Spans: divergence: expected one of probabilities, got 'logit_mse'"):
        Spans("logit_mse")
    with pytest.raises(
        TypeError, match="Spans: arguments: expected some of weight, temperature, t_squared beside 'kl_div'"
    ):
        Spans(vocab_size=3)
