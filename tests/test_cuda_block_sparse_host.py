"""The CUDA kernels of block-sparse products, run on the CPU by the host shim: those of any GPU from Ampere on, and Hopper's."""

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
SHORT = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SQUARES = [(64, 64), (128, 128), (64, 128), (128, 64)]
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


@SHORT
@pytest.mark.parametrize("block", SQUARES, ids=str)
def test_products_by_wgmma(shim: ctypes.CDLL, dtype: torch.dtype, block: tuple[int, int]) -> None:
    """Two tiles of 256 rows, of which the second is one row, and an odd number of live blocks, of which a pair is of two
    block rows."""
    check(Case(shim, Device(wgmma=True), seed=1), layout_of(block, SOME), 257, dtype)


@SHORT
@pytest.mark.parametrize(("rows", "density"), [(1, SOME), (33, ALL), (129, NONE), (0, SOME), (64, ALL)])
def test_rows_and_densities_by_wgmma(shim: ctypes.CDLL, dtype: torch.dtype, rows: int, density: float) -> None:
    """Several blocks of threads, and none for some of the tiles; threads take turns in any order."""
    check(Case(shim, Device(wgmma=True, multiprocessors=5), seed=2), layout_of((64, 64), density), rows, dtype)


def test_many_tiles_by_wgmma(shim: ctypes.CDLL) -> None:
    """Nine of rows: eight that multiprocessors make together, and one."""
    check(Case(shim, Device(wgmma=True, multiprocessors=7), seed=2), layout_of((64, 64), SOME), 2060, torch.bfloat16)


@pytest.mark.parametrize("offset", [0, 1])
def test_rows_that_wgmma_cannot_take(shim: ctypes.CDLL, offset: int) -> None:
    """Rows that overlap; rows that do not start on 16 bytes are copied first."""
    case, layout = Case(shim, Device(wgmma=True), seed=3), layout_of((64, 64), SOME)
    check(case, layout, 37, torch.bfloat16, offset)
    x, values = torch.randn(1, 256).bfloat16().expand(70, 256), torch.randn(layout.count, 64, 64).bfloat16()
    y = case.ops.block_sparse_product(x, values, *layout.rows, None, True)
    assert_close(y, x.double() @ layout.dense(values.double()).T, torch.bfloat16)


@FLOATS
@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("density", [NONE, SOME, ALL])
def test_rows_and_densities(shim: ctypes.CDLL, dtype: torch.dtype, rows: int, density: float) -> None:
    check(Case(shim, Device(), seed=2), layout_of((64, 32), density), rows, dtype)


@FLOATS
def test_rows_that_do_not_start_on_16_bytes(shim: ctypes.CDLL, dtype: torch.dtype) -> None:
    check(Case(shim, Device(), seed=3), layout_of((32, 64), SOME), 37, dtype, offset=1)


@FLOATS
@pytest.mark.parametrize(("wgmma", "block"), [(False, (32, 64)), (True, (64, 64))], ids=["mma", "wgmma"])
def test_dead_places_reach_nothing(shim: ctypes.CDLL, dtype: torch.dtype, wgmma: bool, block: tuple[int, int]) -> None:
    """NaN in the empty block row's gradient and the empty block column's input, and between the rows of both."""
    case, layout, rows = Case(shim, Device(wgmma=wgmma), seed=4), layout_of(block, SOME), 45
    values = torch.randn(layout.count, *layout.block).to(dtype)
    x, grad = strided(rows, layout.shape[1], dtype), strided(rows, layout.shape[0], dtype)
    weight = layout.dense(values.double())
    wanted = x.double() @ weight.T, grad.double() @ weight, layout.values_of(grad.double().T @ x.double())
    dead, dead_of_x = slice(block[0], 2 * block[0]), slice(2 * block[1], 3 * block[1])
    x[:, dead_of_x] = grad[:, dead] = torch.nan
    y = case.ops.block_sparse_product(x, values, *layout.rows, None, True)
    of_x = case.ops.block_sparse_product(grad, values, *layout.columns, None, False)
    of_values = case.ops.block_sparse_gradient(grad, x, *layout.rows, *layout.block, True)
    for ours, exact in zip((y, of_x, of_values), wanted, strict=True):
        assert_close(ours, exact, dtype)
    assert (y[:, dead] == 0).all()
    assert (of_x[:, dead_of_x] == 0).all()
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
