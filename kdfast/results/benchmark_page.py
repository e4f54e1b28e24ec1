"""What `kdfast bench` has left as a page of HTML: of the operators, of a sweep over widths, or beside other libraries."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kdfast.bench import harness, plots
from kdfast.bench.peers import measure
from kdfast.results.page import render, svg

EXPECTED = "one file of kdfast bench, such as operators-….json or peers-….json, or folders of runs"
Facts = dict[str, Any]


def page(path: Path) -> str:
    """
    Raises:
        ValueError: it is another file.
    """
    try:
        stored = json.loads(path.read_text())["results"]
        of_peers = "way" in stored[0]
        found: tuple[Any, Facts] = measure.load(path) if of_peers else harness.load(path)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, IndexError):
        raise ValueError(f"runs {path}: expected {EXPECTED}, got another file") from None
    if of_peers:
        return _peers(*found)
    return _sweep(*found) if all(result["compiled"] is None for result in stored) else _operators(*found)


def _operators(results: list[harness.Result], facts: Facts) -> str:
    return _of_cases(results, facts, {"Speed": plots.plot, "Roofline": plots.plot_roofline})


def _sweep(results: list[harness.Result], facts: Facts) -> str:
    return _of_cases(results, facts, {"Speed": plots.plot_sweep})


def _of_cases(results: list[harness.Result], facts: Facts, drawings: dict[str, Callable[..., None]]) -> str:
    return render(
        title=f"kdfast bench: {facts['device']}",
        first=harness.HEADER[0],
        headings=harness.HEADER[1:],
        rows=[(name, cells) for name, *cells in harness.table(results)],
        legend="ms, × eager and × comp. (torch.compile): what a user waits for. Rate and % of the roof: the kernel alone. "
        "MB: peak memory beyond the inputs.",
        drawings=[(name, svg(partial(draw, results, facts))) for name, draw in drawings.items()],
        runs=[_environment(facts)],
    )


def _peers(rows: list[measure.Row], facts: Facts) -> str:
    shown: list[tuple[str, Sequence[str]]] = []
    for title, of_case in measure.by_case(rows).items():
        cells = measure.cells(of_case, lambda text: Markup("<b>{}</b>").format(text))
        shown += [(title, ()), *((way, more) for way, *more in cells)]
    drawn = {"Time": "milliseconds", "Memory": "megabytes"}
    return render(
        title=f"kdfast bench --peers: {facts['device']}",
        first=measure.HEADER[0],
        headings=measure.HEADER[1:],
        rows=shown,
        legend="Loss and gradient. MB: peak memory beyond the inputs, gradients included. Gradient error: the norm of its "
        "difference from float64 over its norm. The best of a case is bold.",
        said=measure.said(rows),
        drawings=[
            (name, svg(partial(plots.plot_peers, rows, facts, quantity=quantity))) for name, quantity in drawn.items()
        ],
        runs=[_environment(facts)],
    )


def _environment(facts: Facts) -> tuple[str, Facts, str]:
    versions = facts.get("peers", {})
    told = ", ".join(f"{name} {version}" for name, version in {"torch": facts["torch"], **versions}.items())
    return "environment", {name: value for name, value in facts.items() if name != "peers"}, f"{told}, {facts['date']}"
