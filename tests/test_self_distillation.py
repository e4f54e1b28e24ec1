"""Born-again generations: each step by step, stopped and continued."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import tiny_reviews
import torch
import torch.nn.functional as F
from rich.console import Console
from test_recipes_by_hand import SETTINGS, follow, inputs
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from kdfast.objective import Labels, Logits, Terms
from kdfast.recipes import self_distillation
from kdfast.recipes.classifier import Stage
from kdfast.results import compare
from kdfast.runs import run, stages


def born_again(student: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
    alpha, t = 0.6, 1.5
    z = student(**inputs(batch)).logits
    with torch.no_grad():
        p = (teacher(**inputs(batch)).logits / t).softmax(-1)
    kl = F.kl_div((z / t).log_softmax(-1), p, reduction="batchmean")
    return alpha * t**2 * kl + (1 - alpha) * F.cross_entropy(z, batch["labels"])


def test_generations_follow_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = self_distillation.Recipe(**SETTINGS, generations=3, alpha=0.6, temperature=1.5)
    starts = {}
    train_stage = stages.train_stage

    def keep(trainer: Any, folder: Path, title: str, dtype: str) -> Any:
        starts[folder.name] = trainer.model.classifier.weight.detach().clone()
        return train_stage(trainer, folder, title, dtype)

    monkeypatch.setattr(stages, "train_stage", keep)
    expected = {
        "generation_1": (born_again, "teacher"),
        "generation_2": (born_again, "generation_1"),
        "student": (born_again, "generation_2"),
    }
    follow(recipe, expected, tmp_path, monkeypatch)
    for name in expected:
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / name)
        assert model.config.num_hidden_layers == tiny_reviews.LAYERS
    values = list(starts.values())
    assert list(starts) == ["teacher", *expected]
    assert all((values[i] - values[j]).abs().max() > 1e-2 for i in range(4) for j in range(i))
    rows = compare.compare([tmp_path / "run"]).rows
    assert [row.model for row in rows] == ["teacher", "generation_1", "generation_2", "student"]


def test_stopped_run_continues_in_its_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets = tiny_reviews.make(tmp_path)
    monkeypatch.setattr("kdfast.data.demo.fetch", lambda package: assets[package.requirement])
    recipe = self_distillation.Recipe(**SETTINGS | {"train_rows": 48}, generations=2)
    through = run(recipe, tmp_path / "through", Console(file=io.StringIO()))
    train_stage, trained = stages.train_stage, []

    def stop_once(trainer: Any, folder: Path, title: str, dtype: str) -> Any:
        trained.append(folder.name)
        if trained == ["teacher", "generation_1", "student"]:
            raise stages.StageInterrupted
        return train_stage(trainer, folder, title, dtype)

    monkeypatch.setattr(stages, "train_stage", stop_once)
    with pytest.raises(stages.StageInterrupted):
        run(recipe, tmp_path / "run", Console(file=io.StringIO()))
    again = run(recipe, tmp_path / "run", Console(file=io.StringIO()))
    assert trained == ["teacher", "generation_1", "student", "student"]
    for name, row in through.items():
        assert again[name]["kl_to_teacher"] == pytest.approx(row["kl_to_teacher"], rel=1e-5, abs=1e-9)
    assert through["student"]["kl_to_teacher"] > 1e-6


def test_stages_and_what_is_refused() -> None:
    of = [
        (stage.folder, stage.teacher_of, stage.seed)
        for stage in self_distillation.Recipe(generations=1).stages(6, 6, "regression")
    ]
    assert of == [("student", "teacher", 1)]
    assert self_distillation.Recipe().student_default(6) == (0, 1, 2, 3, 4, 5)
    with pytest.raises(ValueError, match="generations: expected at least 1, got 0"):
        self_distillation.Recipe(generations=0)
    with pytest.raises(ValueError, match="base: expected the pre-trained encoder"):
        self_distillation.Recipe(teacher="org/bert")
    with pytest.raises(ValueError, match="Stage: teacher: expected stored or live beside teacher_of, got 'base'"):
        Stage("student", "it", Terms(kl=Logits(), ce=Labels()), teacher="base", teacher_of="generation_1")
