"""Whether a run's settings still lead to the rows that it was measured on: one that was moved may find another file."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from kdfast.data import tasks
from kdfast.data.labels import of_setting
from kdfast.recipes.base import Recipe
from kdfast.recipes.classifier import ClassifierRecipe
from kdfast.recipes.paths import METRICS, moved

SETTINGS = ("text_columns", "label_column", "kind", "test_rows")  # of which the test rows are made, beside the data


def read(data: str | None, **settings: Any) -> tasks.Task:
    """`kdfast.data.tasks.load`; its messages begin with the setting, which is `data` and not `source` here.

    Raises:
        ValueError, kdfast.data.demo.AssetError: as `load` there.
    """
    try:
        return tasks.load(data, **settings)
    except tasks.TaskError as error:
        raise of_setting(error, "data") from None


def load(recipe: ClassifierRecipe, **instead: Any) -> tasks.Task:
    """The task of a recipe's settings, some of them others."""
    return read(recipe.data, **{name: getattr(recipe, name) for name in SETTINGS} | instead)


def stored(run: Path) -> str | None:
    """The `kdfast.data.tasks.fingerprint` of a run; None of one that is not finished, or has none."""
    if not (run / METRICS).is_file():
        return None
    task = json.loads((run / METRICS).read_text()).get("task")
    return task.get("test") if isinstance(task, dict) else None


def check(run: Path, task: tasks.Task) -> None:
    """
    Args:
        task: as the run's settings lead to it.

    Raises:
        ValueError: its test rows are not those of the run.
    """
    check_rows(run, task.test, task.name)


def check_rows(run: Path, rows: Any, data: str | None) -> None:
    """
    Args:
        rows: to test on, as the run's settings lead to them; data: where they are from.

    Raises:
        ValueError: they are not those of the run.
    """
    expected = stored(run)
    if expected is not None and (found := tasks.fingerprint(rows)) != expected:
        raise ValueError(
            f"run {run}: data: expected the test rows that it was measured on ({expected}), "
            f"got those of {data} ({found})"
        )


def check_config(recipe: Recipe, config: Path, given: Collection[str]) -> list[str]:
    """Before another run is made of a run's `config`: what to tell of the files that are elsewhere now.

    Args:
        recipe: what is run.
        given: settings that are not the config's.

    Raises:
        ValueError: rows that are elsewhere are not those that the run was measured on.
    """
    settings: dict[str, Any] = yaml.safe_load(config.read_text(encoding="utf-8"))
    of_config = {name: value for name, value in settings.items() if name not in given}
    elsewhere = moved({"data": of_config.get("data")}, config.parent)
    if elsewhere and isinstance(recipe, ClassifierRecipe) and stored(config.parent) is not None:
        check(config.parent, load(type(recipe)(**recipe.read_yaml(config))))
    return moved(of_config, config.parent)
