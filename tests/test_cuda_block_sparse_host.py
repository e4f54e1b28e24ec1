"""The CUDA kernels of block-sparse products, run on the CPU by the host shim."""

from __future__ import annotations

import ctypes
import platform

import pytest
import torch
from shim import Case, Device, assert_close, shim
from torch import Tensor

from kdfast.ops._block_layout import BlockLayout

__all__ = ["shim"]  # a fixture
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the shim switches fibers on x86-64 only")
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
BLOCKS = [(32, 32), (64, 64), (128, 128), (128, 32), (32, 96), (96, 64), (64, 128)]
NONE, SOME, ALL = 0.0, 0.3, 1.0


def layout_of(block: tuple[int, int], density: float) -> BlockLayout:
    """[3, 4] blocks; of some, a block row and a block column are empty."""
    mask = torch.full((3, 4), density == ALL)
    if density == SOME:
        mask[0, 3] = mask[2, 0] = mask[2, 1] = mask[2, 3] = True
    return BlockLayout(mask, block)


def strided(rows: int, columns: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """Steps of rows beyond their columns, whose numbers are NaN; with an offset, rows that do not start on 16 bytes."""
    x = torch.full((rows, columns + 8 + offset), torch.nan, dtype=dtype)
    x[:, offset : columns + offset] = torch.randn(rows, columns)
    return x[:, offset : columns + offset]


def check(case: Case, layout: BlockLayout, rows: int, dtype: torch.dtype, offset: int = 0) -> None:
    """All three products against float64; the gradient of the blocks by either side's order, bitwise the same."""
    x, grad = (strided(rows, size, dtype, offset) for size in (layout.shape[1], layout.shape[0]))
    values = torch.randn(layout.count, *layout.block).to(dtype)
    bias = torch.randn(layout.shape[0]).to(dtype)
    weight = layout.dense(values.double())
    ops = case.ops
    y = ops.block_sparse_product(x, values, *layout.rows, bias, True)
    assert_close(y, x.double() @ weight.T + bias.double(), dtype)
    assert_close(ops.block_sparse_product(x, values, *layout.rows, None, True), x.double() @ weight.T, dtype)
    assert_close(ops.block_sparse_product(grad, values, *layout.columns, None, False), grad.double() @ weight, dtype)
    exact = layout.values_of(grad.double().T @ x.double())
    of_values = ops.block_sparse_gradient(grad, x, *layout.rows, *layout.block, True)
    assert_close(of_values, exact, dtype)
    assert torch.equal(of_values, ops.block_sparse_gradient(grad, x, *layout.columns, *layout.block, False))
    case.clean()


@FLOATS
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_products(shim: ctypes.CDLL, dtype: torch.dtype, block: tuple[int, int]) -> None:
    """Two tiles of rows, of which the second is not whole, and an odd number of steps over them."""
    check(Case(shim, Device(), seed=1), layout_of(block, SOME), 161, dtype)


@FLOATS
@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("density", [NONE, SOME, ALL])
def test_rows_and_densities(shim: ctypes.CDLL, dtype: torch.dtype, rows: int, density: float) -> None:
    check(Case(shim, Device(), seed=2), layout_of((64, 32), density), rows, dtype)


@FLOATS
def test_rows_that_do_not_start_on_16_bytes(shim: ctypes.CDLL, dtype: torch.dtype) -> None:
    check(Case(shim, Device(), seed=3), layout_of((32, 64), SOME), 37, dtype, offset=1)


@FLOATS
def test_dead_places_reach_nothing(shim: ctypes.CDLL, dtype: torch.dtype) -> None:
    """NaN in the empty block row's gradient and the empty block column's input."""
    case, layout, rows = Case(shim, Device(), seed=4), layout_of((32, 64), SOME), 45
    values = torch.randn(layout.count, *layout.block).to(dtype)
    x, grad = strided(rows, layout.shape[1], dtype), strided(rows, layout.shape[0], dtype)
    weight = layout.dense(values.double())
    wanted = x.double() @ weight.T, grad.double() @ weight, layout.values_of(grad.double().T @ x.double())
    x[:, 2 * 64 : 3 * 64] = grad[:, 32:64] = torch.nan
    y = case.ops.block_sparse_product(x, values, *layout.rows, None, True)
    of_x = case.ops.block_sparse_product(grad, values, *layout.columns, None, False)
    of_values = case.ops.block_sparse_gradient(grad, x, *layout.rows, *layout.block, True)
    for ours, exact in zip((y, of_x, of_values), wanted, strict=True):
        assert_close(ours, exact, dtype)
    assert (y[:, 32:64] == 0).all()
    assert (of_x[:, 2 * 64 : 3 * 64] == 0).all()
    case.clean()


def test_rows_of_nan_stay_their_own(shim: ctypes.CDLL) -> None:
    case, layout = Case(shim, Device(), seed=5), layout_of((32, 32), SOME)
    x, values = strided(9, layout.shape[1], torch.float32), torch.randn(layout.count, *layout.block)
    x[4] = torch.nan
    y = case.ops.block_sparse_product(x, values, *layout.rows, None, True)
    assert y[4, :32].isnan().all()
    assert y[torch.arange(9) != 4].isfinite().all()


def test_refuses(shim: ctypes.CDLL) -> None:
    case, layout = Case(shim, Device()), layout_of((32, 32), SOME)
    x, values = torch.randn(4, layout.shape[1]), torch.randn(layout.count, *layout.block)
    with pytest.raises(RuntimeError, match="block_sparse_product: x: expected float32, bfloat16 or float16 on the GPU"):
        case.ops.block_sparse_product(x.double(), values.double(), *layout.rows, None, True)
    with pytest.raises(RuntimeError, match="block_sparse_gradient: begin: expected 4 numbers, got 5"):
        case.ops.block_sparse_gradient(x[:, :96], x, *layout.columns, *layout.block, True)
