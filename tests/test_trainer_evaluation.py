"""Evaluations and predictions of DistillationTrainer: means whatever the batches, rows that lack columns, logits on request."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_berts import CLASSES, bert, collate, logged, masked_lm, rows, trainer
from tiny_teacher import llama
from torch import Tensor, nn
from transformers import BertModel

from kdfast.objective import (
    CLS,
    Attention,
    Cosine,
    Embedding,
    Hidden,
    Hinton,
    Labels,
    LanguageModel,
    Logits,
    Missing,
    Relations,
    Terms,
    model_inputs,
)


def of_rows() -> Terms:
    return Terms(
        kl=Logits(temperature=2.0), ce=Labels(), cls=CLS({1: 1}), hidden=Hidden(), padded=Hidden(masked=False),
        embedding=Embedding(), cosine=Cosine(), attention=Attention(), relations=Relations(),
    )  # fmt: skip


def of_tokens() -> Terms:
    return Terms(kl=Logits(tokens="labels"), every=Logits(tokens="all", weight=0.5), mlm=Labels("tokens"))


CASES = {"rows": (of_rows, bert), "tokens": (of_tokens, masked_lm)}


@torch.no_grad()
def whole(objective: Terms, student: Any, teacher: Any, given: Any) -> dict[str, float]:
    """The weighted terms of all rows in one batch."""
    batch = collate(given)
    values = objective(objective.run(student, batch), objective.run(teacher, batch), batch)
    return {name: value.item() for name, value in values.items()}


@pytest.mark.parametrize("name", CASES)
def test_means_do_not_depend_on_the_batches(tmp_path: Path, name: str) -> None:
    """Rows of 3 to 12 tokens, whose batches have unequal numbers of tokens, targets and pairs of tokens."""
    make, kind = CASES[name]
    objective, student, teacher = make(), kind(1), kind(0)
    given = rows(11, tokens=name == "tokens")
    expected = whole(objective, student, teacher, given)
    if name == "rows":  # a column of padding more or less is of the batch, not of the rows
        del expected["padded"]
    assert min(expected.values()) > 1e-3
    spread = [whole(objective, student, teacher, given[i : i + 3]) for i in range(0, 11, 3)]
    assert all(len({round(part[term], 4) for part in spread}) == 4 for term in expected)
    for size in (1, 3, 11):
        options = {"per_device_eval_batch_size": size, "eval_dataset": {"a": given, "b": given[:5]}}
        metrics = trainer(tmp_path, student, None, objective, teacher=teacher, **options).evaluate()
        for term, value in expected.items():
            assert metrics[f"eval_a_{term}"] == pytest.approx(value, rel=1e-5), (size, term)
        for part in "ab":
            terms = [metrics[f"eval_{part}_{term}"] for term in objective.terms]
            assert metrics[f"eval_{part}_loss"] == pytest.approx(sum(terms), rel=1e-12)
        assert metrics["eval_b_kl"] == pytest.approx(whole(objective, student, teacher, given[:5])["kl"], rel=1e-5)
        if name == "rows":
            batch = model_inputs(student, collate(given))
            with torch.no_grad():
                s, t = (model(**batch).logits.log_softmax(-1) for model in (student, teacher))
            assert 0 < metrics["eval_a_agreement"] < 1
            assert metrics["eval_a_agreement"] == pytest.approx(
                (s.argmax(-1) == t.argmax(-1)).float().mean().item(), abs=1e-6
            )
            assert metrics["eval_a_kl_to_teacher"] == pytest.approx((t.exp() * (t - s)).sum(-1).mean().item(), rel=1e-5)


def test_scores_of_causal_models_are_counted_as_such(tmp_path: Path) -> None:
    """Pairs of n tokens, n(n + 1)/2: in evaluations, and in micro-batches of unequal lengths."""
    student, teacher, given = llama(5), llama(), [{"input_ids": row["input_ids"]} for row in rows(8)]
    losses = []
    for size in (2, 8):
        objective = Terms(attention=Attention())
        sizes = {"per_device_eval_batch_size": size, "per_device_train_batch_size": size}
        accumulated = {"gradient_accumulation_steps": 8 // size, "eval_dataset": given}
        it = trainer(tmp_path, student, given, objective, teacher=teacher, **sizes, **accumulated)
        assert it.evaluate()["eval_attention"] == pytest.approx(
            whole(objective, student, teacher, given)["attention"], rel=1e-5
        )
        start = copy.deepcopy(student.state_dict())
        it.train()
        student.load_state_dict(start)
        losses.append(logged(it, "attention"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[1][0] > 1e-3


def test_language_models_are_weighed_by_tokens(tmp_path: Path) -> None:
    student, teacher, given = llama(5), llama(), rows(7, tokens=True)
    objective, batch = LanguageModel(alpha=0.5, temperature=2.0), collate(given)
    with torch.no_grad():
        expected = objective(objective.run(student, batch), objective.run(teacher, batch), batch)
    for size in (1, 3, 7):
        sizes = {"per_device_eval_batch_size": size, "eval_dataset": given}
        metrics = trainer(tmp_path, student, None, objective, teacher=teacher, **sizes).evaluate()
        for name, value in expected.items():
            assert metrics[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-4), (size, name)
            assert value > 1e-3
        assert metrics["eval_loss"] == pytest.approx(metrics["eval_kd"] + metrics["eval_ce"], rel=1e-12)


def test_objectives_that_do_not_count_are_weighed_by_rows(tmp_path: Path) -> None:
    student, given = bert(1), rows(7)

    def objective(student_outputs: Any, teacher_outputs: Any, inputs: Any) -> dict[str, Tensor]:
        return {"ce": nn.functional.cross_entropy(student_outputs.logits, inputs["labels"])}

    batch = collate(given)
    with torch.no_grad():
        expected = objective(student(**model_inputs(student, batch)), None, batch)["ce"].item()
    for size in (2, 7):
        metrics = trainer(
            tmp_path, student, None, objective, eval_dataset=given, per_device_eval_batch_size=size
        ).evaluate()
        assert metrics["eval_ce"] == metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)


# ---- rows that lack columns ----
def test_predictions_without_labels(tmp_path: Path) -> None:
    student, teacher, given = bert(1), bert(0), rows(6)
    unlabelled = [{"input_ids": row["input_ids"]} for row in given]
    it = trainer(tmp_path, student, None, Hinton(alpha=0.5), teacher=teacher)
    with pytest.warns(
        UserWarning, match="DistillationTrainer: evaluation without ce: Labels: inputs: expected rows with labels"
    ):
        predicted = it.predict(unlabelled)
    with torch.no_grad():
        expected = student(**model_inputs(student, collate(unlabelled))).logits
    np.testing.assert_allclose(predicted.predictions, expected.numpy(), atol=1e-5)
    assert predicted.label_ids is None
    assert "test_ce" not in predicted.metrics
    assert predicted.metrics["test_loss"] == predicted.metrics["test_kl"] > 1e-3
    with pytest.warns(UserWarning, match="without ce"):
        assert it.evaluate(unlabelled)["eval_kl"] == pytest.approx(predicted.metrics["test_kl"])
    with pytest.raises(Missing, match="Labels: inputs: expected rows with labels"):  # training stops
        trainer(tmp_path, student, unlabelled, Hinton(alpha=0.5), teacher=teacher).train()


def test_no_term_no_loss(tmp_path: Path) -> None:
    student = bert(1)
    unlabelled = [{"input_ids": row["input_ids"]} for row in rows(6)]
    with pytest.warns(UserWarning, match="evaluation without (kl|ce)") as warned:
        predicted = trainer(tmp_path, student, None, Hinton(alpha=0.5)).predict(unlabelled)
    assert {str(w.message).split(": ")[2] for w in warned if "without" in str(w.message)} == {"Labels", "Logits"}
    assert predicted.predictions.shape == (6, CLASSES)
    assert not {"test_loss", "test_kl", "test_ce"} & set(predicted.metrics)


def test_without_the_columns_of_a_stored_teacher(tmp_path: Path) -> None:
    given = rows(8)
    stored = [
        {**row, "teacher_logits": [1.0, 0.0, -i / 4], "teacher_cls_3": [i / 8] * 16} for i, row in enumerate(given)
    ]
    objective = Terms(kl=Logits(), ce=Labels(), cls=CLS({1: 3}))
    it = trainer(tmp_path, bert(1), stored, objective, eval_dataset={"with": stored, "without": given})
    with pytest.warns(
        UserWarning, match="without cls: CLS: teacher: expected one, or rows with a teacher_cls_3 column"
    ):
        metrics = it.evaluate()
    assert metrics["eval_with_kl"] > 1e-3
    assert metrics["eval_with_cls"] > 1e-3
    assert "eval_without_kl" not in metrics
    assert "eval_without_cls" not in metrics
    assert metrics["eval_without_loss"] == metrics["eval_without_ce"] == pytest.approx(metrics["eval_with_ce"])
    named = trainer(tmp_path, bert(1), None, Terms(ce=Labels(), cls=CLS("uniform")), eval_dataset=given)
    with pytest.warns(
        UserWarning, match="without cls: CLS: teacher: expected one, or rows with teacher_cls_<state> columns"
    ):
        assert named.evaluate()["eval_ce"] > 1e-3


# ---- logits on request ----
class Fused:
    """An objective whose model is run up to its hidden states; how often logits were asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def run(self, model: Any, inputs: Any) -> Any:
        hidden = model.bert(**model_inputs(model, inputs)).pooler_output
        return {"hidden": hidden, "head": model.classifier}

    def __call__(self, student: Any, teacher: Any, inputs: Any) -> dict[str, Tensor]:
        if "labels" not in inputs:
            raise Missing("Fused: inputs: expected rows with labels, got none")
        return {"ce": nn.functional.cross_entropy(student["head"](student["hidden"]), inputs["labels"])}


