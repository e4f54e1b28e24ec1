"""One stage of the run on a GPU: `python -m kdfast.bench.evidence <stage> <folder>`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from kdfast.bench.evidence.record import Record

# Of each, the module whose `run(record)` it is. They are imported one at a time: a broken one stops no other.
STAGES = ("smoke", "tests", "benchmarks", "linear", "peers")


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in STAGES:
        sys.exit(f"kdfast.bench.evidence: expected a stage of {', '.join(STAGES)} and a folder, got {sys.argv[1:]}")
    record = Record(sys.argv[1], Path(sys.argv[2]))
    importlib.import_module(f"kdfast.bench.evidence.{record.stage}").run(record)
    sys.exit(record.failed)


if __name__ == "__main__":
    main()
