"""Two processes on gloo evaluate and predict uneven sets to what one process does, and train after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import spawn
from test_trainer_evaluation import of_rows
from tiny_berts import CLASSES, bert, moved, rows, trainer
from torch import nn

from kdfast.objective import Labels, Logits, Terms

RANKS, BATCH = 2, 2
# Rows: the last batches of both processes have 3, 1 (the second process has repeated rows alone) and 4 of their own; one
# row in all, which both processes get.
SETS = {"seven": 7, "five": 5, "eight": 8, "one": 1}


def right(predicted: Any) -> dict[str, float]:
    return {
        "right": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean()),
        "rows": len(predicted.label_ids),
    }


def evaluator(folder: Path, size: int) -> Any:
    objective = of_rows()
    del objective.terms["padded"]  # batches are padded to other widths
    given = rows(8)
    sets = {name: given[:count] for name, count in SETS.items()}
    return trainer(
        folder, bert(1), rows(16), objective, teacher=bert(0), eval_dataset=sets, compute_metrics=right,
        per_device_eval_batch_size=size, per_device_train_batch_size=size, ddp_backend="gloo" if size == BATCH else None, max_steps=2,
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip


def check(rank: int, folder: Path) -> None:
    it = evaluator(folder / str(rank), BATCH)
    assert it.args.world_size == RANKS
    one = torch.load(folder / "one.pt", weights_only=False)
    metrics = it.evaluate()
    for name, value in one["metrics"].items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    for name, count in SETS.items():
        np.testing.assert_allclose(it.predict(rows(8)[:count]).predictions, one["predictions"][name], atol=1e-5)
    it.train()  # evaluations within it, of a student that DDP wraps
    during = [event for event in it.state.log_history if "eval_one_kl" in event]
    assert len(during) == 2
    assert all(event["eval_one_rows"] == 1 for event in during)


def test_uneven_sets_on_two_processes(tmp_path: Path) -> None:
    it = evaluator(tmp_path / "one", RANKS * BATCH)
    metrics = it.evaluate()
    compared = [f"eval_{part}_{name}" for part in SETS for name in ("loss", *it.objective.terms, "kl_to_teacher")]
    assert all(metrics[name] > 1e-3 for name in compared)
    assert len({round(metrics[f"eval_{part}_kl"], 4) for part in SETS}) == len(SETS)
    compared += [f"eval_{part}_{name}" for part in SETS for name in ("agreement", "right", "rows")]
    assert [metrics[f"eval_{part}_rows"] for part in SETS] == list(SETS.values())
    predictions = {name: it.predict(rows(8)[:count]).predictions for name, count in SETS.items()}
    assert predictions["seven"].shape == (7, CLASSES)
    torch.save({"metrics": {name: metrics[name] for name in compared}, "predictions": predictions}, tmp_path / "one.pt")
    spawn(check, RANKS, tmp_path, tmp_path)


def check_training(rank: int, folder: Path, options: dict[str, Any]) -> None:
    given, student = rows(16), bert(1)
    it = trainer(
        folder / str(rank), student, given, Terms(kl=Logits(), ce=Labels()), teacher=bert(0), eval_dataset=given[:7],
        per_device_train_batch_size=BATCH, max_steps=3, optim="sgd", learning_rate=0.5, ddp_backend="gloo", **options,
    )  # fmt: skip
    seen: list[type] = []
    step = it.compute_loss

    def compute_loss(model: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(getattr(model, "_orig_mod", model)))
        return step(model, *args, **kwargs)

    it.compute_loss = compute_loss
    before = [it.evaluate()["eval_kl"], it.evaluate()["eval_kl"], it.predict(given[:5]).metrics["test_kl"]]
    assert before[0] == before[1] > 1e-3
    it.train()
    assert seen == [nn.parallel.DistributedDataParallel] * 3
    own = torch.cat([p.detach().flatten() for p in student.parameters()])
    every = [torch.empty_like(own) for _ in range(RANKS)]
    dist.all_gather(every, own)
    assert torch.equal(*every)
    moved(student, bert(1))
    assert it.evaluate()["eval_kl"] != before[0]
    it.train()  # once more, after an evaluation of the model that DDP wraps
    assert seen == [nn.parallel.DistributedDataParallel] * 6


MODES: dict[str, dict[str, Any]] = {
    "": {}, "bf16": {"bf16": True}, "compiled": {"torch_compile": True, "torch_compile_backend": "eager"}
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_training_after_an_evaluation(tmp_path: Path, mode: str) -> None:
    """The model that trains is DDP's, and its weights are the same in both processes."""
    spawn(check_training, RANKS, tmp_path, tmp_path, MODES[mode])
