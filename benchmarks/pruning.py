r"""Which units may go: criteria of pruning on real data, over seeds, against units drawn by chance.

    python benchmarks/pruning.py [--seeds 0,1,2] [--left 0.5,0.25] [--only random,taylor] [--teachers FOLDER] \
        [--runs runs/pruning] [--output benchmarks/results] [--measure]

MiniLM's six layers, fine-tuned on the movie reviews, lose half and three quarters of their heads and of their neurons,
in two steps early in one epoch of distillation from what they were. Every cell is a run of `kdfast prune` in a folder
of its own, and is finished, continued or skipped like one: interrupt this whenever you like and start it again. Of each
seed there is one teacher, whose outputs on the rows are stored once; `--teachers` has them where benchmarks/recipes.py
left them, else they are trained here. All cells have the same rows, steps and rate: only the criterion differs.

Milliseconds are those of each run's end, beside whatever else was running. `--measure`, once all is done and nothing
else runs, takes them again: the models of a seed in turn, in one process.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from kdfast.bench import harness
from kdfast.data import tasks
from kdfast.recipes import hinton, prune
from kdfast.recipes.paths import METRICS
from kdfast.results import compare, measure, plots, tables
from kdfast.runs import run, stages

# One of each family: the control; weights; activations; the loss to first and to second order; what the next map misses;
# and where weights went in training. Michel's importance is Taylor's where layers are compared, as here.
CRITERIA = ("random", "taylor", "magnitude", "fisher", "activation_norm", "obs", "movement")
SHORT: dict[str, Any] = {"epochs": 1, "train_rows": 3200, "learning_rate": 2e-4, "score_rows": 128}
STEPS: dict[str, Any] = {"schedule": "iterative", "begin": 0.1, "end": 0.4, "rounds": 2}
TIMED = "timed"  # of metrics.json: how its milliseconds were taken again


def recipe(criterion: str, left: float, seed: int, teacher: str) -> prune.Recipe:
    return prune.Recipe(criterion=criterion, target=f"keep={left:g}", seed=seed, teacher=teacher, **SHORT, **STEPS)


def folder_of(runs: Path, criterion: str, left: float, seed: int) -> Path:
    return runs / f"{criterion}-{left:g}-{seed}"


def cells(options: argparse.Namespace) -> Iterator[tuple[float, int, str]]:
    """Whole seeds, one after another, of one size after another."""
    for left in options.left:
        for seed in options.seeds:
            for criterion in options.only:
                yield left, seed, criterion


def teacher_of(options: argparse.Namespace, seed: int, console: Console) -> Path:
    """The fine-tuned model of a seed."""
    given = None if options.teachers is None else options.teachers / f"hinton-{seed}" / "teacher"
    if given is not None and stages.finished(given) is not None:
        return given.resolve()
    own = options.runs / f"hinton-{seed}"
    if stages.finished(own / "teacher") is None:
        console.rule(f"teacher, seed {seed}")
        run(hinton.Recipe(seed=seed, epochs=1, student_layers=(0,), train_rows=None), own, console)
    return (own / "teacher").resolve()


def share(outputs: Path, folder: Path, settings: dict[str, Any]) -> None:
    """A run that begins finds what the teacher made of the rows, which an earlier one has stored."""
    mine = folder / outputs.name
    if outputs.is_dir() and outputs.parent != folder and not mine.exists():
        stages.write_config(folder, settings)
        mine.symlink_to(outputs.resolve())


def train(options: argparse.Namespace, console: Console) -> None:
    stored: dict[int, Path] = {}
    for left, seed, criterion in cells(options):
        folder = folder_of(options.runs, criterion, left, seed)
        outputs = stored.setdefault(seed, folder / "teacher_outputs")
        if (folder / METRICS).is_file():
            continue
        console.rule(f"{criterion}, {left:g} left, seed {seed}")
        one = recipe(criterion, left, seed, str(teacher_of(options, seed, console)))
        share(outputs, folder, one.as_dict())
        run(one, folder, console)


# ---- results ----
def measure_again(options: argparse.Namespace, console: Console) -> None:
    """Leaves in every finished run's metrics.json what its models take now: those of a seed in turn."""
    for seed in options.seeds:
        folders = [folder_of(options.runs, criterion, left, of) for left, of, criterion in cells(options) if of == seed]
        finished = [folder for folder in folders if (folder / METRICS).is_file()]
        if not finished:
            continue
        first = json.loads((finished[0] / METRICS).read_text())
        sources = {"teacher": first["settings"]["teacher"]} | {one.name: str(one / "student") for one in finished}
        console.print(f"milliseconds, seed {seed}: {len(sources)} models")
        load = round(os.getloadavg()[0], 2)
        times = measure.times(sources, tasks.load(None), first["settings"]["max_length"])
        for folder in finished:
            stored = json.loads((folder / METRICS).read_text())
            for name, of in stored["models"].items():
                of |= times["teacher" if name == "teacher" else folder.name]
            stages.write_json(folder / METRICS, {**stored, TIMED: {"load_before": load, "models": len(sources)}})


