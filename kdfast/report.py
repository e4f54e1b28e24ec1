"""What a run shows at its end: measured metrics, the table of models and the learning curves."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn

import kdfast
from kdfast import kl_div

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
    ("latency_ms_batch_1", "ms,\n1 row", 1, 1),
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
        "KL: from the teacher's distribution, in nats. ms: median forward pass, rows of median length",
        [column[1] for column in columns],
    )
    for name, title in titles.items():
        row = results[name]
        cells = [f"{row[key] * scale:.{places}f}" if key in row else "–" for key, _, scale, places in columns]
        table.add_row(title, *cells)
    return table


def language_table(results: Mapping[str, Metrics]) -> Table:
    """One row per language model, in the order given."""
    table = _table(
        "Held-out text: teacher and student",
        "KL: of the next token, from the teacher's distribution at T = 1, in nats. Tokens per second: one forward pass",
        ("perplexity", "KL to\nteacher", "params\nmillion", "MB", "tokens\nper second"),
    )
    for name, row in results.items():
        perplexity = row["perplexity"]
        table.add_row(
            name,
            f"{perplexity:.2f}" if perplexity < 1e4 else f"{perplexity:.1e}",
            f"{row['kl_to_teacher']:.4f}",
            f"{row['parameters'] / 1e6:.1f}",
            f"{row['megabytes']:.0f}" if row["megabytes"] else "–",
            f"{row['tokens_per_second']:.0f}",
        )
    return table


def plot_losses(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """The loss of training, its terms, and the loss on held-out rows over the steps, saved as an image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    styles: dict[str, dict[str, Any]] = {
        "loss": {"label": "training, loss", "color": "#1b6ca8"},
        "kd": {"label": "training, teacher's term", "color": "#1b6ca8", "linestyle": "--", "linewidth": 1},
        "ce": {"label": "training, labels' term", "color": "#1b6ca8", "linestyle": ":"},
        "eval_loss": {"label": "held out, loss", "color": "#d95f02", "marker": "o"},
    }
    for name, style in styles.items():
        points = [(event["step"], event[name]) for event in history if name in event]
        if points:
            axes.plot(*zip(*points, strict=True), **style)
    axes.set(title="Distillation of a language model", xlabel="step", ylabel="nats per token", yscale="log")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
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
    for (name, history), style in zip(reversed(histories.items()), cycle(styles), strict=False):
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
    divergence.set_ylim(bottom=0)
    for axes in (quality, divergence):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