class WithLogits(Fused):
    def logits(self, student: Any) -> Tensor:
        self.asked += 1
        made: Tensor = student["head"](student["hidden"])
        return made


def right(predicted: Any) -> dict[str, float]:
    return {"right": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def test_logits_are_asked_for_where_predictions_are_wanted(tmp_path: Path) -> None:
    student, given, objective = bert(1), rows(10), WithLogits()
    with torch.no_grad():
        expected = student(**model_inputs(student, collate(given))).logits.numpy()
    it = trainer(tmp_path, student, given, objective, eval_dataset=given, compute_metrics=right)
    it.train()
    assert objective.asked == 0
    assert trainer(tmp_path, student, None, objective, eval_dataset=given).evaluate()["eval_loss"] > 1e-3
    assert objective.asked == 0  # no metrics to compute
    student.load_state_dict(bert(1).state_dict())
    labels = np.array([row["labels"] for row in given])
    assert it.evaluate()["eval_right"] == pytest.approx((expected.argmax(-1) == labels).mean())
    assert objective.asked == 3
    np.testing.assert_allclose(it.predict(given).predictions, expected, atol=1e-5)
    with pytest.warns(UserWarning, match="without WithLogits: Fused: inputs: expected rows with labels, got none"):
        unlabelled = it.predict([{"input_ids": row["input_ids"]} for row in given])
    np.testing.assert_allclose(unlabelled.predictions, expected, atol=1e-5)
    assert "test_loss" not in unlabelled.metrics


def test_settings_of_predictions_are_kept(tmp_path: Path) -> None:
    student, given = bert(1), rows(10)
    with torch.no_grad():
        expected = student(**model_inputs(student, collate(given))).logits

    def best(logits: Tensor, labels: Tensor) -> Tensor:
        assert logits.shape == (len(labels), CLASSES)
        return logits.argmax(-1)

    options = {"compute_metrics": lambda p: {}, "eval_do_concat_batches": False}
    it = trainer(tmp_path, student, None, WithLogits(), preprocess_logits_for_metrics=best, **options)
    predicted = it.predict(given)
    assert [len(batch) for batch in predicted.predictions] == [4, 4, 2]
    assert np.concatenate(predicted.predictions).tolist() == expected.argmax(-1).tolist()
    assert [len(batch) for batch in predicted.label_ids] == [4, 4, 2]


def test_metrics_without_logits_are_refused(tmp_path: Path) -> None:
    it = trainer(tmp_path, bert(1), None, Fused(), eval_dataset=rows(4), compute_metrics=right)
    message = r"DistillationTrainer: compute_metrics: expected .* \(`logits\(outputs\)`\) .*, got dict from Fused"
    with pytest.raises(ValueError, match=message):
        it.evaluate()
    without = trainer(tmp_path, bert(1, kind=BertModel), None, Terms(rel=Relations()), teacher=bert(0, kind=BertModel))
    assert without.predict(rows(4)).predictions is None


def test_a_teacher_of_other_classes_is_not_compared(tmp_path: Path) -> None:
    objective = Terms(ce=Labels(), cosine=Cosine())
    metrics = trainer(tmp_path, bert(1), None, objective, teacher=bert(0, classes=5), eval_dataset=rows(5)).evaluate()
    assert min(metrics["eval_ce"], metrics["eval_cosine"]) > 1e-3
    assert not {"eval_agreement", "eval_kl_to_teacher"} & set(metrics)


def test_nothing_is_warned_of_where_all_is_there(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="DistillationTrainer")
        metrics = trainer(tmp_path, bert(1), None, of_rows(), teacher=bert(0), eval_dataset=rows(5)).evaluate()
    assert {f"eval_{name}" for name in of_rows().terms} <= set(metrics)
