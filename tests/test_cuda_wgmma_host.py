"""Hopper's instructions (csrc/cuda/wgmma.cuh) on the host shim: where operands and sums lie, as the PTX ISA has it."""

from __future__ import annotations

import ctypes
import platform

import pytest
import torch
from shim import shim
from torch import Tensor

__all__ = ["shim"]  # a fixture
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the shim switches fibers on x86-64 only")


def pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def swizzled(rows: Tensor) -> Tensor:
    """[rows, 64] numbers of 16 bits as shared memory has them: vector i of eight numbers of row r is at i ^ r % 8."""
    vectors = rows.reshape(-1, 8, 8)
    places = torch.arange(8) ^ torch.arange(len(vectors))[:, None] % 8  # their own inverse
    return vectors.gather(1, places[..., None].expand_as(vectors)).reshape(rows.shape)


def image(operand: Tensor, wide: bool) -> Tensor:
    """Two squares of an operand [128, 64 numbers of a sum]: deep, its rows; wide, 64 numbers by 64 rows each."""
    return torch.cat([swizzled(part.T if wide else part) for part in operand.split(64)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wide_a", [False, True])
@pytest.mark.parametrize("wide_b", [False, True])
def test_products(shim: ctypes.CDLL, dtype: torch.dtype, wide_a: bool, wide_b: bool) -> None:
    """m64n128k16. Sums by the ISA: thread t has d[i] at row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2), column
    8 (i / 4) + 2 (t % 4) + i % 2."""
    torch.manual_seed(0)
    a, b, c = torch.randn(128, 64).to(dtype), torch.randn(128, 64).to(dtype), torch.randn(64, 128)
    thread, i = torch.arange(128)[:, None], torch.arange(64)
    row, column = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8, i // 4 * 8 + thread % 4 * 2 + i % 2
    images = torch.cat([image(a, wide_a), image(b, wide_b)])
    for k in (0, 16, 48):
        sums = c[row, column].contiguous()
        shim.cuda_host_wgmma_product(dtype == torch.bfloat16, wide_a, wide_b, pointer(images), k, pointer(sums))
        exact = c + a[:64, k : k + 16].float() @ b[:, k : k + 16].float().T
        torch.testing.assert_close(sums, exact[row, column])


@pytest.mark.parametrize("box", [64, 256])
def test_boxes(shim: ctypes.CDLL, box: int) -> None:
    """Of a matrix in steps of rows; beyond its last row are zeros, whatever lies there."""
    rows, columns, step, first = 300, 128, 136, 107
    memory = torch.randn(rows + box, step).bfloat16()
    memory[rows:] = memory[:, columns:] = torch.nan
    found = torch.empty(box, 64, dtype=torch.bfloat16)
    sizes = [ctypes.c_int64(n) for n in (rows, columns, step)]
    for row in (first, 0):
        shim.cuda_host_bring_box(pointer(memory), *sizes, box, 64, row, pointer(found))
        expected = torch.nn.functional.pad(memory[row:rows, 64:columns], (0, 0, 0, box))[:box]
        assert torch.equal(found, swizzled(expected))
