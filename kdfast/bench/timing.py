"""Calls that take turns in one process, in another order each time: machines are shared and their clocks move, so a slow
moment hits all alike; and none always finds in caches and allocator what the same other has left."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

Name = TypeVar("Name")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(
    calls: Mapping[Name, Callable[[], object]], device: str, *, rounds: int = 5, seconds: float = 0.0, warm: int = 1
) -> dict[Name, list[float]]:
    """Milliseconds of each call, in turn, of `rounds` rounds and more until `seconds` have passed.

    Args:
        device: "cuda" waits for the GPU before and after each call.
        warm: rounds before those: compilation, allocator, caches.
    """
    times: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(warm):
        for call in calls.values():
            call()
    turns, order = list(calls.items()), random.Random(0)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or min(map(len, times.values())) < rounds:
        order.shuffle(turns)
        for name, call in turns:
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def back_to_back(
    calls: Mapping[str, Callable[[], object]], device: str, *, rounds: int = 5, seconds: float = 0.0
) -> dict[str, list[float]]:
    """Milliseconds of each call, in turn, of `rounds` rounds and more until `seconds` have passed; a round is as many calls
    as take some 20 ms, without a wait between them, so that the GPU is never short of work.

    Args:
        device: "cuda" measures by events on the current stream, others by the clock.
    """
    many = {}
    for name, call in calls.items():
        call()
        many[name] = min(500, max(1, int(20 / max(_mean(call, 1, device), 1e-3))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or min(map(len, times.values())) < rounds:
        for name, call in calls.items():
            times[name].append(_mean(call, many[name], device))
    return times


def _mean(call: Callable[[], object], many: int, device: str) -> float:
    """Milliseconds of one of so many calls."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(many):
            call()
        return 1e3 * (time.perf_counter() - start) / many
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(many):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / many


def in_graph(call: Callable[[], object], many: int = 20) -> float:
    """Milliseconds of a call on the GPU alone: of so many calls in one CUDA graph, without the host's part."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as capture requires
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(many):
            call()
    graph.replay()
    return min(_mean(graph.replay, 10, "cuda") for _ in range(5)) / many
