"""`kdfast bench --peers`: what is timed beside kdfast computes the same, and a table says who wins."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import call, refused

from kdfast.bench import harness
from kdfast.bench.peers import comparisons, measure, ways
from kdfast.bench.peers.comparisons import COMPARISONS, Case

OURS_AND_TORCH = {"kdfast", "torch"}


def small(name: str, dtype: str = "float32") -> Case:
    shape = (6, 31, 57) if COMPARISONS[name].operator.startswith("linear") else (16, 57)
    return Case(COMPARISONS[name], shape, dtype)


def plain(name: str) -> dict[str, ways.Way]:
    """Without what is compiled, which takes long."""
    every = measure.ways_of(COMPARISONS[name], {})
    return {way: of for way, of in every.items() if way not in measure.COMPILES}


@pytest.mark.parametrize("name", COMPARISONS)
def test_rows(name: str) -> None:
    rows = measure.measure(small(name), plain(name), "cpu", seconds=0.0)
    assert {row.way for row in rows} >= OURS_AND_TORCH
    for row in rows:
        assert row.error is None
        assert row.milliseconds > 0
        assert 0 < row.gradient_error < 1e-5


def test_as_many_rows_as_classes() -> None:
    """Of which the first rows are taken, and all classes."""
    case = Case(COMPARISONS["linear_js_div_labels"], (16, 16, 16), "float32")
    rows = measure.measure(case, plain(case.comparison.name), "cpu", seconds=0.0)
    assert [row.error for row in rows] == [None, None]


def test_compiled_is_the_idiom() -> None:
    case = small("kl_div")
    way = measure.ways_of(case.comparison, {}, backend="eager")[measure.COMPILED]
    right = case.comparison.exact()(comparisons.part(case.inputs("cpu"), 99, torch.float64))()
    assert max(measure.apart(way(case.inputs("cpu"))(), right)) < 1e-5


@pytest.mark.parametrize("rows", [3, 16])
def test_errors_are_of_so_many_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MOST_LOGITS", rows * 57)
    made = measure.measure(small("js_div", "bfloat16"), plain("js_div"), "cpu", seconds=0.0)
    assert all(1e-4 < row.gradient_error < 1e-2 for row in made)


def test_what_fails_or_computes_another_loss_is_a_row() -> None:
    def fails(inputs: ways.Inputs) -> ways.Call:
        raise RuntimeError("no kernel\nfor this")

    def in_bfloat16(inputs: ways.Inputs) -> torch.Tensor:
        return harness.OPERATORS["kl_div"].eager(*(x.bfloat16() for x in (*inputs.student, *inputs.teacher)))

    others = {"fails": fails, "rounds": ways.way(in_bfloat16), "reverse": plain("reverse_kl_div")["torch"]}
    rows = measure.measure(small("kl_div"), plain("kl_div") | others, "cpu", seconds=0.0)
    told = {row.way: row.error for row in rows}
    assert told["kdfast"] is told["torch"] is None
    assert told["fails"] == "RuntimeError: no kernel for this"
    assert "another loss" in (told["rounds"] or "")
    assert "another loss" in (told["reverse"] or "")
    said = measure.said(rows)
    assert said[1] == "Failed: kl_div-16x57-float32, fails: RuntimeError: no kernel for this."
    assert len(said) == 4


def test_the_table_tells_who_wins() -> None:
    row = measure.Row("kl_div", (16, 57), "float32", "kdfast", 2.0, 40.0, 1e-7)
    rows = [row, replace(row, way="a", milliseconds=1.5), replace(row, way="b", megabytes=20.0, gradient_error=9e-8)]
    rows.append(replace(row, way="c", milliseconds=1.95))
    title = "KL(t ‖ s) of logits: 16×57 f32"
    assert measure.wins(rows) == [f"{title}, ms: a 1.50, kdfast 2.00", f"{title}, MB: b 20, kdfast 40"]
    text = measure.markdown(rows).splitlines()
    assert text[2] == f"| {title} | kdfast | 2.00 | 1.00 | 40 | 1.0e-07 |"
    assert text[3] == "|  | a | **1.50** | 0.75 | 40 | 1.0e-07 |"
    assert text[4] == "|  | b | 2.00 | 1.00 | **20** | **9.0e-08** |"
    assert measure.said([row]) == ["Better than kdfast: none."]


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(comparisons, "cases", lambda device, only="*": [small("kl_div")])
    every = plain("kl_div")
    monkeypatch.setattr(measure, "ways_of", lambda comparison, found: every)
    monkeypatch.setitem(ways.LIBRARIES, "torchtune", lambda device: importlib.import_module("no_such_library"))
    for _ in range(2):  # the second run's rows take the place of the first's
        assert call(monkeypatch, "bench", "--peer", "torchtune", "--seconds", "0.1", "--output", tmp_path) == 0
    out, err = capsys.readouterr()
    assert "torchtune (No module named 'no_such_library')" in err
    assert "KL(t ‖ s) of logits: 16×57 f32" in out
    (path,) = tmp_path.glob("peers-*.json")
    rows, facts = measure.load(path)
    assert [row.way for row in rows] == ["kdfast", "torch"]
    assert facts["peers"] == {}
    assert path.with_suffix(".md").read_text() == measure.markdown(rows) + "\n"
    assert json.loads(path.read_text())["results"][0]["shape"] == [16, 57]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--peer", "lige"), "peer: expected liger-kernel, trl, torchtune, got 'lige'"),
        (
            ("--peers", "--only", "nothing"),
            "only: expected a pattern of case names, got 'nothing'; there are kl_div-*, ",
        ),
        (
            ("--only", "hidden_mse-*bf16*"),
            "only: expected a pattern of case names, got 'hidden_mse-*bf16*'; there are hidden_mse-5x32x128x384-float32-grad",
        ),
        (("--peers", "--sweep"), "sweep: expected --sweep or --peers, got both"),
    ],
)
def test_errors(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(monkeypatch, capsys, "bench", *arguments)


@pytest.mark.parametrize("library", ways.LIBRARIES)
def test_libraries_compute_the_same(library: str) -> None:
    found = ways.find([library], "cpu")
    if found.missing:
        pytest.skip(found.missing[library])
    assert found.versions
    compared = 0
    for name, theirs in found.ways.items():
        inputs, exact = small(name).inputs("cpu"), COMPARISONS[name].exact()
        right = exact(comparisons.part(inputs, 99, torch.float64))()
        for way, of in theirs.items():
            if way in measure.COMPILES:  # for half a minute
                continue
            errors = measure.apart(of(inputs)(), right)
            assert max(errors) < 1e-5, (name, way, errors)
            compared += 1
    assert compared >= {"liger-kernel": 1, "trl": 4, "torchtune": 4}[library]
