"""Words with a label each, as rows for token classification; and how well they are found (names in texts, parts of speech).

rows = words.rows(part, classes=model.config.label2id, tokenizer=tokenizer, max_length=128)
words.quality([["B-PER", "O"]], [["B-PER", "O"]])       # {"f1": 1.0, "accuracy": 1.0}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kdfast.data.text import OFF

WORDS, TAGS = ("tokens", "words"), ("labels", "ner_tags", "tags", "pos_tags", "ner")  # names of columns


def column_of(features: Mapping[str, Any], given: str | None, known: Sequence[str], option: str | None = None) -> str:
    """The column of this name, or the first there is of those that are known; `option` is what names another.

    Raises:
        ValueError: there is none.
    """
    names = known if given is None else (given,)
    for name in names:
        if name in features:
            return name
    hint = f"; {option} names another" if given is None and option else ""
    raise ValueError(f"data: expected a column {' or '.join(names)}, got columns {', '.join(features)}{hint}")


def _numbers(feature: Any, values: Iterable[Any], classes: Mapping[str, int]) -> dict[Any, int]:
    """The model's number of each label: by its name where it has one, else the number itself."""
    of_words = getattr(feature, "feature", None)
    names = getattr(of_words, "names", None)
    found = {value for row in values for value in row}
    known = {value: names[value] if names is not None and isinstance(value, int) else value for value in found}
    numbers = {
        value: classes.get(name) if isinstance(name, str) else name if name in classes.values() else None
        for value, name in known.items()
    }
    if strange := sorted(str(known[value]) for value, number in numbers.items() if number is None):
        expected = f"the teacher's labels, {', '.join(classes)}"
        raise ValueError(f"data: expected {expected}, got {', '.join(strange[:5])}")
    return {value: number for value, number in numbers.items() if number is not None}


def rows(
    part: Any,
    classes: Mapping[str, int],
    tokenizer: Any,
    max_length: int,
    word_column: str | None = None,
    label_column: str | None = None,
) -> list[dict[str, list[int]]]:
    """Rows with `input_ids` and `labels`: a word's label at its first token, -100 at its others and at what is no word.
    Longer rows are cut; rows without words are left out.

    Args:
        part: a `datasets.Dataset` with lists of words and of as many labels, which are texts, numbers with names
            (`ClassLabel`), or numbers of the model's; of tables, which have no lists, with texts that spaces divide.
        classes: the model's numbers of its labels, `label2id` of its config.
        tokenizer: a fast one.
        word_column, label_column: None: the first there is of `WORDS` and `TAGS`.

    Raises:
        ValueError: no such columns, other labels than the model's, rows of more words than labels, or a tokenizer that
            takes no words.
    """
    name = column_of(part.features, label_column, TAGS, "--label-column")
    words, tags = (
        [row.split() if isinstance(row, str) else row for row in part[column]]
        for column in (column_of(part.features, word_column, WORDS), name)
    )
    for row, of_row in zip(words, tags, strict=True):
        if not (isinstance(row, list) and isinstance(of_row, list) and len(row) == len(of_row)):
            got = " and ".join(
                f"{len(x)}: {str(x)[:40]}" if isinstance(x, list) else str(x)[:40] for x in (row, of_row)
            )
            raise ValueError(f"data: expected a list of words and one of as many labels in each row, got {got}")
    numbers = _numbers(part.features[name], tags, classes)
    made = []
    for row, of_row in zip(words, tags, strict=True):
        if not row:
            continue
        try:
            encoded = tokenizer(row, is_split_into_words=True, truncation=True, max_length=max_length)
            places = encoded.word_ids()
        except (AssertionError, ValueError) as error:  # of slow ones, and of those that ask for add_prefix_space
            raise ValueError(f"tokenizer: expected a fast one that takes words, got {error}") from None
        first = [place is not None and place != before for place, before in zip(places, [None, *places], strict=False)]
        labels = [numbers[of_row[at]] if new else OFF for at, new in zip(places, first, strict=True)]
        made.append({"input_ids": list(encoded["input_ids"]), "labels": labels})
    return made


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The names in a row of tags: kind, first word, and the word after the last.

    B- begins one, I- and E- go on, S- is a whole one; as in CoNLL's evaluation, I- of another kind, or after O, begins
    one too.
    """
    found, begin, kind, before = [], None, "", "O"
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, its = tag.partition("-")
        if begin is not None and (prefix in ("B", "S", "O") or its != kind or before in ("E", "S")):
            found.append((kind, begin, place))
            begin = None
        if begin is None and prefix != "O":
            begin, kind = place, its
        before = prefix
    return found


def quality(predicted: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> dict[str, float]:
    """`f1` of whole names, where tags are such (B-, I-, …), and `accuracy` of words. 0 where a quotient is 0/0."""
    pairs = [pair for rows in zip(predicted, right, strict=True) for pair in zip(*rows, strict=True)]
    accuracy = sum(a == b for a, b in pairs) / len(pairs) if pairs else 0.0
    if not any(tag.startswith(("B-", "I-")) for row in right for tag in row):
        return {"accuracy": accuracy}
    found, known = ({(i, *name) for i, row in enumerate(rows) for name in entities(row)} for rows in (predicted, right))
    total = len(found) + len(known)
    return {"f1": 2 * len(found & known) / total if total else 0.0, "accuracy": accuracy}
