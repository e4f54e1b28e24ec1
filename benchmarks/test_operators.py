"""Every operator's benchmark under pytest-benchmark: `pytest benchmarks` (all cases of `kdfast bench`).

pytest-benchmark records kdfast's own time; what it is compared with, in the same process and in turn, is in
`extra_info`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from kdfast.bench import harness, timing
from kdfast.bench.registry import OPERATORS
from kdfast.bench.registry.operator import apply, tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in harness.cases(device=DEVICE)])
def test_speed(case: harness.Case, benchmark: Any) -> None:
    result = harness.run(case, DEVICE)
    benchmark.extra_info.update(asdict(result))
    benchmark.extra_info["environment"] = harness.environment(DEVICE)
    student, teacher = harness.make(case, DEVICE)
    operator = OPERATORS[case.operator]
    more = operator.arguments(student)

    def call() -> None:
        loss = apply(operator.function, student, teacher, **more)
        if case.gradient:
            torch.autograd.grad(loss, tensors(student))
        timing.synchronize(DEVICE)

    benchmark(call)
