"""A student's rest, outside of its teacher's top-k, that is far less likely than other columns, or not there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast.ops import linear_reference

K, KEPT, INF = 9, 0.7, math.inf
ROUNDING = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
DTYPES = pytest.mark.parametrize("dtype", list(ROUNDING))
# Powers of e that the rest has: 1e-13, 1e-30, below the ranges of float32 and of float64, nothing.
GAPS = pytest.mark.parametrize("gap", [30, 69, 104, 461, 2000, INF])


def inputs(rows: int, columns: int, gap: float, dtype: torch.dtype, temperature: Any = 1.0) -> tuple[Tensor, ...]:
    """A student whose rest is `gap` below the others, its teacher's columns, at both ends and between, and a mask of the
    rest."""
    generator = torch.Generator().manual_seed(0)
    between = 1 + torch.randperm(columns - 2, generator=generator)[: K - 2]
    indices = torch.cat((torch.tensor([0, columns - 1]), between))
    logprobs = (3 * torch.randn(rows, K, generator=generator)).log_softmax(-1) + math.log(KEPT)
    student = 2 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    rest = torch.ones(columns, dtype=torch.bool).index_fill(0, indices, False)
    lower = student - gap * torch.as_tensor(temperature, dtype=torch.float64).reshape(-1, 1)
    return torch.where(rest, lower, student).to(dtype), logprobs, indices.expand(rows, K), rest


def check(student: Tensor, logprobs: Tensor, indices: Tensor, rest: Tensor, **kwargs: Any) -> None:
    """Value and gradient; that of the rest by itself: others could hide it."""
    student.requires_grad_()
    double = student.detach().double().requires_grad_()
    doubled = {name: x.double() if name in ("temperature", "weight") else x for name, x in kwargs.items()}
    exact = linear_reference.topk_kl_div(double, logprobs.double(), indices, **doubled)
    kwargs = doubled if student.dtype == torch.float64 else kwargs
    loss = kdfast.topk_kl_div(student, logprobs, indices, **kwargs)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-12 if student.dtype == torch.float64 else 2e-6, atol=0)
    assert exact.all() if "mask" not in kwargs else exact.any()
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).reshape(loss.shape)
    (ours,) = torch.autograd.grad(loss, student, upstream.to(loss.dtype))
    (expected,) = torch.autograd.grad(exact, double, upstream)
    for columns in (rest, ~rest):
        error, of = (ours.double() - expected)[:, columns].norm(), expected[:, columns].norm()
        assert error <= ROUNDING[student.dtype] * of
        assert of > 1e-3 or (columns is rest and (student[:, rest] == -INF).all())


@GAPS
@DTYPES
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("columns", [40, 1025, 5003], ids=["a block", "two blocks", "five blocks"])
def test_against_float64(cpu_variant: str, columns: int, reduction: str, dtype: torch.dtype, gap: float) -> None:
    check(*inputs(9, columns, gap, dtype), reduction=reduction)


@GAPS
@DTYPES
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_options_of_rows(reduction: str, dtype: torch.dtype, gap: float) -> None:
    rows = {"temperature": torch.linspace(0.5, 4, 9), "weight": torch.linspace(1, 2, 9)}
    mask = torch.arange(9) % 3 != 1
    check(*inputs(9, 1501, gap, dtype, rows["temperature"]), **rows, mask=mask, reduction=reduction)


@GAPS
@DTYPES
def test_few_wide_rows(dtype: torch.dtype, gap: float) -> None:
    """The threads share their columns."""
    check(*inputs(2, 40000, gap, dtype), reduction="sum")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_finite_mask(cpu_variant: str, dtype: torch.dtype, temperature: float) -> None:
    """Whose size is all of the loss, and nothing of the gradient."""
    student, *teacher, rest = inputs(9, 1501, 0.0, dtype)
    lowest = torch.finfo(dtype).min
    gradients = []
    for masked in (lowest, -5000.0):
        student = student.detach().masked_fill(rest, masked).requires_grad_()
        loss = kdfast.topk_kl_div(student, *teacher, temperature=temperature, reduction="sum")
        torch.testing.assert_close(loss, torch.tensor(-9 * (1 - KEPT) * masked / temperature), rtol=1e-2, atol=0)
        gradients.append(torch.autograd.grad(loss, student)[0])
    assert gradients[0][:, rest].all()
    assert torch.equal(*gradients)


@DTYPES
def test_rows_unlike_each_other(dtype: torch.dtype) -> None:
    """Some as usual, some low, some without a rest."""
    parts = [inputs(9, 1501, gap, dtype) for gap in (0, 20, 60, 104, 2000, INF)]
    student = torch.cat([part[0][i : i + 1] for i, part in enumerate(parts)])
    _, logprobs, indices, rest = parts[0]
    for reduction in ("sum", "none"):
        check(student.detach().clone(), logprobs[:6], indices[:6], rest, reduction=reduction)


@GAPS
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_beside_labels(smoothing: float, temperature: float, gap: float) -> None:
    """Whose cross-entropy takes powers that the divergence has made: labels in the top-k and in the rest."""
    rows, columns, width = 70, 1501, 8
    _, logprobs, indices, rest = inputs(rows, columns, 0, torch.float32)
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (rows, columns))
    bias = torch.where(rest, -temperature * gap, 0.0).double()
    some = rest if gap < INF else ~rest
    labels = torch.where(torch.arange(rows) % 2 == 0, int(indices[0, 3]), int(some.nonzero()[-2]))
    given = {"alpha": 0.5, "temperature": temperature, "label_smoothing": smoothing if gap < INF else 0.0}
    results = []
    for function, dtype in (
        (kdfast.linear_topk_kd_loss, torch.float32),
        (linear_reference.linear_topk_kd_loss, torch.float64),
    ):
        h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        loss = function(h, w, logprobs.to(dtype), indices, labels, student_bias=bias.to(dtype), **given)
        results.append([loss.detach(), *torch.autograd.grad(loss, (h, w))])
    for ours, exact in zip(*results, strict=True):
        assert exact.any()
        assert (ours.double() - exact).norm() <= 1e-5 * exact.norm()
