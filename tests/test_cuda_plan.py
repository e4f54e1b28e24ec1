"""The plan of the CUDA row kernels (csrc/cuda/plan.h): plain arithmetic, checked without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from kdfast import _C

RESERVED = 1024  # shared bytes that the driver takes of every block
MOST_THREADS = 384
H100 = {
    "multiprocessors": 132,
    "shared_per_block": 227 << 10,
    "shared_per_multiprocessor": 228 << 10,
    "max_cluster": 16,
}
A100 = {"multiprocessors": 108, "shared_per_block": 163 << 10, "shared_per_multiprocessor": 164 << 10, "max_cluster": 1}
RTX3090 = {
    "multiprocessors": 82,
    "shared_per_block": 99 << 10,
    "shared_per_multiprocessor": 100 << 10,
    "max_cluster": 1,
}


def exchange(threads: int) -> int:
    """Shared bytes per block beside the row, as in plan.h."""
    return 560 + threads


def plan(
    columns: int, *, rows: int = 8192, size: int = 2, device: dict[str, int] = H100, room: int = 16, **case: bool
) -> dict[str, Any]:
    """On a device with room for clusters of up to `room` blocks."""
    flags = {"same_elements": True, "alike": True, "aligned": True, "again": True, "given": False} | case
    return _C.cuda_plan(rows=rows, columns=columns, element_size=size, **flags, **device, room=room)


@pytest.mark.parametrize(
    ("columns", "size", "cluster"),
    [
        (1025, 2, 1),
        (16384, 2, 1),
        (32000, 2, 2),
        (50257, 2, 4),
        (128256, 2, 8),
        (151936, 2, 8),  # fits to 16 bytes: see exchange_bytes
        (262144, 2, 16),
        (32000, 4, 4),
        (128256, 4, 16),
    ],
)
def test_three_blocks_share_a_multiprocessor(columns: int, size: int, cluster: int) -> None:
    p = plan(columns, size=size)
    assert (p["kernel"], p["cluster"], p["blocks"]) == ("on_chip", cluster, 8192 * cluster)
    assert 3 * (p["shared"] + RESERVED) <= H100["shared_per_multiprocessor"]
    assert p["shared"] >= 2 * columns * size / cluster + exchange(p["threads"])
    assert p["threads"] <= 256


def test_rows_that_only_one_block_per_multiprocessor_holds() -> None:
    p = plan(262144, size=4)
    assert (p["kernel"], p["cluster"], p["threads"]) == ("on_chip", 16, MOST_THREADS)
    assert p["shared"] <= H100["shared_per_block"]
    p = plan(32000, device=A100)
    assert (p["kernel"], p["cluster"], p["threads"]) == ("on_chip", 1, MOST_THREADS)


@pytest.mark.parametrize(("columns", "device"), [(128256, A100), (32000, RTX3090), (1 << 20, H100)])
def test_rows_that_do_not_fit_are_read_twice(columns: int, device: dict[str, int]) -> None:
    p = plan(columns, device=device)
    assert (p["kernel"], p["cluster"], p["blocks"]) == ("two_reads", 1, 8192)


def test_forced_without_clusters() -> None:
    assert plan(128256, device=H100 | {"max_cluster": 1})["kernel"] == "two_reads"
    assert plan(50257, device=H100 | {"max_cluster": 1})["kernel"] == "on_chip"


@pytest.mark.parametrize("room", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("columns", "size"), [(32000, 2), (128256, 2), (262144, 2), (262144, 4)])
def test_clusters_the_device_has_no_room_for(columns: int, size: int, room: int) -> None:
    """Half as many blocks, until there is room; two reads where these do not hold a row."""
    wanted, p = plan(columns, size=size), plan(columns, size=size, room=room)
    cluster = min(wanted["cluster"], room)
    if 2 * columns * size / cluster < H100["shared_per_block"] - exchange(MOST_THREADS):
        assert (p["kernel"], p["cluster"], p["blocks"]) == ("on_chip", cluster, 8192 * cluster)
        assert p["shared"] <= H100["shared_per_block"]
    else:
        assert (p["kernel"], p["cluster"], p["blocks"]) == ("two_reads", 1, 8192)


@pytest.mark.parametrize("columns", [1, 2, 8, 9, 64, 65, 255, 256, 1000, 1024])
@pytest.mark.parametrize("rows", [1, 127, 100000])
def test_small_rows_stay_in_registers(columns: int, rows: int) -> None:
    p = plan(columns, rows=rows, aligned=columns % 8 == 0)
    assert p["kernel"] == "registers"
    assert p["lanes"] * p["held"] >= columns
    assert p["lanes"] <= 32
    assert p["held"] <= 32
    assert p["blocks"] * (p["threads"] // p["lanes"]) >= rows > (p["blocks"] - 1) * (p["threads"] // p["lanes"])
    assert p["vectors"] == (columns in (256, 1000, 1024))


@pytest.mark.parametrize("columns", [2, 1000, 128256])
def test_mixed_dtypes_and_strides_take_the_general_kernel(columns: int) -> None:
    p = plan(columns, same_elements=False, alike=False, aligned=False)
    assert (p["kernel"], p["blocks"]) == ("any_layout", 8192)


def test_rows_misaligned_differently_take_the_general_kernel_unless_small() -> None:
    assert plan(50257, alike=False, aligned=False)["kernel"] == "any_layout"
    assert plan(256, alike=False, aligned=False)["kernel"] == "registers"
    assert plan(1000, alike=False, aligned=False)["kernel"] == "any_layout"


@pytest.mark.parametrize(
    ("columns", "size", "cluster"),
    [(2, 2, 1), (1000, 4, 1), (32000, 2, 1), (128256, 2, 4), (151936, 2, 8), (128256, 4, 8)],
)
def test_of_a_topk_teacher_only_the_student_is_kept(columns: int, size: int, cluster: int) -> None:
    p = plan(columns, size=size, same_elements=False, topk=True)
    assert (p["kernel"], p["cluster"], p["blocks"]) == ("on_chip", cluster, 8192 * cluster)
    assert 3 * (p["shared"] + RESERVED) <= H100["shared_per_multiprocessor"]
    bits = columns / 8 / cluster
    assert 0 <= p["shared"] - exchange(p["threads"]) - columns * size / cluster - bits < 48
    p = plan(columns, size=size, same_elements=False, topk=True, again=False)
    assert p["kernel"] == "two_reads"
    assert columns / 8 <= p["shared"] - exchange(p["threads"]) < columns / 8 + 12
    assert plan(columns, size=size, same_elements=False, alike=False, topk=True)["kernel"] == "two_reads"


def test_several_dtypes_are_widened_on_chip() -> None:
    flags = {"same_elements": False, "alike": False, "aligned": False, "widened": True}
    assert plan(128256, size=4, **flags)["cluster"] == 16
    for columns in (2, 1000, 32000):
        assert plan(columns, size=4, **flags)["kernel"] == "on_chip"
        for once in ({"again": False}, {"given": True}):
            p = plan(columns, size=4, **once, **flags)
            assert (p["kernel"], p["widened"]) == ("two_reads", True)
    assert plan(128256, size=4, device=A100, **flags)["kernel"] == "two_reads"


def test_small_rows_that_are_not_whole_vectors() -> None:
    assert plan(256, aligned=False)["kernel"] == "registers"
    assert plan(257, aligned=False)["kernel"] == "on_chip"


def test_for_one_look_one_read_is_enough() -> None:
    assert plan(128256, again=False)["kernel"] == "two_reads"
    assert plan(128256, given=True)["kernel"] == "two_reads"
    assert plan(128256, again=False, rows=16)["kernel"] == "on_chip"  # a block per row would leave most idle


def test_few_rows_spread_over_more_blocks() -> None:
    assert plan(32000, rows=8)["cluster"] == 8  # more would leave each block less than it is worth
    assert plan(32000, rows=100)["cluster"] == 2
    assert plan(2000, rows=8)["cluster"] == 1


@pytest.mark.parametrize("columns", [1025, 4999, 50257, 151936, 262144, 10**6])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("device", [H100, A100, RTX3090])
@pytest.mark.parametrize("rows", [1, 64, 10**6])
def test_every_plan_fits_its_device(columns: int, size: int, device: dict[str, int], rows: int) -> None:
    for again in (True, False):
        p = plan(columns, size=size, device=device, rows=rows, again=again)
        assert p["shared"] <= device["shared_per_block"]
        assert p["cluster"] <= device["max_cluster"]
        assert p["threads"] % 32 == 0
        assert 64 <= p["threads"] <= MOST_THREADS
        assert p["blocks"] == rows * p["cluster"]
