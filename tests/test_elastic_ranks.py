"""Sub-networks under DDP on two gloo ranks, without `find_unused_parameters`: what one process makes of both batches."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import tiny_models
import torch
from ranks import spawn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from kdfast.elastic import Elastic

STEPS, RANKS = 2, 2
WIDTHS, DEPTHS = (0.25, 1.0), (1 / 3, 2 / 3)  # every sub-network leaves layers out, and all the last one


def batch_of(model: Any, step: int, rank: int) -> dict[str, Tensor]:
    return tiny_models.batch(model, seed=10 * step + rank) | {"labels": torch.tensor([0, 1, rank])}


def train(model: Any, ranks: list[int], wrapped: Any = None, in_one: bool = False) -> list[dict[str, Tensor]]:
    """Gradients and weights after each step; `in_one`: synchronised with the last sub-network alone."""
    elastic, seen = Elastic(model, WIDTHS, DEPTHS), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        for width, depth in elastic.subnetworks:
            elastic.set(width, depth)
            last = (width, depth) == elastic.subnetworks[-1]
            with wrapped.no_sync() if in_one and not last else contextlib.nullcontext():
                for rank in ranks:
                    loss = (wrapped or model)(**batch_of(model, step, rank)).loss / len(ranks)
                    loss.backward()
        for name, x in model.named_parameters():
            assert x.grad is not None or name.startswith("bert.encoder.layer.2"), name
        seen.append({name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None})
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        seen.append({name: x.detach().clone() for name, x in model.named_parameters()})
    return seen


def check(rank: int, path: str) -> None:
    expected = torch.load(path)
    for in_one, as_view in itertools.product((False, True), repeat=2):
        model = tiny_models.make("bert")
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=as_view)
        for mine, its in zip(train(model, [rank], wrapped, in_one), expected, strict=True):
            largest = max(float(x.abs().max()) for x in its.values())
            for name, x in mine.items():
                want = its.get(name, torch.zeros_like(x))  # DDP gives zeros where one process gives none
                assert float((x - want).abs().max()) <= 1e-12 * largest, f"{name} {in_one=} {as_view=}"
            assert its.keys() <= mine.keys()


def test_ranks(tmp_path: Path) -> None:
    expected = train(tiny_models.make("bert"), [*range(RANKS)])
    assert all(x.any() for name, x in expected[0].items() if "layer.1" in name and "key.bias" not in name)
    torch.save(expected, tmp_path / "expected.pt")
    spawn(check, RANKS, tmp_path, str(tmp_path / "expected.pt"))
