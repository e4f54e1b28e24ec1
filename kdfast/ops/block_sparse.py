"""A linear layer of which some blocks live."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdfast import _C
from kdfast.ops import _checks, _live_linear, _transforms
from kdfast.ops._block_layout import BlockLayout
from kdfast.ops._transforms import transformable

_OP = "block_sparse_linear"
# The plan's rule (csrc/cuda/block_sparse.h) as numbers, which `torch.compile` can look at: by element size and whether
# a side of the blocks is below 64, the density up to which the GPU's own kernels win.
_MOST_DENSITY = {
    (size, narrow): _C.cuda_block_density(size, 32 if narrow else 64) for size in (2, 4) for narrow in (False, True)
}
_LEAST_ROWS = _C.cuda_block_rows
_HAS_CUDA = _C.cuda is not None


@transformable
def block_sparse_linear(x: Tensor, values: Tensor, layout: BlockLayout, bias: Tensor | None = None) -> Tensor:
    """y = x · Wᵀ + bias with a weight W [out, in] of which some blocks live, at the cost of these (Gray et al., GPU
    Kernels for Block-Sparse Weights, 2017).

    On the CPU, products and gradients are kdfast's own kernels: they go to live blocks alone, so that what is in dead
    places of x or of the upstream gradient, NaN too, reaches nothing, and the results are bitwise the same whatever the
    threads. bfloat16 numbers are multiplied as they are by AMX or AVX512-BF16 (which takes what is below 1.2e-38 for 0),
    elsewhere widened; sums are float32 (float64 of float64).

    On a CUDA GPU they are kdfast's own kernels too, on tensor cores with float32 sums, deterministic; float32 numbers
    as three products of tf32, to float32's accuracy. Hopper has faster ones for 16-bit numbers and blocks of 64 and 128.
    They are taken where they are expected to win: of 64 rows and more, float32, bfloat16 or float16, and at most half of
    the blocks live in 16 bits (35 % where a side of theirs is 32), 90 % in float32 (70 %). Elsewhere the whole weight is put together and multiplied by the vendor library, at the cost
    of a dense layer, and NaN spreads as there. The same goes for subclasses of tensors. Rows that do not start on 16
    bytes are copied first.

    Args:
        x: [..., in], any strides; float32, bfloat16, float16 or (on the CPU) float64.
        values: [live blocks, rows, columns], the blocks in row-major order of the layout's mask
            (`layout.values_of(weight)`), any strides; of the dtype of x, but under autocast, where both are cast.
        layout: where they are. Made once, on the device of x: from another one it is copied at every call.
        bias: [out], or None.

    Returns:
        [..., out], of the dtype that `torch.nn.functional.linear` gives.

    Raises:
        ValueError, TypeError: a shape, dtype or device is wrong; the message names the argument.
    """
    if not isinstance(layout, BlockLayout):
        _checks.wrong_type(_OP, "layout", "a kdfast.BlockLayout", _checks.kind(layout))
    _live_linear.check_tensors(_OP, x, values=values, bias=bias)
    if values.shape != (layout.count, *layout.block):
        expected = f"the layout's blocks, {[layout.count, *layout.block]}"
        _checks.wrong_value(_OP, "values", expected, f"shape {list(values.shape)}")
    if bias is not None and bias.shape != layout.shape[:1]:
        _checks.wrong_value(_OP, "bias", f"[{layout.shape[0]}]", f"shape {list(bias.shape)}")
    if x.shape[-1] != layout.shape[1]:
        _checks.wrong_value(_OP, "x", f"{layout.shape[1]} features", f"shape {list(x.shape)}")
    layout = layout.to(x.device)
    dtype = _live_linear.product_dtype(x)
    if not (x.is_cpu or _wins(x, layout, dtype)) or not _live_linear.is_plain(x, values):
        return block_sparse_linear_reference(x, values, layout, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _BlockSparseLinear.apply(x, values, bias, layout, dtype)  # type: ignore[no-any-return]
    return _forward(_live_linear.cast(x, dtype), _live_linear.cast(values, dtype), bias, layout)


def block_sparse_linear_reference(x: Tensor, values: Tensor, layout: BlockLayout, bias: Tensor | None = None) -> Tensor:
    """`block_sparse_linear` in plain torch: the whole weight, with zeros for what is dead."""
    return nn.functional.linear(x, layout.dense(values), bias)


def _wins(x: Tensor, layout: BlockLayout, dtype: torch.dtype) -> bool:
    """Whether a GPU's kernels are expected to be faster than a dense product."""
    if not (_HAS_CUDA and x.is_cuda) or dtype.itemsize > 4:
        return False
    rows = x.numel() // x.shape[-1]
    most = _MOST_DENSITY[dtype.itemsize, min(layout.block) < 64]
    return bool(rows >= _LEAST_ROWS and layout.density <= most)


