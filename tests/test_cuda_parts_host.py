"""The CUDA kernels that pack live rows and columns, run on the CPU by the host shim."""

from __future__ import annotations

import ctypes
import platform

import pytest
import torch
from accuracy import check
from shim import Case, Device, shim
from torch import Tensor

from kdfast.bench.registry.operator import Sample
from kdfast.bench.registry.pruned import PRUNED

__all__ = ["shim"]  # a fixture
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the shim switches fibers on x86-64 only")
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# Whole heads; neurons here and there, the last one too; none; all.
HEADS = torch.cat((torch.arange(16, 32), torch.arange(64, 96)))
NEURONS = torch.tensor([0, 3, 4, 5, 6, 7, 8, 9, 40, 41, 98, 100])
NOTHING = torch.empty(0, dtype=torch.int64)
COLUMNS = {"heads": HEADS, "neurons": NEURONS, "nothing": NOTHING, "all": None}
ROWS = {"rows": torch.tensor([0, 1, 2, 5, 6, 7, 8, 9, 10, 12]), "every row": None}


def indices(chosen: Tensor | None, count: int) -> Tensor:
    return torch.arange(count) if chosen is None else chosen


def matrix(dtype: torch.dtype, offset: int) -> Tensor:
    """[13, 101] in rows of 112, or 113, numbers that do not start on 16 bytes where there is an offset."""
    torch.manual_seed(0)
    memory = torch.randn(13 * (112 + offset) + 1).to(dtype)
    return memory[offset:][: 13 * (112 + offset)].view(13, -1)[:, :101]


@FLOATS
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("offset", [0, 1])
def test_moves(shim: ctypes.CDLL, dtype: torch.dtype, columns: str, rows: str, offset: int) -> None:
    """Bit for bit what indexing gives; nothing else is touched."""
    case = Case(shim, Device(), seed=2, offset=offset)
    live = ROWS[rows], COLUMNS[columns]
    at = indices(live[0], 13)[:, None], indices(live[1], 101)
    x = matrix(dtype, offset)
    part = case.ops.pack_part(x, *live)
    assert torch.equal(part, x[at])
    added, wanted = x.clone(), x.clone()
    wanted[at] += 2 * part
    case.ops.unpack_part_(added, 2 * part, *live, True)
    assert torch.equal(added, wanted)
    fresh = torch.full_like(x, torch.nan)
    case.ops.unpack_part_(fresh, part, *live, False)
    assert torch.equal(fresh, torch.zeros_like(x).index_put_(at, part))
    case.clean()


@pytest.mark.parametrize("sample", [pytest.param(s, id=s.name) for s in PRUNED["selected_linear"].samples])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_samples(shim: ctypes.CDLL, sample: Sample, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(shim, Device(), seed=3)
    for op in ("pack_part", "unpack_part_"):
        monkeypatch.setattr(torch.ops.kdfast, op, getattr(case.ops, op))
    check(PRUNED["selected_linear"], sample, 1.0, dtype, dtype, device="cpu:0")
    case.clean()


def test_refuses(shim: ctypes.CDLL) -> None:
    case = Case(shim, Device())
    x = torch.randn(4, 5)
    with pytest.raises(RuntimeError, match="pack_part: matrix: expected float32, bfloat16 or float16 on the GPU"):
        case.ops.pack_part(x.double(), None, None)
    with pytest.raises(RuntimeError, match=r"unpack_part_: part: expected \[4, 2\], got \[4, 3\]"):
        case.ops.unpack_part_(x, x[:, :3].contiguous(), None, torch.tensor([0, 1]), True)
