"""In which precision recipes train, on any processor; and teachers whose weights are stored in 16 bits."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_reviews
import tiny_texts
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from tiny_berts import bert
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
)

from kdfast import _C, students
from kdfast.data import demo
from kdfast.recipes import (
    adversarial,
    causal_lm,
    distilbert,
    dynabert,
    dynamic,
    fastbert,
    hinton,
    minilm,
    multi_teacher,
    patient_kd,
    self_distillation,
    tinybert,
)
from kdfast.runs import arguments
from kdfast.runs import run as run_recipe

CLASSIFIERS: dict[str, Any] = {
    "epochs": 1,
    "teacher_epochs": 1,
    "learning_rate": 2e-3,
    "batch_size": 8,
    "train_rows": 160,
    "test_rows": 32,
}
RECIPES: dict[str, Any] = {
    "hinton": hinton.Recipe(**CLASSIFIERS, baseline=False),
    "patient-kd": patient_kd.Recipe(**CLASSIFIERS),
    "minilm": minilm.Recipe(**CLASSIFIERS, relation_epochs=1),
    "dynabert": dynabert.Recipe(**CLASSIFIERS, widths=(0.5, 1.0), depths=(0.5, 1.0), augment=0),
    "fastbert": fastbert.Recipe(**CLASSIFIERS, branch_width=16),
    "tinybert": tinybert.Recipe(**CLASSIFIERS, general_epochs=1, intermediate_epochs=1, augment=0),
    "dynamic": dynamic.Recipe(**CLASSIFIERS, rule="flsw"),
    "multi-teacher": multi_teacher.Recipe(**CLASSIFIERS, teachers=2, combine="confidence", cached=False),
    "adversarial": adversarial.Recipe(**CLASSIFIERS, norm="l2", epsilon=0.3),
    "self-distillation": self_distillation.Recipe(**CLASSIFIERS),
    "distilbert": distilbert.Recipe(
        teacher_steps=8, steps=8, batch_size=8, max_length=24, test_rows=20, learning_rate=5e-3, train_rows=64
    ),
    "causal-lm": causal_lm.Recipe(
        student_layers=(0, 2), steps=8, learning_rate=1e-2, max_length=16, batch_size=4, test_rows=10
    ),
}
LANGUAGE = ("distilbert", "causal-lm")
OF_BASE = ("patient-kd", "minilm", "tinybert", "self-distillation")  # whose students start from it

Runs = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """By recipe and what `kdfast.data.demo.fetch` is asked for; of classifiers also a teacher, of two classes."""
    reviews, masked, causal = (tmp_path_factory.mktemp(name) for name in ("reviews", "masked", "causal"))
    of_classifiers = tiny_reviews.make(reviews)
    base = of_classifiers[demo.MINILM.requirement]
    named = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    AutoModelForSequenceClassification.from_pretrained(base, **named).save_pretrained(reviews / "teacher")
    AutoTokenizer.from_pretrained(base).save_pretrained(reviews / "teacher")
    of_classifiers |= {"teacher": reviews / "teacher", "base": base}
    of_masked, of_causal = tiny_texts.masked(masked), tiny_texts.causal(causal)
    of_masked["teacher"], of_causal["teacher"] = of_masked["masked-lm"], of_causal[demo.SMOLLM2.folder]
    return dict.fromkeys(RECIPES, of_classifiers) | {
        "distilbert": of_masked,
        "causal-lm": of_causal,
    }


@pytest.fixture(scope="module")
def runs(assets: dict[str, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A recipe's run with these settings, made once: its folder, and the metrics it leaves there."""

    @cache
    def run(name: str, **settings: Any) -> tuple[Path, dict[str, Any]]:
        of, folder = assets[name], tmp_path_factory.mktemp("runs") / "run"

        def fetch(package: demo.Package) -> Path:
            return of[package.requirement if package.requirement in of else package.folder]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(demo, "fetch", fetch)
            run_recipe(dataclasses.replace(RECIPES[name], **settings), folder, Console(file=io.StringIO()))
        return folder, json.loads((folder / "metrics.json").read_text())

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


# ---- what is chosen ----
@pytest.mark.parametrize(
    ("best", "capabilities", "expected"),
    [
        ("amx", {"avx512_bf16": True}, True),
        ("avx512_bf16", {"avx512_bf16": True}, True),
        ("avx512_bf16_fma", {"avx512_bf16": True}, False),  # Intel's, twice as slow as float32
        ("avx512", {"avx512_f": True, "avx512_bf16": False}, False),
        ("portable", {"sve_bf16": True}, True),
    ],
)
def test_bf16_only_where_it_is_faster(
    best: str, capabilities: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_C, "cpu_variants", lambda: ["portable", best])
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert arguments.cpu_likes_bf16() is expected
    assert arguments.chosen("auto") == ("bfloat16" if expected else "float32")
    assert arguments.of_precision("auto") == {"use_cpu": True, "bf16": expected, "fp16": False}
    for chosen in ("float32", "bfloat16"):  # whatever the processor has
        assert arguments.chosen(chosen) == chosen
    with pytest.raises(
        ValueError, match="precision: expected auto, float32 or bfloat16 where there is no GPU, got float16"
    ):
        arguments.chosen("float16")


def test_float16_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert arguments.of_precision("float16") == {"use_cpu": False, "bf16": False, "fp16": True}


