"""What a run shows at its end: measured metrics, the table of models and the learning curves."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn

import kdfast
from kdfast import kl_div
from kdfast._disk import saving
from kdfast.compare import Comparison, standard_error

Metrics = dict[str, float]


def against_teacher(logits: Tensor, teacher_logits: Tensor) -> Metrics:
    """Of classifiers: mean KL(teacher ‖ student) in nats, and agreement, the fraction of rows with the same class."""
    return {
        "kl_to_teacher": kl_div(logits, teacher_logits).item(),
        "agreement": (logits.argmax(-1) == teacher_logits.argmax(-1)).float().mean().item(),
    }


def versions() -> dict[str, str]:
    return {"kdfast": kdfast.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def size(model: nn.Module, folder: Path) -> Metrics:
    """Number of parameters, and megabytes (10⁶ bytes) of the weights saved in `folder`."""
    saved = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"parameters": sum(p.numel() for p in model.parameters()), "megabytes": saved / 1e6}


def latency_ms(models: Mapping[str, nn.Module], batch: Mapping[str, Tensor], repeats: int = 15) -> dict[str, float]:
    """Median milliseconds of a forward pass; the models take turns, so that a slow moment hits all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.eval()
    with torch.inference_mode():
        for repeat in range(-2, repeats):  # two rounds to warm up
            for name, model in models.items():
                start = time.perf_counter()
                model(**batch)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if repeat >= 0:
                    times[name].append(time.perf_counter() - start)
    return {name: 1e3 * median(values) for name, values in times.items()}


def _table(title: str, caption: str, headings: Sequence[str]) -> Table:
    table = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("model", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


# Metric: its heading, its factor, its digits.
HEADINGS = {
    "accuracy": ("accuracy\n%", 100, 1),
    "f1": ("F1\n%", 100, 1),
    "micro_f1": ("micro F1\n%", 100, 1),
    "matthews": ("Matthews", 1, 3),
    "pearson": ("Pearson", 1, 3),
}
COLUMNS: tuple[tuple[str, str, float, int], ...] = (
    ("kl_to_teacher", "KL to\nteacher", 1, 4),
    ("agreement", "agrees\n%", 100, 1),
    ("parameters", "params\nM", 1e-6, 1),
    ("megabytes", "MB", 1, 0),
    ("latency_ms_batch_1", "ms,\n1", 1, 1),
    ("latency_ms_batch_32", "ms,\n32", 1, 0),
    ("training_seconds", "train\ns", 1, 0),
)


def results_table(results: Mapping[str, Metrics], titles: Mapping[str, str], data: str, metric: str) -> Table:
    """One row per model, in the order of the titles."""
    heading, factor, digits = HEADINGS[metric]
    columns = [(metric, heading, factor, digits), *COLUMNS]
    columns = [column for column in columns if any(column[0] in results[name] for name in titles)]
    table = _table(
        f"{data}: on the test rows",
        "KL: from the teacher's distribution, in nats. " * any("kl_to_teacher" in results[name] for name in titles)
        + "ms: median forward pass, rows of median length",
        [column[1] for column in columns],
    )
    for name, title in titles.items():
        row = results[name]
        cells = [_cell(row[key] * scale, places) if key in row else "–" for key, _, scale, places in columns]
        table.add_row(title, *cells)
    return table


def _cell(value: float, places: int) -> str:
    return f"{value:.{places if abs(value) < 99.95 else 0}f}"


LANGUAGE_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("perplexity", "perplexity", ".2f"),
    ("accuracy", "accuracy\n%", ".1f"),
    ("kl_to_teacher", "KL to\nteacher", ".4f"),
    ("parameters", "params\nmillion", ".1f"),
    ("megabytes", "MB", ".0f"),
    ("tokens_per_second", "tokens\nper second", ".0f"),
)
FACTORS = {"accuracy": 100, "parameters": 1e-6}


def language_table(results: Mapping[str, Metrics], caption: str) -> Table:
    """One row per language model, in the order given; the caption says what perplexity and KL are of."""
    columns = [column for column in LANGUAGE_COLUMNS if any(column[0] in row for row in results.values())]
    table = _table(
        "Held-out text: teacher and student",
        f"{caption}. Tokens per second: one forward pass",
        [heading for _, heading, _ in columns],
    )

    def cell(name: str, value: float, form: str) -> str:
        if name == "megabytes" and not value:  # not saved here
            return "–"
        return f"{value * FACTORS.get(name, 1):{'.1e' if name == 'perplexity' and value >= 1e4 else form}}"

    for title, row in results.items():
        table.add_row(title, *(cell(name, row[name], form) for name, _, form in columns))
    return table


