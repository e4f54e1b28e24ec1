"""The benchmark of criteria: its cells share what the teacher made of the rows, its sentence is that of the differences."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kdfast.recipes.paths import METRICS

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import pruning as benchmark

ACCURACY = {"random": (0.80, 0.81, 0.79), "taylor": (0.84, 0.83, 0.85), "fisher": (0.82, 0.82, 0.86)}


def options(folder: Path, **changes: Any) -> argparse.Namespace:
    given: dict[str, Any] = {
        "seeds": [0, 1, 2], "left": [0.5], "only": [*ACCURACY], "teachers": None, "runs": folder / "runs",
        "output": folder / "results",
    }  # fmt: skip
    return argparse.Namespace(**{**given, **changes})


def made_up(folder: Path) -> list[Path]:
    """Finished runs, of which there is the file of results alone."""
    folders = []
    for left, seed, criterion in benchmark.cells(options(folder)):
        place = benchmark.folder_of(folder / "runs", criterion, left, seed)
        place.mkdir(parents=True)
        teacher = folder / f"hinton-{seed}" / "teacher"
        teacher.mkdir(parents=True, exist_ok=True)
        (teacher.parent / "config.yaml").write_text(f"recipe: hinton\nseed: {seed}\n")
        settings = benchmark.recipe(criterion, left, seed, str(teacher)).as_dict()
        times = {f"latency_ms_batch_{rows}{of}": 3.0 for rows in (1, 32) for of in ("", "_fastest", "_slowest")}
        models = {
            "teacher": {"accuracy": 0.86, "kl_to_teacher": 0.0, "parameters": 2e7, **times},
            "student": {"accuracy": ACCURACY[criterion][seed], "kl_to_teacher": 0.1, "parameters": 1e7, **times},
        }
        task = {"metric": "accuracy", "test": "12 rows"}
        (place / METRICS).write_text(json.dumps({"settings": settings, "task": task, "models": models}))
        folders.append(place)
    return folders


def test_the_best_against_chance(tmp_path: Path) -> None:
    comparison = benchmark.compared(made_up(tmp_path))
    assert [row.name for row in comparison.rows] == ["teacher", *(f"{name}/0.5 left" for name in ACCURACY)]
    told = benchmark.against_random(comparison, "0.5 left")
    # 4, 2 and 6 points: 4 with a standard deviation of 2, over the root of 3.
    assert told == (
        "0.5 left: the best criterion, taylor, beats random by 4.0 points of accuracy "
        "(standard error of the 3 differences 1.2), chosen of 2 by the same rows."
    )
    assert benchmark.against_random(comparison, "0.25 left") is None


def test_what_is_left_in_the_folder(tmp_path: Path) -> None:
    folders = made_up(tmp_path)
    benchmark.save(folders, tmp_path / "results", Console(quiet=True))
    files = {path.suffix: path for path in (tmp_path / "results").iterdir()}
    assert files.keys() == {".json", ".md", ".png"}
    text = files[".md"].read_text()
    assert "| taylor/0.5 left | 3 | 84.0±0.6 |" in text
    assert "beside other work" in text
    assert "beats random by 4.0 points" in text
    stored = json.loads(files[".json"].read_text())
    assert str(tmp_path) not in files[".json"].read_text()
    assert stored["environment"]["settings"]["train_rows"] == benchmark.SHORT["train_rows"]
    for folder in folders:
        again = json.loads((folder / METRICS).read_text()) | {benchmark.TIMED: {"load_before": 0.25, "models": 4}}
        (folder / METRICS).write_text(json.dumps(again))
    assert benchmark.times_of(folders).endswith("load before it at most 0.25.")


@pytest.mark.usefixtures("no_download")
def test_cells_are_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {"train_rows": 40, "test_rows": 16, "batch_size": 8, "score_rows": 8, "epochs": 1, "precision": "float32"}
    monkeypatch.setattr(benchmark, "SHORT", short)
    given, console = options(tmp_path, seeds=[0], only=["random", "movement"]), Console(quiet=True)
    benchmark.train(given, console)
    folders = [benchmark.folder_of(given.runs, name, 0.5, 0) for name in given.only]
    assert (folders[1] / "teacher_outputs").resolve() == (folders[0] / "teacher_outputs").resolve()
    before = [(folder / METRICS).read_text() for folder in folders]
    monkeypatch.setattr(benchmark, "run", None)
    benchmark.train(given, console)  # nothing is left to do
    benchmark.measure_again(given, console)
    for folder, was in zip(folders, before, strict=True):
        stored, old = json.loads((folder / METRICS).read_text()), json.loads(was)
        assert stored[benchmark.TIMED]["models"] == 3
        for name, of in stored["models"].items():
            assert of["latency_ms_batch_32"] != old["models"][name]["latency_ms_batch_32"]
            assert {k: v for k, v in of.items() if "latency" not in k} == {
                k: v for k, v in old["models"][name].items() if "latency" not in k
            }
