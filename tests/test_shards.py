"""A vocabulary split over ranks gives what one process gives: gloo, 2 and 4 ranks, every divergence and kd_loss."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accuracy import value_and_gradient
from ranks import spawn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import kdfast
from kdfast.bench.registry.divergences import DIVERGENCES

ROWS, WIDTH = 6, 840  # a multiple of 4: even shards
# The columns at which 4 (or, merged in pairs, 2) uneven shards start; the last one holds nothing.
UNEVEN = (0, 1, 700, WIDTH)


def whole(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    teacher = 4 * torch.randn(ROWS, WIDTH, generator=generator)
    student = teacher + torch.randn(ROWS, WIDTH, generator=generator)
    student[1, 420:] = teacher[1, 420:] = -torch.inf  # whole shards without a distribution
    student[2, ::5] = teacher[2, ::5] = -torch.inf
    return student.to(dtype), teacher.to(dtype)


def arguments(operator: str, reduction: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    kwargs: dict[str, Any] = {
        "reduction": reduction,
        "mask": torch.tensor([True, True, True, False, True, True]),
        "weight": torch.rand(ROWS, generator=generator),
        "temperature": 1 + torch.rand(ROWS, generator=generator),
    }
    if operator == "kd_loss":
        labels = torch.tensor([0, 419, 1, 7, -100, 839])
        kwargs |= {"labels": labels, "label_smoothing": 0.0 if reduction == "sum" else 0.1}  # smoothing meets -inf
        kwargs["mask"] = torch.tensor([True, False, False, False, True, True])
    return kwargs


def same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype, what: str) -> None:
    assert bool(expected[0].any()), what
    assert bool(expected[1].any()), what
    precision = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(got[0], expected[0], rtol=precision, atol=precision, msg=lambda m: f"{what}: {m}")
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, precision)
    error = (got[1].double() - expected[1].double()).norm()
    assert error <= rounding * expected[1].double().norm() + 1e-12, f"{what}: gradient differs by {error}"


def check_all(rank: int, ranks: int) -> None:
    group = dist.group.WORLD
    width = WIDTH // ranks
    bounds = (*UNEVEN, WIDTH)[:: 4 // ranks]  # of one rank: everything
    splits: list[tuple[int, int, dict[str, Any]]] = [
        (rank * width, (rank + 1) * width, {}),
        (bounds[rank], bounds[rank + 1], {"vocab_start": bounds[rank], "vocab_size": WIDTH}),
    ]
    cases = [(torch.float64, "mean"), (torch.float64, "none"), (torch.float32, "mean"), (torch.float32, "sum")]
    cases += [(torch.bfloat16, "mean"), (torch.float16, "mean")]
    for name, (dtype, reduction) in itertools.product(DIVERGENCES, cases):
        function, kwargs = DIVERGENCES[name].function, arguments(name, reduction)
        student, teacher = whole(dtype)
        value, gradient = value_and_gradient(function, student, teacher, kwargs)
        for begin, end, more in splits:
            local = student[:, begin:end], teacher[:, begin:end]
            got = value_and_gradient(function, *local, kwargs | more | {"process_group": group})
            what = f"{name} {dtype} {reduction} rank {rank} of {ranks}, columns {begin} to {end}"
            assert got[1].shape == local[0].shape, what
            torch.testing.assert_close(got[0], value, rtol=2e-6, atol=2e-6, msg=lambda m, what=what: f"{what}: {m}")
            whole_gradient = torch.zeros_like(gradient)
            whole_gradient[:, begin:end] = got[1]
            whole_gradient = whole_gradient.double()
            dist.all_reduce(whole_gradient)
            same((got[0], whole_gradient), (value, gradient), dtype, what)


def check_padded_and_no_grad(rank: int, ranks: int) -> None:
    """The last columns are padding; vocab_size is global."""
    student, teacher = whole(torch.float32)
    width = WIDTH // ranks
    mine = slice(rank * width, (rank + 1) * width)
    kept = max(WIDTH - width, width) - 11  # of several, the last shard holds no column that counts
    clean = kdfast.js_div(student[:, :kept], teacher[:, :kept], reduction="none")
    student[:, kept:] = torch.nan
    got = kdfast.js_div(
        student[:, mine], teacher[:, mine], reduction="none", vocab_size=kept, process_group=dist.group.WORLD
    )
    torch.testing.assert_close(got, clean)


def check_dtensors(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,))
    labels = torch.tensor([0, 419, 1, 7, -100, 838])
    for width in (WIDTH, WIDTH - 1):
        student, teacher = (z[:, :width].contiguous() for z in whole(torch.float32))
        teacher_shards = distribute_tensor(teacher, mesh, [Shard(1)])
        for function, more in (
            (kdfast.kl_div, {}),
            (kdfast.js_div, {"beta": 0.2}),
            (kdfast.kd_loss, {"labels": labels}),
        ):
            value, gradient = value_and_gradient(function, student, teacher, more)
            shards = distribute_tensor(student, mesh, [Shard(-1)]).requires_grad_()
            got = function(shards, teacher_shards, **more)
            assert not isinstance(got, DTensor)
            torch.testing.assert_close(got.detach(), value, rtol=2e-6, atol=2e-6)
            (sharded,) = torch.autograd.grad(got, shards, torch.tensor(0.5))
            assert isinstance(sharded, DTensor)
            assert bool(gradient.any())
            assert (sharded.full_tensor() - gradient).norm() <= 2e-6 * gradient.norm()


def check_refusals(rank: int, ranks: int) -> None:
    student, teacher = whole(torch.float32)
    group = dist.group.WORLD
    mesh = init_device_mesh("cpu", (ranks,))
    sharded = distribute_tensor(student, mesh, [Shard(1)])
    replicated = distribute_tensor(student, mesh, [Replicate()])
    refusals: list[tuple[str, tuple[Any, Any], dict[str, Any]]] = [
        ("process_group: expected None beside DTensors", (sharded, sharded), {"process_group": group}),
        ("vocab_start: expected None beside DTensors", (sharded, sharded), {"vocab_start": 0}),
        ("student_logits: expected a DTensor sharded on its last dimension", (replicated, replicated), {}),
        ("teacher_logits: expected the student's placements", (sharded, replicated), {}),
        ("vocab_start: expected a process_group with it", (student, teacher), {"vocab_start": 0}),
        (
            "vocab_size: expected the size of the whole vocabulary",
            (student, teacher),
            {"vocab_start": 0, "process_group": group},
        ),
        ("teacher_logits: expected a shard as wide", (student, teacher[:, 1:]), {"process_group": group}),
        (
            "vocab_start: expected 0 or more",
            (student, teacher),
            {"vocab_start": -1, "vocab_size": 9, "process_group": group},
        ),
    ]
    for match, logits, kwargs in refusals:
        with pytest.raises(ValueError, match=match):
            kdfast.kl_div(*logits, **kwargs)
    with pytest.raises(TypeError, match="teacher_logits: expected a DTensor like the other logits"):
        kdfast.kl_div(sharded, teacher)
    labels = torch.full((ROWS,), ranks * WIDTH)
    with pytest.raises(ValueError, match="labels: expected 0 to"):
        kdfast.kd_loss(student, teacher, labels, process_group=group)


def check_everything(rank: int, ranks: int) -> None:
    for check in (check_all, check_padded_and_no_grad, check_dtensors, check_refusals):
        check(rank, ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_agree_with_one_process(ranks: int, tmp_path: Path) -> None:
    spawn(check_everything, ranks, tmp_path, ranks)
