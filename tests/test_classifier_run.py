"""What a run of classifiers refuses before it trains, a teacher that runs beside the student, and the time it tells."""

from __future__ import annotations

import io
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_berts
import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from kdfast import runs
from kdfast.data import demo
from kdfast.objective import Hidden, Hinton, Relations, Terms
from kdfast.recipes import hinton, patient_kd
from kdfast.recipes.classifier import Stage
from kdfast.runs import stages

SHORT: dict[str, Any] = {"epochs": 1, "teacher_epochs": 1, "learning_rate": 2e-3, "batch_size": 8, "train_rows": 48}
SHORT |= {"test_rows": 32, "precision": "float32"}


pytestmark = pytest.mark.usefixtures("no_download")


def run(folder: Path, recipe: Any) -> str:
    shown = io.StringIO()
    runs.run(recipe, folder, Console(file=shown, width=80))
    return shown.getvalue()


@dataclass(frozen=True, kw_only=True)
class Live(hinton.Recipe):
    """Hinton's, of a teacher that is not stored; and of its hidden states."""

    hidden: float = 0.0

    def stages(self, student_layers: int, teacher_layers: int, kind: str) -> list[Stage]:
        soft = Hinton(self.alpha, self.temperature)
        terms = {**soft.terms, "hidden": Hidden("uniform", weight=self.hidden)} if self.hidden else soft.terms
        return [Stage("student", "student, live", Terms(**terms), teacher="live")]


def test_live_teacher_trains_as_its_stored_outputs_do(tmp_path: Path) -> None:
    stored, live, hidden = (
        hinton.Recipe(**SHORT, baseline=False),
        Live(**SHORT, baseline=False),
        Live(**SHORT, baseline=False, hidden=0.1),
    )
    weights = []
    for number, recipe in enumerate((stored, live, hidden)):
        run(tmp_path / str(number), recipe)
        student = AutoModelForSequenceClassification.from_pretrained(tmp_path / str(number) / "student")
        weights.append(torch.cat([p.flatten() for p in student.bert.encoder.parameters()]).detach())
    start = AutoModelForSequenceClassification.from_pretrained(tmp_path / "0" / "teacher").bert.encoder
    moved = torch.cat([p.flatten() for i in (0, 2, 4) for p in start.layer[i].parameters()]) - weights[0]
    assert (weights[1] - weights[0]).norm() < 0.02 * moved.norm()  # Adam enlarges the rounding of what is stored
    assert (weights[2] - weights[0]).norm() > 0.2 * moved.norm()
    history = stages.finished(tmp_path / "2" / "student") or []
    assert next(event["eval_hidden"] for event in history if "eval_hidden" in event) > 0.01


def test_rows_are_told(tmp_path: Path) -> None:
    lines = [f"{'good' if i % 2 else 'bad'} film {'scene ' * (i % 5)},{i % 2}" for i in range(60)]
    (tmp_path / "reviews.csv").write_text("text,label\n" + "\n".join(lines))
    shown = run(tmp_path / "run", hinton.Recipe(**{**SHORT, "data": str(tmp_path / "reviews.csv")}, baseline=False))
    assert "48 training rows, 6 test rows, held out of the file's" in " ".join(shown.split())


def test_refused_before_anything_is_trained(assets: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(stages, "train_stage", lambda *a: pytest.fail("trained"))
    teacher = tmp_path / "teacher"
    base = assets[demo.MINILM.requirement]
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).save_pretrained(teacher)
    AutoTokenizer.from_pretrained(base).save_pretrained(teacher)
    narrow = "hidden_size=16,num_attention_heads=2"
    (tmp_path / "numbers.csv").write_text("text,label\n" + "\n".join(f"film {i},{i}" for i in range(40)))
    for recipe, expected in (
        (hinton.Recipe(**SHORT, student_layers=(0, 9)), "layers: expected .* got .*9"),
        (
            hinton.Recipe(**SHORT, student="./nofolder"),
            "student ./nofolder: expected the folder of a model, got no folder",
        ),
        (hinton.Recipe(**SHORT, student_config="hidden_sise=16"), "hidden_sise"),
        (hinton.Recipe(**SHORT, student_config="hidden_size=15"), "hidden_size"),
        (hinton.Recipe(**SHORT, teacher=str(teacher)), "expected 2 classes, as the data has, got 3"),
        (
            patient_kd.Recipe(**SHORT, student_config=narrow),
            "patient-kd, student, patient: cls_distance: .*equal widths",
        ),
        (hinton.Recipe(**{**SHORT, "data": "./none.csv"}), "^data: expected .*none.csv"),
        (
            hinton.Recipe(**{**SHORT, "data": str(tmp_path / "numbers.csv")}),
            "^label_column: expected classes of several rows each, .* got 40 different labels of 40 rows",
        ),
    ):
        with pytest.raises(ValueError, match=expected):
            run(tmp_path / "run", recipe)
        assert not (tmp_path / "run").exists()  # so that the mended command may use it


def test_teachers_of_a_stage() -> None:
    with pytest.raises(ValueError, match="Stage: teacher: expected stored, live, base or None, got 'TEACHER'"):
        Stage("student", "student", Terms(relations=Relations()), teacher="TEACHER")
    with pytest.raises(ValueError, match="expected stored or live for logits, got base"):
        Stage("student", "student", Hinton(), teacher="base")
    assert Stage("student", "student", Terms(relations=Relations()), teacher="base").teacher == "base"


class Slow(TrainerCallback):  # type: ignore[misc]
    """Steps of a fifth of a second, and Ctrl-C in one of them."""

    def __init__(self, stop: int | None) -> None:
        self.stop = stop

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        time.sleep(0.2)
        if state.global_step + 1 == self.stop:
            os.kill(os.getpid(), signal.SIGINT)


def test_seconds_count_what_was_trained_before_an_interruption(assets: dict[str, Path], tmp_path: Path) -> None:
    def train(stop: int | None) -> stages.History:
        torch.manual_seed(1)
        it = tiny_berts.trainer(
            tmp_path / "stage" / "checkpoints", tiny_berts.bert(1), tiny_berts.rows(24), Hinton(),
            teacher=tiny_berts.bert(0), max_steps=6, callbacks=[Slow(stop)],
        )  # fmt: skip
        it.processing_class = AutoTokenizer.from_pretrained(assets[demo.MINILM.requirement])
        return stages.train_stage(it, tmp_path / "stage", "slow")

    with pytest.raises(stages.StageInterrupted):
        train(stop=4)
    history = train(stop=None)
    seconds = [event["seconds"] for event in history if "seconds" in event]
    assert 6 * 0.2 < seconds[-1] < 30
    assert 4 * 0.2 < seconds[0] < seconds[-1]
    runtime = [event["train_runtime"] for event in history if "train_runtime" in event][-1]
    assert seconds[-1] > runtime + 0.7
