"""What a run shows at its end: measured metrics, the table of models and the learning curves."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kdfast.models.cost import Cost
from kdfast.prune import advice
from kdfast.results.compare import Comparison, standard_error
from kdfast.results.measure import FAST, LATENCY_ROWS, SLOW, Metrics


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
    table.add_column("model", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


# Of what is measured: its heading, its factor, its digits.
HEADINGS: dict[str, tuple[str, float, int]] = {
    "accuracy": ("accuracy\n%", 100, 1),
    "f1": ("F1\n%", 100, 1),
    "micro_f1": ("micro F1\n%", 100, 1),
    "matthews": ("Matthews", 1, 3),
    "pearson": ("Pearson", 1, 3),
    "spearman": ("Spearman", 1, 3),
    "exact_match": ("exact\n%", 100, 1),
    "perplexity": ("perplexity", 1, 2),
    "kl_to_teacher": ("KL to\nteacher", 1, 4),
    "mse_to_teacher": ("MSE to\nteacher", 1, 4),
    "agreement": ("agrees\n%", 100, 1),
    "parameters": ("params\nM", 1e-6, 1),
    "megabytes": ("MB", 1, 0),
    "gflop": ("GFLOP,\n1", 1, 2),
    "latency_ms_batch_1": ("ms,\n1", 1, 1),
    "latency_ms_batch_32": ("ms,\n32", 1, 0),
    "tokens_per_second": ("tokens\nper s", 1, 0),
    "training_seconds": ("train\ns", 1, 0),
}
# Of a run's table, beside its metric.
COLUMNS = (
    *("kl_to_teacher", "mse_to_teacher", "agreement", "parameters", "megabytes"),
    *("latency_ms_batch_1", "latency_ms_batch_32", "training_seconds"),
)


def _distances(names: Collection[str]) -> str:
    """What a table says of its columns, where they are there."""
    told = {
        "KL: from the teacher's distribution, in nats. ": "kl_to_teacher" in names and "micro_f1" not in names,
        "KL: from the teacher's probability of each label, in nats. ": {"kl_to_teacher", "micro_f1"} <= {*names},
        "MSE: squared distance to the teacher's numbers. ": "mse_to_teacher" in names,
    }
    return "".join(text for text, so in told.items() if so)


MEDIAN = "ms: median forward pass, rows of median length"
WIDE = 1.25  # times the median: a slowest pass that is told
SPREAD = "; below it fastest–slowest, where far apart"


def _latencies(rows: Iterable[Metrics]) -> str:
    """What a table says of them."""
    return MEDIAN + SPREAD * any(_spread(row, name) for row in rows for name in row)


def _spread(row: Metrics, name: str) -> str:
    """In a line of its own, below the median."""
    if name + SLOW not in row:
        return ""
    low, high = sorted((row[name], row[name + SLOW]))  # of milliseconds the slowest is more, of speeds less
    if high <= WIDE * low:
        return ""
    fast, slow = (f"{row[name + of]:.{0 if row[name + of] >= 9.95 else 1}f}" for of in (FAST, SLOW))
    return f"\n{fast}–{slow}"


def results_table(results: Mapping[str, Metrics], titles: Mapping[str, str], data: str, metric: str) -> Table:
    """One row per model, in the order of the titles."""
    columns = [column for column in (metric, *COLUMNS) if any(column in results[name] for name in titles)]
    table = _table(
        f"{data}: on the test rows",
        _distances({key for name in titles for key in results[name]}) + _latencies(results[name] for name in titles),
        [column_of(column)[0] for column in columns],
    )
    for name, title in titles.items():
        row = results[name]
        table.add_row(
            title, *(_cell(row, column) + _spread(row, column) if column in row else "–" for column in columns)
        )
    return table


def gain(results: Mapping[str, Metrics], metric: str) -> list[str]:
    """What distillation brought, in one line, where the same student was trained on the labels alone as well."""
    if not {"labels_only", "student"} <= {*results}:
        return []
    alone, distilled = results["labels_only"], results["student"]
    heading, factor, digits = column_of(metric)
    name, *unit = heading.splitlines()
    mine, other = (" ".join([_cell(row, metric), *unit]) for row in (distilled, alone))
    difference = f"{factor * (distilled[metric] - alone[metric]):+.{digits}f}{' points' if factor == 100 else ''}"
    values = [f"{name} {mine}, on the labels alone {other} ({difference})"]
    for key, title in (("kl_to_teacher", "KL"), ("mse_to_teacher", "MSE")):
        if distilled.get(key) and key in alone:
            values.append(f"{title} to the teacher {_cell(distilled, key)} against {_cell(alone, key)}")
    return [f"Distilled: {'; '.join(values)}"]


def _cell(row: Metrics, name: str) -> str:
    _, factor, digits = column_of(name)
    value = row[name] * factor
    return f"{value:{_form(value, digits if abs(value) < 99.95 else 0)}}"


LANGUAGE_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("perplexity", "perplexity", ".2f"),
    ("f1", "F1\n%", ".1f"),
    ("exact_match", "exact\n%", ".1f"),
    ("accuracy", "accuracy\n%", ".1f"),
    ("kl_to_teacher", "KL to\nteacher", ".4f"),
    ("parameters", "params\nmillion", ".1f"),
    ("megabytes", "MB", ".0f"),
    ("tokens_per_second", "tokens\nper second", ".0f"),
)
FACTORS = {"f1": 100, "exact_match": 100, "accuracy": 100, "parameters": 1e-6}


def language_table(results: Mapping[str, Metrics], caption: str) -> Table:
    """One row per language model, in the order given; the caption says what perplexity and KL are of."""
    columns = [column for column in LANGUAGE_COLUMNS if any(column[0] in row for row in results.values())]
    table = _table(
        "Held-out text: teacher and student",
        f"{caption}. Tokens per second: median forward pass"
        + SPREAD * any(_spread(row, "tokens_per_second") for row in results.values()),
        [heading for _, heading, _ in columns],
    )

    def cell(name: str, value: float, form: str) -> str:
        if name == "megabytes" and not value:  # not saved here
            return "–"
        if name == "megabytes":
            form = _form(value, 0)
        return f"{value * FACTORS.get(name, 1):{'.1e' if name == 'perplexity' and value >= 1e4 else form}}"

    for title, row in results.items():
        table.add_row(title, *(cell(name, row[name], form) + _spread(row, name) for name, _, form in columns))
    return table


def column_of(name: str) -> tuple[str, float, int]:
    """Heading, factor and digits of anything that is measured."""
    return HEADINGS.get(name, (name.replace("_", "\n"), 1, 3))


def _form(value: float, digits: int) -> str:
    """Below 1 with two digits at least, which what is small would be 0 without."""
    return f".{digits or 2 * (0 < abs(value) < 1)}f" if abs(value) < 1e5 else ".1e"


def evaluation_table(results: Mapping[str, Metrics], data: str, rows: int, teacher: str | None = None) -> Table:
    """One row per model, in the order given, with everything that was measured; below it, which of them compute less
    than their teacher and are no faster."""
    every = dict.fromkeys(name for row in results.values() for name in row)
    names = [name for name in every if not name.endswith((SLOW, FAST))]
    table = _table(
        f"{data}: on {rows:,} test rows",
        _distances(names) + _latencies(results.values()) + _no_faster(results, teacher),
        [column_of(name)[0] for name in names],
    )
    for title, row in results.items():
        cells = []
        for name in names:
            _, factor, digits = column_of(name)
            value = row.get(name, 0.0) * factor
            cells.append(f"{value:{_form(value, digits)}}{_spread(row, name)}" if name in row else "–")
        table.add_row(title, *cells)
    return table


def _no_faster(results: Mapping[str, Metrics], teacher: str | None) -> str:
    if teacher is None:
        return ""
    costs = {name: cost_of(row) for name, row in results.items()}
    less = (name for name, of in costs.items() if of.gflop < costs[teacher].gflop)
    told = {name: advice(costs[teacher], costs[name]) for name in less}
    return "".join(f". {name} with {LATENCY_ROWS[-1]} rows: {text}" for name, text in told.items() if text)


def cost_of(row: Metrics) -> Cost:
    """What was measured of a model, with many rows."""
    latency = f"latency_ms_batch_{LATENCY_ROWS[-1]}"
    milliseconds = (row[latency + FAST], row[latency], row[latency + SLOW])
    return Cost(int(row["parameters"]), row["megabytes"], row["gflop"], milliseconds)


COMPARED = ("kl_to_teacher", "mse_to_teacher", "agreement", "parameters")
LATENCY, LATENCY_32 = "latency_ms_batch_1", "latency_ms_batch_32"
SPEEDS = (LATENCY, LATENCY_32, "tokens_per_second", "training_seconds")


def compared(comparison: Comparison, all_spreads: bool) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a comparison, beside the models' names."""
    rows = comparison.rows
    present = {name for row in rows for name in row.values} - {comparison.metric}
    masked = ("accuracy",) if comparison.family == "distilbert" else ()  # of the tokens to be predicted
    names = [name for name in (*masked, *COMPARED, *SPEEDS) if name in present]
    heading, factor, digits = column_of(comparison.metric)
    several, alone = any(len(row.runs) > 1 for row in rows), any(row.differences for row in rows)
    headings = ["n"] * several + [heading] + ["vs\nlabels"] * alone + [column_of(name)[0] for name in names]

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
            _, scale, places = column_of(name)
            cells.append(cell(row.values.get(name, ()), scale, places, all_spreads and name != "parameters"))
        made.append(cells)
    return headings, made


