"""Plots of what was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdfast.bench.harness import Result, table


def plot(results: list[Result], facts: dict[str, Any], path: Path) -> None:
    """Time relative to eager, a bar per case: shorter is faster."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.55 * len(results)), layout="constrained")
    positions = range(len(results))
    series: dict[str, Callable[[Result], float]] = {"eager": lambda r: r.eager, "kdfast": lambda r: r.kdfast}
    if all(r.compiled for r in results):
        series = {"eager": series["eager"], "torch.compile": lambda r: r.compiled or 0.0, "kdfast": series["kdfast"]}
    for i, (name, of) in enumerate(series.items()):
        offset = 0.27 * (i - (len(series) - 1) / 2)
        bars = axes.barh([p + offset for p in positions], [of(r) / r.eager for r in results], 0.26, label=name)
        axes.bar_label(bars, [f"{of(r):.3g} ms" for r in results], padding=3, fontsize=8)
    axes.set_yticks(positions, [row[0] for row in table(results)], fontsize=8)
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * max(1, *(of(r) / r.eager for r in results for of in series.values())))
    axes.set_xlabel("time relative to eager PyTorch (shorter is faster)")
    axes.set_title(f"{facts['device']}, torch {facts['torch']}, {facts['date']}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_sweep(results: list[Result], facts: dict[str, Any], path: Path) -> None:
    """Speed relative to eager over the width, a line per operator."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(r.case.gradient, r.case.dtype) for r in results}, reverse=True)
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(1 + 3.4 * len(panels), 4.4), layout="constrained", sharey=True, squeeze=False
    )
    for axes, (gradient, dtype) in zip(grid[0], panels, strict=True):
        chosen = [r for r in results if (r.case.gradient, r.case.dtype) == (gradient, dtype)]
        for i, name in enumerate(dict.fromkeys(r.case.operator for r in chosen)):
            line = [(r.case.shape[-1], r.eager / r.kdfast) for r in chosen if r.case.operator == name]
            style = "-" if i < 10 else "--"  # colours come round after ten
            axes.plot(*zip(*line, strict=True), style, marker="o", markersize=3, label=name)
        axes.set(
            xscale="log", yscale="log", xlabel="vocabulary", title=f"{dtype}, {'gradient' if gradient else 'loss'}"
        )
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_yticks((1, 2, 5, 10, 20, 50), ("1", "2", "5", "10", "20", "50"))
    grid[0][0].set_ylabel("times faster than eager PyTorch")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(f"{facts['device']}, torch {facts['torch']}, {facts['date']}", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
