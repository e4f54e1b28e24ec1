"""Times, memory and errors of the ways of a comparison, each checked before it is timed; their table, and who wins where."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kdfast.bench import harness, timing
from kdfast.bench.peers.comparisons import COMPARISONS, Case, Comparison, part
from kdfast.bench.peers.ways import LIGER_COMPILED, Call, Inputs, Made, Way, Ways

OURS, COMPILED = "kdfast", "torch.compile"
COMPILES = {COMPILED, LIGER_COMPILED}
# In float32, of a loss and of its gradient's norm, against float64.
SAME = 1e-4
# At most so many float64 logits are made of a side to compare with.
MOST_LOGITS = 2**27


@dataclass(frozen=True)
class Row:
    """A way in a case. milliseconds: the median of loss and gradient; megabytes: peak beyond the inputs, gradient
    included; gradient_error: norm against float64. error: why there is none of these."""

    comparison: str
    shape: tuple[int, ...]
    dtype: str
    way: str
    milliseconds: float = 0.0
    megabytes: float = 0.0
    gradient_error: float = 0.0
    error: str | None = None

    @property
    def case(self) -> Case:
        return Case(COMPARISONS[self.comparison], self.shape, self.dtype)


def ways_of(comparison: Comparison, ways: Ways, backend: str = "inductor") -> dict[str, Way]:
    """kdfast's, torch's, and those of other libraries."""

    def compiled(inputs: Inputs) -> Call:
        # Each case is compiled for itself: past a number of variants it would silently run eager.
        torch.compiler.reset()
        call: Call = torch.compile(comparison.torch["torch"](inputs), backend=backend)
        return call

    return {OURS: comparison.ours()} | comparison.torch | {COMPILED: compiled} | ways.get(comparison.name, {})


def apart(made: Made, exact: Made) -> tuple[float, float]:
    """Relative, of the loss and of the gradient's norm."""
    (value, gradient), (right, right_gradient) = (
        (loss.double(), torch.cat([x.double().flatten() for x in gradients])) for loss, gradients in (made, exact)
    )
    return abs(float(value / right) - 1), float((gradient - right_gradient).norm() / right_gradient.norm())


def refuse(errors: tuple[float, float]) -> None:
    """What computes another number is not timed."""
    if not max(errors) < SAME:
        raise AssertionError(f"loss and gradient are {errors[0]:.1e} and {errors[1]:.1e} off in float32: another loss")


