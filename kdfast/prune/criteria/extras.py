"""Packages that only some criteria need."""

from __future__ import annotations

import importlib
from typing import Any


def scikit_learn(module: str) -> Any:
    """A module of scikit-learn.

    Raises:
        ImportError: it is not installed; the message says how.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"this criterion needs {error.name}, which is not installed: pip install kdfast[prune]"
        ) from error
