"""What a call of an operator must cost, and whether it goes through kdfast's kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdfast.bench import harness, timing
from kdfast.bench.harness import Case
from kdfast.bench.registry import OPERATORS
from kdfast.bench.registry.operator import cast
from kdfast.doctor.speeds import Speeds

DTYPES = ("float32", "bfloat16", "float16", "float64")
LONGEST = 100.0  # milliseconds that a call may take at the least to be tried as a whole
MEMORY = 6  # eager code and the float64 check of some rows beside what a call needs: times its least bytes


@dataclass(frozen=True)
class Cost:
    """What a call must do at the least.

    `bytes`: both sides read once, the gradient written once; `flops`: of matrix products, None where there are none.
    """

    bytes: float
    flops: float | None
    dtype: str

    def floor(self, speeds: Speeds) -> float:
        """Milliseconds: of the bytes at the speed of a copy, or of the arithmetic, whichever is longer."""
        arithmetic = 0.0 if self.flops is None else self.flops / speeds.of_product(self.dtype)
        return 1e3 * max(self.bytes / speeds.copy, arithmetic)


@dataclass(frozen=True)
class Tried:
    """A call that was made, checked against float64 and timed.

    `shape`: with less in the first dimension where the whole would take long or much memory; `floor` and `took`:
    milliseconds; `kernels`: kdfast's operators of `torch.ops` that it went through.
    """

    shape: tuple[int, ...]
    floor: float
    took: float
    kernels: tuple[str, ...]


def case_of(op: str, shape: tuple[int, ...] | None, dtype: str, gradient: bool, device: str) -> Case:
    """
    Raises:
        ValueError: no operator or dtype of kdfast, or a shape of other dimensions than the operator's benchmarks have.
    """
    if op not in OPERATORS:
        raise ValueError(f"op: expected one of {', '.join(OPERATORS)}, got {op!r}")
    known = DTYPES if device == "cpu" else DTYPES[:-1]
    if dtype not in known:
        raise ValueError(f"dtype: expected one of {', '.join(known)}, got {dtype!r}")
    operator = OPERATORS[op]
    example = ((operator.cuda_shapes if device == "cuda" else ()) or operator.cpu_shapes)[0][0]
    if shape is not None and (len(shape) != len(example) or min(shape) < 1):
        got = "x".join(map(str, shape))
        raise ValueError(f"shape: expected {len(example)} numbers of 1 or more, such as {shown(example)}, got {got}")
    return Case(op, example if shape is None else shape, dtype, gradient)


def cost(case: Case) -> Cost:
    """By the registry, without memory.

    Raises:
        ValueError: a shape that the operator cannot have.
    """
    operator = OPERATORS[case.operator]
    try:
        sides = operator.make(case.shape, {"device": "meta"})
    except RuntimeError as error:
        expected = f"one that {case.operator} can have"
        raise ValueError(f"shape: expected {expected}, got {shown(case.shape)} ({error})") from None
    student, teacher = (cast(side, getattr(torch, case.dtype)) for side in sides)
    flops = None if operator.flops is None else operator.flops(student, case.gradient)
    return Cost(harness.needed_bytes(operator, student, teacher, case.gradient), flops, case.dtype)


def attempt(case: Case, device: str, speeds: Speeds) -> Tried:
    """Makes the call, or one of the same kind with less in its first dimension.

    Raises:
        AssertionError: its result is wrong.
        ValueError: the least of them takes more memory than there is.
    """
    room = _available(device) / MEMORY
    while case.shape[0] > 1 and (cost(case).floor(speeds) > LONGEST or cost(case).bytes > room):
        case = replace(case, shape=((case.shape[0] + 1) // 2, *case.shape[1:]))
    if cost(case).bytes > room:
        expected = f"one that takes at most {room / 1e9:.1f} GB, a {MEMORY}th of this machine's free memory"
        raise ValueError(f"shape: expected {expected}, got {shown(case.shape)}, {cost(case).bytes / 1e9:.1f} GB")
    student, teacher = harness.make(case, device)
    harness.check(OPERATORS[case.operator], student, teacher)
    call = harness.caller(case, student, teacher)(harness.ours(case))
    kernels = _kernels(call)
    times = timing.interleaved({"kdfast": call}, device, rounds=3)
    return Tried(case.shape, cost(case).floor(speeds), min(times["kdfast"]), kernels)


def is_fast(case: Case, tried: Tried) -> bool:
    """Whether the call went through a kernel of kdfast; those of vendor products by design have none."""
    return bool(tried.kernels) or not OPERATORS[case.operator].native


def _kernels(call: Callable[[], object]) -> tuple[str, ...]:
    """The operators of `torch.ops.kdfast` that a call dispatches to."""
    seen: dict[str, None] = {}

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "kdfast":
                seen[func._schema.name.removeprefix("kdfast::")] = None
            return func(*args, **(kwargs or {}))

    with Listening():
        call()
    return tuple(seen)


def _available(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


def shown(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
