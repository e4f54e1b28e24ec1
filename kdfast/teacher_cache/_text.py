"""Rows of text, from files or the Hub; and as rows of numbers, the same for the teacher and, later, the student."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from kdfast._hub import why_no_answer
from kdfast.teacher_cache._manifest import mismatch

# In a CSV file "None" and "NA" are words like others. A TSV file knows no quotation marks, as GLUE's do not: where they
# were taken for some, one at the beginning of a sentence would swallow the rows up to the next.
_CSV = {"keep_default_na": False, "na_values": [""]}
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", {**_CSV, "sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".parquet": ("parquet", {}),
}
PARTS = ("train", "test", "validation", "dev")  # how the names of a folder's files begin

Wrong = Callable[[object, object], Exception]


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
        data: a .txt (one row per line), .jsonl, .json, .csv, .tsv (without quotation marks) or .parquet file, a folder or a
            name on the Hub (their split "train"; "org/name:config" names a configuration).
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
        expected = "a column of whole texts (prompts with completions: kdfast.text.read_completions reads them, and "
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


def read(source: str | Path, wrong: Wrong) -> dict[str, Any]:
    """The splits, each a `datasets.Dataset`: of a file ("train", all of it), a folder of files, or a dataset on the Hub.

    Args:
        source: as `data` of `text_rows`. A folder's files are of one kind, and their names begin with one of `PARTS`.
        wrong: makes the error to raise out of what was expected and what there is.
    """
    files = _files(Path(source), wrong)
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError as error:
        raise ImportError(
            f"reading {source} needs {error.name}, which is not installed: pip install kdfast[train]"
        ) from error
    name, _, config = str(source).partition(":")
    none = wrong("a file, a folder or a dataset on the Hub", f"{str(source)!r}, which is none")
    absent = None if files else why_no_answer("dataset_info", name, none)
    try:
        if files:
            kind, options = READERS[Path(files["train"][0]).suffix]
            # Each for itself: test rows may lack a column.
            return {part: load_dataset(kind, data_files=of, split="train", **options) for part, of in files.items()}
        # Without the Hub, what was downloaded before is still there.
        with _offline() if absent else nullcontext():
            return dict(load_dataset(name, config or None))
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        if absent and isinstance(error, ConnectionError):
            expected = "a file, a folder, or a name on the Hub, which needs a network or that it was loaded here before"
            raise wrong(expected, f"{source!r} and no answer from the Hub ({absent})") from None
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise wrong(f"rows that `datasets` can read in {source}", " ".join(reason[:2])) from None


def _files(path: Path, wrong: Wrong) -> dict[str, list[str]] | None:
    """The files of each split; None for a name on the Hub."""
    if path.is_file() and path.suffix in READERS:
        return {"train": [str(path)]}
    if path.is_file():
        raise wrong(f"a file that ends in {', '.join(READERS)}, or a name on the Hub", path)
    if not path.is_dir():
        if path.suffix in READERS or str(path).startswith(("/", ".", "~")):
            raise wrong(f"a file {path}", "none")
        return None
    found = {}
    for part in PARTS:
        if files := [str(file) for file in sorted(path.glob(f"{part}*")) if file.suffix in READERS]:
            found[part] = files
    if "train" not in found:
        there = ", ".join(sorted(file.name for file in path.iterdir())[:10]) or "none"
        expected = (
            f"files in {path} that begin with train, {', '.join(PARTS[1:-1])} or {PARTS[-1]}, and with train at least"
        )
        raise wrong(f"{expected}, and end in {', '.join(READERS)}", there)
    kinds = sorted({Path(file).suffix for files in found.values() for file in files})
    if len(kinds) > 1:
        raise wrong(f"files of one kind in {path}", ", ".join(kinds))
    return found


@contextmanager
def _offline() -> Iterator[None]:
    import datasets

    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
