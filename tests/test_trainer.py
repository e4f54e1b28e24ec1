"""DistillationTrainer against hand-written loops, on random BERTs that train in a second."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import kdfast
from kdfast.data.sampler import LengthGroupedSampler
from kdfast.objective import Hinton
from kdfast.runs import stages

STEPS, BATCH, RATE = 20, 4, 1e-3
# The gradient of a key bias is zero but for rounding, as softmax ignores it; Adam's default of 1e-8 would turn that
# rounding into steps of full size.
EPSILON = 1e-4


def _bert(seed: int, dropout: float = 0.0, layers: int = 2) -> Any:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=3,
        initializer_range=0.5,  # logits far enough apart for the terms to matter
    )
    return BertForSequenceClassification(config).eval()


def _rows(count: int, teacher: Any = None, length: int = 7) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for _ in range(count):
        ids = torch.randint(1, 40, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": int(torch.randint(3, (), generator=generator))})
    if teacher is not None:
        with torch.no_grad():
            logits = teacher(input_ids=torch.tensor([row["input_ids"] for row in rows])).logits
        rows = [{**row, "teacher_logits": values} for row, values in zip(rows, logits.tolist(), strict=True)]
    return rows


def _trainer(folder: Path, model: Any, rows: list[dict[str, Any]], *, teacher: Any = None, **options: Any) -> Any:
    objective = options.pop("objective", Hinton(0.9, 2.0))
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "adam_epsilon": EPSILON,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return kdfast.DistillationTrainer(
        model,
        TrainingArguments(**{**defaults, **options}),
        teacher=teacher,
        objective=objective,
        train_dataset=rows,
        data_collator=default_data_collator,
    )


def _losses(trainer: Any) -> list[float]:
    return [event["loss"] for event in trainer.state.log_history if "loss" in event]


def _plain_loop(model: Any, teacher: Any, rows: list[dict[str, Any]], alpha: float, temperature: float) -> list[float]:
    """The published loss and the Trainer's defaults (AdamW, linear decay, clipping at 1) in plain torch."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, eps=EPSILON, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        batch = rows[step * BATCH : (step + 1) * BATCH]
        ids = torch.tensor([row["input_ids"] for row in batch])
        labels = torch.tensor([row["labels"] for row in batch])
        student_logits = model(input_ids=ids).logits
        with torch.no_grad():
            soft = F.softmax(teacher(input_ids=ids).logits / temperature, -1)
        kl = F.kl_div(F.log_softmax(student_logits / temperature, -1), soft, reduction="batchmean")
        loss = alpha * temperature**2 * kl + (1 - alpha) * F.cross_entropy(student_logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _same(first: Any, second: Any, tolerance: float) -> None:
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("stored", [False, True], ids=["teacher module", "stored logits"])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.9, 2.0), (1.0, 4.0), (0.0, 2.0)])
def test_follows_a_plain_loop(tmp_path: Path, stored: bool, alpha: float, temperature: float) -> None:
    teacher, student = _bert(0), _bert(1)
    by_hand = copy.deepcopy(student)
    rows = _rows(STEPS * BATCH, teacher if stored else None)
    trainer = _trainer(
        tmp_path, student, rows, teacher=None if stored else teacher, objective=Hinton(alpha, temperature)
    )
    trainer.train()
    expected = _plain_loop(by_hand, teacher, rows, alpha, temperature)
    torch.testing.assert_close(_losses(trainer), expected, rtol=0, atol=1e-5)
    _same(student, by_hand, 1e-5)
    assert max(expected) - min(expected) > 0.1  # the loop did train


def test_every_term_is_logged_and_they_add_up(tmp_path: Path) -> None:
    teacher = _bert(0)
    trainer = _trainer(tmp_path, _bert(1), _rows(24, teacher), logging_steps=3)
    trainer.train()
    events = [event for event in trainer.state.log_history if "loss" in event]
    assert len(events) == 2
    for event in events:
        assert event["kl"] > 0
        assert event["ce"] > 0
        assert event["kl"] + event["ce"] == pytest.approx(event["loss"], abs=2e-6)


def test_teacher_is_frozen_and_unchanged(tmp_path: Path) -> None:
    teacher = _bert(0, dropout=0.5).train()
    before = copy.deepcopy(teacher)
    _trainer(tmp_path, _bert(1), _rows(8), teacher=teacher).train()
    assert not teacher.training
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    _same(teacher, before, 0.0)


def test_accumulated_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    teacher, big = _bert(0), _bert(1)
    start, small = copy.deepcopy(big), copy.deepcopy(big)
    rows = _rows(48, teacher)
    one = _trainer(tmp_path / "one", big, rows, per_device_train_batch_size=8)
    many = _trainer(tmp_path / "many", small, rows, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    one.train()
    many.train()
    torch.testing.assert_close(_losses(many), _losses(one), rtol=0, atol=1e-5)
    _same(small, big, 1e-5)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(big.parameters(), start.parameters(), strict=True))


RESUMABLE = {
    "train_sampling_strategy": "group_by_length",
    "num_train_epochs": 3,
    "save_strategy": "steps",
    "save_steps": 7,  # of 5 steps per epoch: within the second
    "logging_steps": 2,
}


def _ragged_teacher_rows(teacher: Any) -> list[dict[str, Any]]:
    # All of one length, as the default collator does not pad; the order comes from the sampler all the same.
    return _rows(5 * BATCH, teacher)