def plot_losses(path: Path, history: Sequence[Mapping[str, float]], terms: Mapping[str, str]) -> None:
    """The loss of training, its terms by name with what they are, and the loss on held-out rows, over the steps; an image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    dashes = ("--", ":", "-.", (0, (1, 3)))
    styles: dict[str, dict[str, Any]] = {"loss": {"label": "training, loss", "color": "#1b6ca8"}}
    for (name, title), dash in zip(terms.items(), dashes, strict=False):
        styles[name] = {"label": f"training, {title}", "color": "#1b6ca8", "linestyle": dash, "linewidth": 1.2}
    styles["eval_loss"] = {"label": "held out, loss", "color": "#d95f02", "marker": "o"}
    for name, style in styles.items():
        points = [(event["step"], event[name]) for event in history if name in event]
        if points:
            axes.plot(*zip(*points, strict=True), **style)
    axes.set(title="Distillation of a language model", xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with saving(path):
        figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_learning_curves(
    path: Path, histories: Mapping[str, Sequence[Mapping[str, float]]], metric: str, teacher_value: float
) -> None:
    """The metric and KL to the teacher over training, one line per student, saved as an image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    heading, factor, _ = HEADINGS[metric]
    figure, (quality, divergence) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    styles: list[dict[str, Any]] = [{"color": "#1b6ca8", "marker": "o"}, {"color": "#d95f02", "marker": "s"}]
    for (name, history), style in zip(reversed(list(histories.items())), cycle(styles), strict=False):
        points = [event for event in history if f"eval_{metric}" in event]
        epochs = [event["epoch"] for event in points]
        quality.plot(epochs, [factor * event[f"eval_{metric}"] for event in points], label=name, **style)
        if points and "eval_kl_to_teacher" in points[0]:
            divergence.plot(epochs, [event["eval_kl_to_teacher"] for event in points], label=name, **style)
    quality.axhline(factor * teacher_value, color="0.4", linestyle="--", label="teacher, all test rows")
    quality.set(
        title=f"{heading.splitlines()[0].capitalize()} on held-out rows", xlabel="epoch", ylabel="%" * (factor == 100)
    )
    divergence.set(title="KL(teacher ‖ student) on held-out rows", xlabel="epoch", ylabel="nats")
    divergence.axhline(0, linewidth=0).sticky_edges.y.append(0)  # from 0 on, with a margin above
    for axes in (quality, divergence):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    with saving(path):
        figure.savefig(path, dpi=150)
    plt.close(figure)


MORE_HEADINGS = {
    "spearman": ("Spearman", 1, 3),
    "exact_match": ("exact\n%", 100, 1),
    "perplexity": ("perplexity", 1, 2),
    "tokens_per_second": ("tokens\nper s", 1, 0),
}


def _column(name: str) -> tuple[str, float, int]:
    """Heading, factor and digits of anything that is measured."""
    of_columns = {key: (heading, factor, digits) for key, heading, factor, digits in COLUMNS}
    return (HEADINGS | MORE_HEADINGS | of_columns).get(name, (name.replace("_", "\n"), 1, 3))


def _form(value: float, digits: int) -> str:
    return f".{digits}f" if abs(value) < 1e5 else ".1e"


def evaluation_table(results: Mapping[str, Metrics], data: str, rows: int) -> Table:
    """One row per model, in the order given, with everything that was measured."""
    names = list(dict.fromkeys(name for row in results.values() for name in row))
    table = _table(
        f"{data}: on {rows:,} test rows",
        "KL: from the teacher's distribution, in nats. " * ("kl_to_teacher" in names)
        + "ms: median forward pass, rows of median length",
        [_column(name)[0] for name in names],
    )
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    for title, row in results.items():
        cells = []
        for name in names:
            _, factor, digits = _column(name)
            cells.append(f"{row[name] * factor:{_form(row[name] * factor, digits)}}" if name in row else "–")
        table.add_row(title, *cells)
    return table


COMPARED = ("kl_to_teacher", "agreement", "parameters")
LATENCY = "latency_ms_batch_1"
SPEEDS = (LATENCY, "latency_ms_batch_32", "tokens_per_second", "training_seconds")


def _compared(comparison: Comparison, all_spreads: bool) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a comparison, beside the models' names."""
    rows = comparison.rows
    present = {name for row in rows for name in row.values} - {comparison.metric}
    masked = ("accuracy",) if comparison.family == "distilbert" else ()  # of the tokens to be predicted
    names = [name for name in (*masked, *COMPARED, *SPEEDS) if name in present]
    heading, factor, digits = _column(comparison.metric)
    several, alone = any(len(row.runs) > 1 for row in rows), any(row.differences for row in rows)
    headings = ["n"] * several + [heading] + ["vs\nlabels"] * alone + [_column(name)[0] for name in names]

    def cell(values: Sequence[float], factor: float, digits: int, spread: bool = True, sign: str = "") -> str:
        if not values:
            return "–"
        error = standard_error([factor * value for value in values]) if spread else None
        mean = factor * fmean(values)
        form = _form(mean, digits)
        return f"{mean:{sign}{form}}" + ("" if error is None else f"±{error:{form}}")

    made = []
    for row in rows:
        cells = [str(len(row.runs))] * several + [cell(row.values.get(comparison.metric, ()), factor, digits)]
        cells += [cell(row.differences, factor, digits, sign="+")] * alone
        for name in names:
            _, scale, places = _column(name)
            cells.append(cell(row.values.get(name, ()), scale, places, all_spreads and name != "parameters"))
        made.append(cells)
    return headings, made


