"""What the values of a label column are: classes, several classes of a row, or numbers;
and how a model's loss takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

try:
    from datasets import List, Value
except ModuleNotFoundError as error:
    raise ImportError(
        f"kdfast.data.tasks needs {error.name}, which is not installed: pip install kdfast[train]"
    ) from error

KINDS = ("classification", "regression", "multi_label")


class TaskError(ValueError):
    """A dataset or an argument is not what was expected; the message names it."""


def mismatch(argument: str, expected: object, got: object) -> TaskError:
    return TaskError(f"tasks: {argument}: expected {expected}, got {got}")


def of_setting(error: TaskError, setting: str) -> ValueError:
    """The same as a recipe's, of which this setting is the source."""
    return ValueError(str(error).replace("tasks: source: ", f"{setting}: ").removeprefix("tasks: "))


def has_labels(part: Any, column: str) -> bool:
    """Whether there is one: the test rows of a competition have -1 for all."""
    return column in part.column_names and any(value is not None and value != -1 for value in part[column])


def values_of(part: Any, column: str, which: str, name: str, kind: str | None) -> list[Any]:
    """The labels as they stand in the dataset, all of them there."""
    values = list(part[column])
    absent = sum(_is_absent(value, kind) for value in values)
    if absent or not values:
        expected = f"labels (not -1) in column {column} of the {which} rows of {name}"
        raise mismatch("source", expected, f"{absent} rows without" if values else "no rows")
    infinite = [value for value in values if isinstance(value, float) and math.isinf(value)]
    if infinite:
        raise mismatch("source", f"finite labels in column {column} of the {which} rows of {name}", infinite[0])
    return values


def _is_absent(value: Any, kind: str | None) -> bool:
    if isinstance(value, list):
        return any(_is_absent(one, kind) for one in value)
    # The numbers of a regression may be -1.
    return value is None or value != value or (type(value) is int and value == -1 and kind != "regression")


@dataclass(frozen=True)
class LabelColumn:
    """What the values of a label column are, and their numbers.

    Attributes:
        kind, names: of the `Task`.
        numbers: of each class, by the value that it has in the dataset; empty for a regression, and where a row already
            has a 0 or 1 for each class.
        guessed: what a user should know of a kind that may not be the one that is meant.
    """

    kind: str
    names: tuple[str, ...]
    numbers: Mapping[Any, int]
    guessed: str | None = None

    @classmethod
    def of(cls, feature: Any, values: list[Any], name: str, kind: str | None = None) -> LabelColumn:
        """From the training rows.

        Args:
            feature: the column's type, which may name the classes.
            values: of the column.
            name: of the dataset.
            kind: one of `KINDS`; None: lists are several classes of a row, decimal numbers a regression,
                others classes.
        """
        lists = isinstance(values[0], list)
        flat = [value for row in values for value in row] if lists else values
        types = {type(value) for value in flat}
        if kind is not None:
            _check_kind(kind, lists, types, name)
        named = getattr(getattr(feature, "feature", feature) if lists else feature, "names", None)
        if kind == "regression" or (kind is None and types == {float} and not lists):
            return cls("regression", (), {}, _guess(flat) if kind is None else None)
        sure, kind = kind is not None, "multi_label" if lists else "classification"
        if named is not None:
            return cls(kind, tuple(named), {number: number for number in range(len(named))})
        width = len(values[0]) if lists else 0
        if width > 1 and all(len(row) == width for row in values) and all(value in (0, 1) for value in flat):
            return cls(kind, tuple(map(str, range(width))), {})
        return cls._classes(kind, flat, None if sure else len(values), name)

    @classmethod
    def _classes(cls, kind: str, flat: list[Any], rows: int | None, name: str) -> LabelColumn:
        """In their order; of so many rows, unless it is sure that these are classes."""
        types = {type(value) for value in flat}
        whole = types == {float} and all(value.is_integer() for value in flat)
        if len(types) != 1 or not (types <= {bool, int, str} or whole):
            expected = f"labels that are integers, texts, true and false, decimal numbers or lists of classes in {name}"
            raise mismatch("label_column", expected, ", ".join(sorted(one.__name__ for one in types)) or "empty lists")
        known = sorted(set(flat))
        if rows is not None and len(known) > max(20, len(flat) // 2):  # numbers, most likely
            expected = f"classes of several rows each, decimal numbers, or kind to say what they are, in {name}"
            raise mismatch("label_column", expected, f"{len(known)} different labels of {rows} rows")
        names = (f"{value:g}" if whole else str(value) for value in known)
        return cls(kind, tuple(names), {value: number for number, value in enumerate(known)})

    def check(self, values: list[Any], name: str) -> None:
        """Compares the labels of the test rows with those of the training rows."""
        unknown: set[Any] = set()
        if self.numbers:
            found = {value for row in values for value in row} if self.kind == "multi_label" else set(values)
            unknown = found - set(self.numbers)
        elif self.kind == "multi_label":
            unknown = {str(row) for row in values if len(row) != len(self.names) or not set(row) <= {0, 1}}
        elif self.kind == "regression":
            unknown = {value for value in values if isinstance(value, (str, list))}
        if unknown:
            shown = ", ".join(sorted(map(str, unknown))[:5])
            raise mismatch("source", f"test labels of {name} among {', '.join(self.names) or 'numbers'}", shown)

    def number(self, value: Any) -> Any:
        """A label as a model's loss takes it."""
        if self.kind == "regression":
            return float(value)
        if self.kind == "classification":
            return self.numbers[value]
        if not self.numbers:
            return [float(one) for one in value]
        chosen = {self.numbers[one] for one in value}
        return [float(number in chosen) for number in range(len(self.names))]

    def shown(self, number: Any) -> str:
        """A label of `number` as it stands in the dataset, or nearly."""
        return self.names[number] if self.kind == "classification" else str(number)

    @property
    def feature(self) -> Any:
        if self.kind == "multi_label":
            return List(Value("float32"))
        return Value("float32" if self.kind == "regression" else "int64")


def _check_kind(kind: str, lists: bool, types: set[type], name: str) -> None:
    if kind not in KINDS:
        raise mismatch("kind", f"one of {', '.join(KINDS)}", repr(kind))
    expected = {
        "classification": f"a class of each row in {name}",
        "regression": f"a number of each row in {name}",
        "multi_label": f"lists of classes, or of a 0 or 1 for each, in {name}",
    }[kind]
    if lists != (kind == "multi_label") or (kind == "regression" and not types <= {int, float}):
        raise mismatch(
            "label_column", f"{expected} (kind {kind})", "lists" if lists else ", ".join(t.__name__ for t in types)
        )


def _guess(values: list[float]) -> str | None:
    known = sorted(set(values))
    if len(known) > 20 or not all(value.is_integer() for value in known):
        return None
    told = ", ".join(map(str, known[:3] + ["…"] * (len(known) > 3)))
    return f"labels {told} are decimal numbers: a regression; kind classification makes classes of them"