def compared(folders: Sequence[Path]) -> compare.Comparison:
    """The teachers, then criterion by criterion what each leaves."""
    comparison = compare.compare(folders)
    for row in comparison.rows:
        if row.model != "teacher":
            of = prune.Recipe(**{name: row.runs[0].settings[name] for name in ("criterion", "target")})
            row.group, row.model = of.criterion, f"{of.goal[1]:g} left"
    comparison.rows.sort(key=lambda row: row.model == "teacher", reverse=True)
    return comparison


def against_random(comparison: compare.Comparison, model: str) -> str | None:
    """How far the best criterion is above chance, seed by seed; None where too few seeds have both."""
    rows = {row.group: row for row in comparison.rows if row.model == model}
    values = {
        name: dict(zip((run.seed for run in row.runs), row.values[comparison.metric], strict=True))
        for name, row in rows.items()
    }
    chance = values.pop("random", {})
    apart = {name: [of[seed] - chance[seed] for seed in of if seed in chance] for name, of in values.items()}
    apart = {name: of for name, of in apart.items() if len(of) > 1 and len(of) == len(chance)}
    if not apart:
        return None
    best = max(apart, key=lambda name: fmean(apart[name]))
    heading, factor, digits = tables.column_of(comparison.metric)
    mean, error = (factor * (of or 0.0) for of in (fmean(apart[best]), compare.standard_error(apart[best])))
    return (
        f"{model}: the best criterion, {best}, beats random by {mean:.{digits}f} points of {heading.split()[0]} "
        f"(standard error of the {len(chance)} differences {error:.{digits}f}), chosen of {len(apart)} by the same rows."
    )


def times_of(folders: Sequence[Path]) -> str:
    """How the milliseconds were taken."""
    taken = [json.loads((folder / METRICS).read_text()).get(TIMED) for folder in folders]
    if not all(taken):
        return "Milliseconds are of each run's end, beside other work."
    load = max(of["load_before"] for of in taken)
    return f"Milliseconds: the models of a seed in turn, in one process, load before it at most {load:g}."


def save(folders: Sequence[Path], output: Path, console: Console) -> None:
    """The table of finished runs: shown, and as JSON, markdown and plot."""
    comparison = compared(folders)
    console.print(tables.comparison_table(comparison))
    models = dict.fromkeys(row.model for row in comparison.rows if row.model != "teacher")
    told = [text for model in models if (text := against_random(comparison, model))]
    facts = harness.environment("cpu") | {"times": times_of(folders), "best": told, "settings": SHORT | STEPS}
    path = harness.write(
        [{**row.as_dict(), "runs": [run.folder.name for run in row.runs]} for row in comparison.rows],
        facts,
        harness.results_path(facts, output, "pruning"),
    )
    text = "\n\n".join([tables.comparison_markdown(comparison), facts["times"], *told])
    path.with_suffix(".md").write_text(text + "\n")
    plots.plot_pruned(path.with_suffix(".png"), comparison)
    for line in (*told, facts["times"], f"In {output}: {path.name}, {path.stem}.md, {path.stem}.png"):
        console.print(line)


def main() -> None:
    def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [kind(one) for one in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=several(int), default=[0, 1, 2])
    parser.add_argument("--left", type=several(float), default=[0.5, 0.25], help="shares of heads and neurons")
    parser.add_argument("--only", type=several(str), default=CRITERIA, help="criteria, with commas")
    parser.add_argument("--teachers", type=Path, help="runs of benchmarks/recipes.py")
    parser.add_argument("--runs", type=Path, default=Path("runs/pruning"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--measure", action="store_true", help="take the milliseconds again, of what is finished")
    options, console = parser.parse_args(), Console()
    if options.measure:
        measure_again(options, console)
    else:
        train(options, console)
    folders = [folder_of(options.runs, criterion, left, seed) for left, seed, criterion in cells(options)]
    save([folder for folder in folders if (folder / METRICS).is_file()], options.output, console)


if __name__ == "__main__":
    main()
