"""Rows of text as rows of numbers, the same for the teacher and, later, the student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdfast.teacher_cache._manifest import mismatch

READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def text_rows(data: str | Path, tokenizer: Any, *, text_column: str = "text", max_length: int | None = None) -> Any:
    """A `datasets.Dataset` with input_ids (and what else the tokenizer gives) in place of the text; other columns stay.

    `kdfast cache-teacher` reads its rows with it: the same call gives the dataset to train on beside the cache.

    Args:
        data: a .txt (one row per line), .jsonl, .json, .csv or .parquet file, or a name on the Hub (its split "train").
        tokenizer: of transformers.
        text_column: where the text is ("text" in a .txt file). Rows without any text are left out.
        max_length: longer rows are cut to as many tokens.

    Raises:
        CacheError: no such file or column, a kind of file that is not known, or no text in it.
    """
    path = Path(data)
    if path.exists() and path.suffix not in READERS:
        raise mismatch("data", f"a file that ends in {', '.join(READERS)}, or a name on the Hub", data)
    if path.suffix in READERS and not path.is_file():
        raise mismatch("data", f"a file {data}", "none")
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError as error:
        raise ImportError(
            f"reading {data} needs {error.name}, which is not installed: pip install kdfast[train]"
        ) from error
    kind = READERS.get(path.suffix)
    try:
        rows = load_dataset(kind or str(data), data_files=str(path) if kind else None, split="train")
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise mismatch("data", f"rows that `datasets` can read in {data}", reason[0]) from None
    if {"prompt", "completion"} <= set(rows.column_names) and text_column in ("prompt", "completion", "text"):
        expected = "a column of whole texts (prompts with completions: kdfast.text.read_completions reads them, and "
        raise mismatch(
            "text_column", expected + 'write(..., positions="next_labels") stores the completions)', text_column
        )
    if text_column not in rows.column_names:
        raise mismatch("text_column", f"one of {', '.join(rows.column_names)} in {data}", text_column)
    rows = rows.filter(lambda text: bool(text and text.strip()), input_columns=text_column)
    if not len(rows):
        raise mismatch("data", f"text in column {text_column} of {data}", "none")
    return rows.map(
        lambda texts: dict(tokenizer(texts, truncation=max_length is not None, max_length=max_length)),
        input_columns=text_column,
        remove_columns=text_column,
        batched=True,
    )
