"""What a run and a comparison show as images: learning curves, quality beside speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

from kdfast.bench import figures
from kdfast.prune import Sensitivity
from kdfast.recipes.dynabert import size_of
from kdfast.results.compare import Comparison, standard_error
from kdfast.results.disk import saving
from kdfast.results.tables import HEADINGS, LATENCY, LATENCY_32, SPEEDS, column_of, folded


@contextmanager
def _drawn(path: Path, *heights: float, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its panels, one below the other, of so many inches; at the end it is saved as an image."""
    with figures.pyplot() as plt:
        size = figures.WIDTH, sum(heights)
        figure, grid = plt.subplots(
            len(heights), figsize=size, height_ratios=heights, layout="constrained", squeeze=False, **options
        )
        yield figure, grid[:, 0]
        for axes in figure.axes:
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        with saving(path):
            figure.savefig(path, dpi=figures.DPI)
        plt.close(figure)


def _color(i: int, of: int) -> Any:
    """One of so many."""
    import matplotlib

    return matplotlib.colormaps["tab10" if of <= 10 else "tab20"](i % 20)


def _label(metric: str) -> str:
    """Of an axis."""
    heading, factor, _ = column_of(metric)
    return heading.replace("\n", ", " if factor == 100 else " ")


def _errors(across: Sequence[Sequence[float]], up: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Standard errors of points."""
    return {f"{of}err": [standard_error(v) or 0 for v in values] for of, values in (("x", across), ("y", up))}


def plot_losses(path: Path, history: Sequence[Mapping[str, float]], terms: Mapping[str, str]) -> None:
    """The loss of training, its terms by name with what they are, and the loss on held-out rows, over the steps."""
    dashes = ("--", ":", "-.", (0, (1, 3)))
    styles: dict[str, dict[str, Any]] = {"loss": {"label": "training, loss", "color": "#1b6ca8"}}
    for (name, title), dash in zip(terms.items(), dashes, strict=False):
        styles[name] = {"label": f"training, {title}", "color": "#1b6ca8", "linestyle": dash, "linewidth": 1.2}
    styles["eval_loss"] = {"label": "held out, loss", "color": "#d95f02", "marker": "o"}
    with _drawn(path, 4.0) as (figure, (axes,)):
        for name, style in styles.items():
            points = [(event["step"], event[name]) for event in history if name in event]
            if points:
                axes.plot(*zip(*points, strict=True), **style)
        axes.set(title="Distillation", xlabel="step", ylabel="loss", yscale="log")
        figure.legend(frameon=False, loc="outside lower center", ncols=2)


# What the trainer compares with the teacher: title and unit.
DISTANCES = {
    "kl_to_teacher": ("KL(teacher ‖ student) on {rows}", "nats"),
    "mse_to_teacher": ("Squared distance to the teacher on held-out rows", "mean of squares"),
}


def plot_learning_curves(
    path: Path,
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    metric: str,
    teacher_value: float,
    rows: tuple[int, int],
) -> None:
    """The metric and the distance to the teacher over training, one line per student. rows: how many test rows the points
    are of, and how many there are, of which the teacher's value is."""
    heading, factor, _ = HEADINGS[metric]
    styles: list[dict[str, Any]] = [{"color": "#1b6ca8", "marker": "o"}, {"color": "#d95f02", "marker": "s"}]
    events = {name: [event for event in of if f"eval_{metric}" in event] for name, of in histories.items()}
    known = next(
        (key for key in DISTANCES if any(f"eval_{key}" in event for of in events.values() for event in of)), None
    )
    name = heading.splitlines()[0]
    where = "all test rows" if rows[0] == rows[1] else f"{rows[0]} of {rows[1]:,} test rows"
    with _drawn(path, *[3.2] * (1 if known is None else 2)) as (_, (quality, *rest)):
        for (student, points), style in zip(reversed(list(events.items())), cycle(styles), strict=False):
            epochs = [event["epoch"] for event in points]
            quality.plot(epochs, [factor * event[f"eval_{metric}"] for event in points], label=student, **style)
            apart = [(event["epoch"], event[f"eval_{known}"]) for event in points if f"eval_{known}" in event]
            for distance in rest if apart else []:
                distance.plot(*zip(*apart, strict=True), label=student, **style)
        quality.axhline(factor * teacher_value, color="0.5", linestyle="--", label="teacher, all test rows")
        quality.set(
            title=f"{name[0].upper()}{name[1:]} on {where}",
            xlabel="epoch",
            ylabel="%" if factor == 100 else "correlation",
        )
        quality.legend(frameon=False)
        for distance in rest:
            title, unit = DISTANCES[str(known)]
            per_label = ", mean over labels" * (metric == "micro_f1")
            distance.set(title=title.format(rows=where), xlabel="epoch", ylabel=unit + per_label)
            distance.axhline(0, linewidth=0).sticky_edges.y.append(0)  # from 0 on, with a margin above
            distance.legend(frameon=False)


def plot_comparison(path: Path, comparison: Comparison) -> None:
    """The metric with its standard error, and below against latency (of language models: speed).

    A colour for the models of one group, a marker for what they are in their runs.
    """
    rows = [row for row in comparison.rows if comparison.metric in row.values]
    _, factor, _ = column_of(comparison.metric)
    speed = next((name for name in SPEEDS if any(name in row.values for row in rows)), None)
    groups, models = (list(dict.fromkeys(of)) for of in ([r.group for r in rows], [r.model for r in rows]))
    colors = {group: _color(i, len(groups)) for i, group in enumerate(groups)}
    markers = dict(zip(models, cycle("^sovDPX*<>"), strict=False))
    with _drawn(path, 1.5 + 0.32 * len(rows), *[3.2] * (speed is not None)) as (figure, (quality, *against)):
        for place, row in enumerate(rows):
            values = [factor * value for value in row.values[comparison.metric]]
            style = {"color": colors[row.group], "marker": markers[row.model], "linestyle": "none", "capsize": 3}
            mean, error = fmean(values), standard_error(values)
            quality.errorbar(mean, place, xerr=error, **style)
            for speeds in against if speed in row.values else []:
                speeds.errorbar(fmean(row.values[str(speed)]), mean, yerr=error, **style)
        quality.set_yticks(range(len(rows)), [folded(row.name, 26) for row in rows], fontsize=9)
        quality.set_ylim(len(rows) - 0.5, -0.5)
        several = any(len(row.runs) > 1 for row in rows)
        quality.set(xlabel=_label(comparison.metric) + ", ± standard error over seeds" * several)
        quality.locator_params(axis="x", nbins=6)
        for speeds in against:
            speeds.set(ylabel=_label(comparison.metric), title="against speed, marks as above")
            speeds.locator_params(axis="x", nbins=6)
            speeds.set_xlabel("ms of a forward pass, 1 row" if speed == LATENCY else str(speed).replace("_", " "))
        far_apart = [fmean(row.values[comparison.metric]) for row in rows]
        if comparison.metric == "perplexity" and max(far_apart) > 20 * min(far_apart):
            quality.set_xscale("log")
            for speeds in against:
                speeds.set_yscale("log")
        figure.suptitle(comparison.title)


def plot_costs(path: Path, comparison: Comparison) -> None:
    """The metric against the time of a forward pass of 32 rows, in circles as large as the models."""
    _, factor, _ = column_of(comparison.metric)
    rows = [row for row in comparison.rows if {"parameters", LATENCY_32, comparison.metric} <= {*row.values}]
    largest = max(fmean(row.values["parameters"]) for row in rows)
    with _drawn(path, 3.6 + 0.2 * len(rows)) as (figure, (axes,)):
        for i, row in enumerate(rows):
            place = fmean(row.values[LATENCY_32]), factor * fmean(row.values[comparison.metric])
            size, color = fmean(row.values["parameters"]), _color(i, len(rows))
            axes.scatter(*place, s=900 * size / largest, color=color, alpha=0.35, linewidths=0)
            axes.plot(*place, "o", markersize=4, color=color, label=f"{row.name}: {size / 1e6:.1f} M")
        axes.margins(0.15)
        axes.set(xlabel="ms of a forward pass, 32 rows", ylabel=_label(comparison.metric), title="area: parameters")
        figure.legend(frameon=False, fontsize=9, loc="outside lower left")


def plot_speeds(path: Path, curves: Sequence[Sequence[Mapping[str, float]]], metric: str, title: str) -> None:
    """The metric of an `EarlyExit` against operations and time at its speeds, of `kdfast.results.speed_curve`: the mean of
    the curves with standard errors.

    Args:
        curves: of seeds, at the same speeds.
    """
    _, factor, _ = HEADINGS[metric]
    quantities = {"flops_per_row": ("GFLOP per row", 1e-9), LATENCY: ("ms of a forward pass, 1 row", 1.0)}
    with _drawn(path, 3.4, 3.2) as (figure, panels):
        for axes, (name, (quantity, scale)) in zip(panels, quantities.items(), strict=True):
            points = list(zip(*curves, strict=True))
            across = [[scale * point[name] for point in at if name in point] for at in points]
            up = [[factor * point[metric] for point in at] for at in points]
            style = {"color": "#1b6ca8", "marker": "o", "markersize": 4, "capsize": 2}
            axes.errorbar([fmean(v) for v in across], [fmean(v) for v in up], **_errors(across, up), **style)
            labelled: list[float] = []
            apart = 0.07 * max(map(fmean, across))  # nearer to each other, labels would lie upon each other
            for at, x, y in zip(points, map(fmean, across), map(fmean, up), strict=True):
                if all(abs(x - other) > apart for other in labelled):
                    label = f"{at[0]['speed']:g}"
                    axes.annotate(label, (x, y), (4, -11), textcoords="offset points", fontsize=8)
                    labelled.append(x)
            axes.margins(0.08)  # for the numbers at the edges
            axes.set(xlabel=quantity, xlim=(0, None), ylabel=_label(metric))
        figure.suptitle(f"{title}\nnumbers beside points: speeds{_of_seeds(len(curves))}")


def _of_seeds(count: int) -> str:
    return f"; ± standard error of {count} seeds" * (count > 1)


def plot_sizes(path: Path, runs: Sequence[Mapping[str, Mapping[str, float]]], metric: str, title: str) -> None:
    """The metric of sub-networks against time and parameters, a line for each depth along its widths: the mean of runs with
    standard errors; times of those that have any.

    Args:
        runs: metrics by `kdfast.recipes.dynabert.name_of`, and the teacher's; of seeds, with the same sub-networks.
    """
    _, factor, _ = HEADINGS[metric]
    sizes = {name: size for name in runs[0] if (size := size_of(name)) is not None}
    quantities = {LATENCY: ("ms of a forward pass, 1 row", 1.0), "parameters": ("parameters, millions", 1e-6)}
    styles = cycle(zip(("#1b6ca8", "#d95f02", "#2a9d5c", "#8e44ad", "#666666"), "os^Dv", strict=True))
    of_depth = {depth: next(styles) for depth in sorted({depth for _, depth in sizes.values()}, reverse=True)}
    with _drawn(path, 3.8, 3.6) as (figure, panels):
        for axes, (quantity, (label, scale)) in zip(panels, quantities.items(), strict=True):
            places = cycle(
                ((4, -11, "left"), (-4, 5, "right"), (-4, -11, "right"))
            )  # points of two depths may coincide
            for depth, (color, marker) in of_depth.items():
                names = sorted((name for name, size in sizes.items() if size[1] == depth), key=lambda name: sizes[name])
                across, up = (
                    [[scale_of * run[name][of] for run in runs if of in run[name]] for name in names]
                    for scale_of, of in ((scale, quantity), (factor, metric))
                )
                style = {"color": color, "marker": marker, "markersize": 4, "capsize": 2, "label": f"depth {depth:g}"}
                axes.errorbar([fmean(v) for v in across], [fmean(v) for v in up], **_errors(across, up), **style)
                across_by, up_by, side = next(places)
                for name, x, y in zip(names, map(fmean, across), map(fmean, up), strict=True):
                    style = {"textcoords": "offset points", "fontsize": 8, "color": color, "ha": side}
                    axes.annotate(f"{sizes[name][0]:g}", (x, y), (across_by, up_by), **style)
            teacher = fmean(factor * run["teacher"][metric] for run in runs)
            axes.axhline(teacher, color="0.5", linestyle="--", linewidth=1, label="teacher")
            axes.margins(0.08)  # for the numbers at the edges
            axes.set(xlabel=label, ylabel=_label(metric))
        panels[1].legend(frameon=False, loc="lower right")
        figure.suptitle(f"{title}\nnumbers beside points: widths{_of_seeds(len(runs))}")


def plot_pruned(path: Path, comparison: Comparison) -> None:
    """The metric of what criteria left of a model, against parameters and time, a line from the whole model through the
    sizes of each criterion: means with standard errors.

    Args:
        comparison: the teacher's row, and rows whose group is the criterion and whose model the size.
    """
    _, factor, _ = column_of(comparison.metric)
    whole = next(row for row in comparison.rows if row.model == "teacher")
    criteria = dict.fromkeys(row.group for row in comparison.rows if row is not whole)
    quantities = {
        "parameters": ("parameters, millions", 1e-6),
        LATENCY: ("ms of a forward pass, 1 row", 1.0),
        SPEEDS[1]: ("ms of a forward pass, 32 rows", 1.0),
    }
    with _drawn(path, *[3.2] * len(quantities)) as (figure, panels):
        for axes, (quantity, (label, scale)) in zip(panels, quantities.items(), strict=True):
            for i, criterion in enumerate(criteria):
                rows = [row for row in comparison.rows if row.group == criterion and row is not whole]
                rows = [whole, *sorted(rows, key=lambda row: fmean(row.values["parameters"]), reverse=True)]
                across = [[scale * value for value in row.values[quantity]] for row in rows]
                up = [[factor * value for value in row.values[comparison.metric]] for row in rows]
                style: dict[str, Any] = {"color": f"C{i}"}
                if criterion == "random":
                    style = {"color": "0.5", "linestyle": "--"}
                style |= {"marker": figures.MARKERS[i % 10], "markersize": 5, "linewidth": 1, "capsize": 2}
                means = [fmean(v) for v in across], [fmean(v) for v in up]
                axes.errorbar(*means, **_errors(across, up), **style, label=criterion)
            axes.set(xlabel=label, ylabel=_label(comparison.metric))
        panels[0].legend(frameon=False, loc="lower right", fontsize=9)
        figure.suptitle(
            f"{comparison.title}: what criteria leave\non the right: the whole model{_of_seeds(len(whole.runs))}"
        )


def plot_sensitivity(path: Path, found: Sensitivity, quality: str) -> None:
    """What `kdfast.prune.sensitivity` found: a panel for each kind of unit, a line for each share that was gone, over the
    layers.

    Args:
        quality: what it is called.
    """
    import matplotlib

    kinds = [kind for kind, of in found.found.items() if of]
    with _drawn(path, *[3.2] * len(kinds), sharey=True) as (figure, panels):
        for axes, kind in zip(panels, kinds, strict=True):
            of = found.found[kind]
            places = range(1, len(of) + 1)
            shares = (1.0,) if kind == "layers" else found.shares
            for i, share in enumerate(shares):
                shade = matplotlib.colormaps["viridis"](0.85 - 0.75 * i / max(1, len(shares) - 1))
                label = "the layer gone" if kind == "layers" else f"{share:.0%} gone"
                values = [values[i] for values in of.values()]
                axes.plot(places, values, marker="o", markersize=4, color=shade, label=label)
            axes.axhline(found.whole, color="0.5", linestyle="--", linewidth=1, label="whole model")
            axes.set(title=kind, xlabel="layer", ylabel=quality, xticks=[*places])
        lines = {line.get_label(): line for axes in panels for line in axes.lines}
        figure.legend(lines.values(), lines, frameon=False, fontsize=9, loc="outside lower center", ncols=3)
        figure.suptitle("One layer pruned at a time")
