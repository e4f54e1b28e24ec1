"""Files of `kdfast bench`: what is added to one that is there, and what is refused before it is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import call, refused

from kdfast.bench import harness
from kdfast.bench.peers import measure

CASES = [harness.Case("kl_div", (16, width), "float32", True) for width in (57, 58, 59)]
FACTS = {"date": "2026-01-01", "torch": "2.10.0", "device": "A CPU", "threads": 2, "load_before": 0.5}


def result(case: harness.Case, ms: float) -> harness.Result:
    numbers = dict.fromkeys(("mapped", "eager", "rate", "roofline", "peak_memory", "eager_peak_memory"), 1.0)
    return harness.Result(case, kdfast=ms, compiled=None, **numbers)


def test_other_cases_stay(tmp_path: Path) -> None:
    first = harness.save([result(case, 1.0) for case in CASES[:2]], FACTS, tmp_path)
    assert (first.replaced, first.kept) == (0, 0)
    second = harness.save([result(case, 2.0) for case in CASES[1:]], FACTS | {"load_before": 0.2}, tmp_path)
    assert (second.path, second.replaced, second.kept) == (first.path, 1, 1)
    results, facts = harness.load(second.path)
    assert {r.case: r.kdfast for r in results} == dict(zip(CASES, (1.0, 2.0, 2.0), strict=True))
    assert facts == FACTS  # with the largest load


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"torch": "2.11.0"}, "expected results of torch 2.11.0, got those of torch 2.10.0; choose another folder"),
        ({"threads": 4}, "expected results of threads 4, got those of threads 2"),
        ({"peers": {"trl": "1.1"}}, "expected results of trl 1.1, got those of trl 1.0; choose"),
    ],
)
def test_another_environment_is_refused(changed: dict[str, Any], expected: str, tmp_path: Path) -> None:
    facts: dict[str, Any] = FACTS | {"peers": {"trl": "1.0"}}
    path = harness.save([result(CASES[0], 1.0)], facts, tmp_path).path
    before = path.read_text()
    with pytest.raises(ValueError, match=f"^output {path}: {expected}"):
        harness.save([result(CASES[1], 1.0)], facts | changed, tmp_path)
    assert path.read_text() == before


def test_another_variant_has_another_file(tmp_path: Path) -> None:
    """Processors of one name may differ in what they multiply with."""
    paths = {harness.results_path(FACTS | {"cpu_variant": of}, tmp_path, "peers").name for of in ("amx", "avx512_bf16")}
    assert paths == {"peers-a-cpu-amx-2026-01-01.json", "peers-a-cpu-avx512-bf16-2026-01-01.json"}
    assert harness.results_path(FACTS, tmp_path, "peers").name == "peers-a-cpu-2026-01-01.json"


def test_libraries_are_added(tmp_path: Path) -> None:
    row = measure.Row("kl_div", (16, 57), "float32", "kdfast", 2.0, 40.0, 1e-7)
    measure.save([row, replace(row, way="TRL, GKD")], FACTS | {"peers": {"trl": "1.0"}}, tmp_path)
    saved = measure.save([row, replace(row, way="torchtune")], FACTS | {"peers": {"torchtune": "0.6"}}, tmp_path)
    assert (saved.replaced, saved.kept) == (1, 1)
    rows, facts = measure.load(saved.path)
    assert facts["peers"] == {"trl": "1.0", "torchtune": "0.6"}
    assert {row.way for row in rows} == {"kdfast", "TRL, GKD", "torchtune"}


def test_command_says_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "cases", lambda *_, **__: iter(CASES[:1]))
    monkeypatch.setattr(harness, "run", lambda case, *_, **__: result(case, 3.0))
    assert call(monkeypatch, "bench", "--output", tmp_path) == 0
    assert "was there" not in capsys.readouterr().out
    monkeypatch.setattr(harness, "cases", lambda *_, **__: iter(CASES[:2]))
    assert call(monkeypatch, "bench", "--output", tmp_path) == 0
    assert "1 of its results are replaced, 0 others kept" in " ".join(capsys.readouterr().out.split())
    (path,) = tmp_path.glob("operators-*.json")
    assert all(path.with_suffix(ending).is_file() for ending in (".md", ".png"))


@pytest.mark.parametrize("arguments", [(), ("--peers",)])
def test_command_refuses_before_it_measures(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(harness, "run", measured)
    monkeypatch.setattr(measure, "measure", measured)
    facts = harness.environment("cpu") | {"peers": {}}
    path = harness.results_path(facts, tmp_path, "peers" if arguments else "operators")
    harness.write([], facts | {"python": "2.7"}, path)
    told = refused(monkeypatch, capsys, "bench", *arguments, "--only", "kl_div-*", "--output", tmp_path)
    assert f"output {path}: expected results of python {facts['python']}, got those of python 2.7" in told
    path.write_text("{}")
    assert "expected a file of kdfast bench, got another" in refused(
        monkeypatch, capsys, "bench", *arguments, "--only", "kl_div-*", "--output", tmp_path
    )
    assert "expected a folder that can be written, got" in refused(
        monkeypatch, capsys, "bench", *arguments, "--only", "kl_div-*", "--output", path
    )
