"""The registry's cases by CUDA events, the headline ones first: time, share of the ceiling that was measured in the same run,
× eager, memory."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from kdfast.bench import harness, timing
from kdfast.bench.evidence.record import DEVICE, DRY, Record
from kdfast.bench.registry import OPERATORS
from kdfast.bench.registry.operator import Side, apply, tensors

SECONDS = 0.02 if DRY else 0.3  # of each case
SHORT_MS = 0.3  # below, the host's part of a call shows: a graph has none
HEADLINES = (
    *("kl_div-*x128256-*-grad", "kl_div-*x151936-bfloat16-grad", "kl_div-8192x2-*-grad", "js_div-*-grad"),
    *("linear_kd_loss-*-grad", "qk_attention_mse-*x4096x*-grad", "attention_mse-*-grad", "hidden_mse-*-grad"),
    *("cosine_distance-*-grad", "kl_div-*-grad", "qk_*-grad", "*-grad"),
)
# Loss and gradient, or the loss alone, of kdfast and of the code people write.
Calls = dict[str, Callable[[], object]]


def cases(only: str = "") -> list[harness.Case]:
    """Whose names contain `only`; a rehearsal's are the GPU's, smaller."""
    found = list(harness.cases(f"*{only}*", "cuda"))
    order = {case: i for i, case in enumerate(found)}
    found.sort(key=lambda case: (place(case), order[case]))
    if DRY:
        found = [replace(case, shape=tuple(min(n, 16) for n in case.shape)) for case in found[::6]]
    return found


def place(case: harness.Case) -> int:
    return next((i for i, pattern in enumerate(HEADLINES) if fnmatch.fnmatch(case.name, pattern)), len(HEADLINES))


def ceilings(record: Record) -> dict[str, float]:
    """Bytes per millisecond of a copy, read and written; FLOP per millisecond of a matrix product in each dtype, on random
    numbers: zeros are faster."""
    size, count = (64, 1 << 16) if DRY else (8192, 1 << 31)
    source = torch.empty(count, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    found = {"copy": 2 * count / fastest(lambda: target.copy_(source))}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
        found[str(dtype).removeprefix("torch.")] = 2 * size**3 / fastest(lambda a=a, b=b: a @ b)  # type: ignore[misc]
    rates = {"copy_GBps": found["copy"] / 1e6} | {f"{n}_TFLOPps": x / 1e9 for n, x in found.items() if n != "copy"}
    record.facts |= {"ceilings": rates}
    record.add("ceilings", **rates)
    return found


def fastest(call: Callable[[], object]) -> float:
    return statistics.median(timing.back_to_back({"": call}, DEVICE, seconds=SECONDS)[""])


def calls_of(case: harness.Case, student: Side, teacher: Side) -> Calls:
    operator = OPERATORS[case.operator]
    more = operator.arguments(student)
    upstream = torch.randn_like(apply(operator.reference, student, teacher, **more)) if operator.product else None
    reduction = {} if operator.product else {"reduction": "batchmean"}

    def caller(loss_of: Callable[..., torch.Tensor], **kwargs: Any) -> Callable[[], object]:
        def call() -> None:
            loss = apply(loss_of, student, teacher, **more, **kwargs)
            if case.gradient:
                torch.autograd.grad(loss, tensors(student), upstream)

        return call

    return {"kdfast": caller(operator.function, **reduction), "eager": caller(operator.eager)}


def measure(case: harness.Case, ceiling: dict[str, float], found: dict[str, Any]) -> None:
    """Fills `found` as it goes: what is known before an error stays."""
    operator = OPERATORS[case.operator]
    student, teacher = harness.make(case, DEVICE)
    harness.check(operator, student, teacher)
    calls = calls_of(case, student, teacher)
    found["ms"] = fastest(calls["kdfast"])
    if operator.flops is not None:
        found["needs_GFLOP"] = operator.flops(student, case.gradient) / 1e9
        least = 1e9 * found["needs_GFLOP"] / ceiling[case.dtype]
    else:
        found["needs_GB"] = harness.needed_bytes(operator, student, teacher, case.gradient) / 1e9
        least = 1e9 * found["needs_GB"] / ceiling["copy"]
    if found["ms"] < SHORT_MS and not DRY:
        found["graph_ms"] = timing.in_graph(calls["kdfast"])
    found["of_ceiling"] = least / found.get("graph_ms", found["ms"])
    found["peak_MB"] = harness.peak_memory(calls["kdfast"], DEVICE)
    times = timing.back_to_back(calls, DEVICE, rounds=2)
    found["eager_ms"] = statistics.median(times["eager"])
    found["x_eager"] = found["eager_ms"] / statistics.median(times["kdfast"])
    found["eager_peak_MB"] = harness.peak_memory(calls["eager"], DEVICE)


def run(record: Record) -> None:
    ceiling = ceilings(record)
    for case in cases(os.environ.get("ONLY", "")):
        with record.case(case.name) as found:
            measure(case, ceiling, found)
        if not DRY:
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()  # the next case's peak is its own
    record.failed = False  # errors are results here
