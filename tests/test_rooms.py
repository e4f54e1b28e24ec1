"""Imports between the folders of kdfast run one way, and the root stays light (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kdfast
from kdfast.ops import _call

ROOT = Path(kdfast.__file__).parent
ARCHITECTURE = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
# What each may import beside itself and the public functions of kdfast.
MAY: dict[str, set[str]] = {
    "ops": set(),
    "nn": {"ops"},
    "bench": {"ops", "nn"},
    "doctor": {"ops", "bench"},
    "data": {"ops"},
    "models": {"ops", "bench", "data"},
    "prune": {"ops", "nn", "data", "models"},
    "prune/criteria": {"ops", "models", "prune"},
    "prune/schedules": {"ops", "models", "prune", "prune/criteria"},
    "objective": {"ops", "data", "models"},
    "teacher_cache": {"ops", "data", "models"},
    "integrations": {"ops", "data", "models", "objective"},
    "train": {"ops", "data", "models", "objective", "teacher_cache"},
    "recipes": {"ops", "data", "models", "prune", "objective"},
    "results": {"ops", "bench", "data", "models", "prune", "objective", "teacher_cache", "train", "recipes"},
    "runs": {
        *("ops", "data", "models", "prune", "prune/criteria", "prune/schedules", "objective", "teacher_cache"),
        *("train", "recipes", "results"),
    },
    "cli": {"ops", "data", "models", "prune", "teacher_cache", "recipes", "results", "runs", "bench", "doctor"},
}


def imported(path: Path) -> Iterator[str]:
    """The rooms that a file imports from, also late."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kdfast":
            yield from (room_of(f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (room_of(alias.name) for alias in node.names if alias.name.startswith("kdfast."))


def room_of(module: str) -> str:
    """The innermost room of a module of kdfast, or what stands in its place there."""
    inside = module.split(".")[1:]
    return "/".join(inside[:2]) if "/".join(inside[:2]) in MAY else inside[0]


def test_every_folder_is_a_room() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == {room for room in MAY if "/" not in room}
    for room in MAY:
        assert ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text())), room
    assert len(list(ROOT.glob("*.py"))) <= 8


def test_imports_run_one_way() -> None:
    order = list(MAY)
    assert all(order.index(one) < order.index(room) for room, others in MAY.items() for one in others)  # no circle
    wrong = [
        f"{path.relative_to(ROOT)} imports {other}"
        for room, others in MAY.items()
        for path in sorted((ROOT / room).rglob("*.py"))
        if room_of(f"kdfast.{'.'.join(path.relative_to(ROOT).parts)}") == room
        for other in imported(path)
        if other in MAY and other not in others | {room}
    ]
    assert wrong == []


def test_constants_stand_once() -> None:
    """A name with the same value in two files; and the label that does not count, which the operators alone say again."""
    found: dict[tuple[str, str], list[str]] = {}
    labels = []
    for path in sorted(ROOT.rglob("*.py")):
        tree, file = ast.parse(path.read_text()), str(path.relative_to(ROOT))
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
                found.setdefault((node.targets[0].id, ast.unparse(node.value)), []).append(file)
        if path.parent.name != "ops" and "bench" not in path.parts:
            labels += [file for node in ast.walk(tree) if ast.unparse(node) == "-100"]
    assert len(found) > 50
    assert {constant: files for constant, files in found.items() if len(files) > 1} == {}
    assert labels == ["data/text.py"]


def test_the_table_of_rooms_is_true() -> None:
    rows = re.findall(r"^\| `([\w/]+)` \| .* \| (.*)\|$", ARCHITECTURE, flags=re.M)
    assert {room: {*re.findall(r"[\w/]+", others)} for room, others in rows} == MAY
    assert [room for room, _ in rows] == list(MAY)


def test_the_way_down_is_the_way_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*call: Any) -> None:
        raise InterruptedError

    told = re.findall(r"^\d+\. `(kdfast/ops/\w+\.py)` `(\w+)`", ARCHITECTURE, flags=re.M)
    monkeypatch.setattr(_call.torch.ops.kdfast.divergence, "default", stop)
    with pytest.raises(InterruptedError) as caught:
        kdfast.kl_div(torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3))
    frames = [frame for frame in traceback.extract_tb(caught.tb) if Path(frame.filename).is_relative_to(ROOT)]
    assert [(f"kdfast/ops/{Path(frame.filename).name}", frame.name) for frame in frames] == told
    assert len(told) == 7