def measure(case: Case, ways: dict[str, Way], device: str, seconds: float = 2.0) -> list[Row]:
    """A row for each way, timed in turn; one that fails is a row too, and stops none of the others."""
    inputs, exact = case.inputs(device), case.comparison.exact()
    few = part(inputs, 4, torch.float32)
    rows = min(case.shape[0], max(1, MOST_LOGITS // case.shape[-1]))
    of_few, right = (exact(part(of, n, torch.float64))() for of, n in ((few, 4), (inputs, rows)))
    found: dict[str, dict[str, Any]] = {name: {} for name in ways}
    calls: dict[str, Call] = {}
    for name, way in ways.items():
        with _recorded(found[name], device):
            # Compiled for few rows, all of them would run other code: that is compared on the case itself alone.
            if name not in COMPILES:
                refuse(apart(way(few)(), of_few))
            of_part = way(part(inputs, rows))() if rows < case.shape[0] else None
            call = way(inputs)
            errors = apart(call() if of_part is None else of_part, right)
            if case.dtype == "float32":
                refuse(errors)
            found[name] |= {"gradient_error": errors[1], "megabytes": harness.peak_memory(call, device)}
            calls[name] = call
    times = timing.interleaved(calls, device, seconds=seconds, warm=0) if calls else {}
    for name, of in times.items():
        found[name]["milliseconds"] = statistics.median(of)
    named = case.comparison.name, case.shape, case.dtype
    return [Row(*named, way, **({"error": of["error"]} if "error" in of else of)) for way, of in found.items()]


@contextlib.contextmanager
def _recorded(found: dict[str, Any], device: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if device == "cuda":
            torch.cuda.empty_cache()


# ---- files and tables ----
def save(rows: Sequence[Row], facts: dict[str, Any], folder: Path) -> harness.Saved:
    """Writes `peers-<device>-<date>.json`. What the file holds of other ways and cases stays in it.

    Raises:
        ValueError: as `harness.environment_with`.
    """
    path = harness.results_path(facts, folder, "peers")
    new = {(row.case.name, row.way) for row in rows}
    facts, before = harness.environment_with(path, facts), load(path)[0] if path.exists() else []
    kept = [row for row in before if (row.case.name, row.way) not in new]
    order = list(COMPARISONS)
    every = sorted([*rows, *kept], key=lambda row: (order.index(row.comparison), row.dtype != "float32", row.shape))
    harness.write([asdict(row) for row in every], facts, path)
    return harness.Saved(path, len(before) - len(kept), len(kept))


def load(path: Path) -> tuple[list[Row], dict[str, Any]]:
    data = json.loads(path.read_text())
    return [Row(**{**row, "shape": tuple(row["shape"])}) for row in data["results"]], data["environment"]


HEADER = ("way", "ms", "× kdfast", "MB", "gradient error")
# What is told as better: by 5 % of the time, by 5 % of the memory and 1 MB, by half the error.
_TOLD: dict[str, tuple[str, Callable[[float], float]]] = {
    "milliseconds": ("ms", lambda ours: ours / 1.05),
    "megabytes": ("MB", lambda ours: min(ours / 1.05, ours - 1)),
    "gradient_error": ("gradient error", lambda ours: ours / 2),
}


def by_case(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """By what is computed, and of what."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        title = f"{row.case.comparison.formula}: {'×'.join(map(str, row.shape))} {harness.SHORT[row.dtype]}"
        found.setdefault(title, []).append(row)
    return found


def cells(rows: Sequence[Row], bold: Callable[[str], str]) -> list[tuple[str, ...]]:
    """Of one case, under `HEADER`; the best of each column is bold."""
    timed = [row for row in rows if not row.error]
    best = {name: _shown(name, min(getattr(row, name) for row in timed)) for name in _TOLD} if timed else {}
    ours = next((row.milliseconds for row in timed if row.way == OURS), None)

    def of(row: Row) -> tuple[str, ...]:
        if row.error:
            return row.way, *("–",) * (len(HEADER) - 1)
        texts = {name: _shown(name, getattr(row, name)) for name in best}
        ms, mb, error = (bold(text) if text == best[name] else text for name, text in texts.items())
        return row.way, ms, f"{row.milliseconds / ours:.2f}" if ours else "–", mb, error

    return [of(row) for row in rows]


def _shown(name: str, value: float) -> str:
    if name == "gradient_error":
        return f"{value:.1e}"
    return f"{max(value, 0):.{0 if name == 'megabytes' else 2 if value < 10 else 1 if value < 100 else 0}f}"


def wins(rows: Sequence[Row]) -> list[str]:
    """Where another way is better than kdfast, by more than noise."""
    found = []
    for title, of in by_case(rows).items():
        ours = next((row for row in of if row.way == OURS and not row.error), None)
        others = [row for row in of if row is not ours and not row.error] if ours else []
        for name, (unit, better) in _TOLD.items():
            mine = getattr(ours, name, 0.0)
            its = [f"{o.way} {_shown(name, getattr(o, name))}" for o in others if getattr(o, name) < better(mine)]
            if its:
                found.append(f"{title}, {unit}: {', '.join(its)}, kdfast {_shown(name, mine)}")
    return found


def said(rows: Sequence[Row]) -> list[str]:
    """Below the table: who wins against kdfast, and what failed."""
    failed = [f"Failed: {row.case.name}, {row.way}: {row.error}." for row in rows if row.error]
    return [f"Better than kdfast: {'; '.join(wins(rows)) or 'none'}.", *failed]


def markdown(rows: Sequence[Row]) -> str:
    """One table of all cases."""
    lines = [("", *HEADER), ("---", "---", *("---:",) * (len(HEADER) - 1))]
    for title, of in by_case(rows).items():
        made = cells(of, lambda text: f"**{text}**")
        lines += [(title if i == 0 else "", *line) for i, line in enumerate(made)]
    return "\n\n".join(["\n".join("| " + " | ".join(line) + " |" for line in lines), *said(rows)])
