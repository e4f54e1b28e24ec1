"""Plots of what `kdfast bench` measures."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from kdfast.bench import figures
from kdfast.bench.harness import SHORT, Result
from kdfast.bench.peers.measure import OURS, Row
from kdfast.bench.registry import FAMILIES, OPERATORS

_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)


def _save(pyplot: Any, figure: Any, facts: dict[str, Any], path: Path) -> None:
    figure.suptitle(f"{facts['device']}\ntorch {facts['torch']}, {facts['date']}", fontsize=10)
    figure.savefig(path, dpi=figures.DPI)
    pyplot.close(figure)


def plot(results: Sequence[Result], facts: dict[str, Any], path: Path) -> None:
    """Times as fast as eager PyTorch, on one logarithmic axis: a panel per family, a row per operator, of every case a
    mark. Beside kdfast's are torch.compile's, where it was measured."""
    families = {
        family: _by_operator(r for r in results if r.case.operator in operators)
        for family, operators in FAMILIES.items()
    }
    panels = [(family, named) for family, named in families.items() if named]
    heights = [len(named) + 0.6 for _, named in panels]
    with figures.pyplot() as pyplot:
        figure, grid = pyplot.subplots(
            len(panels),
            figsize=(figures.WIDTH, 1.3 + 0.32 * sum(heights) + 0.3 * len(panels)),
            height_ratios=heights,
            layout="constrained",
            sharex=True,
            squeeze=False,
        )
        for axes, (family, named) in zip(grid[:, 0], panels, strict=True):
            _family(axes, family, named)
        _logarithmic(grid[-1, 0], _TICKS)
        grid[-1, 0].set_xlabel("times as fast as eager PyTorch")
        _legend(figure, grid[:, 0])
        _save(pyplot, figure, facts, path)


def _family(axes: Any, family: str, named: dict[str, list[Result]]) -> None:
    for place, results in enumerate(named.values()):
        for gradient, face in ((True, None), (False, "white")):
            of = [r for r in results if r.case.gradient == gradient]
            what = "loss and gradient" if gradient else "loss alone"
            compiled = [r.eager / r.compiled for r in of if r.compiled]
            for name, color, offset, values in (
                ("kdfast", "#1b6ca8", -0.16, [r.eager / r.kdfast for r in of]),
                ("torch.compile", "#d95f02", 0.18, compiled),
            ):
                style = {"color": color, "markerfacecolor": face or color, "markersize": 6, "alpha": 0.85}
                if values:
                    axes.plot(values, [place + offset] * len(values), "o", label=f"{name}, {what}", **style)
    axes.axvline(1, color="0.5", linewidth=1)
    _rows(axes, family, named)


def _rows(axes: Any, title: str, named: Collection[str]) -> None:
    """A row per operator, the first above."""
    axes.set_title(title)
    axes.set_yticks(range(len(named)), list(named))
    axes.set_ylim(len(named) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _logarithmic(axes: Any, ticks: Sequence[float]) -> None:
    """Of these ticks those that lie within; written without powers, whose type would be small."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    within = [x for x in ticks if low <= x <= high]
    if len(within) < 3:  # a narrow range
        within = [x for x in MaxNLocator(4).tick_values(low, high) if low <= x <= high]
    axes.set_xticks(within, minor=False)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def plot_roofline(results: Sequence[Result], facts: dict[str, Any], path: Path) -> None:
    """The kernels' rates beside what bounds them as measured with each: bytes per second of a plain pass over the same
    tensors, or operations per second of a large matrix product."""
    bounds = {
        "what memory bounds": ("GB/s", [r for r in results if OPERATORS[r.case.operator].flops is None]),
        "what arithmetic bounds": ("GFLOP/s", [r for r in results if OPERATORS[r.case.operator].flops is not None]),
    }
    panels = [(title, unit, _by_operator(of)) for title, (unit, of) in bounds.items() if of]
    heights = [len(named) + 0.6 for _, _, named in panels]
    with figures.pyplot() as pyplot:
        size = figures.WIDTH, 1.2 + 0.28 * sum(heights) + 0.6 * len(panels)
        figure, grid = pyplot.subplots(
            len(panels), figsize=size, height_ratios=heights, layout="constrained", squeeze=False
        )
        for axes, (title, unit, named) in zip(grid[:, 0], panels, strict=True):
            for place, of in enumerate(named.values()):
                for r in of:
                    style = {"color": "#1b6ca8", "markerfacecolor": "#1b6ca8" if r.case.gradient else "white"}
                    what = "kdfast, " + ("loss and gradient" if r.case.gradient else "loss alone")
                    axes.plot(r.rate, place + 0.12, "o", label=what, alpha=0.85, **style)
                    axes.plot(r.rate / r.roofline, place - 0.12, "|", color="0.5", markersize=9, label="what bounds it")
            _rows(axes, title, named)
            _logarithmic(axes, [m * 10**e for e in range(-3, 6) for m in (1, 2, 5)])
            axes.set_xlabel(unit)
        _legend(figure, grid[:, 0])
        _save(pyplot, figure, facts, path)


