r"""Recipes on real data, over seeds: accuracy, KL to the teacher, latency and time of every one, on equal terms.

    python benchmarks/recipes.py [--seeds 0,1,2] [--only hinton,minilm] [--runs runs/recipes] \
        [--output benchmarks/results]

Ends with a table, and leaves it with its numbers and a plot in the output folder. Every cell is a run of
`kdfast distill` in a folder of its own, and is finished, continued or skipped like one: interrupt this whenever you
like and start it again. Of each seed there is one teacher. Every student is three layers, trained for three epochs at
the same rate with batches in the same order; only the objective differs, and, where the name says so, the start.
TinyBERT's have two stages before, and twice the rows in its last. FastBERT is the teacher with branches, at speed
0.5; its other speeds are in files of their own, as are DynaBERT's sizes. The cells whose names begin with few have
labels for a thousand rows only, and a table of their own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from kdfast.bench import harness
from kdfast.recipes import (
    adversarial,
    dynabert,
    dynamic,
    fastbert,
    hinton,
    minilm,
    multi_task,
    multi_teacher,
    patient_kd,
    self_distillation,
    tinybert,
)
from kdfast.recipes.base import Recipe
from kdfast.recipes.dynabert import size_of
from kdfast.results import compare, plots, speed_curve, tables
from kdfast.runs import run

EQUAL: dict[str, Any] = {"epochs": 3, "learning_rate": 1e-4, "warmup": 0.06, "student_layers": (0, 2, 4)}

# Recipes, by a seed and its teacher's folder. The first trains the teacher, and the student on the labels alone.
CELLS: dict[str, Callable[[int, str], Recipe]] = {
    "hinton": lambda seed, teacher: hinton.Recipe(seed=seed, **EQUAL),
    "patient-kd": lambda seed, teacher: patient_kd.Recipe(seed=seed, teacher=teacher, student_start="teacher", **EQUAL),
    "minilm": lambda seed, teacher: minilm.Recipe(seed=seed, teacher=teacher, base=base(), **EQUAL),
    # Steps of four sub-networks: all widths, then the largest, the smallest and two others. An epoch of each stage.
    "dynabert": lambda seed, teacher: dynabert.Recipe(
        seed=seed,
        teacher=teacher,
        epochs=1,
        sandwich=2,
        learning_rate=EQUAL["learning_rate"],
        warmup=EQUAL["warmup"],
        freeze_embeddings=True,
    ),
    # No student: the teacher itself, whose rows leave early. Its branches are trained as in the paper.
    "fastbert": lambda seed, teacher: fastbert.Recipe(seed=seed, teacher=teacher),
    # Before the three epochs of the prediction: three on text and one on the teacher's layers; each row has a variant.
    "tinybert": lambda seed, teacher: tinybert.Recipe(
        seed=seed,
        teacher=teacher,
        base=base(),
        general_rate=EQUAL["learning_rate"],
        intermediate_rate=EQUAL["learning_rate"],
        intermediate_epochs=1,
        augment=1,
        freeze_embeddings=True,
        **EQUAL,
    ),
    "dynamic-up": lambda seed, teacher: dynamic.Recipe(seed=seed, teacher=teacher, **EQUAL),
    "dynamic-down": lambda seed, teacher: dynamic.Recipe(seed=seed, teacher=teacher, direction="down", **EQUAL),
    "dynamic-flsw": lambda seed, teacher: dynamic.Recipe(
        seed=seed, teacher=teacher, direction="equal", rule="flsw", **EQUAL
    ),
    **{
        f"multi-teacher-{combine}": lambda seed, teacher, combine=combine: multi_teacher.Recipe(
            seed=seed, combine=combine, **EQUAL
        )
        for combine in multi_teacher.COMBINED
    },
    "adversarial-fgsm": lambda seed, teacher: adversarial.Recipe(seed=seed, teacher=teacher, **EQUAL),
    "adversarial-pgd": lambda seed, teacher: adversarial.Recipe(seed=seed, teacher=teacher, steps=3, **EQUAL),
    # Of the teacher's depth, as it is meant.
    "self-distillation": lambda seed, teacher: self_distillation.Recipe(
        seed=seed, teacher=teacher, base=base(), **{**EQUAL, "student_layers": None}
    ),
    # One encoder for the movie reviews and 1,300 reviews of products; of the former its rows are in the table.
    "multi-task": lambda seed, teacher: multi_task.Recipe(seed=seed, **EQUAL),
    # MiniLM's and TinyBERT's students start from the pre-trained encoder, those above from the fine-tuned teacher.
    "labels-pretrained-start": lambda seed, teacher: hinton.Recipe(
        seed=seed, teacher=teacher, base=base(), student_start="base", alpha=0.0, baseline=False, **EQUAL
    ),
}
SIZES = ("student", "width_1_depth_0.5", "width_0.5_depth_0.5")  # of DynaBERT's, beside the other recipes

# A thousand of the rows have labels, of the other 7,568 there is the text alone. The first is `make demo`: it trains the
# teacher, on the labels, and a student on them with as many steps as the others have on all text.
FEW: dict[str, Any] = {**EQUAL, "train_rows": 1000, "unlabeled": "movie_reviews", "epochs": 2}
FEW_CELLS: dict[str, Callable[[int, str], Recipe]] = {
    "few-hinton": lambda seed, teacher: hinton.Recipe(seed=seed, teacher_epochs=4, baseline_epochs=17, **FEW),
    "few-patient-kd": lambda seed, teacher: patient_kd.Recipe(
        seed=seed, teacher=teacher, student_start="teacher", **FEW
    ),
    "few-labels-shorter": lambda seed, teacher: hinton.Recipe(
        seed=seed, teacher=teacher, alpha=0.0, baseline=False, **{**FEW, "unlabeled": None, "epochs": 3}
    ),
}


def base() -> str:
    from kdfast.data import demo

    return str(demo.fetch(demo.MINILM))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default=",".join([*CELLS, *FEW_CELLS]), help="cells, with commas")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    console, names = Console(), arguments.only.split(",")
    tables_of = {"recipes": [n for n in names if n in CELLS], "few-labels": [n for n in names if n in FEW_CELLS]}
    folders: dict[str, list[Path]] = {table: [] for table in tables_of}
    for seed in map(int, arguments.seeds.split(",")):
        for table, cells in tables_of.items():
            first = next(iter(CELLS if table == "recipes" else FEW_CELLS))
            teacher = arguments.runs.resolve() / f"{first}-{seed}" / "teacher"
            for name in cells:
                folder = arguments.runs / f"{name}-{seed}"
                folders[table].append(folder / "task_movie_reviews" if name == "multi-task" else folder)
                if not (folders[table][-1] / "metrics.json").is_file():
                    console.rule(f"{name}, seed {seed}")
                    run((CELLS | FEW_CELLS)[name](seed, str(teacher)), folder, console)
    for table, of in folders.items():
        if of:
            save(of, arguments.output, console, table)
    save_curves([folder for of in folders.values() for folder in of], arguments.output, console)


def save(folders: list[Path], output: Path, console: Console, table: str) -> Path:
    """The table of finished runs: shown, and as JSON, markdown and plot."""
    comparison = compare.compare(folders)
    if table == "recipes":  # the others have a table of their own
        comparison.rows[:] = [row for row in comparison.rows if size_of(row.model) is None or row.model in SIZES]
    console.print(tables.comparison_table(comparison))
    facts = harness.environment("cpu")
    path = harness.write(
        [{**row.as_dict(), "runs": [run.folder.name for run in row.runs]} for row in comparison.rows],
        facts,
        harness.results_path(facts, output, table),
    )
    path.with_suffix(".md").write_text(tables.comparison_markdown(comparison) + "\n")
    plots.plot_comparison(path.with_suffix(".png"), comparison)
    console.print(f"In {output}: {path.name}, {path.stem}.md, {path.stem}.png")
    return path


def save_curves(folders: list[Path], output: Path, console: Console) -> None:
    """What one model of several speeds or sizes gives, where there is any: as JSON, and the mean of the seeds as markdown and
    plot."""
    stored = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    facts = harness.environment("cpu")
    if runs_of := [one for one in stored if "curve" in one]:
        curves, metric = [one["curve"] for one in runs_of], runs_of[0]["task"]["metric"]
        found = [{"seed": one["settings"]["seed"], "curve": one["curve"]} for one in runs_of]
        path = harness.write(found, facts, harness.results_path(facts, output, "fastbert-speeds"))
        path.with_suffix(".md").write_text(speed_curve.markdown(curves, metric) + "\n")
        plots.plot_speeds(path.with_suffix(".png"), curves, metric, "FastBERT")
        console.print(f"In {output}: {path.name}, {path.stem}.md, {path.stem}.png")
    of_sizes = [folder for folder, one in zip(folders, stored, strict=True) if one["settings"]["recipe"] == "dynabert"]
    if of_sizes:
        path = save(of_sizes, output, console, "dynabert-sizes")
        models = [one["models"] for one in stored if one["settings"]["recipe"] == "dynabert"]
        plots.plot_sizes(path.with_suffix(".png"), models, stored[0]["task"]["metric"], "DynaBERT")


if __name__ == "__main__":
    main()
