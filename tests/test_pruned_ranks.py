"""Layers of which a part lives, under DDP and fully_shard (gloo, two ranks): the gradients of one process."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import spawn
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import kdfast
from kdfast.nn import PrefixLinear, SelectedLinear

WIDTH, INNER, ROWS = 8, 24, 6
LIVE = torch.tensor([0, 3, 4, 9, 10, 11, 20, 23])
RANKS = 2


class Sliced(nn.Linear):
    """The reference: some rows and columns, in plain torch."""

    def __init__(self, linear: nn.Linear, rows: Tensor | slice, columns: Tensor | slice) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.live = rows, columns

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.live
        return nn.functional.linear(x, self.weight[rows][:, columns], self.bias[rows])


def models(ours: bool) -> nn.Module:
    """Neurons that are selected, the same layers twice (shared, as ALBERT's), and then a part of a width."""
    torch.manual_seed(0)
    linears = [nn.Linear(*sizes) for sizes in ((WIDTH, INNER), (INNER, WIDTH), (WIDTH, INNER), (INNER, WIDTH))]
    everything = slice(None)
    if not ours:
        parts = ((LIVE, everything), (everything, LIVE), (slice(10), everything), (everything, slice(10)))
        layers: list[Any] = [Sliced(linear, *part) for linear, part in zip(linears, parts, strict=True)]
    else:
        layers = [
            cls.from_linear(x) for cls, x in zip((SelectedLinear,) * 2 + (PrefixLinear,) * 2, linears, strict=True)
        ]
        layers[0].rows = layers[1].columns = LIVE
        layers[2].out_features = layers[3].in_features = 10
    a, b, c, d = layers
    return nn.Sequential(a, nn.GELU(), b, a, nn.GELU(), b, c, nn.GELU(), d)


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))


def backward(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]  # type: ignore[misc, union-attr]


def close(model: nn.Module, reference: nn.Module, what: str) -> None:
    for got, wanted in zip(gradients(model), gradients(reference), strict=True):
        assert wanted.any(), what
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6, msg=lambda text: f"{what}: {text}")


def reference_step(reference: nn.Module, steps: list[int]) -> None:
    """The mean over ranks."""
    for step in steps:
        for rank in range(RANKS):
            (reference(batch(step, rank)).square().mean() / RANKS).backward()


def check_ddp(rank: int, as_view: bool, static: bool) -> None:
    reference, model = models(False), models(True)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=as_view, static_graph=static)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
    for step in range(4):
        steps = [2 * step, 2 * step + 1] if step % 2 else [2 * step]  # every other time two that are accumulated
        for i in steps:
            waits = parallel.no_sync() if i != steps[-1] else contextlib.nullcontext()
            with waits:
                backward(parallel, batch(i, rank))
        reference_step(reference, steps)
        close(model, reference, f"step {step}, as_view {as_view}, static {static}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=step < 2)


def check_fsdp(rank: int) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    for reshard in (True, False):
        reference, model = models(False), models(True)
        for layer in {*model.children()}:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
        for step in range(4):
            steps = [2 * step, 2 * step + 1] if step % 2 else [2 * step]
            for i in steps:
                backward(model, batch(i, rank))
            reference_step(reference, steps)
            close(model, reference, f"step {step}, reshard {reshard}")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        # Evaluations before and after the weights change without a backward, and unseen by their version.
        x = batch(0, 0)
        for factor in (1.0, 2.0, 0.5, 2.0):
            with torch.no_grad():
                for p in [*model.parameters(), *reference.parameters()]:
                    (p.to_local() if isinstance(p, DTensor) else p).mul_(factor)
                torch.testing.assert_close(model(x), reference(x))


def check_dtensors(rank: int) -> None:
    """Weights that tensor parallelism splits, or does not."""
    mesh, kwargs = init_device_mesh("cpu", (RANKS,)), {"rows": LIVE, "columns": torch.tensor([0, 2, 5])}
    torch.manual_seed(0)
    given = torch.randn(ROWS, 3), torch.randn(INNER, WIDTH), torch.randn(INNER)
    for split in (Replicate(), Shard(0), Shard(1)):
        placements = Replicate(), split, split if split == Shard(0) else Replicate()
        for function, part in ((kdfast.selected_linear, kwargs), (kdfast.prefix_linear, {"in_features": 3})):
            whole = [t.clone().requires_grad_() for t in given]
            spread = [distribute_tensor(t, mesh, [p]).requires_grad_() for t, p in zip(given, placements, strict=True)]
            results = []
            for leaves in (whole, spread):
                y = function(*leaves, **part)  # type: ignore[operator]
                y.square().sum().backward()
                results.append(
                    [t.full_tensor() if isinstance(t, DTensor) else t for t in (y, *(x.grad for x in leaves))]
                )
            for got, wanted in zip(results[1], results[0], strict=True):
                assert wanted.any()
                torch.testing.assert_close(got, wanted, msg=lambda text: f"{function.__name__} {split}: {text}")  # noqa: B023


CHECKS = [
    pytest.param(check_ddp, (False, False), id="ddp"),
    pytest.param(check_ddp, (True, False), id="ddp-gradient_as_bucket_view"),
    pytest.param(check_ddp, (True, True), id="ddp-static_graph"),
    pytest.param(check_fsdp, (), id="fully_shard"),
    pytest.param(check_dtensors, (), id="dtensors"),
]


@pytest.mark.parametrize(("check", "arguments"), CHECKS)
def test_gradients(tmp_path: Path, check: Any, arguments: tuple[Any, ...]) -> None:
    spawn(check, RANKS, tmp_path, *arguments)
