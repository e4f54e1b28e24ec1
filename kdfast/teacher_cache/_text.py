"""Rows of text, from files or the Hub; and as rows of numbers, the same for the teacher and, later, the student."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from kdfast.data.files import read
from kdfast.teacher_cache._manifest import mismatch


def text_rows(
    data: str | Path,
    tokenizer: Any,
    *,
    text_column: str = "text",
    max_length: int | None = None,
    tell: Callable[[str], Any] | None = None,
) -> Any:
    """A `datasets.Dataset` with input_ids (and what else the tokenizer gives) in place of the text; other columns stay.

    `kdfast cache-teacher` reads its rows with it: the same call gives the dataset to train on beside the cache.

    Args:
        data: a .txt (one row per line), .jsonl, .json, .csv, .tsv (without quotation marks) or .parquet file, a folder
            or a name on the Hub (their split "train"; "org/name:config" names a configuration).
        tokenizer: of transformers.
        text_column: where the text is ("text" in a .txt file). Rows without any text are left out.
        max_length: longer rows are cut to as many tokens.
        tell: gets how many rows are left out, where some are.

    Raises:
        CacheError: no such file or column, a kind of file that is not known, or no text in it.
    """
    splits = read(data, partial(mismatch, "data"))
    if "train" not in splits:
        raise mismatch("data", f"a split train in {data}", ", ".join(splits))
    rows = splits["train"]
    if {"prompt", "completion"} <= set(rows.column_names) and text_column in ("prompt", "completion", "text"):
        expected = (
            "a column of whole texts (prompts with completions: kdfast.data.text.read_completions reads them, and "
        )
        raise mismatch(
            "text_column", expected + 'write(..., positions="next_labels") stores the completions)', text_column
        )
    if text_column not in rows.column_names:
        raise mismatch("text_column", f"one of {', '.join(rows.column_names)} in {data}", text_column)
    every = len(rows)
    rows = rows.filter(lambda text: bool(text and text.strip()), input_columns=text_column)
    if not len(rows):
        raise mismatch("data", f"text in column {text_column} of {data}", "none")
    if tell is not None and len(rows) < every:
        tell(f"{every - len(rows):,} of {every:,} rows have no text and are left out")
    return rows.map(
        lambda texts: dict(tokenizer(texts, truncation=max_length is not None, max_length=max_length)),
        input_columns=text_column,
        remove_columns=text_column,
        batched=True,
    )