def folded(name: str, width: int) -> str:
    """In several lines, preferably between the run and its model."""
    return textwrap.fill(name.replace("/", "/ "), width + 1).replace("/ ", "/")


def legend(comparison: Comparison) -> str:
    of_labels = any("micro_f1" in row.values for row in comparison.rows)
    said = {
        "n seeds: mean ± standard error.": any(len(row.runs) > 1 for row in comparison.rows),
        "vs labels: difference to the same student trained on the labels alone, seed by seed.": any(
            row.differences for row in comparison.rows
        ),
        f"KL: from each one's teacher{', of each label' * of_labels}, in nats.": any(
            "kl_to_teacher" in row.values for row in comparison.rows
        ),
        "MSE: squared distance to each one's teacher.": any("mse_to_teacher" in row.values for row in comparison.rows),
        "ms: median forward pass of 1 row and of 32.": any(LATENCY in row.values for row in comparison.rows),
    }
    return " ".join(text for text, so in said.items() if so)


def comparison_table(comparison: Comparison) -> Table:
    """A row per model, for 80 columns: only the metric has its standard error."""
    headings, cells = compared(comparison, all_spreads=False)
    table = _table(f"{comparison.title}: runs compared", legend(comparison), headings)
    table.padding = 0
    for row, values in zip(comparison.rows, cells, strict=True):
        table.add_row(folded(row.name, 19), *values)
    return table


def comparison_markdown(comparison: Comparison) -> str:
    """The table with all standard errors."""
    headings, cells = compared(comparison, all_spreads=True)
    lines = [["model", *headings], ["---", *["---:"] * len(headings)]]
    lines += [[row.name, *values] for row, values in zip(comparison.rows, cells, strict=True)]
    table = "\n".join(f"| {' | '.join(cell.replace(chr(10), ' ') for cell in line)} |" for line in lines)
    return f"{comparison.title}: runs compared. {legend(comparison)}\n\n{table}"
