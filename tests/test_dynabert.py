"""The recipe of DynaBERT from end to end, on a tiny random BERT and made-up reviews."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_reviews
import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kdfast import runs
from kdfast.cli.evaluate import _chosen
from kdfast.data import demo, tasks
from kdfast.elastic import Elastic
from kdfast.recipes import dynabert
from kdfast.recipes.dynabert import name_of, size_of
from kdfast.results import compare, measure
from kdfast.runs import stages

SHORT: dict[str, Any] = {
    "epochs": 2, "teacher_epochs": 4, "learning_rate": 2e-3, "batch_size": 8, "train_rows": 160, "test_rows": 64,
    "precision": "float32",
}  # fmt: skip
RECIPE = dynabert.Recipe(**SHORT, widths=(0.5, 1.0), depths=(0.5, 1.0), importance_rows=40)
SIZES = [(1.0, 1.0), (0.5, 1.0), (1.0, 0.5), (0.5, 0.5)]


def run(folder: Path, recipe: Any) -> tuple[dict[str, Any], str]:
    shown = io.StringIO()
    return runs.run(recipe, folder, Console(file=shown, width=120)), shown.getvalue()


@pytest.fixture(scope="module")
def finished(assets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("dynabert") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "fetch", lambda package: assets[package.requirement])
        return folder, *run(folder, RECIPE)


pytestmark = pytest.mark.usefixtures("no_download")


def test_every_size_is_right(finished: Any) -> None:
    folder, results, shown = finished
    assert list(results) == ["teacher", *(name_of(*size) for size in SIZES)]
    assert [size_of(name) for name in results] == [None, *SIZES]
    for row in results.values():
        assert row["accuracy"] > 0.9
    parameters = [results[name_of(*size)]["parameters"] for size in SIZES]
    assert parameters == sorted(parameters, reverse=True)
    assert len({*parameters}) == len(SIZES)
    assert parameters[0] == results["teacher"]["parameters"]
    assert all(results[name_of(*size)]["kl_to_teacher"] > 0 for size in SIZES)
    assert "0.5 wide, 0.5 deep" in shown
    seconds = {results[name_of(*size)]["training_seconds"] for size in SIZES}
    of_stages = [stages.seconds(stages.finished(folder / name)) for name in ("width", "student")]
    assert seconds == {sum(of_stages)}


def test_what_is_left_behind(finished: Any) -> None:
    folder, _, _ = finished
    names = {"teacher", "width", "student", "teacher_outputs", "config.yaml", "metrics.json", "sizes_accuracy.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "sizes_accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert dynabert.Recipe(**dynabert.Recipe.read_yaml(folder / "config.yaml")) == RECIPE
    stored = json.loads((folder / "metrics.json").read_text())
    assert stored["task"]["titles"]["width_0.5_depth_0.5"] == "0.5 wide, 0.5 deep"


def test_three_lines_of_use(finished: Any) -> None:
    folder, results, _ = finished
    test = tasks.load(None, test_rows=64).test
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    batch = tokenizer(list(test["text"]), padding=True, return_tensors="pt")
    whole = AutoModelForSequenceClassification.from_pretrained(folder / "student")
    elastic = Elastic(whole, (0.5, 1.0), (0.5, 1.0))
    for size in SIZES:
        elastic.set(*size)
        for model in (whole, elastic.export(*size)):
            right = (model(**batch).logits.argmax(-1) == torch.tensor(test["labels"])).float().mean().item()
            assert right == pytest.approx(results[name_of(*size)]["accuracy"])


def test_finished_runs_are_not_repeated(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, results, _ = finished
    monkeypatch.setattr(stages, "train_stage", None)
    again, told = run(folder, RECIPE)
    assert again == results
    assert "0.5 wide, 0.5 deep" in told


def test_compared(finished: Any) -> None:
    folder, results, _ = finished
    comparison = compare.compare([folder])
    assert {row.name for row in comparison.rows} >= {"teacher", "run/student", "run/width_0.5_depth_0.5"}
    row = next(row for row in comparison.rows if row.model == "width_0.5_depth_0.5")
    assert row.values["accuracy"] == [results["width_0.5_depth_0.5"]["accuracy"]]


OPTIONS: list[dict[str, Any]] = [
    {"teacher_width": "match", "keep_last": True, "accumulate": True, "padding": True},
    {"teacher_width": "in_place", "sandwich": 1, "widths": (0.5, 0.75, 1.0)},
    {"sandwich": 0, "finetune_epochs": 1},
    {"depths": (1.0,), "augment": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_options(options: dict[str, Any], tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, **{"train_rows": 80, "test_rows": 16, "epochs": 1, **options})
    results, _ = run(tmp_path / "run", recipe)
    sizes = itertools.product(recipe.widths, recipe.depths)
    assert {*results} == {"teacher", *(name_of(*size) for size in sizes)}
    folders = {path.name for path in (tmp_path / "run").iterdir() if (path / "stage.json").is_file()}
    many = len(recipe.depths) > 1
    expected = {"teacher", "student", *["width"] * many, *["depth"] * (many and bool(recipe.finetune_epochs))}
    assert folders == expected
    history = stages.finished(tmp_path / "run" / "student") or []
    terms = {name for event in history for name in event} & {"soft", "hidden", "ce"}
    if recipe.finetune_epochs:
        assert terms == {"ce"}
    else:
        assert terms == {"soft", "hidden", *["ce"] * (recipe.teacher_width == "in_place")}


def test_numbers(tmp_path: Path) -> None:
    """Of which the teacher's are learnt."""
    lines = [f"{tiny_reviews.WORDS[i % 12]} film plot,{i % 12 / 4 + 0.25}" for i in range(160)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(lines))
    short = {**SHORT, "train_rows": None, "data": str(tmp_path / "rows.csv"), "augment": 0}
    results, _ = run(tmp_path / "run", dynabert.Recipe(**short, widths=(0.5, 1.0), depths=(1.0,)))
    assert results["student"]["pearson"] > 0.9
    assert results["width_0.5_depth_1"]["mse_to_teacher"] > 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"widths": (0.5,)}, r"widths: expected different shares above 0, and 1 among them, such as 0.5,1, got 0.5"),
        ({"depths": (1.0, 1.0)}, r"depths: expected different shares above 0, and 1 among them"),
        ({"widths": (0.0, 1.0)}, "widths: expected"),
        ({"teacher_width": "half"}, "teacher_width: expected one of full, match, in_place, got half"),
        (
            {"teacher_width": "in_place", "unlabeled": "x"},
            "unlabeled: expected none with teacher_width in_place, .*, got x",
        ),
        ({"sandwich": -1}, "sandwich: expected at least 0, got -1"),
    ],
)
def test_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        dynabert.Recipe(**options)


