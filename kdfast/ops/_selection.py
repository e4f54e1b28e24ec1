"""Some rows and columns of a weight: their indices checked, and what is read and written by them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdfast.ops import _checks


class Selection:
    """The live rows and columns of a weight [out, in] as `kdfast.ops._live_linear.Live`.

    Args:
        op: the operator that errors name.
        shape: of the weight.
        rows, columns: int64 indices, sorted and each once; None: all.

    Raises:
        ValueError, TypeError: indices of a wrong dtype or shape; on the CPU also such that are out of range, repeated
            or out of order, which a device would have to be waited for.
    """

    def __init__(self, op: str, shape: tuple[int, int], rows: Tensor | None, columns: Tensor | None) -> None:
        self.op, self.shape = op, shape
        self.rows, self.columns = _checked(op, "rows", rows, shape[0]), _checked(op, "columns", columns, shape[1])
        self.inputs = shape[1] if columns is None else columns.shape[0]

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self._follow(weight.device)
        return selected_linear_reference(x, weight, bias, rows=self.rows, columns=self.columns)

    def part(self, weight: Tensor, dtype: torch.dtype, recorded: bool) -> Tensor:
        self._follow(weight.device)
        part = weight if self.rows is None else weight.index_select(0, self.rows)
        if self.columns is not None:
            part = part.index_select(1, self.columns)
        return part if part.dtype is dtype else part.to(dtype)

    def part_of_bias(self, bias: Tensor, dtype: torch.dtype) -> Tensor:
        if self.rows is not None:
            bias = bias.index_select(0, self.rows)
        return bias if bias.dtype is dtype else bias.to(dtype)

    def add_product_(self, grad: Tensor, left: Tensor, right: Tensor) -> None:
        if self.rows is None and self.columns is None and left.dtype is grad.dtype:
            grad.addmm_(left, right)
            return
        part = (left @ right).to(grad.dtype)
        if self.columns is None:
            grad.add_(part) if self.rows is None else grad.index_add_(0, self.rows, part)
        elif self.rows is None:
            grad.index_add_(1, self.columns, part)
        else:
            grad.index_put_((self.rows[:, None], self.columns), part, accumulate=True)

    def product(self, weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
        part = (left @ right).to(weight.dtype)
        if self.rows is None and self.columns is None:
            return part
        gradient = torch.zeros_like(weight)
        if self.columns is None:
            return gradient.index_copy_(0, self.rows, part)  # type: ignore[arg-type]
        if self.rows is None:
            return gradient.index_copy_(1, self.columns, part)
        return gradient.index_put_((self.rows[:, None], self.columns), part)

    def of_bias(self, bias: Tensor, gradient: Tensor) -> Tensor:
        gradient = gradient.to(bias.dtype)
        return gradient if self.rows is None else torch.zeros_like(bias).index_copy_(0, self.rows, gradient)

    def used(self) -> None:
        pass

    def _follow(self, device: torch.device) -> None:
        """Indices move to where the weight has gone, but to a device without memory."""
        if device.type == "meta":
            return
        if self.rows is not None and self.rows.device != device:
            self.rows = self.rows.to(device)
        if self.columns is not None and self.columns.device != device:
            self.columns = self.columns.to(device)


def selected_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """`selected_linear` in plain torch."""
    if rows is not None:
        weight = weight.index_select(0, rows)
        bias = None if bias is None else bias.index_select(0, rows)
    if columns is not None:
        weight = weight.index_select(1, columns)
    return nn.functional.linear(x, weight, bias)


def _checked(op: str, argument: str, indices: Tensor | None, count: int) -> Tensor | None:
    if indices is None:
        return None
    if not isinstance(indices, Tensor):
        _checks.wrong_type(op, argument, "an int64 tensor of indices (mask.nonzero().flatten())", _checks.kind(indices))
    if indices.dtype is not torch.int64:
        _checks.wrong_type(op, argument, "an int64 tensor of indices (mask.nonzero().flatten())", indices.dtype)
    if indices.dim() != 1:
        _checks.wrong_value(op, argument, "one dimension", f"shape {list(indices.shape)}")
    if indices.device.type != "cpu" or torch.compiler.is_compiling() or not indices.shape[0]:
        return indices
    first, last = int(indices[0]), int(indices[-1])
    steps = indices[1:] > indices[:-1]
    if not bool(steps.all()):
        at = int(steps.logical_not().nonzero()[0])
        got = f"{int(indices[at + 1])} after {int(indices[at])}"
        _checks.wrong_value(op, argument, "sorted indices, each once", got)
    if first < 0 or last >= count:
        _checks.wrong_value(op, argument, f"indices from 0 to {count - 1}", first if first < 0 else last)
    return indices
