"""Some rows and columns of a weight: their indices checked, and what is read and written by them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdfast import _C
from kdfast.ops import _checks, _products, _shards


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
        rows, columns = self.rows, self.columns
        if _shards.is_dtensor(weight):
            rows, columns = _replicated(rows, weight), _replicated(columns, weight)
        return selected_linear_reference(x, weight, bias, rows=rows, columns=columns)

    def part(self, weight: Tensor, dtype: torch.dtype, recorded: bool) -> Tensor:
        self._follow(weight.device)
        if self.columns is None:
            part = weight if self.rows is None else weight.index_select(0, self.rows)
        elif _lies_in_rows(weight):
            part = torch.ops.kdfast.pack_part(weight, self.rows, self.columns)
        else:
            part = torch.ops.kdfast.pack_part(weight.t().contiguous(), self.columns, self.rows).t()
        return part if part.dtype is dtype else part.to(dtype)

    def part_of_bias(self, bias: Tensor, dtype: torch.dtype) -> Tensor:
        if self.rows is not None:
            bias = bias.index_select(0, self.rows)
        return bias if bias.dtype is dtype else bias.to(dtype)

    def add_product_(self, grad: Tensor, left: Tensor, right: Tensor) -> None:
        if self.rows is None and self.columns is None and left.dtype is grad.dtype:
            _products.add_product_(grad, left, right)
        elif self.columns is None:
            part = _product(left, right, grad.dtype)
            grad.add_(part) if self.rows is None else grad.index_add_(0, self.rows, part)
        else:
            self._unpack(grad, left, right, accumulate=True)

    def product(self, weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
        if self.rows is None and self.columns is None:
            return _product(left, right, weight.dtype)
        gradient = torch.empty_like(weight)
        self._unpack(gradient, left, right, accumulate=False)
        return gradient

    def _unpack(self, matrix: Tensor, left: Tensor, right: Tensor, accumulate: bool) -> None:
        """left · right, or its transpose, into the live part of a matrix that lies in rows or in columns."""
        rows, columns = self.rows, self.columns
        if not _lies_in_rows(matrix):
            matrix, left, right, rows, columns = matrix.t(), right.t(), left.t(), columns, rows
        torch.ops.kdfast.unpack_part_(matrix, _product(left, right, matrix.dtype), rows, columns, accumulate)

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


def _replicated(indices: Tensor | None, like: Any) -> Tensor | None:
    """On the mesh of a DTensor, which takes no other indices."""
    if indices is None:
        return None
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(indices, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)


def _lies_in_rows(matrix: Tensor) -> bool:
    return matrix.stride(1) == 1 or matrix.shape[1] <= 1


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    product = _products.product(left, right)
    return product if product.dtype is dtype else product.to(dtype)


@torch.library.register_fake("kdfast::pack_part")
def _(matrix: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    return matrix.new_empty(
        *(n if x is None else x.shape[0] for n, x in zip(matrix.shape, (rows, columns), strict=True))
    )


@torch.library.register_fake("kdfast::unpack_part_")
def _(matrix: Tensor, part: Tensor, rows: Tensor | None, columns: Tensor | None, accumulate: bool) -> None:
    return None


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
    indices = indices.contiguous()
    if indices.device.type != "cpu" or torch.compiler.is_compiling() or not indices.shape[0]:
        return indices
    if type(indices) is Tensor and _C.is_sorted_once(indices.data_ptr(), indices.shape[0], count):
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
