"""The matrix instructions of csrc/cuda/mma.cuh on the host shim: which lane has which number, as the PTX ISA has it."""

from __future__ import annotations

import ctypes
import platform

import pytest
import torch
from shim import shim
from torch import Tensor

__all__ = ["shim"]  # a fixture
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the shim switches fibers on x86-64 only")

BFLOAT16, FLOAT16, TF32, LOAD, LOAD_TRANSPOSED, SPLIT = range(6)
LANES = [(lane // 4, lane % 4) for lane in range(32)]  # groupID and threadID_in_group


def run(shim: ctypes.CDLL, instruction: int, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """`a` and `b` as 32-bit words; returns c and what was loaded, by lane and register."""
    assert a.nbytes == 512
    assert a.is_contiguous()
    assert b.is_contiguous()
    c, loaded = c.contiguous().clone(), torch.zeros(32, 4, dtype=torch.int32)
    shim.cuda_host_mma(instruction, *(ctypes.c_void_p(x.data_ptr()) for x in (a, b, c, loaded)))
    return c, loaded


def of_result(matrix: Tensor) -> Tensor:
    """c0, c1: row groupID; c2, c3: row groupID + 8; columns threadID_in_group * 2 and the next."""
    places = [[(g + 8 * (i >= 2), 2 * q + (i & 1)) for i in range(4)] for g, q in LANES]
    return torch.stack([torch.stack([matrix[row, column] for row, column in lane]) for lane in places])


@pytest.mark.parametrize(
    ("instruction", "dtype"), [(BFLOAT16, torch.bfloat16), (FLOAT16, torch.float16)], ids=["bfloat16", "float16"]
)
def test_pairs_of_16_bits(shim: ctypes.CDLL, instruction: int, dtype: torch.dtype) -> None:
    """m16n8k16; elements by the ISA's a0 to a7 and b0 to b3, two of a register."""
    torch.manual_seed(0)
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    rows = [0, 0, 8, 8, 0, 0, 8, 8]  # row = groupID for a0, a1, a4, a5
    columns = [0, 1, 0, 1, 8, 9, 8, 9]  # column = threadID_in_group * 2 + (i & 1), + 8 from a4 on
    of_a = torch.stack([a[[g + r for r in rows], [2 * q + k for k in columns]] for g, q in LANES])
    of_b = torch.stack([b[[2 * q + k for k in (0, 1, 8, 9)], [g] * 4] for g, q in LANES])
    got, _ = run(shim, instruction, of_a, of_b, of_result(c))
    torch.testing.assert_close(got, of_result(c + a.float() @ b.float()))


def test_tf32(shim: ctypes.CDLL) -> None:
    """m16n8k8; the lower 13 bits of the operands are ignored."""
    torch.manual_seed(0)
    a, b, c = (torch.randn(*size) for size in ((16, 8), (8, 8), (16, 8)))
    of_a = torch.stack([a[[g, g + 8, g, g + 8], [q, q, q + 4, q + 4]] for g, q in LANES])
    of_b = torch.stack([b[[q, q + 4], [g, g]] for g, q in LANES])
    got, _ = run(shim, TF32, of_a, of_b, of_result(c))
    cut = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b)]
    torch.testing.assert_close(got, of_result(c + cut[0] @ cut[1]), rtol=1e-6, atol=1e-6)


def test_split_products_are_those_of_float32(shim: ctypes.CDLL) -> None:
    """Twice [16, 8] [8, 8]: 2^-20 of the sum of the products' sizes, which two of the three products miss."""
    torch.manual_seed(0)
    a, b = torch.randn(16, 8), torch.randn(8, 8)
    got, _ = run(shim, SPLIT, a, b, torch.zeros(32, 4))
    exact = of_result(2 * a.double() @ b.double())
    sizes = of_result(2 * a.double().abs() @ b.double().abs())
    assert ((got - exact).abs() <= 2**-20 * sizes).all()
    assert exact.abs().max() > 1


def test_matrices_from_shared_memory(shim: ctypes.CDLL) -> None:
    """ldmatrix.x4: lane i has numbers 2 (i % 4) and the next of row i / 4 of each matrix; .trans: of its column."""
    rows = torch.arange(4 * 8 * 8, dtype=torch.int16).view(4, 8, 8)
    nothing = torch.zeros(32, 4)
    for instruction, matrices in ((LOAD, rows), (LOAD_TRANSPOSED, rows.mT)):
        _, loaded = run(shim, instruction, rows, nothing, nothing)
        expected = torch.stack([matrices[:, g, 2 * q : 2 * q + 2] for g, q in LANES])  # [lane, matrix, pair]
        assert torch.equal(loaded.view(torch.int16).view(32, 4, 2), expected)
