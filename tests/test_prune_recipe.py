"""`kdfast prune` from end to end, on a tiny random BERT and made-up reviews."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_reviews
import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification

from kdfast import runs
from kdfast.data import demo, tasks
from kdfast.models import cost
from kdfast.prune import LatencyTable, Masks, Parameters, Sensitivity, apply
from kdfast.prune.criteria import CRITERIA, score
from kdfast.recipes import prune
from kdfast.results import measure
from kdfast.runs import stages
from kdfast.runs.classifier import ClassifierRun

SHORT: dict[str, Any] = {
    "epochs": 2, "teacher_epochs": 4, "learning_rate": 2e-3, "batch_size": 8, "train_rows": 160, "test_rows": 64,
    "precision": "float32", "score_rows": 40,
}  # fmt: skip
RECIPE = prune.Recipe(**SHORT)
HEADS, NEURONS = 2 * tiny_reviews.LAYERS, 32 * tiny_reviews.LAYERS


def run(folder: Path, recipe: Any) -> tuple[dict[str, Any], str]:
    shown = io.StringIO()
    return runs.run(recipe, folder, Console(file=shown, width=150)), shown.getvalue()


@pytest.fixture(scope="module")
def finished(assets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("prune") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "fetch", lambda package: assets[package.requirement])
        return folder, *run(folder, RECIPE)


def shorter(finished: Any) -> prune.Recipe:
    """Ten steps, of the teacher that is there."""
    return dataclasses.replace(RECIPE, teacher=str(finished[0] / "teacher"), train_rows=80, test_rows=16, epochs=1)


pytestmark = pytest.mark.usefixtures("no_download")


def masks_of(folder: Path) -> Masks:
    return Masks.from_json((folder / "masked" / "masks.json").read_text())


def counts(masks: Masks) -> tuple[int, int, int]:
    return *(sum(int(x.sum()) for x in of) for of in (masks.heads, masks.neurons)), int(masks.layers.sum())  # type: ignore[return-value]


def test_half_is_left_and_right(finished: Any) -> None:
    folder, results, shown = finished
    assert list(results) == ["teacher", "student"]
    assert results["student"]["accuracy"] > 0.9
    assert results["student"]["parameters"] < results["teacher"]["parameters"]
    assert counts(masks_of(folder)) == (HEADS // 2, NEURONS // 2, tiny_reviews.LAYERS)
    assert f"Kept: {HEADS // 2} of {HEADS} heads, {NEURONS // 2} of {NEURONS} neurons" in shown
    kept = json.loads((folder / "metrics.json").read_text())["kept"]
    assert kept == {"heads": HEADS // 2, "neurons": NEURONS // 2, "layers": tiny_reviews.LAYERS}


def test_masked_and_smaller_agree(finished: Any) -> None:
    folder, results, _ = finished
    names = {"teacher", "masked", "student", "teacher_outputs", "config.yaml", "metrics.json", "learning_curves.png"}
    assert {path.name for path in folder.iterdir()} == names
    masked, smaller = (AutoModelForSequenceClassification.from_pretrained(folder / n) for n in ("masked", "student"))
    apply(masked, masks_of(folder))
    batch = {"input_ids": torch.tensor([[2, 5, 6, 7, 3], [2, 8, 9, 3, 0]]), "attention_mask": torch.ones(2, 5)}
    batch["attention_mask"][1, -1] = 0
    with torch.no_grad():
        torch.testing.assert_close(smaller(**batch).logits, masked(**batch).logits, rtol=0, atol=1e-5)
    found = measure.evaluate(
        {"teacher": folder / "teacher", "student": folder / "student"},
        tasks.load(None, test_rows=64),
        teacher="teacher",
    )
    assert found["student"]["kl_to_teacher"] == pytest.approx(results["student"]["kl_to_teacher"], abs=1e-5)
    assert found["student"]["parameters"] == results["student"]["parameters"] == cost.parameters(smaller)


def test_finished_runs_are_not_repeated(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, results, _ = finished
    monkeypatch.setattr(stages, "train_stage", None)
    assert run(folder, RECIPE)[0] == results


OPTIONS: list[dict[str, Any]] = [
    {"criterion": "random", "schedule": "one-shot", "scope": "local", "sensitivity": True},
    {"criterion": "movement", "schedule": "cubic"},
    {"criterion": "l2", "schedule": "soft", "units": ("neurons",)},
    {"criterion": "l2", "schedule": "surgery", "scope": "local"},
    {"criterion": "hard_concrete", "schedule": "play-and-prune", "bound": 1.0, "rounds": 2},
    {"criterion": "taylor_weights", "units": ("layers",), "schedule": "iterative", "rounds": 2},
    {"criterion": "apoz", "multiple": 8, "target": "keep=0.25", "units": ("neurons",)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: f"{options['criterion']}, {options.get('schedule')}")
def test_options(options: dict[str, Any], finished: Any, tmp_path: Path) -> None:
    recipe = dataclasses.replace(shorter(finished), **options)
    results, _ = run(tmp_path / "run", recipe)
    heads, neurons, layers = counts(masks := masks_of(tmp_path / "run"))
    share = recipe.goal[1]
    assert results["student"]["parameters"] < results["teacher"]["parameters"]
    assert heads == (HEADS * share if "heads" in recipe.units else HEADS)
    assert neurons == (NEURONS * share if "neurons" in recipe.units else NEURONS)
    assert layers == (tiny_reviews.LAYERS * share if "layers" in recipe.units else tiny_reviews.LAYERS)
    assert all(int(of.sum()) % recipe.multiple == 0 for of in masks.neurons)
    swept = Path(tmp_path / "run" / "sensitivity.json")
    assert swept.exists() == recipe.sensitivity == (tmp_path / "run" / "sensitivity.png").exists()
    if recipe.sensitivity:
        found = Sensitivity.from_json(swept.read_text())
        assert {kind: len(of) for kind, of in found.found.items()} == dict.fromkeys(recipe.units, tiny_reviews.LAYERS)
    if recipe.scope == "local":
        assert {int(of.sum()) for of in masks.neurons} == {16}


def test_a_bound_that_lets_nothing_go(finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClassifierRun, "_quality", lambda self, prediction: {"accuracy": 0.0})
    results, shown = run(tmp_path / "run", dataclasses.replace(shorter(finished), schedule="play-and-prune"))
    assert counts(masks_of(tmp_path / "run")) == (HEADS, NEURONS, tiny_reviews.LAYERS)
    assert f"Kept: {HEADS} of {HEADS} heads" in shown
    assert results["student"]["parameters"] == results["teacher"]["parameters"]


@pytest.mark.parametrize(("target", "rounds"), [("keep=0.5", 1), ("parameters=0.8", 1), ("keep=0.5", 2)])
def test_scores_are_asked_once(
    target: str, rounds: int, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the training once, for the check, the sweep of the layers and the first units; then in every other round."""
    asked: list[str] = []

    def counted(model: Any, criterion: str, of: Any, *given: Any, **own: Any) -> Any:
        asked.append(of)
        return score(model, criterion, of, *given, **own)

    monkeypatch.setattr("kdfast.runs.prune.score", counted)
    changes = {"target": target, "schedule": "iterative", "rounds": rounds, "sensitivity": rounds == 1}
    run(tmp_path / "run", dataclasses.replace(shorter(finished), **changes))
    assert asked == ["heads", "neurons"] * rounds


