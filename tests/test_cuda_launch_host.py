"""What the CUDA launchers do on the host, in the shim (tests/shim.py)."""

from __future__ import annotations

import ctypes
import platform
import random

import pytest
from shim import Case, Device, shim

__all__ = ["shim"]  # a fixture
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the shim switches fibers on x86-64 only")


@pytest.mark.parametrize("sizes", [(50 << 10, 200 << 10), (200 << 10, 50 << 10), (100 << 10, 100 << 10)])
def test_two_threads_allow_a_kernel_its_shared_memory(shim: ctypes.CDLL, sizes: tuple[int, int]) -> None:
    """The shim refuses a launch that another thread has left less than it takes. It also refuses to be told less than
    before: no luck is needed to find that."""
    Case(shim, Device())
    shim.cuda_host_shared_calls()
    for _ in range(200):
        assert shim.cuda_host_launch_by_two(*sizes) == 2
        assert shim.cuda_host_shared_calls() == 1


def test_divisions_by_numbers_of_the_launch(shim: ctypes.CDLL) -> None:
    """As the rows of layers are told apart."""
    shim.cuda_host_divided.argtypes = [ctypes.c_uint32, ctypes.c_int64]
    shim.cuda_host_divided.restype = ctypes.c_uint32
    most = 2**31 - 1
    numbers = random.Random(0)
    divisors = [1, 2, 3, 5, 7, 12, 16, 127, 128, 641, 65535, 65537, 2**30 - 1, 2**30, 2**30 + 1, most]
    for by in [*divisors, *(numbers.randint(1, 2 ** numbers.randint(1, 31) - 1) for _ in range(300))]:
        edges = [k * by + d for k in (1, 2, most // by) for d in (-1, 0, 1)]
        for n in (0, 1, most, *edges, *(numbers.randint(0, most) for _ in range(20))):
            if 0 <= n <= most:
                assert shim.cuda_host_divided(n, by) == n // by
