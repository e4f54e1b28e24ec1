"""Masked models over two ranks (gloo): DDP and fully_shard, before and after `kdfast.prune.apply`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pruning_oracle as oracle
import tiny_models
import torch
import torch.distributed as dist
from ranks import spawn
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from kdfast.prune import Masks, apply, remove

RANKS = 2


def loss(model: Any, rank: int) -> Tensor:
    """By a rank's own rows; the gradient of the mean over ranks is what both have after a backward."""
    logits = model(**tiny_models.batch(model, seed=rank)).logits
    generator = torch.Generator().manual_seed(rank)
    return (logits * torch.randn(logits.shape, generator=generator).to(logits)).sum() / RANKS


def expected(name: str, masks: Masks) -> dict[str, Tensor]:
    """The gradients, by the whole model on the rows of all ranks."""
    model = tiny_models.make(name)
    with oracle.zeroed(model, masks):
        sum(loss(model, rank) for rank in range(RANKS)).backward()  # type: ignore[union-attr]
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def check_gradients(model: Any, want: dict[str, Tensor], what: str) -> None:
    largest = max(float(x.abs().max()) for x in want.values())
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        error = float((gradient - want[name]).abs().max())
        assert error <= 1e-12 * largest, f"{what}: {name}: {error} of {largest}"


def check_ddp(rank: int) -> None:
    """The model inside is masked, also between steps: a step after another finds out what no rank has computed."""
    some, more = ("some", "some"), ("empty", "first", "some")
    for name, options, order in (
        ("bert", {}, some),
        ("bert", {"gradient_as_bucket_view": True}, some),
        ("bert", {}, more),
        ("gpt2", {}, some),
        ("llama", {}, more),
    ):
        patterns = oracle.patterns(model := tiny_models.make(name))
        ddp = DistributedDataParallel(model, **options)
        ddp.config = model.config
        for pattern in order:
            apply(ddp, patterns[pattern])
            want = expected(name, patterns[pattern])
            for set_to_none in (True, False):
                ddp.zero_grad(set_to_none=set_to_none)
                loss(ddp, rank).mul(RANKS).backward()  # DDP takes the mean
                check_gradients(model, want, f"{name} {options} {pattern}")


def check_fully_shard(rank: int) -> None:
    """Layers are sharded before masks come or after, and other masks come later."""
    for name in ("bert", "llama"):
        for before in (True, False):
            patterns = oracle.patterns(model := tiny_models.make(name))
            layers = model.bert.encoder.layer if name == "bert" else model.model.layers
            if before:
                apply(model, patterns["first"])
            for layer in layers:
                fully_shard(layer)
            fully_shard(model)
            for pattern in ("first", "some", "empty"):
                apply(model, patterns[pattern])
                want = expected(name, patterns[pattern])
                for set_to_none in (True, False):
                    model.zero_grad(set_to_none=set_to_none)
                    loss(model, rank).mul(RANKS).backward()
                    check_gradients(model, want, f"{name} {before} {pattern}")
            remove(model)
            model.zero_grad()
            loss(model, rank).mul(RANKS).backward()
            check_gradients(model, expected(name, Masks.full(tiny_models.make(name))), f"{name} {before} removed")
    dist.barrier()


def test_ddp(tmp_path: Path) -> None:
    spawn(check_ddp, RANKS, tmp_path)


def test_fully_shard(tmp_path: Path) -> None:
    spawn(check_fully_shard, RANKS, tmp_path)
