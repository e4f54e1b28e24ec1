"""Text without labels beside a task's rows: teachers teach on it, and nothing else reads it."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import tiny_reviews
from rich.console import Console

from kdfast import runs
from kdfast.data.text import OFF
from kdfast.recipes import dynabert, hinton, minilm, multi_teacher, patient_kd, self_distillation, tinybert
from kdfast.runs import stages

SHORT: dict[str, Any] = {
    "epochs": 1, "teacher_epochs": 1, "learning_rate": 2e-3, "batch_size": 8, "train_rows": 40, "test_rows": 16,
    "precision": "float32",
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("no_download")


@pytest.fixture
def text(tmp_path: Path) -> str:
    """12 texts that the task has not."""
    lines = [f"{word} nowhere film" for word in tiny_reviews.WORDS]
    (tmp_path / "more.csv").write_text("text,label\n" + "\n".join(f"{line},7" for line in lines))
    return str(tmp_path / "more.csv")


def run(folder: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int]]:
    """Of each stage: how many rows it is trained on, and how many of them without a label."""
    seen, train_stage = {}, stages.train_stage

    def look(trainer: Any, stage: Path, title: str, dtype: str) -> Any:
        rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
        seen[stage.name] = len(rows), sum(row.get("labels") == OFF for row in rows)
        return train_stage(trainer, stage, title, dtype)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "train_stage", look)
        runs.run(recipe, folder, Console(file=io.StringIO()))
    return seen


LABELLED, ALL = (40, 0), (52, 12)
VARIED = (84, 12)  # 32 of the 40 have a variant
CASES: dict[str, tuple[Any, dict[str, tuple[int, int]]]] = {
    "hinton": (hinton.Recipe(**SHORT), {"teacher": LABELLED, "labels_only": LABELLED, "student": ALL}),
    "patient-kd": (patient_kd.Recipe(**SHORT), {"teacher": LABELLED, "student": ALL}),
    "minilm": (
        minilm.Recipe(**SHORT, relation_epochs=1),
        {"teacher": LABELLED, "relations": ALL, "student": LABELLED},
    ),
    "tinybert": (
        tinybert.Recipe(**SHORT, general_epochs=0, intermediate_epochs=1, augment=1),
        {"teacher": LABELLED, "intermediate": VARIED, "student": VARIED},
    ),
    "dynabert": (
        dynabert.Recipe(**SHORT, widths=(0.5, 1.0), depths=(1.0,), finetune_epochs=1),
        {"teacher": LABELLED, "width": ALL, "student": LABELLED},
    ),
    "multi-teacher": (
        multi_teacher.Recipe(**SHORT, teachers=2),
        {"teacher_0": LABELLED, "teacher_1": LABELLED, "student": ALL},
    ),
    "self-distillation": (
        self_distillation.Recipe(**SHORT, generations=2),
        {"teacher": LABELLED, "generation_1": ALL, "student": ALL},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_stages_with_a_teacher_have_it(name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, expected = CASES[name]
    assert run(tmp_path / "run", dataclasses.replace(recipe, unlabeled=text), monkeypatch) == expected


def test_texts_that_the_task_has_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its test rows too: the demonstration's own training rows are all that is left."""
    recipe = hinton.Recipe(**SHORT, baseline=False, unlabeled="movie_reviews")
    rows, without = run(tmp_path / "run", recipe, monkeypatch)["student"]
    assert rows == 40 + without
    assert 0 < without < 300 - 40


def test_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numbers.csv").write_text("text,label\n" + "\n".join(f"word {i},{i / 4 + 0.5}" for i in range(40)))
    recipe = hinton.Recipe(**SHORT | {"train_rows": None}, data=str(tmp_path / "numbers.csv"), unlabeled=text)
    with pytest.raises(ValueError, match="unlabeled: expected none beside regression, whose labels are numbers, got"):
        run(tmp_path / "run", recipe, monkeypatch)
    (tmp_path / "same.csv").write_text("text\nword 1\nword 2\n")
    (tmp_path / "words.csv").write_text("text,label\n" + "\n".join(f"word {i},{i % 2}" for i in range(40)))
    recipe = dataclasses.replace(
        recipe, data=str(tmp_path / "words.csv"), unlabeled=str(tmp_path / "same.csv"), test_rows=None
    )
    with pytest.raises(
        ValueError, match=r"unlabeled: expected text in text of .*same.csv that .*words.csv has not, got"
    ):
        run(tmp_path / "run", recipe, monkeypatch)
