"""Runs are evaluated, compared and continued from any folder, and where they were moved to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import call
from word_classifiers import bert, save, write_reviews

from kdfast import stages
from kdfast.paths import absolute, located
from kdfast.recipes import hinton

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
    assert f"holds a run with data {project}/data/reviews.csv, not {other}" in capsys.readouterr().err


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
