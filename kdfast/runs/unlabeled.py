"""Text beside a task's rows, of which no label is known: teachers teach on it, and labels do not count there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

from rich.console import Console
from torch.utils.data import Subset

from kdfast.data import files, tasks
from kdfast.data.labels import of_setting
from kdfast.data.text import OFF
from kdfast.recipes.classifier import ClassifierRecipe

Row = dict[str, Any]


def texts_of(recipe: ClassifierRecipe, task: tasks.Task, console: Console) -> Any:
    """The text of `unlabeled`, a `datasets.Dataset`; None without any.

    Raises:
        ValueError: it cannot be read, or the task is not one of classes.
    """
    if recipe.unlabeled is None:
        return None
    if task.kind != "classification":
        raise ValueError(
            f"unlabeled: expected none beside {task.kind}, whose labels are numbers, got {recipe.unlabeled}"
        )
    try:
        texts = tasks.texts(recipe.unlabeled, task, text_columns=recipe.text_columns)
    except tasks.TaskError as error:
        raise of_setting(error, "unlabeled") from None
    console.print(f"{files.shown_name(recipe.unlabeled)}: {len(texts):,} rows of text without labels beside")
    return texts


def rows_of(texts: Any, task: tasks.Task, tokenizer: Any, max_length: int) -> list[Row]:
    """As the task's, with a label that does not count."""
    if texts is None:
        return []
    tokens, _ = tasks.tokenize(replace(task, train=texts), tokenizer, max_length)
    return [{**row, "labels": OFF} for row in tokens.to_list()]


def labelled(rows: Sequence[Row]) -> list[int]:
    """The numbers of the rows that have a label."""
    return [i for i, row in enumerate(rows) if row["labels"] != OFF]


def drawn(rows: Sequence[Row], count: int | None, seed: int) -> list[Row]:
    """Of the rows with a label so many, or all that there are, in an order of the seed."""
    every = [rows[i] for i in labelled(rows)]
    return Random(seed).sample(every, min(count or len(every), len(every)))


def without_label(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["labels"] == OFF]


def labelled_of(cached: Any, rows: Sequence[Row]) -> Any:
    """Those of `cached`, which has something beside each of `rows`, that have a label."""
    own = labelled(rows)
    return cached if len(own) == len(rows) else Subset(cached, own)