def _forward(x: Tensor, values: Tensor, bias: Tensor | None, layout: BlockLayout) -> Tensor:
    bias = None if bias is None else _live_linear.cast(bias, x.dtype).contiguous()
    y: Tensor = torch.ops.kdfast.block_sparse_product(_rows(x), values.contiguous(), *layout.rows, bias, True)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _rows(x: Tensor) -> Tensor:
    """As [rows, features], whose features lie side by side."""
    rows = _live_linear.as_rows(x)
    # Not contiguous(), to which no rows at all are so with any strides.
    return rows if rows.stride(1) == 1 else rows.clone(memory_format=torch.contiguous_format)


class _BlockSparseLinear(torch.autograd.Function):
    """The gradient of x walks W's columns; that of the values walks the side with more blocks, so that the other one's
    rows stay in cache."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layout: BlockLayout, dtype: torch.dtype
    ) -> Tensor:
        ctx.layout, ctx.dtypes = layout, [None if t is None else t.dtype for t in (x, values, bias)]
        x, values = _live_linear.cast(x, dtype), _live_linear.cast(values, dtype)
        ctx.save_for_backward(x, values)
        return _forward(x, values, bias, layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _transforms.no_double_backward(_OP)
        _transforms.refuse_batched(_OP, grad, "of a weight's blocks")
        x, values = ctx.saved_tensors
        layout: BlockLayout = ctx.layout
        of_x, of_values, of_bias, *_ = ctx.needs_input_grad
        rows = _rows(grad)
        of: list[Tensor | None] = [None, None, None]
        if of_x:
            gradient = torch.ops.kdfast.block_sparse_product(rows, values.contiguous(), *layout.columns, None, False)
            of[0] = _live_linear.cast(gradient.view(x.shape), ctx.dtypes[0])
        if of_values:
            by_rows = layout.shape[0] > layout.shape[1]
            order = layout.rows if by_rows else layout.columns
            gradient = torch.ops.kdfast.block_sparse_gradient(rows, _rows(x), *order, *layout.block, by_rows)
            of[1] = _live_linear.cast(gradient, ctx.dtypes[1])
        if of_bias:
            of[2] = _live_linear.cast(_live_linear.sum_of_rows(rows), ctx.dtypes[2])
        return *of, None, None


@torch.library.register_fake("kdfast::block_sparse_product")
def _(
    x: Tensor, values: Tensor, begin: Tensor, index: Tensor, place: Tensor, bias: Tensor | None, turned: bool
) -> Tensor:
    return x.new_empty(x.shape[0], (begin.shape[0] - 1) * values.shape[1 if turned else 2])


@torch.library.register_fake("kdfast::block_sparse_gradient")
def _(
    grad: Tensor, x: Tensor, begin: Tensor, index: Tensor, place: Tensor, rows: int, columns: int, by_rows: bool
) -> Tensor:
    return x.new_empty(index.shape[0], rows, columns)
