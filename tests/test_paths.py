"""Runs are evaluated, compared and continued from any folder, and where they were moved to."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import call
from word_classifiers import bert, save, write_reviews

from kdfast.cli import main
from kdfast.data import tasks
from kdfast.recipes import hinton
from kdfast.recipes.paths import absolute, located
from kdfast.runs import stages

NAMES = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}


def test_what_is_there_is_stored_as_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("sst2", "model", "folder"):
        (tmp_path / name).mkdir()
    (tmp_path / "reviews.csv").touch()
    for setting, value, expected in (
        ("data", "reviews.csv", f"{tmp_path}/reviews.csv"),
        ("data", "folder/../reviews.csv", f"{tmp_path}/reviews.csv"),
        ("data", "folder", f"{tmp_path}/folder"),
        ("data", "sst2", "sst2"),  # of GLUE
        ("data", "org/name:config", "org/name:config"),
        ("data", None, None),
        ("teacher", "model", f"{tmp_path}/model"),
        ("teacher", "org/model", "org/model"),
        ("label_column", "folder", "folder"),
        ("epochs", 3, 3),
    ):
        assert absolute(setting, value) == expected
    stored = hinton.Recipe(data="reviews.csv", teacher="model").as_dict()
    assert (stored["data"], stored["teacher"]) == (f"{tmp_path}/reviews.csv", f"{tmp_path}/model")


def test_where_things_are_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project that was /old/project/{data/reviews.csv, runs/mine, runs/other/teacher} is somewhere else."""
    project = tmp_path / "new" / "project"
    run = project / "runs" / "mine"
    run.mkdir(parents=True)
    (project / "runs" / "other" / "teacher").mkdir(parents=True)
    (project / "data").mkdir()
    (project / "data" / "reviews.csv").touch()
    (project / "runs" / "other" / "config.yaml").write_text("recipe: hinton")
    monkeypatch.chdir("/")
    for setting, value, expected in (
        ("data", "/old/project/data/reviews.csv", f"{project}/data/reviews.csv"),
        ("data", "data/reviews.csv", f"{project}/data/reviews.csv"),  # of an earlier version
        ("data", "/old/reviews.csv", "/old/reviews.csv"),  # gone
        ("data", "sst2", "sst2"),
        ("data", str(project / "data"), f"{project}/data"),
        ("teacher", "/old/project/runs/other/teacher", f"{project}/runs/other/teacher"),
        ("teacher", "runs/other/student", f"{project}/runs/other/student"),  # whose weights are gone
        ("teacher", "org/model", "org/model"),
        ("epochs", 3, 3),
    ):
        assert located(setting, value, run) == expected
    weights = project / "data" / "weights.csv"
    weights.symlink_to(project / "data" / "reviews.csv")
    assert located("data", str(weights), run) == str(weights)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, a teacher, and two finished runs whose commands were given in it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    write_reviews(folder / "data" / "reviews.csv", labels=("bad", "good"))
    save(folder / "models" / "teacher", bert(0, **NAMES))
    monkeypatch.chdir(folder)
    for alpha in (0.5, 0.9):
        assert (
            call(monkeypatch, "distill", *_command(alpha, "data/reviews.csv", "models/teacher", f"runs/{alpha}")) == 0
        )
    return folder


def _command(alpha: float, data: Any, teacher: Any, output: Any) -> list[Any]:
    start = ["--student-start", "teacher", "--student-layers", "0"]
    return [
        "hinton",
        "--alpha",
        alpha,
        "--data",
        data,
        "--teacher",
        teacher,
        "--output",
        output,
        "--max-length",
        16,
        "--epochs",
        1,
        *start,
    ]


