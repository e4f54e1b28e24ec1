"""Calls that take turns in one process: machines are shared and their clocks move, so a slow moment hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(
    calls: Mapping[str, Callable[[], object]], device: str, *, rounds: int = 5, seconds: float = 0.0, warm: int = 1
) -> dict[str, list[float]]:
    """Milliseconds of each call, in turn, of `rounds` rounds and more until `seconds` have passed.

    Args:
        device: "cuda" waits for the GPU before and after each call.
        warm: rounds before those: compilation, allocator, caches.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warm):
        for call in calls.values():
            call()
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or min(map(len, times.values())) < rounds:
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return times
