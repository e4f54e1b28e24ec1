"""Dense products on the CPU: by `kdfast::matmul_` where that is faster than torch's library, else by torch.

Where that is, is decided natively, from the processor (`own_products`, csrc/cpu/variant.cpp): float32, and float16 that
is widened, where the CPU variant has AVX-512 and the processor is not Intel's, as MKL takes its AVX2 kernels there; and
bfloat16 into float32 also where there are dot products of it. Products of few rows read a matrix once and wait for it
whatever reads it: these are torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdfast import _C

LEAST_ROWS = 4
TORCHS_STEP = 32  # numbers of bfloat16 that torch's library multiplies at a time


def own(x: Tensor) -> bool:
    """Whether products with x are by `kdfast::matmul_`: of plain tensors, which no mode or tracer wants to see."""
    return (
        x.is_cpu
        and x.dtype is not torch.float64
        and _C.own_products(x.dtype is torch.bfloat16)
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
    )


def _own_floats(a: Tensor, b: Tensor) -> bool:
    return a.dtype is torch.float32 and min(a.shape[0], b.shape[1]) >= LEAST_ROWS and own(a)


def packed(x: Tensor) -> Tensor:
    """x for torch's products, which read a row of bfloat16 up to a whole step (with AMX) and multiply by zeros what is
    not its own: NaN between rows would reach the result."""
    apart = x.dtype is torch.bfloat16 and x.is_cpu and x.shape[-1] % TORCHS_STEP and x.stride(-1) == 1
    return x.contiguous() if apart else x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear`, not recorded."""
    inputs = weight.shape[1]
    if not inputs or x.numel() < LEAST_ROWS * inputs or x.dtype is not torch.float32 or not own(x):
        return nn.functional.linear(packed(x), weight, bias)
    rows = x if x.dim() == 2 else x.reshape(-1, inputs)
    y = x.new_empty(rows.shape[0], weight.shape[0])
    torch.ops.kdfast.matmul_(y, rows, weight.t(), None if bias is None else bias.contiguous(), False)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def product(a: Tensor, b: Tensor) -> Tensor:
    """a · b."""
    if not _own_floats(a, b):
        return packed(a) @ b
    c = a.new_empty(a.shape[0], b.shape[1])
    torch.ops.kdfast.matmul_(c, a, b, None, False)
    return c


def product_into(c: Tensor, a: Tensor, b: Tensor) -> None:
    """c = a · b, of one dtype; rows or columns of c lie side by side."""
    if _own_floats(a, b):
        torch.ops.kdfast.matmul_(c, a, b, None, False)
    else:
        torch.mm(packed(a), b, out=c)


def add_product_(c: Tensor, a: Tensor, b: Tensor) -> None:
    """c += a · b, the same."""
    if _own_floats(a, b):
        torch.ops.kdfast.matmul_(c, a, b, None, True)
    else:
        c.addmm_(packed(a), b)