@pytest.mark.parametrize("moved", [False, True])
def test_from_another_folder(
    moved: bool, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = project / "runs"
    stored = {name: yaml.safe_load((runs / "0.9" / "config.yaml").read_text())[name] for name in ("data", "teacher")}
    assert stored == {"data": f"{project}/data/reviews.csv", "teacher": f"{project}/models/teacher"}
    before = json.loads((runs / "0.9" / "metrics.json").read_text())
    assert {name: before["settings"][name] for name in stored} == stored
    if moved:
        project = project.rename(tmp_path / "renamed")
        runs = project / "runs"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    assert call(monkeypatch, "evaluate", runs / "0.9", "--output", "out.json") == 0
    measured = json.loads(Path("out.json").read_text())
    assert measured["sources"]["teacher"] == f"{project}/models/teacher"
    assert measured["models"]["teacher"]["accuracy"] == before["models"]["teacher"]["accuracy"]
    assert measured["models"]["student, distilled"]["kl_to_teacher"] == pytest.approx(
        before["models"]["student"]["kl_to_teacher"]
    )
    assert call(monkeypatch, "evaluate", os.path.relpath(runs / "0.5" / "student"), "--output", "out.json") == 0

    capsys.readouterr()
    assert call(monkeypatch, "compare", runs / "0.9", runs / "0.5") == 0
    shown = capsys.readouterr().out
    assert "reviews.csv: runs compared" in shown
    assert sum(line.lstrip().startswith("teacher ") for line in shown.splitlines()) == 1  # of both runs

    monkeypatch.setattr(stages, "train_stage", lambda *a: pytest.fail("trained again"))
    given = [os.path.relpath(project / part) for part in ("data/reviews.csv", "models/teacher", "runs/0.9")]
    assert call(monkeypatch, "distill", *_command(0.9, *given)) == 0
    assert (
        call(monkeypatch, "distill", "hinton", "--config", runs / "0.9" / "config.yaml", "--output", runs / "0.9") == 0
    )
    other = write_reviews(elsewhere / "reviews.csv", labels=("bad", "good"))
    assert call(monkeypatch, "distill", *_command(0.9, other, *given[1:])) == 2
    assert f"data: expected {project}/data/reviews.csv, as the run in the output folder " in capsys.readouterr().err


def test_settings_of_an_earlier_version(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths as they were given."""
    config = project / "runs" / "0.9" / "config.yaml"
    stored = {**yaml.safe_load(config.read_text()), "data": "data/reviews.csv", "teacher": "models/teacher"}
    config.write_text(yaml.safe_dump(stored))
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "evaluate", config.parent) == 0
    assert hinton.Recipe.read_yaml(config)["teacher"] == f"{project}/models/teacher"
    monkeypatch.setattr(stages, "train_stage", lambda *a: pytest.fail("trained again"))
    given = [project / part for part in ("data/reviews.csv", "models/teacher", "runs/0.9")]
    assert call(monkeypatch, "distill", *_command(0.9, *given)) == 0


# ---- a run that was moved to where another file of the same name lies


@pytest.fixture
def moved(project: Path, tmp_path: Path) -> Path:
    """The run 0.9, of which the data is gone, beside other rows and the teacher."""
    there = tmp_path / "there"
    (there / "data").mkdir(parents=True)
    write_reviews(there / "data" / "reviews.csv", labels=("bad", "good"), rows=40)
    (project / "models").rename(there / "models")
    (project / "runs" / "0.9").rename(there / "run")
    (project / "data" / "reviews.csv").unlink()
    return there


def _lines(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What the console shows, and the last one of the error."""
    out, err = capsys.readouterr()
    return out, err.strip().splitlines()[-1] if err.strip() else ""


def _other_rows(moved: Path) -> str:
    first = json.loads((moved / "run" / "metrics.json").read_text())["task"]["test"]
    now = tasks.fingerprint(tasks.load(moved / "data" / "reviews.csv").test)
    assert (first[:6], now[:6]) == ("6 rows", "4 rows")
    return (
        f"data: expected the test rows that it was measured on ({first}), got those of {moved}/data/reviews.csv ({now})"
    )


def test_evaluate_refuses_other_rows(
    moved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = _other_rows(moved)
    for model, options in (("run", ()), ("run/student", ()), ("run", ("--test-rows", "2"))):
        capsys.readouterr()
        assert call(monkeypatch, "evaluate", moved / model, *options) == 2
        assert f"kdfast: Invalid value: run {moved}/run: {refusal}" in _lines(capsys)[1]
    assert call(monkeypatch, "evaluate", moved / "run", "--data", moved / "data" / "reviews.csv") == 0
    assert "data: " not in _lines(capsys)[0]


def test_evaluate_tells_what_it_reads(
    moved: Path, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_reviews(moved / "data" / "reviews.csv", labels=("bad", "good"))  # the run's own
    told = f"data: {project}/data/reviews.csv is not there; {moved}/data/reviews.csv is read"
    capsys.readouterr()
    assert call(monkeypatch, "evaluate", moved / "run") == 0
    shown = _lines(capsys)[0].splitlines()
    assert shown[:2] == [told, f"teacher: {project}/models/teacher is not there; {moved}/models/teacher is read"]
    assert call(monkeypatch, "evaluate", moved / "run", "--test-rows", "2") == 0
    assert call(monkeypatch, "evaluate", moved / "run" / "student") == 0
    assert _lines(capsys)[0].count(told) == 2
    (project / "data").mkdir(exist_ok=True)
    write_reviews(project / "data" / "reviews.csv", labels=("bad", "good"))
    assert call(monkeypatch, "evaluate", moved / "run" / "student") == 0
    assert "is not there" not in _lines(capsys)[0]


def test_distill_refuses_other_rows(
    moved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal, run = _other_rows(moved), moved / "run"
    monkeypatch.setattr(stages, "train_stage", lambda *a: pytest.fail("trained"))
    given = [moved / "data" / "reviews.csv", moved / "models" / "teacher"]
    of_config = ["hinton", "--config", run / "config.yaml", "--output"]
    for command in (
        _command(0.9, *given, run),
        [*of_config, run],
        [*of_config, moved / "b"],
        [*of_config, run, "--fresh"],
    ):
        capsys.readouterr()
        assert call(monkeypatch, "distill", *command) == 2
        assert f"kdfast: Invalid value: run {run}: {refusal}" in _lines(capsys)[1]
        assert (run / "metrics.json").is_file()
    assert not (moved / "b").exists()


def test_distill_tells_what_it_reads(
    moved: Path, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a run has measured anything there is nothing to compare with."""
    run = moved / "run"
    (run / "metrics.json").unlink()
    told = f"data: {project}/data/reviews.csv is not there; {moved}/data/reviews.csv is read"
    of_config = ["distill", "hinton", "--config", run / "config.yaml", "--output"]
    capsys.readouterr()
    assert call(monkeypatch, *of_config, moved / "b") == 0
    assert _lines(capsys)[0].count(told) == 1
    other = write_reviews(moved / "other.csv", labels=("bad", "good"))
    assert call(monkeypatch, *of_config, moved / "c", "--data", other) == 0
    assert told not in _lines(capsys)[0]

    class Trained(Exception):
        pass

    def train(*arguments: Any) -> None:
        raise Trained

    monkeypatch.setattr(stages, "train_stage", train)
    (run / "student" / "stage.json").unlink()
    (run / "teacher_outputs").rename(moved / "outputs")
    monkeypatch.setattr(
        sys,
        "argv",
        ["kdfast", "distill", *map(str, _command(0.9, moved / "data/reviews.csv", moved / "models/teacher", run))],
    )
    with pytest.raises(Trained):
        main.main()
    assert _lines(capsys)[0].splitlines()[0] == told


def test_a_run_keeps_its_fingerprint_where_nothing_moved(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is another one in the same place: the finished run is refused, settings for a new one are not."""
    run = project / "runs" / "0.9"
    write_reviews(project / "data" / "reviews.csv", labels=("bad", "good"), rows=40)
    assert call(monkeypatch, "evaluate", run) == 2
    assert "expected the test rows that it was measured on (6 rows, " in _lines(capsys)[1]
    assert call(monkeypatch, "distill", "hinton", "--config", run / "config.yaml", "--output", project / "new") == 0
