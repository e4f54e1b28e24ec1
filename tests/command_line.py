"""The command line, called as from a shell 80 columns wide."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kdfast.cli import main


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["kdfast", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main.main()
    return exit_.value.code or 0


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert call(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    message: str = err.splitlines()[-1]
    assert message.startswith("kdfast: ")
    return message


def width(shown: str) -> int:
    """Width of all lines but the last, which may have a long path."""
    return max(map(len, shown.splitlines()[:-1]))


# ---- compare ----


def classifier_run(
    folder: Path, recipe: Any, metric: str = "accuracy", test: str = "2000 rows, 0f", **models: dict[str, float]
) -> Path:
    """A finished run of made-up metrics."""
    folder.mkdir(parents=True)
    task = {
        "data": recipe.data or "movie_reviews",
        "kind": "classification",
        "metric": metric,
        "test": test,
        "titles": {},
    }
    stored = {"settings": recipe.as_dict(), "versions": {}, "task": task, "models": models}
    (folder / "metrics.json").write_text(json.dumps(stored))
    return folder
