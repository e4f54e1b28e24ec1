"""The CUDA tests, shared among processes by hand: pytest-xdist may not be there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from kdfast.bench.evidence.record import DRY, Record

PROCESSES = 2 if DRY else 4


def files() -> list[str]:
    """Those that have tests for a GPU alone: the others may need what a bare machine lacks."""
    if DRY:
        return ["tests/test_cuda_plan.py"]
    return [str(path) for path in sorted(Path("tests").glob("test_cuda*.py")) if "mark.cuda" in path.read_text()]


def run(record: Record) -> None:
    """A log of each process, a line of each test as it ends: what was done shows, also of one that is killed."""
    only = os.environ.get("ONLY", "")
    command = [
        sys.executable,
        "-m",
        "pytest",
        *files(),
        "-vv",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
    ]
    command += [] if DRY else ["-m", "cuda", "--durations=5"]
    command += ["-k", only] if only else []
    processes = []
    for i in range(PROCESSES):
        log = (record.folder / f"tests-{i}.log").open("w")
        share = f"--share={i}/{PROCESSES}"
        processes.append((log, subprocess.Popen([*command, share], stdout=log, stderr=subprocess.STDOUT)))
    for i, (log, process) in enumerate(processes):
        code = process.wait()
        log.close()
        lines = (record.folder / f"tests-{i}.log").read_text().splitlines()
        broken = [line for line in lines if re.search(r"::.* (FAILED|ERROR)\b", line)]
        record.failed |= code not in (0, 5)  # 5: none of this share is named like ONLY
        record.add(f"tests, {i + 1} of {PROCESSES}", code=code, summary=lines[-1] if lines else "", failed=broken)