def test_models_that_have_no_subnetworks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kdfast.elastic.Elastic: depths: expected shares that leave one of 6 layers"):
        run(tmp_path / "run", dataclasses.replace(RECIPE, depths=(0.01, 1.0)))
    assert not (tmp_path / "run").exists()


# ---- the command line ----
def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    line = [sys.executable, "-m", "kdfast", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=environment)


def test_exported(finished: Any, tmp_path: Path) -> None:
    folder, results, _ = finished
    done = command("export", folder, tmp_path / "small", "--width", 0.5, "--depth", 0.5)
    assert done.returncode == 0, done.stderr
    expected = results["width_0.5_depth_0.5"]
    assert f"{expected['parameters'] / 1e6:.1f} million parameters, 0.5 wide and 0.5 deep" in done.stdout
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert len(model.bert.encoder.layer) == tiny_reviews.LAYERS // 2
    found = measure.evaluate(
        {"teacher": folder / "teacher", "small": tmp_path / "small"}, tasks.load(None, test_rows=64), teacher="teacher"
    )["small"]
    for name in ("accuracy", "kl_to_teacher", "parameters"):
        assert found[name] == pytest.approx(expected[name], abs=1e-5)


def test_export_refuses(finished: Any, tmp_path: Path) -> None:
    folder, _, _ = finished
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, told in (
        ((tmp_path, tmp_path / "x"), f"run {tmp_path}: expected the folder of a run, got one without config.yaml"),
        ((folder, tmp_path / "x", "--width", 0.3), "width: expected one of the run's, 0.5, 1, got 0.3"),
        (
            (folder, tmp_path / "full"),
            f"output {tmp_path / 'full'}: expected a folder that is new or empty, got one with files",
        ),
    ):
        done = command("export", *arguments)
        assert done.returncode == 2, done.stderr
        assert told in " ".join(done.stderr.split())


def test_evaluate_measures_the_models_that_are_there(finished: Any) -> None:
    folder, _, _ = finished
    chosen = _chosen(str(folder), None)
    assert chosen.sources == {"teacher": folder / "teacher", "1 wide, 1 deep": folder / "student"}
