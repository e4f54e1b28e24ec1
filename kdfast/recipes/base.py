"""What all recipes share: settings with their help, YAML, and a run folder. Light, so that `kdfast --help` is quick."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

import yaml

from kdfast.recipes.paths import absolute, located

PRECISIONS = ("auto", "float32", "bfloat16", "float16")


def setting(default: Any, help: str, repeated: bool = False) -> Any:
    """A field of a recipe, with the text that `kdfast distill` shows for it. `repeated`: of several values, each is an
    option of its own, and not one with commas."""
    return dataclasses.field(default=default, metadata={"help": help, "repeated": repeated})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a published system. Stored in a run's folder, and compared when the run is continued.

    Raises:
        ValueError: a value out of range.
    """

    name: ClassVar[str]
    quick: ClassVar[Mapping[str, Any]] = {}  # settings of a short run, to see everything work
    measured_on: ClassVar[tuple[str, ...]] = ()  # settings on which it depends what a run is measured on

    seed: int = setting(0, "Seed of initialisation, order of rows and dropout.")
    precision: str = setting(
        "auto",
        "Of the products in training: float32, bfloat16, or on a GPU float16; auto: bfloat16 where it is native. "
        "Weights are float32.",
    )
    save_dtype: str = setting(
        "float32", "Of the saved student's weights: float32, bfloat16 or float16; it is measured as it is saved."
    )

    def __post_init__(self) -> None:
        self.at_least(0, "seed")
        self.one_of(PRECISIONS, "precision")
        self.one_of(PRECISIONS[1:], "save_dtype")

    def at_least(self, least: int, *names: str) -> None:
        for name in names:
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")

    def between(self, low: float, high: float, *names: str) -> None:
        for name in names:
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: expected {low:g} to {high:g}, got {getattr(self, name)}")

    def inside(self, low: float, high: float, *names: str) -> None:
        for name in names:
            if (value := getattr(self, name)) is not None and not low < value < high:
                raise ValueError(f"{name}: expected above {low:g} and below {high:g}, got {value}")

    def one_of(self, values: tuple[Any, ...], *names: str) -> None:
        for name in names:
            if getattr(self, name) not in values:
                known = ", ".join(str(value) for value in values if value is not None)
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)}")

    def positive(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")

    def layer_numbers(self, *names: str) -> None:
        """Of a teacher's layers, in the student's order; how many the teacher has is known when it is loaded."""
        for name in names:
            if (value := getattr(self, name)) is not None and (not value or min(value) < 0):
                raise ValueError(f"{name}: expected numbers from 0 on, got {list(value)}")

    def none_beside(self, one: str, *names: str) -> None:
        """That settings of which `one` takes the place are not given beside it."""
        for name in names:
            if getattr(self, one) is not None and (value := getattr(self, name)) is not None:
                raise ValueError(f"{name}: expected none beside {one}, got {list(value)}")

    def as_dict(self) -> dict[str, Any]:
        """As YAML and JSON have it: the recipe's name first, lists for tuples,
        files and folders that are there as absolute paths."""
        values = {k: absolute(k, v) for k, v in dataclasses.asdict(self).items()}
        return {"recipe": self.name, **values}

    def to_yaml(self) -> str:
        text: str = yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)
        return text

    @classmethod
    def read_yaml(cls, path: Path) -> dict[str, Any]:
        """The settings in a file, such as config.yaml of a run's folder. Paths are where they are now,
        if the run was moved.

        Raises:
            ValueError: no such file, no settings in it, another recipe's, or names that this one does not have.
        """
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"config {path}: expected a file of settings, got {str(error.strerror).lower()}") from None
        except yaml.YAMLError as error:
            raise ValueError(f"config {path}: expected YAML, got other text: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise ValueError(f"config {path}: expected settings by name, got none")
        if (recipe := values.pop("recipe", cls.name)) != cls.name:
            raise ValueError(f"config {path}: expected the recipe {cls.name}, got {recipe}")
        fields = get_type_hints(cls)
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"config {path}: expected settings of {cls.name}, got {', '.join(unknown)}; it has "
                f"{', '.join(sorted(known))}"
            )
        found = {name: located(name, value, path.parent) for name, value in values.items()}
        return {name: _converted(f"config {path}: {name}", fields[name], value) for name, value in found.items()}


def _converted(what: str, kind: Any, value: Any) -> Any:
    """A value of a YAML file as the setting's type has it; 1e-4, without a point, is a text in YAML."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if value is None and NoneType in kinds:
        return None
    of = next(one for one in kinds if one is not NoneType)
    if get_origin(of) is tuple and isinstance(value, list):
        return tuple(value)
    if of is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with suppress(ValueError):
            return float(value)
    if get_origin(of) is not None or type(value) is not of:
        name = "a list such as [0, 2]" if get_origin(of) is tuple else of.__name__
        raise ValueError(f"{what}: expected {name}, got {value!r}")
    return value