def _folded(name: str, width: int) -> str:
    """In several lines, preferably between the run and its model."""
    return textwrap.fill(name.replace("/", "/ "), width + 1).replace("/ ", "/")


def _legend(comparison: Comparison) -> str:
    said = {
        "n seeds: mean ± standard error.": any(len(row.runs) > 1 for row in comparison.rows),
        "vs labels: difference to the same student trained on the labels alone, seed by seed.": any(
            row.differences for row in comparison.rows
        ),
        "KL: from each one's teacher, in nats.": any("kl_to_teacher" in row.values for row in comparison.rows),
        "ms: median forward pass of 1 row and of 32.": any(LATENCY in row.values for row in comparison.rows),
    }
    return " ".join(text for text, so in said.items() if so)


def comparison_table(comparison: Comparison) -> Table:
    """A row per model, for 80 columns: only the metric has its standard error."""
    headings, cells = _compared(comparison, all_spreads=False)
    table = _table(f"{comparison.title}: runs compared", _legend(comparison), headings)
    table.columns[0].no_wrap, table.columns[0].overflow, table.padding = False, "fold", 0
    for row, values in zip(comparison.rows, cells, strict=True):
        table.add_row(_folded(row.name, 19), *values)
    return table


def comparison_markdown(comparison: Comparison) -> str:
    """The table with all standard errors."""
    headings, cells = _compared(comparison, all_spreads=True)
    lines = [["model", *headings], ["---", *["---:"] * len(headings)]]
    lines += [[row.name, *values] for row, values in zip(comparison.rows, cells, strict=True)]
    table = "\n".join(f"| {' | '.join(cell.replace(chr(10), ' ') for cell in line)} |" for line in lines)
    return f"{comparison.title}: runs compared. {_legend(comparison)}\n\n{table}"


def plot_comparison(path: Path, comparison: Comparison) -> None:
    """The metric with its standard error, and against latency (of language models: speed), saved as an image.

    A colour for the models of one group, a marker for what they are in their runs.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in comparison.rows if comparison.metric in row.values]
    heading, factor, _ = _column(comparison.metric)
    label = heading.replace("\n", ", " if factor == 100 else " ")
    speed = next((name for name in SPEEDS if any(name in row.values for row in rows)), None)
    groups, models = (list(dict.fromkeys(of)) for of in ([r.group for r in rows], [r.model for r in rows]))
    colors = {group: plt.get_cmap("tab10" if len(groups) <= 10 else "tab20")(i % 20) for i, group in enumerate(groups)}
    markers = dict(zip(models, cycle("^sovDPX*<>"), strict=False))
    figure, (quality, speeds) = plt.subplots(1, 2, figsize=(11, 1.6 + 0.34 * max(6, len(rows))), layout="constrained")
    for place, row in enumerate(rows):
        values = [factor * value for value in row.values[comparison.metric]]
        style = {"color": colors[row.group], "marker": markers[row.model], "linestyle": "none", "capsize": 3}
        mean, error = fmean(values), standard_error(values)
        quality.errorbar(mean, place, xerr=error, **style)
        if speed is not None and speed in row.values:
            speeds.errorbar(fmean(row.values[speed]), mean, yerr=error, label=row.name, **style)
    quality.set_yticks(range(len(rows)), [_folded(row.name, 32) for row in rows], fontsize=8)
    quality.set_ylim(len(rows) - 0.5, -0.5)
    quality.set(xlabel=label, title="± standard error over seeds" * any(len(row.runs) > 1 for row in rows))
    speeds.set(ylabel=label, title="against speed, colours and markers as on the left")
    speeds.set_xlabel("ms of a forward pass, 1 row" if speed == LATENCY else str(speed).replace("_", " "))
    far_apart = [fmean(row.values[comparison.metric]) for row in rows]
    if comparison.metric == "perplexity" and max(far_apart) > 20 * min(far_apart):
        quality.set_xscale("log")
        speeds.set_yscale("log")
    for axes in (quality, speeds):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(comparison.title)
    with saving(path):
        figure.savefig(path, dpi=150)
    plt.close(figure)
