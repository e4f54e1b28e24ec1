"""Rows and texts out of files and datasets of the Hub."""

from __future__ import annotations

import csv
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from kdfast.data.hub import why_no_answer


def shown_name(source: str) -> str:
    """A path without its folders; anything else, a name on the Hub say, as it is."""
    return Path(source).name if Path(source).is_absolute() or Path(source).exists() else source


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


def why_not_readable(source: str | Path) -> str | None:
    """The reason why a file or folder cannot be read; None where it can, or is not there."""
    try:
        os.stat(source)
    except PermissionError as error:  # of a folder around it
        return str(error.strerror).lower()
    except OSError:
        return None
    needed = os.R_OK | os.X_OK if os.path.isdir(source) else os.R_OK
    return None if os.access(source, needed) else os.strerror(errno.EACCES).lower()


def read(source: str | Path, wrong: Wrong) -> dict[str, Any]:
    """The splits, each a `datasets.Dataset`: of a file ("train", all of it), a folder of files,
    or a dataset on the Hub.

    Args:
        source: as `data` of `text_rows`. A folder's files are of one kind, and their names begin with one of `PARTS`.
        wrong: makes the error to raise out of what was expected and what there is.
    """
    if locked := why_not_readable(source):
        raise wrong(f"a file or folder {source} that can be read", locked)
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
