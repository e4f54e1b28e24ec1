"""An `EarlyExit` at several speeds: quality, where rows leave, operations and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import DataCollatorWithPadding

from kdfast.bench import timing
from kdfast.data import metrics
from kdfast.models.early_exit import EarlyExit, uncertainty
from kdfast.objective import model_inputs
from kdfast.results.compare import standard_error
from kdfast.results.measure import BATCH, LATENCY_ROWS, length
from kdfast.results.progress import bar
from kdfast.results.tables import HEADINGS, _table

TIMED = 64  # rows whose time is taken, alone and in batches
REPEATS = 3  # of each; the median counts
LEGEND = (
    "layers: mean of those that rows leave after. times fewer: operations than at speed 0. ms: mean forward pass of rows of "
    "about median length."
)
LATENCIES = tuple(f"latency_ms_batch_{count}" for count in LATENCY_ROWS)
OF_MODEL = ("layers", "flops_per_row", *LATENCIES)

Point = dict[str, float]


def measured(
    model: EarlyExit, rows: Sequence[dict[str, Any]], tokenizer: Any, metric: str, speeds: Sequence[float]
) -> list[Point]:
    """A point for each speed: `speed`; what `kdfast.data.metrics` gives; `layers`, the mean layer that rows leave after;
    `flops_per_row`, the mean of `EarlyExit.flops`; `leaves_1`, …, the shares of rows that leave after each layer;
    `latency_ms_batch_1` and `_32`, mean milliseconds of batches of rows of about median length.

    Args:
        model: on the device that it runs on.
        rows: with input_ids and labels.
    """
    answers = _answers(model, rows, tokenizer, speeds)
    flops = {count: model.flops(count) for count in {length(row) for row in rows}}
    labels = torch.tensor([row["labels"] for row in rows])
    times = {count: _latencies(model, rows, tokenizer, speeds, count) for count in LATENCY_ROWS}
    points: list[Point] = []
    for speed in speeds:
        logits, layers = answers[speed]
        of_rows = [flops[length(row)][layer if speed else 0] for row, layer in zip(rows, layers.tolist(), strict=True)]
        shares = {f"leaves_{i}": (layers == i).double().mean().item() for i in range(1, model.depth + 1)}
        points.append(
            {
                "speed": speed,
                **metrics.metrics(metric, logits, labels),
                "layers": layers.double().mean().item(),
                "flops_per_row": fmean(of_rows),
                **shares,
                **{f"latency_ms_batch_{count}": of[speed] for count, of in times.items()},
            }
        )
    return points


def _answers(
    model: EarlyExit, rows: Sequence[dict[str, Any]], tokenizer: Any, speeds: Sequence[float]
) -> dict[float, tuple[Tensor, Tensor]]:
    """Logits [N, C] and layers [N] of all rows, in their order, by speed; of one run, with every branch."""
    order = sorted(range(len(rows)), key=lambda i: length(rows[i]))  # similar lengths: little padding
    every: list[Tensor] = []
    model.eval()
    with torch.inference_mode(), bar("test: every branch", len(rows)) as shown:
        for start in range(0, len(rows), BATCH):
            outputs = model(**_batch(model, [rows[i] for i in order[start : start + BATCH]], tokenizer), branches=True)
            every.append(torch.stack([*outputs.branch_logits, outputs.logits]).float().cpu())
            shown.update(len(order[start : start + BATCH]))
    logits = torch.cat(every, 1)[:, torch.tensor(order).argsort()]
    unsure = uncertainty(logits)
    found = {}
    for speed in speeds:
        leaves = (unsure < speed) if model.strict else (unsure <= speed) & (speed > 0)
        leaves[-1] = True
        layers = leaves.int().argmax(0)  # the first
        found[speed] = logits[layers, torch.arange(len(rows))], layers + 1
    return found


def _latencies(
    model: EarlyExit, rows: Sequence[dict[str, Any]], tokenizer: Any, speeds: Sequence[float], count: int
) -> dict[float, float]:
    """Mean milliseconds of a batch, by speed; the speeds take turns, so that a slow moment hits all of them alike."""
    middle = sorted(rows, key=length)[len(rows) // 2 :][:TIMED]
    batches = [_batch(model, middle[i : i + count], tokenizer) for i in range(0, len(middle) - count + 1, count)]
    batches = batches or [_batch(model, (list(middle) * count)[:count], tokenizer)]
    found: dict[float, list[float]] = {speed: [] for speed in speeds}
    with torch.inference_mode():
        for batch in batches:
            calls = {speed: partial(model, **batch, speed=speed) for speed in speeds}
            for speed, repeats in timing.interleaved(calls, model.device.type, rounds=REPEATS).items():
                found[speed].append(median(repeats))
    return {speed: fmean(of) for speed, of in found.items()}


def _batch(model: EarlyExit, rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, Any]:
    own = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
    return model_inputs(model, DataCollatorWithPadding(tokenizer)(own).to(model.device))


HEADINGS_OF = ("layers", "GFLOP\nper row", "times\nfewer", "ms,\n1", "ms,\n32")


def _cells(curves: Sequence[Sequence[Point]], metric: str) -> list[list[str]]:
    """Rows of the tables, with standard errors where there are several curves; times of those that have any."""
    _, factor, digits = HEADINGS[metric]

    def cell(values: Sequence[float], places: int) -> str:
        error = standard_error(values)
        return f"{fmean(values):.{places}f}" + ("" if error is None else f"±{error:.{places}f}")

    made = []
    for at in zip(*curves, strict=True):
        fewer = [curve[0]["flops_per_row"] / point["flops_per_row"] for curve, point in zip(curves, at, strict=True)]
        made.append(
            [
                f"{at[0]['speed']:g}",
                cell([factor * point[metric] for point in at], digits),
                cell([point["layers"] for point in at], 2),
                cell([point["flops_per_row"] / 1e9 for point in at], 3),
                cell(fewer, 2),
                *(cell([point[name] for point in at if name in point], 1) for name in LATENCIES),
            ]
        )
    return made


def table(points: Sequence[Point], metric: str) -> Table:
    """A row per speed."""
    made = _table("FastBERT at its speeds", LEGEND, [HEADINGS[metric][0], *HEADINGS_OF])
    made.columns[0].header = "speed"
    for cells in _cells([points], metric):
        made.add_row(*cells)
    return made


def markdown(curves: Sequence[Sequence[Point]], metric: str) -> str:
    """A row per speed, the mean of curves at the same speeds."""
    headings = ["speed", HEADINGS[metric][0], *HEADINGS_OF]
    lines = [[heading.replace("\n", " ") for heading in headings], ["---:"] * len(headings), *_cells(curves, metric)]
    return LEGEND + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