def test_resume_gives_the_same_weights(tmp_path: Path) -> None:
    teacher, through = _bert(0), _bert(1, dropout=0.2)
    resumed = _bert(2, dropout=0.2)  # other weights: all must come from the checkpoint
    rows = _ragged_teacher_rows(teacher)
    _trainer(tmp_path, through, rows, **RESUMABLE).train()
    torch.manual_seed(99)
    _trainer(tmp_path, resumed, rows, **RESUMABLE).train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    _same(resumed, through, 0.0)


class _Signal(TrainerCallback):
    """Sends Ctrl-C to this process in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGINT)


class _Tokenizer:
    def save_pretrained(self, folder: str | Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("step", [8, 15], ids=["within an epoch", "last step"])
def test_interrupted_stage_continues_to_the_same_weights(tmp_path: Path, step: int) -> None:
    teacher, through = _bert(0), _bert(1, dropout=0.2)
    rows = _ragged_teacher_rows(teacher)
    stopped = copy.deepcopy(through)

    def stage(model: Any, name: str, *callbacks: Any) -> stages.History:
        trainer = _trainer(tmp_path / name / "checkpoints", model, rows, **RESUMABLE)
        trainer.processing_class = _Tokenizer()
        for callback in callbacks:
            trainer.add_callback(callback)
        return stages.train_stage(trainer, tmp_path / name, name)

    handler = signal.getsignal(signal.SIGINT)
    expected = stage(through, "through")
    with pytest.raises(stages.StageInterrupted):
        stage(stopped, "stopped", _Signal(step))
    assert signal.getsignal(signal.SIGINT) is handler
    assert stages.finished(tmp_path / "stopped") is None
    history = stage(_bert(2, dropout=0.2), "stopped")
    assert [[event["step"] for event in of if "loss" in event][-1] for of in (history, expected)] == [14, 14]
    assert stages.finished(tmp_path / "stopped") == json.loads(json.dumps(history))
    saved = BertForSequenceClassification.from_pretrained(tmp_path / "stopped")
    _same(saved, through, 0.0)
    assert not (tmp_path / "stopped" / "checkpoints").exists()


def test_checkpoint_cut_short_is_passed_over(tmp_path: Path) -> None:
    for step, content in ((5, "{}"), (10, '{"cut'), (15, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if content is not None:
            (folder / "trainer_state.json").write_text(content)
    assert stages.last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert stages.last_checkpoint(tmp_path / "none") is None


def test_rows_are_grouped_by_length(tmp_path: Path) -> None:
    rows = [{"input_ids": [1] * (3 + i % 9), "labels": 0} for i in range(40)]
    trainer = _trainer(tmp_path, _bert(1), rows, train_sampling_strategy="group_by_length", seed=5)
    sampler = trainer._get_train_sampler()
    assert isinstance(sampler, LengthGroupedSampler)
    assert list(sampler) == list(LengthGroupedSampler([3 + i % 9 for i in range(40)], BATCH, seed=5))


def test_mistakes_are_named(tmp_path: Path) -> None:
    student = _bert(1)
    with pytest.raises(ValueError, match="same module"):
        _trainer(tmp_path, student, _rows(4), teacher=student)
    with pytest.raises(ValueError, match="teacher: expected one, or rows with"):
        _trainer(tmp_path, student, _rows(4)).train()
    unlabelled = [{"input_ids": row["input_ids"]} for row in _rows(4)]
    with pytest.raises(ValueError, match="expected rows with labels, got"):
        _trainer(tmp_path, student, unlabelled, teacher=_bert(0)).train()
    with pytest.raises(ValueError, match=r"Hinton: alpha: expected a number from 0 to 1, got 1\.5"):
        Hinton(alpha=1.5)
    with pytest.raises(ValueError, match="Hinton: temperature: expected a finite number > 0, got 0"):
        Hinton(temperature=0)


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_operators_do_not_import_transformers() -> None:
    done = _python("import sys, kdfast; sys.exit('transformers' in sys.modules or 'accelerate' in sys.modules)")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", ["transformers", "accelerate"])
def test_missing_extra_names_the_command(missing: str) -> None:
    done = _python(f"import sys; sys.modules['{missing}'] = None; import kdfast; kdfast.DistillationTrainer")
    assert f"ImportError: kdfast.DistillationTrainer needs {missing}" in done.stderr
    assert "pip install kdfast[train]" in done.stderr


def test_refuses_settings_that_the_objective_replaces(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match="compute_loss_func, label_smoothing_factor: expected neither, as the objective is the loss"
    ):
        kdfast.DistillationTrainer(model, objective=Hinton(alpha=0.0), compute_loss_func=lambda *args: None)
    args = TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=0.1, use_cpu=True)
    with pytest.raises(
        ValueError, match="compute_loss_func, label_smoothing_factor: expected neither, as the objective is the loss"
    ):
        kdfast.DistillationTrainer(model, args, objective=Hinton(alpha=0.0))


def test_hinton_refuses_token_logits() -> None:
    outputs = SimpleNamespace(logits=torch.zeros(2, 5, 7))
    with pytest.raises(ValueError, match=r"logits: expected \[batch, classes\] with tokens=None, got \[2, 5, 7\]"):
        Hinton()(outputs, outputs, {"labels": torch.zeros(2, 5, dtype=torch.long)})
