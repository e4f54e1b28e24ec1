"""The benchmark of layers of which a part lives compares like with like, and times nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import pruned_linear as benchmark

from kdfast.nn import SelectedLinear


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WIDTH": 48, "INNER": 96, "BATCH": 2, "ROWS": (64,), "LENGTHS": (4,), "STEPS": 1}.items():
        monkeypatch.setattr(benchmark, name, value)


def test_every_case_is_measured() -> None:
    results = benchmark.measure(0.0)
    assert {r["what"] for r in results} == {"prefix 64", "heads 4"}
    assert all(ms > 0 for r in results for ms in r["ms"].values())
    assert benchmark.table(results).row_count == len(results) == 2 * (2 * 3 + 1) * 2


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SelectedLinear.forward
    monkeypatch.setattr(SelectedLinear, "forward", lambda self, x: 1.1 * right(self, x))
    with pytest.raises(AssertionError, match=r"kdfast: a gradient differs by .*: not worth timing"):
        benchmark.heads(benchmark.DTYPES[0], 4)
