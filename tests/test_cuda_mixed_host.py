"""CUDA source on the CPU (tests/shim.py): student and teacher of different dtypes, and gradients of a third."""

from __future__ import annotations

import ctypes
import itertools
import platform
from typing import Any

import pytest
import torch
from shim import IGNORED, NONE, Case, Device, Loss, assert_close, logits, shim

import kdfast
from kdfast.ops._call import KNOWN_NOTHING
from kdfast.ops._divergence import KINDS

__all__ = ["shim"]  # a fixture
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the shim switches fibers on x86-64 only")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = pytest.mark.parametrize(("student", "teacher"), list(itertools.permutations(DTYPES, 2)))
TINY, AMPERE = Device(shared=4 << 10), Device(shared=4 << 10, max_cluster=1)


def kernel(columns: int, device: Device) -> tuple[str, int]:
    shared = {"shared_per_block": device.shared, "shared_per_multiprocessor": 3 * (device.shared + 1024)}
    limits: dict[str, Any] = {"multiprocessors": 1, "max_cluster": device.max_cluster} | shared
    flags = {"same_elements": False, "alike": False, "aligned": False, "again": True, "given": False, "widened": True}
    plan = kdfast._C.cuda_plan(rows=3, columns=columns, element_size=4, **flags, **limits)
    return plan["kernel"], plan["cluster"]


@PAIRS
@pytest.mark.parametrize("kind", ["kl_div", "js_div"])
@pytest.mark.parametrize(
    ("columns", "device", "expected"),
    [
        (3, Device(), ("on_chip", 1)),
        (1501, Device(), ("on_chip", 1)),
        (1501, TINY, ("on_chip", 4)),
        (5001, TINY, ("on_chip", 16)),
        (1501, AMPERE, ("two_reads", 1)),
    ],
)
def test_widened_on_the_way(
    shim: ctypes.CDLL,
    columns: int,
    device: Device,
    expected: tuple[str, int],
    kind: str,
    student: torch.dtype,
    teacher: torch.dtype,
) -> None:
    """Rows of odd widths start in turn at each place of four; the outputs lie as the first."""
    assert kernel(columns, device) == expected
    case = Case(shim, device, seed=7)
    case.check(logits(5, columns, student), logits(5, columns, teacher), Loss(kind))
    labels = torch.tensor([0, columns - 1, IGNORED, columns // 2, 1])
    of = Loss(kind, labels=labels, alpha=0.4, smoothing=0.1, columns=columns, reduction=NONE)
    case.check(logits(5, columns, student, width=columns + 1), logits(5, columns, teacher, width=columns + 1), of)


@pytest.mark.parametrize("offset", range(1, 8))
def test_starts(shim: ctypes.CDLL, offset: int) -> None:
    """Alike in groups of four, or not: both take the right path."""
    for of_outputs in (0, offset):
        case = Case(shim, TINY, offset=of_outputs)
        case.check(logits(3, 1501, torch.float32, offset=offset), logits(3, 1501, torch.bfloat16, offset=offset))
        case.check(logits(3, 1501, torch.float16, offset=offset), logits(3, 1501, torch.bfloat16, offset=offset + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_divergence(shim: ctypes.CDLL, kind: str) -> None:
    case = Case(shim, TINY, seed=3)
    case.check(logits(3, 1501, torch.bfloat16), logits(3, 1501, torch.float32), Loss(kind, mixing=0.1))
    case.check(logits(1501, 3, torch.bfloat16).T, logits(3, 1501, torch.float32), Loss(kind, mixing=0.8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_third_dtype(shim: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Logits of one dtype or two, and memory for the gradient that has another."""
    case = Case(shim, TINY)
    for student, teacher in itertools.product(DTYPES, DTYPES):
        s, t = logits(3, 1501, student, width=1504), logits(3, 1501, teacher, width=1504)
        loss, gradient = Loss(columns=1501).exact(s, t)
        memory = torch.full((5, 1504), 7.0, dtype=dtype)
        args = Loss(columns=1501).args(s)
        ours, _ = case.ops.divergence_into(memory[1:4], s, t, *args, None, KNOWN_NOTHING)
        assert_close(ours, loss, torch.float32)
        assert_close(memory[1:4], gradient, dtype)
        assert (memory[::4] == 7).all()
    case.clean()