def test_random_units_are_those_of_the_seed(finished: Any, tmp_path: Path) -> None:
    found = []
    for i, seed in enumerate((0, 1, 0)):
        changes = {"schedule": "one-shot", "criterion": "random", "seed": seed}
        run(tmp_path / str(i), dataclasses.replace(shorter(finished), **changes))
        found.append(masks_of(tmp_path / str(i)))
    assert found[0] != found[1]
    assert found[0] == found[2]


@pytest.mark.parametrize("target", ["parameters=0.8", "flops=0.6", "latency=0.8"])
def test_targets_of_cost(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"heads": {i: 1.0 * i for i in range(3)}, "neurons": {0: 0.0, 32: 4.0}}  # of a machine without chance
    monkeypatch.setattr(
        "kdfast.runs.prune.latency_table",
        lambda model, batch: LatencyTable(
            **sizes,
            rest=3.0,
            calls=(1,) * tiny_reviews.LAYERS,
            rows=len(batch["input_ids"]),
            tokens=5,
            device="cpu",
            threads=1,
        ),
    )
    recipe = dataclasses.replace(RECIPE, train_rows=80, test_rows=16, epochs=1, target=target)
    results, _ = run(tmp_path / "run", recipe)
    masks, (name, share) = masks_of(tmp_path / "run"), recipe.goal
    teacher = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "teacher")
    if name == "parameters":
        assert Parameters(teacher).of(masks) <= share * cost.parameters(teacher)
        assert results["student"]["parameters"] <= share * results["teacher"]["parameters"]
    if name == "flops":
        assert results["student"]["gflop"] < 0.75 * results["teacher"]["gflop"]
    if name == "latency":
        table = LatencyTable.from_json((tmp_path / "run" / "latency.json").read_text())
        assert table.of(masks) <= share * table.of(Masks.full(teacher)) * (1 + 1e-9)
        assert table.rows == 32
    assert sum(counts(masks)) < HEADS + NEURONS + tiny_reviews.LAYERS


