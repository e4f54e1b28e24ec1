"""Pairs of texts, a source and its target (summaries, translations), as rows for encoder-decoders.

rows = pairs.rows(pairs.texts(part), tokenizer, max_length=512, max_target_length=128)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdfast.data.text import Row
from kdfast.data.words import column_of

SOURCES = ("source", "text", "document", "article", "dialogue", "input")  # names of columns
TARGETS = ("target", "summary", "highlights", "abstract", "output")
NESTED = "translation."  # before the languages of datasets of translations


def flat(part: Any) -> Any:
    """A dataset whose texts are columns of their own, those of translations by the names of their languages."""
    part = part.flatten()
    return part.rename_columns({name: name.removeprefix(NESTED) for name in part.column_names})


def texts(part: Any, source_column: str | None = None, target_column: str | None = None) -> list[tuple[str, str]]:
    """Sources and targets of a dataset; those of which either is empty are left out.

    Args:
        part: a `datasets.Dataset` with two columns of texts (`flat`).
        source_column, target_column: None: the first there is of `SOURCES` and `TARGETS`.

    Raises:
        ValueError: no such columns, one for both, or values that are no texts.
    """
    known = part.features
    source = column_of(known, source_column, SOURCES, "--source-column")
    target = column_of(known, target_column, TARGETS, "--target-column")
    if source == target:
        raise ValueError(f"target_column: expected another column than the sources', got {target}")
    pairs = list(zip(part[source], part[target], strict=True))
    for pair in pairs:
        if wrong := [one for one in pair if not isinstance(one, str | None)]:
            raise ValueError(f"data: expected texts in columns {source} and {target}, got {str(wrong[0])[:60]}")
    return [pair for pair in pairs if all(pair)]


def has_targets(part: Any, target_column: str | None = None) -> bool:
    """Whether a dataset has any: the rows of a competition's test have none."""
    known = TARGETS if target_column is None else (target_column,)
    return any(any(part[name]) for name in part.column_names if name in known)


def rows(
    pairs: Sequence[tuple[str, str]], tokenizer: Any, max_length: int, max_target_length: int, prefix: str = ""
) -> list[Row]:
    """Rows with the `input_ids` of a source, after the prefix, and of a target as `labels`; longer ones are cut, but for
    the tokens that end them."""
    if not pairs:
        return []
    sources, targets = zip(*pairs, strict=True)
    ids = tokenizer([prefix + source for source in sources], truncation=True, max_length=max_length)["input_ids"]
    labels = tokenizer(text_target=list(targets), truncation=True, max_length=max_target_length)["input_ids"]
    return [{"input_ids": of_source, "labels": of_target} for of_source, of_target in zip(ids, labels, strict=True)]
