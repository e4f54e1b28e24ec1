"""What the raw divergences divide by, and what the public functions make of a reduction for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import value_and_gradient
from torch import Tensor

import kdfast
from kdfast.ops import reference
from kdfast.ops._call import KNOWN_NOTHING, SAVE_GRADIENT, Call, Numbers, RowValues

S, T, L = torch.randn(6, 9).double(), torch.randn(6, 9).double(), torch.tensor([3, -100, 0, 8, -100, 2])
MASK = torch.tensor([True, True, False, True, True, True])


def raw(divisor: list[float] | None, scale: float, per_row: bool, mask: Tensor | None) -> tuple[Tensor, ...]:
    """kd_loss, alpha 0.3, T = 2."""
    rows = RowValues(indices=None, labels=L, row_temperature=None, mask=mask, weight=None)
    numbers = Numbers(
        kind=0, mixing=0.0, temperature=2.0, columns=9, vocabulary=9, vocab_start=0, scale=scale, per_row=per_row,
        distillation=True, alpha=0.3, smoothing=0.0, ignore_index=-100,
    )  # fmt: skip
    by = None if divisor is None else torch.tensor(divisor, dtype=S.dtype)
    results: tuple[Tensor, ...] = torch.ops.kdfast.divergence(
        S, T, *Call(rows, by, numbers).flat(), None, KNOWN_NOTHING, SAVE_GRADIENT
    )
    return results


def exact(divisor: list[float], scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Components per row [6, 2], and the gradients [6, 9] of their sums."""
    s = S.clone().requires_grad_()
    counted = torch.ones(6, dtype=torch.bool) if mask is None else mask
    soft = 4 * reference.divergence("kl_div", s, T, temperature=2.0, reduction="none")
    hard = torch.nn.functional.cross_entropy(s, L, reduction="none", ignore_index=-100)
    parts = torch.stack((soft, hard), -1) * counted[:, None] * scale / torch.tensor(divisor, dtype=S.dtype)
    (soft_gradient,) = torch.autograd.grad(parts[:, 0].sum(), s, retain_graph=True)
    (hard_gradient,) = torch.autograd.grad(parts[:, 1].sum(), s)
    return parts.detach(), soft_gradient, hard_gradient


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "mask"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("divisor", [None, [5.0], [3.0, 7.0]])
@pytest.mark.usefixtures("cpu_variant")
def test_scale_over_divisor(divisor: list[float] | None, scale: float, per_row: bool, mask: Tensor | None) -> None:
    parts, soft, hard = exact(divisor or [1.0], scale, mask)
    expected = parts if per_row else parts.sum(0)
    assert (expected[..., 0] != 0).any()
    assert (expected[..., 1] != 0).any()
    loss, components, gradient = raw(divisor, scale, per_row, mask)
    torch.testing.assert_close(components, expected)
    torch.testing.assert_close(loss, expected @ torch.tensor([0.3, 0.7]).double())
    torch.testing.assert_close(gradient, 0.3 * soft + 0.7 * hard)


def test_a_divisor_of_0_counts_nothing() -> None:
    for zero in raw([0.0], 1.0, False, None):
        assert not zero.any()
    loss, components, gradient = raw([2.0, 0.0], 1.0, False, None)
    parts, soft, _ = exact([2.0, 1.0], 1.0, None)
    torch.testing.assert_close(components[0], parts[:, 0].sum())
    torch.testing.assert_close(loss, 0.3 * components[0])
    torch.testing.assert_close(gradient, 0.3 * soft)
    assert components[1] == 0


COUNTS: list[Callable[..., Tensor]] = [
    lambda s, t: kdfast.kl_div(s, t),
    lambda s, t: kdfast.kl_div(s, t, num_items=2 * s.shape[0]),
    lambda s, t: kdfast.kl_div(s, t, reduction="batchmean"),
    lambda s, t: kdfast.kd_loss(s, t, s.argmax(-1)),
    lambda s, t: kdfast.kd_loss(s, t, s.argmax(-1), mask=t[:, 0] > 0),
]


@pytest.mark.parametrize("function", COUNTS, ids=["mean", "num_items", "batchmean", "labels", "labels_and_mask"])
def test_another_number_of_rows_is_not_compiled_anew(function: Callable[..., Tensor]) -> None:
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.manual_seed(0)  # of few rows, a mask may leave none
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for rows in (6, 11, 19):
        s, t = torch.randn(rows, 9), torch.randn(rows, 9)
        got, wanted = (value_and_gradient(f, s, t, {}) for f in (compiled, function))
        assert wanted[1].any()
        torch.testing.assert_close(got, wanted)
    assert len(graphs) == 1
