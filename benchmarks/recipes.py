r"""Recipes on real data, over seeds: accuracy, KL to the teacher, latency and time of every one, on equal terms.

    python benchmarks/recipes.py [--seeds 0,1,2] [--only hinton,minilm] [--runs runs/recipes] \
        [--output benchmarks/results]

Ends with a table, and leaves it with its numbers and a plot in the output folder. Every cell is a run of
`kdfast distill` in a folder of its own, and is finished, continued or skipped like one: interrupt this whenever you
like and start it again. Of each seed there is one teacher. Every student is three layers, trained for three epochs at
the same rate with batches in the same order; only the objective differs, and, where the name says so, the start.
TinyBERT's have two stages before, and twice the rows in its last. FastBERT is the teacher with branches, at speed
0.5; its other speeds are in files of their own.
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
    dynamic,
    fastbert,
    hinton,
    minilm,
    multi_teacher,
    patient_kd,
    self_distillation,
    tinybert,
)
from kdfast.recipes.base import Recipe
from kdfast.results import compare, plots, speed_curve, tables
from kdfast.runs import run

EQUAL: dict[str, Any] = {"epochs": 3, "learning_rate": 1e-4, "warmup": 0.06, "student_layers": (0, 2, 4)}

# Recipes, by a seed and its teacher's folder. The first trains the teacher, and the student on the labels alone.
CELLS: dict[str, Callable[[int, str], Recipe]] = {
    "hinton": lambda seed, teacher: hinton.Recipe(seed=seed, **EQUAL),
    "patient-kd": lambda seed, teacher: patient_kd.Recipe(seed=seed, teacher=teacher, student_start="teacher", **EQUAL),
    "minilm": lambda seed, teacher: minilm.Recipe(seed=seed, teacher=teacher, base=base(), **EQUAL),
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
    # MiniLM's and TinyBERT's students start from the pre-trained encoder, those above from the fine-tuned teacher.
    "labels-pretrained-start": lambda seed, teacher: hinton.Recipe(
        seed=seed, teacher=teacher, base=base(), student_start="base", alpha=0.0, baseline=False, **EQUAL
    ),
}


def base() -> str:
    from kdfast.data import demo

    return str(demo.fetch(demo.MINILM))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default=",".join(CELLS), help="cells, with commas")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    console, folders = Console(), []
    for seed in map(int, arguments.seeds.split(",")):
        teacher = arguments.runs.resolve() / f"hinton-{seed}" / "teacher"
        for name in arguments.only.split(","):
            folder = arguments.runs / f"{name}-{seed}"
            folders.append(folder)
            if not (folder / "metrics.json").is_file():
                console.rule(f"{name}, seed {seed}")
                run(CELLS[name](seed, str(teacher)), folder, console)
    save(folders, arguments.output, console)


def save(folders: list[Path], output: Path, console: Console) -> None:
    """The table of finished runs: shown, and as JSON, markdown and plot."""
    comparison = compare.compare(folders)
    console.print(tables.comparison_table(comparison))
    facts = harness.environment("cpu")
    path = harness.write(
        [{**row.as_dict(), "runs": [run.folder.name for run in row.runs]} for row in comparison.rows],
        facts,
        harness.results_path(facts, output, "recipes"),
    )
    path.with_suffix(".md").write_text(tables.comparison_markdown(comparison) + "\n")
    plots.plot_comparison(path.with_suffix(".png"), comparison)
    console.print(f"In {output}: {path.name}, {path.stem}.md, {path.stem}.png")
    save_speeds(folders, output, facts, console)


def save_speeds(folders: list[Path], output: Path, facts: dict[str, Any], console: Console) -> None:
    """The curves of early exits, where there are any: as JSON, and their mean as markdown and plot."""
    stored = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    runs_of = [one for one in stored if "curve" in one]
    if not runs_of:
        return
    curves, metric = [one["curve"] for one in runs_of], runs_of[0]["task"]["metric"]
    found = [{"seed": one["settings"]["seed"], "curve": one["curve"]} for one in runs_of]
    path = harness.write(found, facts, harness.results_path(facts, output, "fastbert-speeds"))
    path.with_suffix(".md").write_text(speed_curve.markdown(curves, metric) + "\n")
    plots.plot_speeds(path.with_suffix(".png"), curves, metric, "FastBERT")
    console.print(f"In {output}: {path.name}, {path.stem}.md, {path.stem}.png")


if __name__ == "__main__":
    main()
