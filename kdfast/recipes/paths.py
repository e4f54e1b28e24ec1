"""Where the data and the models of a run are, whatever folder one is in, and where the run was moved to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from kdfast.data.glue import DEMONSTRATION, GLUE

CONFIG, METRICS = "config.yaml", "metrics.json"  # of a run's folder
MODELS = ("base", "teacher", "student", "augment_model")  # settings that may be folders, other runs' models among them
# Settings that may be files or folders, or names on the Hub.
PATHS = ("data", "unlabeled", "general_text", "word_vectors", *MODELS)


def absolute(name: str, value: Any) -> Any:
    """A setting as a run stores it: what is a file or folder here is one from everywhere."""
    if isinstance(value, (list, tuple)):
        return [absolute(name, one) for one in value]
    if name not in PATHS or not isinstance(value, str) or _is_task(name, value) or not os.path.exists(value):
        return value
    return os.path.abspath(value)


def located(name: str, value: Any, folder: Path) -> Any:
    """A setting of the run in `folder`: files and folders as absolute paths, where they are now;
    anything else as it is.

    Looked for are the path itself, then, as a run may have been moved with what it was made of, the same path, or its
    end of two names or more, from one of the folders around the run.
    A model of a run that has no weights any more is where that run is. Of several, each for itself.
    """
    if isinstance(value, (list, tuple)):
        return [located(name, one, folder) for one in value]
    if name not in PATHS or not isinstance(value, str) or _is_task(name, value):
        return value
    path = Path(value)
    for place in _places(path, folder.resolve()):
        if place.exists() or (name in MODELS and len(path.parts) > 1 and run_settings(place.parent) is not None):
            # Files may be links to others that are called by their sums.
            return os.path.abspath(place) if place.is_file() else str(place.resolve())
    return value


def moved(settings: Mapping[str, Any], folder: Path) -> list[str]:
    """What to tell of the settings of the run in `folder`: which files and folders are not where they were,
    but elsewhere."""
    return [
        f"{name}: {value} is not there; {found} is read"
        for name, values in settings.items()
        for value in each(values)
        if (found := located(name, value, folder)) != value and not Path(value).exists()
    ]


def each(values: Any) -> list[Any]:
    """The values of a setting that may have several."""
    return list(values) if isinstance(values, (list, tuple)) else [values]


def _is_task(name: str, value: str) -> bool:
    return name == "data" and value in (*GLUE, *DEMONSTRATION)


def _places(path: Path, folder: Path) -> Iterator[Path]:
    if not path.is_absolute():
        yield from (base / path for base in (Path(), *folder.parents))
        return
    yield path
    for start in range(1, len(path.parts) - 1):
        yield from (base.joinpath(*path.parts[start:]) for base in folder.parents)


def run_settings(run: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder; None where there is none."""
    if (run / CONFIG).is_file():
        settings = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    elif (run / METRICS).is_file():
        settings = json.loads((run / METRICS).read_text()).get("settings")
    else:
        return None
    return settings if isinstance(settings, dict) else None
