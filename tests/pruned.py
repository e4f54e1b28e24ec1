"""Layers of which a part lives, and slices in plain torch to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast.ops.prefix import prefix_linear_reference
from kdfast.ops.selected import selected_linear_reference

OUT, IN = 12, 40
ROWS, COLUMNS = torch.tensor([0, 3, 4, 5, 11]), torch.tensor([1, 2, 8, 9, 10, 11, 12, 30, 39])
NONE = torch.empty(0, dtype=torch.int64)
Call = Callable[..., Tensor]

# Name, the operator, its reference, keyword arguments.
PARTS: dict[str, tuple[Call, Call, dict[str, Any]]] = {
    "prefix": (kdfast.prefix_linear, prefix_linear_reference, {"in_features": 9, "out_features": 5}),
    "prefix_rows": (kdfast.prefix_linear, prefix_linear_reference, {"out_features": 5}),
    "prefix_columns": (kdfast.prefix_linear, prefix_linear_reference, {"in_features": 9}),
    "prefix_all": (kdfast.prefix_linear, prefix_linear_reference, {}),
    "prefix_no_rows": (kdfast.prefix_linear, prefix_linear_reference, {"in_features": 9, "out_features": 0}),
    "prefix_no_columns": (kdfast.prefix_linear, prefix_linear_reference, {"in_features": 0}),
    "rows": (kdfast.selected_linear, selected_linear_reference, {"rows": ROWS}),
    "columns": (kdfast.selected_linear, selected_linear_reference, {"columns": COLUMNS}),
    "both": (kdfast.selected_linear, selected_linear_reference, {"rows": ROWS, "columns": COLUMNS}),
    "all": (kdfast.selected_linear, selected_linear_reference, {}),
    "no_rows": (kdfast.selected_linear, selected_linear_reference, {"rows": NONE, "columns": COLUMNS}),
    "no_columns": (kdfast.selected_linear, selected_linear_reference, {"columns": NONE}),
}
EVERY = pytest.mark.parametrize("name", PARTS)
SOME = pytest.mark.parametrize("name", ["prefix", "rows", "columns", "both"])


def live(kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Live rows and columns."""
    rows, columns = kwargs.get("rows"), kwargs.get("columns")
    return (
        torch.arange(kwargs.get("out_features", OUT)) if rows is None else rows,
        torch.arange(kwargs.get("in_features", IN)) if columns is None else columns,
    )


def with_nan(x: Tensor, *alive: Tensor) -> Tensor:
    """NaN in what is dead."""
    dead = torch.ones(x.shape, dtype=torch.bool)
    dead[torch.meshgrid(*alive, indexing="ij")] = False
    return x.masked_fill(dead, torch.nan)


def made(kwargs: dict[str, Any], dtype: torch.dtype = torch.float64, leading: tuple[int, ...] = (6,)) -> list[Tensor]:
    """x, weight, bias and the gradient of the result; NaN where nothing lives."""
    torch.manual_seed(0)
    rows, columns = live(kwargs)
    x, grad = torch.randn(*leading, len(columns)), torch.randn(*leading, len(rows))
    weight, bias = with_nan(torch.randn(OUT, IN), rows, columns), with_nan(torch.randn(OUT), rows)
    return [t.to(dtype) for t in (x, weight, bias, grad)]


def results(
    function: Call, kwargs: dict[str, Any], x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor
) -> list[Tensor]:
    """The value and all gradients."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = function(*leaves, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def exact(name: str, *tensors: Tensor | None) -> list[Tensor]:
    _, reference, kwargs = PARTS[name]
    return results(reference, kwargs, *(None if t is None else t.double() for t in tensors))  # type: ignore[arg-type]


def close(got: list[Tensor], wanted: list[Tensor], error: float) -> None:
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert not theirs.isnan().any()
        assert float((ours.double() - theirs).norm()) <= error * float(theirs.norm())
