"""Runs of the other forms of distillation that were killed within a stage go on from its checkpoint, to the same student."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_reviews
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_recipes_by_hand import SETTINGS
from transformers import TrainerCallback

from kdfast.data import demo
from kdfast.recipes import adversarial, dynabert, dynamic, multi_task, multi_teacher, prune, self_distillation
from kdfast.runs import arguments, run, stages

SHORT = SETTINGS | {"train_rows": 80, "precision": "float32"}  # 10 steps
# Recipe, the stage that is killed, and where its student is.
CASES: dict[str, tuple[Any, str, str]] = {
    "dynamic": (dynamic.Recipe(**SHORT, rule="cwsm"), "student", "student"),
    "multi-teacher": (multi_teacher.Recipe(**SHORT, teachers=2), "teacher_1", "student"),
    "adversarial": (adversarial.Recipe(**SHORT, norm="l2", epsilon=0.3), "student", "student"),
    "self-distillation": (self_distillation.Recipe(**SHORT, generations=2), "generation_1", "student"),
    "dynabert": (dynabert.Recipe(**SHORT, widths=(0.5, 1.0), depths=(0.5, 1.0), sandwich=1), "student", "student"),
    "prune": (prune.Recipe(**SHORT, criterion="movement", score_rows=16, end=1.0, rounds=5), "masked", "student"),
    # Its checkpoint is of the end of an epoch.
    "prune softly": (
        prune.Recipe(
            **SHORT | {"train_rows": 32, "batch_size": 8, "epochs": 2}, criterion="l2", schedule="soft", score_rows=16
        ),
        "masked",
        "student",
    ),
    "prune by a bound": (
        prune.Recipe(**SHORT, schedule="play-and-prune", bound=1.0, score_rows=16, end=1.0, rounds=5),
        "masked",
        "student",
    ),
    "multi-task": (multi_task.Recipe(**SHORT), "shared", "task_product_reviews/student"),
}


class Kill(TrainerCallback):  # type: ignore[misc]
    """Ends this process as power cuts do, within a step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)


def execute(name: str, folder: Path, assets: Path, kill: bool, patch: pytest.MonkeyPatch) -> list[int]:
    """The steps that the stage began at."""
    recipe, killed, _ = CASES[name]
    model, reviews = assets / "model", assets / "reviews"
    patch.setattr(demo, "fetch", lambda package: model if package is demo.MINILM else reviews)
    training, train_stage, begun = arguments.training, stages.train_stage, []
    patch.setattr(arguments, "training", lambda *given, **own: training(*given, **own | {"save_steps": 4}))

    def train(trainer: Any, stage: Path, title: str, dtype: str) -> Any:
        if stage.name == killed:
            checkpoint = stages.last_checkpoint(Path(trainer.args.output_dir))
            begun.append(0 if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1]))
            if kill:
                trainer.add_callback(Kill())
        return train_stage(trainer, stage, title, dtype)

    patch.setattr(stages, "train_stage", train)
    run(recipe, folder, Console(file=io.StringIO()))
    return begun


def be_killed(name: str, folder: str, assets: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        execute(name, Path(folder), Path(assets), True, patch)


@pytest.mark.parametrize("name", CASES)
def test_killed_run_goes_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_reviews.make(tmp_path)
    code = f"import test_forms_killed as t; t.be_killed({name!r}, {str(tmp_path / 'run')!r}, {str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    with monkeypatch.context() as patch:
        assert execute(name, tmp_path / "run", tmp_path, False, patch) == [4]
    with monkeypatch.context() as patch:
        assert execute(name, tmp_path / "through", tmp_path, False, patch) == [0]
    place = CASES[name][2]
    killed, through = (load_file(tmp_path / folder / place / "model.safetensors") for folder in ("run", "through"))
    for key, value in through.items():
        torch.testing.assert_close(killed[key], value, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
