"""Quantised teachers of classifiers: runs with students of one's own, what they cost, and what tells them."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_pairs
import torch
import word_classifiers
from command_line import call
from quantised import HOW, quantised
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from word_classifiers import bert, run, save, write_reviews

from kdfast import teacher_cache
from kdfast.models import cost
from kdfast.models.loading import pretrained
from kdfast.recipes import hinton, minilm, multi_teacher, patient_kd
from kdfast.teacher_cache._identity import weights_sha256

# 4 bits go in blocks of 64 numbers, and on some CPUs of 32 rows, which a head of two classes has not.
WIDTHS = {"hidden_size": 64, "intermediate_size": 128}
FOUR_BITS = {"load_in_4bit": True, "llm_int8_skip_modules": ["classifier"]}
KINDS = pytest.mark.parametrize(
    ("library", "how"), [*HOW.items(), ("bitsandbytes", FOUR_BITS)], ids=["torchao", "8", "4"]
)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    own = save(tmp_path / "own", bert(1, **WIDTHS))
    return {
        "data": write_reviews(tmp_path / "reviews.csv"),
        "student": own,
        "epochs": 6,
        "learning_rate": 2e-3,
        "batch_size": 8,
        "max_length": 16,
        "precision": "float32",
    }


def teacher_of(library: str, how: dict[str, Any], folder: Path) -> tuple[str, Path]:
    """A classifier of four layers, and the same quantised."""
    plain = save(folder / "plain", bert(0, **WIDTHS, num_hidden_layers=4))
    return plain, quantised(library, AutoModelForSequenceClassification, plain, folder / "teacher", **how)


@KINDS
def test_students_of_ones_own(
    library: str, how: dict[str, Any], settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a run that goes on where it was stopped; and `evaluate` gives the run's table."""
    teacher = str(teacher_of(library, how, tmp_path)[1])
    recipe = hinton.Recipe(**settings, teacher=teacher)
    results, _ = run(tmp_path / "run", recipe)
    assert 0 < results["student"]["kl_to_teacher"] < 0.7 * results["labels_only"]["kl_to_teacher"]
    assert all(math.isfinite(number) for row in results.values() for number in row.values())
    (tmp_path / "run" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "run" / "student")
    again, _ = run(tmp_path / "run", recipe)
    assert again["student"]["kl_to_teacher"] == results["student"]["kl_to_teacher"]
    assert call(monkeypatch, "evaluate", tmp_path / "run", "--output", tmp_path / "out.json") == 0
    expected = "expected weights that are not quantised"
    for other in (
        hinton.Recipe(**{**settings, "student": None}, teacher=teacher),
        multi_teacher.Recipe(**settings, teacher=(teacher, teacher)),
    ):
        with pytest.raises(ValueError, match=f"^teacher {teacher}: {expected}"):
            run(tmp_path / "other", other)


@pytest.mark.parametrize("recipe", [patient_kd.Recipe, minilm.Recipe])
def test_teachers_layers(recipe: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    """Stored states of theirs, and attention of a teacher that runs beside the student."""
    teacher = teacher_of("bitsandbytes", HOW["bitsandbytes"], tmp_path)[1]
    results, _ = run(tmp_path / "run", recipe(**settings, teacher=str(teacher)))
    assert all(math.isfinite(number) for row in results.values() for number in row.values())
    assert results["student"]["kl_to_teacher"] > 0


def test_torchao_of_bart(tmp_path: Path) -> None:
    """It saves a bias outside of any layer that it cannot load; once it can, docs/models.md may say so."""
    own = tiny_pairs.saved(tmp_path / "bart", "bart", layers=1, seed=0)
    source = quantised("torchao", AutoModelForSeq2SeqLM, own, tmp_path / "teacher")
    expected = (
        f"^teacher {source}: expected what transformers loads, got weights that it cannot put together; torchao's"
    )
    with pytest.raises(ValueError, match=expected):
        pretrained(AutoModelForSeq2SeqLM, "teacher", source, quantised=True)


@KINDS
def test_cost_is_that_of_the_model_that_was_quantised(library: str, how: dict[str, Any], tmp_path: Path) -> None:
    plain, its = map(AutoModelForSequenceClassification.from_pretrained, teacher_of(library, how, tmp_path))
    batch = {"input_ids": torch.tensor([[3, 7, 8], [5, 9, 7]])}
    before = its(**batch).logits
    assert cost.flops(its, batch) == cost.flops(plain, batch) > 0
    assert cost.parameters(its) == cost.parameters(plain)
    torch.testing.assert_close(its(**batch).logits, before)


@KINDS
def test_stored_outputs_are_those_of_the_teacher(library: str, how: dict[str, Any], tmp_path: Path) -> None:
    """Asking what teacher it is, before it ran and after, changes neither."""
    _, source = teacher_of(library, how, tmp_path)
    model, other = (AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32) for _ in range(2))
    rows = [{"input_ids": [3 + i % 7, 7, 8]} for i in range(8)]
    ids = torch.tensor([row["input_ids"] for row in rows])
    with torch.inference_mode():
        expected = other.eval()(input_ids=ids).logits
    for part in ("train", "test"):
        cache = teacher_cache.write(
            model, rows, tmp_path / part, tokenizer=word_classifiers.tokenizer(), outputs=("logits",), batch_size=8
        )
        found = torch.stack([cache[i]["logits"] for i in range(8)]).float()
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert weights_sha256(model) == weights_sha256(AutoModelForSequenceClassification.from_pretrained(source))
    unlike = save(tmp_path / "unlike", bert(2, **WIDTHS, num_hidden_layers=4))
    third = quantised(library, AutoModelForSequenceClassification, unlike, tmp_path / "third", **how)
    assert weights_sha256(model) != weights_sha256(AutoModelForSequenceClassification.from_pretrained(third))