def test_a_target_out_of_reach(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"target: kdfast.prune.select: target: expected at least 0\.\d+, .*, got 0.1"):
        run(tmp_path / "run", dataclasses.replace(RECIPE, target="parameters=0.1"))


def test_known_criteria() -> None:
    assert sorted(prune.CRITERIA) == sorted(CRITERIA)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"target": "size=0.5"},
            "target: expected keep=SHARE or parameters=SHARE or flops=SHARE or latency=SHARE, above",
        ),
        ({"target": "keep=1.5"}, "target: expected keep=SHARE"),
        ({"target": "0.5"}, "target: expected keep=SHARE"),
        (
            {"schedule": "play-and-prune", "target": "flops=0.5"},
            "target: expected keep=SHARE with the schedule play-and",
        ),
        (
            {"schedule": "soft", "units": ("layers",)},
            "units: expected some of heads, groups, neurons with the schedule so",
        ),
        (
            {"schedule": "surgery", "criterion": "l2", "units": ("groups",)},
            "units: expected some of heads, neurons with the schedule surgery, got groups",
        ),
        ({"schedule": "surgery"}, "criterion: expected l2 with the schedule surgery, which has norms, got taylor"),
        ({"bound": 0.0}, "bound: expected a positive number, got 0"),
        ({"criterion": "magic"}, "criterion: expected one of activation_norm, apoz, .*, got magic"),
        (
            {"schedule": "sudden"},
            "schedule: expected one of one-shot, iterative, cubic, soft, surgery, play-and-prune, got sudden",
        ),
        (
            {"schedule": "soft", "target": "latency=0.5"},
            "target: expected keep=SHARE with the schedule soft, got latency",
        ),
        ({"scope": "local", "target": "flops=0.5"}, "scope: expected global with the target flops=0.5, got local"),
        ({"units": ("blocks",)}, "units: expected some of heads, groups, neurons, layers, got blocks"),
        ({"begin": 0.9}, "begin: expected no more than end, 0.5, got 0.9"),
    ],
)
def test_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        prune.Recipe(**options)


def test_units_that_a_criterion_has_not(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"units: .*: of: expected one of heads, neurons, groups with 'thinet', got 'layers'"
    ):
        run(tmp_path / "run", dataclasses.replace(RECIPE, criterion="thinet", units=("layers",)))
    assert not (tmp_path / "run").exists()
