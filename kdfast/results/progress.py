"""Progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]


def bar(title: str, total: int, steps: Iterable[Any] | None = None) -> tqdm[Any]:
    """A progress bar on stderr with the time left."""
    # In a log file every update is a line of its own: seldom there.
    return tqdm(steps, total=total, desc=title, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 20)