def _legend(figure: Any, panels: Iterable[Any]) -> None:
    """Once, of what any panel has."""
    pairs = [pair for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in pairs}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, frameon=False)


def _by_operator(results: Iterable[Result]) -> dict[str, list[Result]]:
    named: dict[str, list[Result]] = {}
    for r in results:
        named.setdefault(r.case.operator, []).append(r)
    return named


def plot_sweep(results: Sequence[Result], facts: dict[str, Any], path: Path) -> None:
    """Times as fast as eager PyTorch over the width, a line per operator."""
    panels = sorted({(r.case.gradient, r.case.dtype) for r in results}, reverse=True)
    down = (len(panels) + 1) // 2
    with figures.pyplot() as pyplot:
        figure, grid = pyplot.subplots(
            down,
            2,
            figsize=(figures.WIDTH, 2.0 + 2.6 * down),
            layout="constrained",
            sharex=True,
            sharey=True,
            squeeze=False,
        )
        for axes, (gradient, dtype) in zip(grid.flat, panels, strict=False):
            chosen = [r for r in results if (r.case.gradient, r.case.dtype) == (gradient, dtype)]
            for i, name in enumerate(dict.fromkeys(r.case.operator for r in chosen)):
                line = [(r.case.shape[-1], r.eager / r.kdfast) for r in chosen if r.case.operator == name]
                style = "-" if i < 10 else "--"  # colours come round after ten
                axes.plot(*zip(*line, strict=True), style, marker="o", markersize=3, label=name)
            axes.set(xscale="log", yscale="log", title=f"{'gradient' if gradient else 'loss'}, {dtype}")
            axes.axhline(1, color="grey", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        first = grid[0, 0]
        low, high = first.get_ylim()
        first.set_yticks([y for y in _TICKS if low <= y <= high], minor=False)
        first.yaxis.set_major_formatter("{x:g}")
        first.minorticks_off()
        first.set_xticks((10, 1000, 100_000), ("10", "1,000", "100,000"))
        for axes in grid[-1]:
            axes.set_xlabel("vocabulary")
        figure.supylabel("times as fast as eager PyTorch", fontsize=10)
        figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        _save(pyplot, figure, facts, path)


def plot_peers(rows: Sequence[Row], facts: dict[str, Any], path: Path, quantity: str = "milliseconds") -> None:
    """What each way takes, in multiples of what kdfast takes, on one logarithmic axis: a panel per loss, a row per size, a
    mark per way.

    Args:
        quantity: "milliseconds" or "megabytes".
    """
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if not row.error and getattr(row, quantity) > 0:
            label = f"{'×'.join(map(str, row.shape))} {SHORT[row.dtype]}"
            of = panels.setdefault(row.case.comparison.formula, {}).setdefault(label, {})
            of[row.way] = getattr(row, quantity)
    panels = {title: named for title, of in panels.items() if (named := {n: x for n, x in of.items() if OURS in x})}
    ways = dict.fromkeys(row.way for row in rows if row.way != OURS)
    styles = {way: {"color": f"C{(i + 1) % 10}", "marker": figures.MARKERS[i % 10]} for i, way in enumerate(ways)}
    titles = {title: fill(title, 34) for title in panels}
    heights = [len(named) + 0.6 + 0.5 * titles[title].count("\n") for title, named in panels.items()]
    with figures.pyplot() as pyplot:
        size = figures.WIDTH, 1.6 + 0.34 * sum(heights) + 0.34 * len(panels)
        figure, grid = pyplot.subplots(
            len(panels), figsize=size, height_ratios=heights, layout="constrained", sharex=True, squeeze=False
        )
        for axes, (title, named) in zip(grid[:, 0], panels.items(), strict=True):
            axes.axvline(1, color="#1b6ca8", linewidth=1.5, label=OURS)
            for place, of in enumerate(named.values()):
                for way, value in of.items():
                    if way != OURS:
                        axes.plot(value / of[OURS], place, label=way, linestyle="none", alpha=0.85, **styles[way])
            _rows(axes, titles[title], named)
        _logarithmic(grid[-1, 0], _TICKS)
        grid[-1, 0].set_xlabel(f"times as {'long' if quantity == 'milliseconds' else 'much memory'} as kdfast")
        _legend(figure, grid[:, 0])
        _save(pyplot, figure, facts, path)
