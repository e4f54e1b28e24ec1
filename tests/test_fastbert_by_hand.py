"""Both stages of FastBERT against loops in plain torch, and two processes against one."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_recipes_by_hand as loops
import tiny_reviews
import torch
import torch.nn.functional as F
from early_exits import plain_branch
from ranks import spawn
from rich.console import Console
from test_recipes_by_hand import EPSILON, RATE, SETTINGS, STEPS
from tiny_berts import bert, logged, rows, same, trainer
from torch import Tensor, nn

from kdfast import runs
from kdfast.data import demo
from kdfast.early_exit import EarlyExit
from kdfast.objective import Branches, Labels, Terms
from kdfast.recipes import fastbert, hinton
from kdfast.runs import stages


def classifiers(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Logits of all layers, by transformers' own hidden states."""
    outputs = model.model(**loops.inputs(batch), output_hidden_states=True)
    states = outputs.hidden_states[1:]
    logits = [
        plain_branch(branch, x, batch["attention_mask"]) for branch, x in zip(model.branches, states, strict=False)
    ]
    return [*logits, outputs.logits] if model.own_head else logits


def first_stage(student: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(classifiers(student, batch)[-1], batch["labels"])


def second_stage(reverse: bool) -> loops.Loss:
    def loss(student: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
        assert "labels" not in batch
        *branches, last = (z.log_softmax(-1) for z in classifiers(student, batch))
        pairs = [(last, z) if reverse else (z, last) for z in branches]
        divergences = [F.kl_div(a, b, reduction="batchmean", log_target=True) for a, b in pairs]
        return torch.stack(divergences).sum()

    return loss


def classifier_of(folder: Path) -> str:
    settings = {**SETTINGS, "train_rows": 16}
    runs.run(hinton.Recipe(**settings, baseline=False), folder, Console(file=io.StringIO()))
    return str(folder / "teacher")


@pytest.mark.parametrize("case", ["", "reverse", "own head"])
def test_stages_follow_a_plain_loop(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets = tiny_reviews.make(tmp_path)
    monkeypatch.setattr(demo, "fetch", lambda package: assets[package.requirement])
    own: dict[str, Any] = (
        {"teacher": classifier_of(tmp_path / "hinton")} if case == "own head" else {"teacher_learning_rate": RATE}
    )
    divergence = "reverse_kl_div" if case == "reverse" else "kl_div"
    recipe = fastbert.Recipe(**SETTINGS, **own, branch_width=16, divergence=divergence)
    losses_of = {"teacher": first_stage, "student": second_stage(case == "reverse")}
    train_stage, compared = stages.train_stage, []

    def compare(trainer: Any, folder: Path, title: str, dtype: str) -> Any:
        trainer.args.logging_steps, trainer.args.adam_epsilon = 1, EPSILON
        copied, batches = copy.deepcopy(trainer.model), list(trainer.get_train_dataloader())
        start = copy.deepcopy(copied.state_dict())
        losses = loops.by_hand(copied, None, batches, losses_of[folder.name])
        history = train_stage(trainer, folder, title, dtype)
        assert len(batches) == STEPS
        got = [event["loss"] for event in history if "loss" in event]
        torch.testing.assert_close(got, losses, rtol=1e-5, atol=1e-5)
        assert max(losses) > 1.01 * min(losses) > 0
        same(trainer.model, copied, 1e-5)
        moved = {name for name, value in trainer.model.state_dict().items() if (value - start[name]).abs().max() > 1e-4}
        last = f"branches.{tiny_reviews.LAYERS - 1}."
        of_branches = {name for name in moved if name.startswith("branches.") and not name.startswith(last)}
        assert of_branches == (moved if folder.name == "student" else set())
        assert len(moved) > 60
        compared.append(folder.name)
        return history

    monkeypatch.setattr(stages, "train_stage", compare)
    runs.run(recipe, tmp_path / "run", Console(file=io.StringIO()))
    assert compared == (["student"] if case == "own head" else ["teacher", "student"])


# ---- processes ----
RANKS, BATCH = 2, 2


def backbone() -> tuple[EarlyExit, Terms]:
    return EarlyExit(bert(1, layers=3).base_model, width=8).train_backbone(), Terms(ce=Labels())


def branches() -> tuple[EarlyExit, Terms]:
    return EarlyExit(bert(1, layers=3), width=8).train_branches(), Terms(branches=Branches())


CASES: dict[str, Callable[[], tuple[EarlyExit, Terms]]] = {"backbone": backbone, "branches": branches}


def run(name: str, folder: Path, ranks: int) -> Any:
    model, objective = CASES[name]()
    given = rows(6 * RANKS * BATCH)
    if name == "branches":
        given = [{"input_ids": row["input_ids"]} for row in given]
    return trainer(
        folder, model, given, objective, per_device_train_batch_size=RANKS * BATCH // ranks,
        eval_dataset=given[:8], ddp_backend=None if ranks == 1 else "gloo", ddp_find_unused_parameters=False,
    )  # fmt: skip


def check(rank: int, folder: Path) -> None:
    for name in CASES:
        it = run(name, folder / f"{name}-{rank}", RANKS)
        start = copy.deepcopy(it.model.state_dict())
        it.train()
        metrics = it.evaluate()
        assert isinstance(it.model_wrapped, nn.parallel.DistributedDataParallel)
        one = torch.load(folder / f"{name}.pt")
        torch.testing.assert_close(logged(it), one["losses"], rtol=0, atol=1e-5)
        same(it.model, one["model"], 1e-5)
        assert metrics["eval_loss"] == pytest.approx(one["eval_loss"], abs=1e-5)
        assert (it.model.state_dict()["branches.0.reduce.weight"] != start["branches.0.reduce.weight"]).any() == (
            name == "branches"
        )


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    for name in CASES:
        torch.manual_seed(0)
        it = run(name, tmp_path / "one" / name, 1)
        it.train()
        assert min(logged(it)) > 1e-3
        found = {"losses": logged(it), "model": it.model.state_dict(), "eval_loss": it.evaluate()["eval_loss"]}
        torch.save(found, tmp_path / f"{name}.pt")
    spawn(check, RANKS, tmp_path, tmp_path)
