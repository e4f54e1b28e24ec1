"""`--fresh`: a run starts over, and what it would take away is not lost for a mistake."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
import tiny_texts
from rich.console import Console

from kdfast.data import demo
from kdfast.recipes import causal_lm
from kdfast.runs import run, stages

RECIPE = causal_lm.Recipe(
    student_layers=(0, 2), steps=2, learning_rate=1e-2, max_length=16, batch_size=4, test_rows=10, precision="float32"
)


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_texts.causal(tmp_path_factory.mktemp("assets"))


@pytest.fixture
def finished(assets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(demo, "fetch", lambda package: assets[package.folder])
    run(RECIPE, tmp_path / "run", Console(file=io.StringIO()))
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("wrong", [{"data": "nothere.txt"}, {"max_length": 500}, {"teacher": "/no/such"}])
def test_a_mistake_takes_nothing_away(wrong: dict[str, object], finished: Path) -> None:
    before = contents(finished)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        run(dataclasses.replace(RECIPE, **wrong), finished, Console(file=io.StringIO()), fresh=True)
    assert contents(finished) == before
    assert [path.name for path in finished.parent.iterdir()] == ["run"]


def test_what_a_run_is_made_of_stays(finished: Path) -> None:
    before = contents(finished)
    own = dataclasses.replace(RECIPE, teacher=str(finished / "student"))
    with pytest.raises(
        ValueError,
        match=r"^teacher .*student: expected a place outside of the output folder .*run, which would be removed, got",
    ):
        run(own, finished, Console(file=io.StringIO()), fresh=True)
    assert contents(finished) == before


def test_another_run_takes_its_place(finished: Path) -> None:
    (finished / "mine.txt").write_text("notes")
    other = dataclasses.replace(RECIPE, steps=3)
    with pytest.raises(
        ValueError, match=r"steps: expected 2, as the run in the output folder .* has, got 3; choose another"
    ):
        run(other, finished, Console(file=io.StringIO()))
    run(other, finished, Console(file=io.StringIO()), fresh=True)
    assert not (finished / "mine.txt").exists()
    assert len([event for event in stages.finished(finished / "student") or [] if "loss" in event]) == 3
    assert [path.name for path in finished.parent.iterdir()] == ["run"]
