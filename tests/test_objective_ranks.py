"""Two processes on gloo train and evaluate objectives of terms to what one makes of both batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import spawn
from tiny_berts import bert, logged, masked_lm, rows, same, trainer
from torch import nn

from kdfast.objective import (
    CLS,
    Adversarial,
    Attention,
    Cosine,
    DynamicLogits,
    Embedding,
    Hidden,
    Labels,
    LinearSchedule,
    Logits,
    Perturbed,
    Relations,
    Terms,
)

RANKS, STEPS, BATCH = 2, 6, 2


def patient() -> tuple[Any, Any, Terms]:
    terms = {"kl": Logits(temperature=10.0, per_class=True, weight=0.7), "ce": Labels(weight=0.3)}
    return bert(0, layers=4), bert(1), Terms(**terms, cls=CLS(weight=20.0), cosine=Cosine())


def relations() -> tuple[Any, Any, Terms]:
    """Most of the last layer, the pooler and the classifier are out of reach."""
    return bert(0, width=24), bert(1), Terms(relations=Relations())


def hidden() -> tuple[Any, Any, Terms]:
    torch.manual_seed(5)
    shared, own = nn.Linear(16, 24), nn.Linear(16, 24)
    terms = {
        "hidden": Hidden(projection=shared, weight=LinearSchedule(1.0, 0.2)),
        "last": Hidden({-1: -1}, projection=own),
    }
    return bert(0, width=24, layers=4), bert(1), Terms(**terms, embedding=Embedding(projection=shared))


def tinybert() -> tuple[Any, Any, Terms]:
    """A narrower student, and a projection that is made of both widths; pooler and classifier are out of reach."""
    teacher, student = bert(0, width=24, layers=4), bert(1)
    torch.manual_seed(5)
    linear = nn.Linear(16, 24)

    def projection(width: int, teacher_width: int) -> nn.Linear:
        assert (width, teacher_width) == (16, 24)
        return linear

    return (
        teacher,
        student,
        Terms(attention=Attention(weight=0.1), hidden=Hidden({0: 0, 1: 2, 2: 4}, projection=projection)),
    )


def tokens() -> tuple[Any, Any, Terms]:
    """Micro-batches whose tokens and targets are not equally many."""
    terms = {
        "kl": Logits(tokens="labels", temperature=2.0),
        "mlm": Labels("tokens"),
        "attention": Attention(weight=0.1),
    }
    return masked_lm(0, width=24, layers=4), masked_lm(1), Terms(**terms, relations=Relations())


def dynamic() -> tuple[Any, Any, Terms]:
    """Means over the rows of a process's own micro-batch."""
    return bert(0, layers=4), bert(1), Terms(kl=DynamicLogits(temperature=8.0, rule="flsw", weight=5.0), ce=Labels())


def adversarial() -> tuple[Any, Any, Terms]:
    """δ of a row depends on no other; l2, as signs of numbers near 0 are chance."""
    perturbed = Perturbed(temperature=2.0, epsilon=0.5, steps=2, norm="l2")
    return bert(0, layers=4), bert(1), Adversarial(kl=Logits(), ce=Labels(weight=0.3), it=perturbed)


CASES: dict[str, Callable[[], tuple[Any, Any, Terms]]] = {
    "patient": patient, "relations": relations, "hidden": hidden, "tokens": tokens, "tinybert": tinybert,
    "dynamic": dynamic, "adversarial": adversarial,
}  # fmt: skip


def run(name: str, folder: Path, ranks: int) -> Any:
    """A trainer on one of `ranks` processes; its micro-batches are smaller the more there are."""
    teacher, student, objective = CASES[name]()
    given = rows(STEPS * RANKS * BATCH + 8, tokens=name == "tokens")
    parts = {"gradient_accumulation_steps": 2} if name == "tokens" and ranks > 1 else {}  # DDP then waits for the last
    size = RANKS * BATCH // ranks
    if name == "dynamic":  # the same micro-batches, one after another
        size, parts = BATCH, {"gradient_accumulation_steps": RANKS} if ranks == 1 else {}
    return trainer(
        folder, student, given[8:], objective, teacher=teacher, eval_dataset=given[:8], save_strategy="steps", save_steps=4,
        per_device_train_batch_size=size // 2 if name == "tokens" and parts else size, per_device_eval_batch_size=size,
        ddp_backend=None if ranks == 1 else "gloo", **parts,
    )  # fmt: skip


def check(name: str, folder: Path, rank: int) -> None:
    it = run(name, folder / f"{name}-{rank}", RANKS)
    start = {key: value.clone() for key, value in it.model.state_dict().items()}
    it.train()
    metrics = it.evaluate()
    assert it.args.world_size == RANKS
    assert isinstance(it.model_wrapped, nn.parallel.DistributedDataParallel)
    assert not hasattr(it.model, "distillation")
    one = torch.load(folder / f"{name}.pt")
    for term in ("loss", *it.objective.terms):
        torch.testing.assert_close(logged(it, term), one["logged"][term], rtol=0, atol=1e-5)
    same(it.model, one["student"], 1e-5)
    same(it.objective, one["objective"], 1e-5)
    for key, value in one["metrics"].items():
        assert metrics[key] == pytest.approx(value, abs=1e-5), key
    of_last = "bert.encoder.layer.1.intermediate.dense.weight"
    moved = {key for key, value in it.model.state_dict().items() if (value - start[key]).abs().max() > 1e-4}
    assert (of_last in moved) == (name != "relations")
    assert "bert.encoder.layer.1.attention.self.query.weight" in moved
    saved = {path.name for path in (folder / f"{name}-{rank}" / "checkpoint-4").iterdir()}
    assert ("model.safetensors" in saved) == (rank == 0)
    assert ("distillation.safetensors" in saved) == (rank == 0 and name in ("hidden", "tinybert"))


def check_cases(rank: int, folder: Path) -> None:
    for name in CASES:
        check(name, folder, rank)


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    for name in CASES:
        it = run(name, tmp_path / "one" / name, 1)
        it.train()
        metrics = it.evaluate()
        terms = list(it.objective.terms)
        compared = [f"eval_{term}" for term in terms] + (
            ["eval_agreement", "eval_kl_to_teacher"] if name in ("patient", "dynamic", "adversarial") else []
        )
        assert all(metrics[key] > 1e-3 for key in compared)
        assert all(min(logged(it, term)) > 1e-3 for term in terms)
        assert len(logged(it)) == STEPS
        found = {
            "logged": {term: logged(it, term) for term in ("loss", *terms)},
            "student": it.model.state_dict(),
            "objective": it.objective.state_dict(),
            "metrics": {key: metrics[key] for key in compared},
        }
        torch.save(found, tmp_path / f"{name}.pt")
    spawn(check_cases, RANKS, tmp_path, tmp_path)
