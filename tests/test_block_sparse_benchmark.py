"""The benchmark of layers of which some blocks live compares like with like, and times nothing else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import block_sparse as benchmark


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WIDTH": 64, "INNER": 128, "ROWS": (6,), "DENSITIES": (1.0, 0.5)}.items():
        monkeypatch.setattr(benchmark, name, value)


def test_every_case_is_measured() -> None:
    results = benchmark.measure(0.0)
    assert len(results) == benchmark.table(results).row_count == 2 * 2 * 2 * 2 * 2
    assert all(ms > 0 for r in results for ms in r["ms"].values())
    assert {name for r in results for name in r["ms"]} == {"dense", "gather", "kdfast", "bsr linear", "bsr product"}


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = benchmark.kdfast.block_sparse_linear
    wrong: Any = lambda *args: 1.1 * right(*args)  # noqa: E731
    monkeypatch.setattr(benchmark.kdfast, "block_sparse_linear", wrong)
    with pytest.raises(AssertionError, match=r"kdfast: a result differs by .*: not worth timing"):
        benchmark.Case(torch.float32, 6, 32, 0.5, 128, 64).check()


def test_amxs_slow_rounds_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"dense": [4.0, 9.0, 4.4, 10.0], "kdfast": [1.0, 1.0, 2.0, 1.0]}
    monkeypatch.setattr(benchmark.timing, "interleaved", lambda *_, **__: times)
    assert benchmark.timed({}, 0.0, True) == {
        "ms": {"dense": pytest.approx(4.2), "kdfast": 1.5},
        "ratios": {"dense": pytest.approx(3.1), "kdfast": 1.0},
    }
    assert benchmark.timed({}, 0.0, False)["ms"]["dense"] == pytest.approx(6.7)
