"""Loads the native library, which registers `torch.ops.kdfast.*`."""

from __future__ import annotations

from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "libkdfast.so"  # beside the module _C
BUILD = 'pip install --no-build-isolation -e . (after: pip install "setuptools>=77" "cmake>=3.31" ninja pybind11)'


def load() -> None:
    """Loads the library; raises ImportError that names the command that builds it where it is missing or broken."""
    if not LIBRARY.exists():
        raise ImportError(
            f"kdfast: the native library {LIBRARY} is missing; build it in the source folder with: {BUILD}"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
        from kdfast import _C  # noqa: F401
    except (OSError, ImportError) as error:
        raise ImportError(
            f"kdfast: the native library {LIBRARY} does not load ({error}); rebuild it in the source folder with: "
            f"{BUILD}"
        ) from error
