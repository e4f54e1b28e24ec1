"""Projections are trained with the student, saved beside it, and gone from it afterwards; killed runs go on."""

from __future__ import annotations

import io
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_berts import bert, collate, logged, moved, rows, same, trainer
from torch import nn
from transformers import BertForSequenceClassification, TrainerCallback

from kdfast.objective import (
    Attention,
    Embedding,
    ExponentialSchedule,
    Hidden,
    LinearSchedule,
    Logits,
    StageSchedule,
    Terms,
)

RUN: dict[str, Any] = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 7}  # of 5 steps an epoch
DROPOUT, ROWS = 0.2, 20


def linear(seed: int = 5) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(16, 24)


def objective(shared: nn.Linear, own: nn.Linear) -> Terms:
    """One projection for two terms and one for a third, weights that change."""
    return Terms(
        kl=Logits(temperature=2.0, weight=StageSchedule({0.0: 0.0, 0.6: 1.0})),
        hidden=Hidden(projection=shared, weight=LinearSchedule(1.0, 0.1)),
        embedding=Embedding(projection=shared, weight=ExponentialSchedule(1.0, 0.2)),
        last=Hidden({-1: -1}, projection=own),
        attention=Attention(weight=0.1),
    )


def run(folder: Path, seed: int = 1, **options: Any) -> Any:
    """A trainer of a new student: of other weights, for another seed."""
    it = objective(linear(seed + 4), linear(seed + 5))
    teacher = bert(0, width=24, layers=4)
    return trainer(folder, bert(seed, dropout=DROPOUT), rows(ROWS), it, teacher=teacher, **{**RUN, **options})


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that nothing interrupted."""
    it = run(tmp_path_factory.mktemp("through"))
    it.train()
    assert len(logged(it)) == 15
    moved(it.model.bert.encoder, bert(1).bert.encoder)
    moved(it.objective.terms["last"].projection, linear(6))
    return it


def test_files_of_a_checkpoint(through: Any) -> None:
    folder = Path(through.args.output_dir) / "checkpoint-7"
    fresh = bert(1)
    assert set(load_file(folder / "model.safetensors")) == set(fresh.state_dict())
    projections = load_file(folder / "distillation.safetensors")
    names = {f"terms.{term}.projection.{of}" for term in ("hidden", "last") for of in ("weight", "bias")}
    assert set(projections) == names  # the embedding's is the hidden states'
    assert all(value.any() for value in projections.values())
    saved = (folder / "config.json").read_text()
    assert "BertForSequenceClassification" in saved
    assert "kdfast" not in saved
    loaded, info = BertForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    moved(loaded.bert.encoder, fresh.bert.encoder)


def test_student_is_itself_again(through: Any, tmp_path: Path) -> None:
    student = through.model
    assert not hasattr(student, "distillation")
    assert list(student.state_dict()) == list(bert(1).state_dict())
    student.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert "kdfast" not in (tmp_path / "config.json").read_text()
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    same(loaded, student, 0.0)
    batch = {k: v for k, v in collate(rows(4)).items() if k != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, student.eval()(**batch).logits)


def test_training_that_fails_leaves_the_student_alone(tmp_path: Path) -> None:
    it = run(tmp_path, max_steps=3)
    del it.objective.terms["last"].projection.bias
    with pytest.raises(AttributeError, match="bias"):
        it.train()
    assert not hasattr(it.model, "distillation")


def resumed(folder: Path, checkpoint: Path) -> Any:
    it = run(folder, seed=2)  # all must come from the checkpoint
    torch.manual_seed(99)
    it.train(resume_from_checkpoint=str(checkpoint))
    return it


def test_resumed_run_ends_the_same(through: Any, tmp_path: Path) -> None:
    text, logger = io.StringIO(), logging.getLogger("transformers")
    handler = logging.StreamHandler(text)
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_info()
    logger.addHandler(handler)
    try:
        it = resumed(tmp_path, Path(through.args.output_dir) / "checkpoint-7")
    finally:
        logger.removeHandler(handler)
        transformers.logging.set_verbosity(before)
    assert "Loading model from" in text.getvalue()  # the log is read
    for word in ("missing keys", "unexpected keys"):
        assert word not in text.getvalue()
    same(it.model, through.model, 0.0)
    same(it.objective, through.objective, 0.0)
    for name in ("loss", *it.objective.terms):
        assert logged(it, name) == logged(through, name)
    assert "kl" in it.state.log_history[9]
    assert "kl" not in it.state.log_history[8]


@pytest.mark.parametrize("lacks", ["a projection", "the file"])
def test_checkpoint_of_another_objective_is_refused(lacks: str, through: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-7"
    shutil.copytree(Path(through.args.output_dir) / "checkpoint-7", folder)
    file = folder / "distillation.safetensors"
    kept = {name: value for name, value in load_file(file).items() if "last" not in name}
    file.unlink()
    if lacks == "a projection":
        save_file(kept, file)
    with pytest.raises(ValueError, match=r"objective: expected the parameters that .*distillation.safetensors has, \["):
        resumed(tmp_path / "again", folder)


class Kill(TrainerCallback):  # type: ignore[misc]
    """Ends this process as power cuts do, within a step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 9:
            os.kill(os.getpid(), signal.SIGKILL)


def train_and_be_killed(folder: str) -> None:
    run(Path(folder), callbacks=[Kill()]).train()


def test_killed_run_goes_on(through: Any, tmp_path: Path) -> None:
    code = f"import test_objective_checkpoints as t; t.train_and_be_killed({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]
    it = resumed(tmp_path, tmp_path / "checkpoint-7")
    same(it.model, through.model, 0.0)
    same(it.objective, through.objective, 0.0)


def test_best_model_comes_with_its_projections(tmp_path: Path) -> None:
    """The first, by a measure that falls in training."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "last", "greater_is_better": True}
    it = run(tmp_path, **best, save_strategy="epoch", eval_strategy="epoch", eval_dataset=rows(8))
    it.train()
    values = logged(it, "eval_last")
    assert values[0] > values[1] + 1e-3 > values[2] + 2e-3
    folder = tmp_path / "checkpoint-5"
    assert it.state.best_model_checkpoint == str(folder)
    same(it.model, load_file(folder / "model.safetensors"), 0.0)
    projections = load_file(folder / "distillation.safetensors")
    torch.testing.assert_close(
        it.objective.terms["last"].projection.weight, projections["terms.last.projection.weight"]
    )
    assert it.evaluate()["eval_last"] == pytest.approx(values[0], abs=1e-5)
    moved(it.model.bert.encoder, bert(1).bert.encoder)
