"""The plan of the CUDA block-sparse kernels (csrc/cuda/block_sparse.h): plain arithmetic, checked without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from kdfast import _C

SHARED = 99 << 10  # what the smallest of the GPUs, from Ampere on, lets a block have
SHARED_OF_HOPPER = 227 << 10
SIDES = (32, 64, 96, 128)


def plan(width: int, depth: int, *, rows: int = 8192, live: int = 24, size: int = 2, **case: Any) -> dict[str, Any]:
    """Of a weight of 8 x 12 blocks."""
    return _C.cuda_block_plan(
        rows=rows, outer=8, all=96, live=live, width=width, depth=depth, element_size=size, **case
    )


@pytest.mark.parametrize("width", SIDES)
@pytest.mark.parametrize("depth", SIDES)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", [{}, {"turned": True}, {"of_weight": True}], ids=str)
def test_panels_and_result_fit(width: int, depth: int, size: int, case: dict[str, bool]) -> None:
    """Two stages of a step of 32 of both operands, and the result; two blocks on a multiprocessor in 16 bits."""
    p = plan(width, depth, size=size, **case)
    rows, columns = (width, depth) if case.get("of_weight") else (128, width)
    assert (p["threads"], p["stages"], p["tile_rows"]) == (256, 2, rows)
    assert p["shared"] >= 2 * 32 * (rows + columns) * size
    assert p["shared"] >= rows * columns * size
    assert p["shared"] % 16 == 0
    assert p["shared"] <= (SHARED // 2 - 1024 if size == 2 else SHARED)


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129, 8192])
def test_every_row_has_a_block(rows: int) -> None:
    assert plan(64, 64, rows=rows)["blocks"] == -(-rows // 128) * 8
    assert plan(64, 64, rows=rows, of_weight=True)["blocks"] == 24


@pytest.mark.parametrize(
    ("side", "size", "most"), [(64, 2, 0.5), (128, 2, 0.5), (32, 2, 0.35), (64, 4, 0.9), (32, 4, 0.7)]
)
def test_dense_where_most_blocks_live(side: int, size: int, most: float) -> None:
    live = int(96 * most)
    assert _C.cuda_block_density(size, side) == most
    assert not plan(side, 128, live=live, size=size)["dense"]
    assert plan(side, 128, live=live + 1, size=size)["dense"]


def test_dense_of_few_rows_and_of_float64() -> None:
    assert not plan(64, 64, rows=_C.cuda_block_rows)["dense"]
    assert plan(64, 64, rows=_C.cuda_block_rows - 1)["dense"]
    assert plan(64, 64, size=8)["dense"]
    assert not plan(64, 64, live=0)["dense"]


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("depth", [64, 128])
@pytest.mark.parametrize("case", [{}, {"turned": True}, {"of_weight": True}], ids=str)
def test_stages_of_wgmma_fit(width: int, depth: int, case: dict[str, bool]) -> None:
    """A step of 64: 256 rows of x and a block's, or two pairs of blocks' gradients. At least three are on chip, so that
    two are on their way while one is multiplied, and no further one would fit."""
    p = plan(width, depth, wgmma=True, **case)
    step = 64 * 2 * (2 * (width + depth) if case.get("of_weight") else 256 + width)
    assert (p["wgmma"], p["threads"]) == (True, 384)
    assert p["tile_rows"] == (width if case.get("of_weight") else 256)
    assert p["stages"] >= 3
    assert p["shared"] - p["stages"] * step - 16 * p["stages"] - 1008 >= 0  # barriers, and up to a multiple of 1024
    assert p["shared"] <= SHARED_OF_HOPPER - 64 < p["shared"] + step


@pytest.mark.parametrize("rows", [1, 256, 257, 8192])
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_multiprocessors_take_tiles_in_turn(rows: int, multiprocessors: int) -> None:
    device = {"wgmma": True, "multiprocessors": multiprocessors}
    assert plan(128, 128, rows=rows, **device)["blocks"] == min(-(-rows // 256) * 8, multiprocessors)
    assert plan(128, 128, rows=rows, live=23, of_weight=True, **device)["blocks"] == min(12, multiprocessors)


@pytest.mark.parametrize(
    "case",
    [{"size": 4}, {"live": 0}, {"rows": 0}, {"rows": 2**31 - 200}, {"live": 2**24}, {"apart": False}, {"wgmma": False}],
    ids=str,
)
def test_what_wgmma_cannot_take(case: dict[str, Any]) -> None:
    assert plan(128, 128, wgmma=True)["wgmma"]
    assert not plan(128, 128, **{"wgmma": True} | case)["wgmma"]
    for width, depth in ((96, 64), (64, 32), (32, 128)):
        assert not plan(width, depth, wgmma=True)["wgmma"]
