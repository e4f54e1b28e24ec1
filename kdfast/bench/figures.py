"""Figures for a phone too: as wide as one at twice its pixels, with type that stays legible there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Inches, and pixels of one: 780 across. A point of type is a pixel of a phone's 390 then.
WIDTH, DPI = 5.2, 150
MARKERS = "osD^vP*X<>"
STYLE = {
    "font.size": 10,
    "figure.titlesize": 11,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}


@contextmanager
def pyplot() -> Iterator[Any]:
    """In this style, without a screen; imported late, as it takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        yield plt