def test_settings_are_checked() -> None:
    for wrong in ({"precision": "fp16"}, {"save_dtype": "auto"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected one of .*float16, got"):
            hinton.Recipe(**wrong)


@pytest.mark.parametrize("name", RECIPES)
def test_no_run_begins_in_a_precision_that_is_not_there(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="precision: expected auto, float32 or bfloat16"):
        run_recipe(dataclasses.replace(RECIPES[name], precision="float16"), tmp_path / "run", Console())
    assert not (tmp_path / "run").exists()


# ---- what is trained ----
@pytest.mark.parametrize("chosen", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains(name: str, chosen: str, runs: Runs) -> None:
    folder, stored = runs(name, precision=chosen)
    assert (
        stored["settings"]["precision"] == yaml.safe_load((folder / "config.yaml").read_text())["precision"] == chosen
    )
    told = stored["training"]["precision"] if name in LANGUAGE else stored["precision"]["student"]
    assert told == json.loads((folder / "student" / "stage.json").read_text())["precision"] == chosen
    trained = weights(folder / "student")
    assert {x.dtype for x in trained.values()} == {torch.float32}
    other = weights(runs(name, precision="float32" if chosen == "bfloat16" else "bfloat16")[0] / "student")
    if name == "dynabert":  # its heads and neurons are sorted by what rounding may change
        trained = {key: x for key, x in trained.items() if "LayerNorm" in key or "embeddings" in key}
    apart = torch.cat([(trained[name] - other[name]).flatten() for name in trained]).norm()
    size = torch.cat([x.flatten() for x in trained.values()]).norm()
    assert 1e-6 * size < apart < 0.1 * size  # another precision, and no other training
    history = json.loads((folder / "student" / "stage.json").read_text())["history"]
    losses = [event["loss"] for event in history if "loss" in event]
    assert all(torch.tensor(losses).isfinite())
    assert losses[-1] < losses[0]


# ---- stored in 16 bits ----
def stored_in(dtype: torch.dtype, source: Path, auto: Any, folder: Path) -> tuple[Path, Path]:
    """The model in 16 bits; and the same numbers in float32."""
    model = auto.from_pretrained(source).to(dtype)
    for name, of in (("half", dtype), ("whole", torch.float32)):
        model.to(of).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder / name)
    return folder / "half", folder / "whole"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RECIPES)
def test_students_of_teachers_stored_in_16_bits(
    name: str, dtype: torch.dtype, assets: dict[str, dict[str, Path]], runs: Runs, tmp_path: Path
) -> None:
    auto = {"distilbert": AutoModelForMaskedLM, "causal-lm": AutoModelForCausalLM}.get(
        name, AutoModelForSequenceClassification
    )
    halves, wholes = {}, {}
    for setting in ("teacher", "base") if name in OF_BASE else ("teacher",):
        half, whole = stored_in(dtype, assets[name][setting], auto, tmp_path / setting)
        assert {x.dtype for x in weights(half).values()} == {dtype}
        several = (lambda path: (str(path),) * 2) if name == "multi-teacher" else str
        halves[setting], wholes[setting] = several(half), several(whole)
    folder, stored = runs(name, precision="float32", **halves)
    expected = weights(runs(name, precision="float32", **wholes)[0] / "student")
    trained = weights(folder / "student")
    assert {x.dtype for x in trained.values()} == {torch.float32}
    for key, value in trained.items():
        assert torch.equal(value, expected[key]), key
    rounded = sum(int((x == x.to(dtype).float()).sum()) for x in trained.values() if x.dim() > 1)
    still = (
        (lambda key: not key[0].isdigit()) if name == "fastbert" else (lambda key: "embeddings" in key)
    )  # its branches
    frozen = sum(x.numel() for key, x in trained.items() if still(key))
    assert rounded < frozen + 0.1 * sum(x.numel() for x in trained.values())  # steps that 16 bits would lose are there
    assert stored["models"]["student"]["parameters"] > 0


@pytest.mark.parametrize("name", ["hinton", "minilm", "fastbert", "causal-lm"])
def test_student_is_saved_in_the_chosen_dtype(name: str, runs: Runs) -> None:
    folder, stored = runs(name, precision="float32", save_dtype="bfloat16")
    whole, expected = runs(name, precision="float32")
    trained = weights(folder / "student")
    assert {x.dtype for x in trained.values()} == {torch.bfloat16}
    for key, value in weights(whole / "student").items():
        assert torch.equal(trained[key], value.bfloat16()), key
    half, full = (of["models"]["student"]["megabytes"] for of in (stored, expected))
    assert half == pytest.approx(full / 2, rel=0.1)
    before = [path for path in folder.iterdir() if path.name in ("relations", "teacher")]
    for path in before:
        assert {x.dtype for x in weights(path).values()} == {torch.float32}
    measured = (of["models"]["student"]["kl_to_teacher"] for of in (stored, expected))
    assert len({*measured}) == 2  # it is the rounded one that is measured


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_weights_of_students_are_float32(stored: torch.dtype, tmp_path: Path) -> None:
    teacher = bert(0, layers=3, kind=BertForMaskedLM).to(stored)
    for number, make in enumerate(
        (
            lambda **dtype: students.from_layers(teacher, [1, 2], **dtype),
            lambda **dtype: students.narrower(teacher, intermediate_size=20, layers=[1, 2], **dtype).model,
            lambda **dtype: students.distilbert(teacher, [1, 2], **dtype),
        )
    ):
        student = make()
        assert {value.dtype for value in student.state_dict().values() if value.is_floating_point()} == {torch.float32}
        embeddings = teacher.get_input_embeddings().weight
        assert torch.equal(student.get_input_embeddings().weight, embeddings.float())
        student.save_pretrained(tmp_path / str(number))
        saved = type(student).from_pretrained(tmp_path / str(number))  # in the dtype that the config tells
        assert {p.dtype for p in saved.parameters()} == {torch.float32}
        assert {p.dtype for p in make(dtype=None).parameters()} == {stored}
