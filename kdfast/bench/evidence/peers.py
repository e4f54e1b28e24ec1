"""kdfast beside torch.compile, and beside the libraries of `kdfast.bench.peers` that can be imported. Last: it compiles for long."""

from __future__ import annotations

import os
from dataclasses import replace

from kdfast.bench.evidence.record import DEVICE, DRY, Record
from kdfast.bench.peers import comparisons, measure, ways
from kdfast.bench.peers.comparisons import Case

SECONDS = 0.05 if DRY else 1.0  # of each case


def cases() -> list[Case]:
    """Those of hidden states first; a rehearsal's are the GPU's, smaller."""
    found = comparisons.cases("cuda", f"*{os.environ.get('ONLY', '')}*")
    found.sort(key=lambda case: not case.comparison.name.startswith("linear"))
    if DRY:
        found = [replace(case, shape=tuple(min(n, 16) for n in case.shape)) for case in found[::5]]
    return found


def run(record: Record) -> None:
    found = ways.find(list(ways.LIBRARIES), DEVICE)
    record.add("libraries", versions=found.versions, missing=found.missing)
    for case in cases():
        with record.case(case.name) as of_case:
            every = measure.ways_of(case.comparison, found.ways, backend="eager" if DRY else "inductor")
            for row in measure.measure(case, every, DEVICE, SECONDS):
                of_case[row.way] = row.error or {
                    "ms": row.milliseconds, "peak_MB": row.megabytes, "gradient_error": row.gradient_error
                }  # fmt: skip
    record.failed = False  # errors are results here
