"""The recipes of classifiers from end to end, on a tiny random BERT and made-up reviews."""

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
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

import kdfast
from kdfast.data import demo, tasks
from kdfast.models.first_token import first_token_only
from kdfast.recipes import dynamic, hinton, minilm, patient_kd
from kdfast.results import measure
from kdfast.runs import run as run_recipe
from kdfast.runs import stages

SHORT: dict[str, Any] = {"epochs": 3, "teacher_epochs": 3, "learning_rate": 2e-3, "batch_size": 8}
ROWS = {"train_rows": 160, "test_rows": 64}
RECIPES: dict[str, Any] = {
    "hinton": hinton.Recipe(**SHORT, **ROWS),
    "patient-kd": patient_kd.Recipe(**SHORT, **ROWS, beta=50.0, baseline=True),
    "minilm": minilm.Recipe(**SHORT, **ROWS, relation_epochs=2, relation_rate=1e-3, baseline=True),
    "minilm v2": minilm.Recipe(
        **SHORT, **ROWS, relation_epochs=1, relations=("qq", "kk", "vv"), relation_heads=4, teacher_layer=-2
    ),
    "dynamic": dynamic.Recipe(**SHORT, **ROWS, rule="cwsm", alpha_end=0.5),
}


pytestmark = pytest.mark.usefixtures("no_download")


def _run(folder: Path, recipe: Any, fresh: bool = False) -> tuple[dict[str, Any], str]:
    shown = io.StringIO()
    results = run_recipe(recipe, folder, Console(file=shown, width=80), fresh)
    return results, shown.getvalue()


Finished = tuple[Any, Path, dict[str, Any], str]


@pytest.fixture(scope="module")
def runs(assets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Finished]:
    """Finished runs by the names of `RECIPES`, each made once."""

    @cache
    def run(name: str) -> Finished:
        folder = tmp_path_factory.mktemp("runs") / "run"
        return RECIPES[name], folder, *_run(folder, RECIPES[name])

    return run


@pytest.fixture(params=RECIPES)
def finished(request: Any, runs: Callable[[str], Finished]) -> Finished:
    return runs(request.param)


def test_all_models_learn(finished: Finished) -> None:
    recipe, folder, results, _ = finished
    assert list(results) == ["teacher", *["labels_only"] * recipe.baseline, "student"]
    assert all(row["accuracy"] > 0.9 for row in results.values())
    assert results["teacher"]["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert results["teacher"]["agreement"] == 1
    assert results["student"]["kl_to_teacher"] > 0
    if recipe.name == "minilm":  # which starts from an earlier stage
        seconds = [stages.finished(folder / stage)[-1]["seconds"] for stage in ("relations", "student")]
        assert min(seconds) > 0.05
        assert results["student"]["training_seconds"] == pytest.approx(sum(seconds))
    if recipe.name == "hinton":
        assert results["student"]["kl_to_teacher"] < results["labels_only"]["kl_to_teacher"]


def test_what_is_left_behind(finished: Finished) -> None:
    recipe, folder, results, shown = finished
    own = {"relations"} if recipe.name == "minilm" else set()
    assert {path.name for path in folder.iterdir()} == {
        *results,
        *own,
        "config.yaml",
        "teacher_outputs",
        "metrics.json",
        "learning_curves.png",
    }
    stored = json.loads((folder / "metrics.json").read_text())
    assert stored["models"] == results
    assert stored["settings"] == yaml.safe_load((folder / "config.yaml").read_text()) == recipe.as_dict()
    assert type(recipe)(**type(recipe).read_yaml(folder / "config.yaml")) == recipe
    assert (folder / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    accuracy = 100 * results["student"]["accuracy"]
    assert f" {accuracy:.{0 if accuracy == 100 else 1}f} " in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_saved_student_is_the_measured_one(finished: Finished, assets: dict[str, Path]) -> None:
    recipe, folder, results, _ = finished
    model = AutoModelForSequenceClassification.from_pretrained(folder / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    assert model.config.num_hidden_layers == 3
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert "kdfast" not in (folder / "student" / "config.json").read_text()
    test = tasks.load(None, test_rows=recipe.test_rows).test
    with torch.no_grad():
        logits = model(**tokenizer(list(test["text"]), padding=True, return_tensors="pt")).logits
    correct = (logits.argmax(-1) == torch.tensor(test["labels"])).float().mean().item()
    assert correct == pytest.approx(results["student"]["accuracy"])
    assert results["student"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert results["student"]["megabytes"] == pytest.approx((folder / "student/model.safetensors").stat().st_size / 1e6)


def test_embeddings_stay_frozen(finished: Finished, assets: dict[str, Path]) -> None:
    _, folder, _, _ = finished
    start = AutoModelForSequenceClassification.from_pretrained(assets[demo.MINILM.requirement])
    trained = AutoModelForSequenceClassification.from_pretrained(folder / "student")
    for a, b in zip(start.bert.embeddings.parameters(), trained.bert.embeddings.parameters(), strict=True):
        assert torch.equal(a, b)
    first = [model.bert.encoder.layer[0].output.dense.weight for model in (start, trained)]
    assert not torch.equal(*first)


@pytest.mark.parametrize("name", ["hinton", "minilm"])
def test_same_command_continues_without_repeating(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = dataclasses.replace(RECIPES[name], epochs=1, teacher_epochs=1, train_rows=48)
    results, shown = _run(tmp_path / "through", short)
    train_stage, trained = stages.train_stage, []

    def stop_at_the_student(trainer: Any, stage: Path, title: str, dtype: str) -> Any:
        if stage.name == "student" and "student" not in trained:
            trained.append("student")
            raise stages.StageInterrupted
        trained.append(stage.name)
        return train_stage(trainer, stage, title, dtype)

    monkeypatch.setattr(stages, "train_stage", stop_at_the_student)
    with pytest.raises(stages.StageInterrupted):
        _run(tmp_path / "run", short)
    again, _ = _run(tmp_path / "run", short)
    relations = ["relations"] * (name == "minilm")
    assert trained == ["teacher", "labels_only", *relations, "student", "student"]
    for model, row in results.items():  # and the result is that of the uninterrupted run
        assert again[model]["kl_to_teacher"] == pytest.approx(row["kl_to_teacher"], rel=1e-5, abs=1e-9)
    trained.clear()
    assert _run(tmp_path / "through", short) == (results, shown)
    assert trained == []


def test_given_teacher_and_narrower_student(runs: Callable[[str], Finished], tmp_path: Path) -> None:
    _, folder, results, _ = runs("hinton")
    recipe = dataclasses.replace(
        RECIPES["hinton"],
        teacher=str(folder / "teacher"),
        student_config="hidden_size=16, intermediate_size=24, num_attention_heads=2",
        baseline=False,
        epochs=1,
    )
    again, _ = _run(tmp_path / "run", recipe)
    assert list(again) == ["teacher", "student"]
    assert again["teacher"]["accuracy"] == results["teacher"]["accuracy"]
    assert not (tmp_path / "run" / "teacher").exists()
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student")
    assert (student.config.hidden_size, student.config.num_hidden_layers) == (16, 3)
    before = BertForSequenceClassification.from_pretrained(folder / "teacher")
    assert student.bert.embeddings.word_embeddings.weight.shape[0] == before.config.vocab_size


def test_local_files_of_pairs_with_names(tmp_path: Path, assets: dict[str, Path]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = ["sentence1,sentence2,label"]
    for i in range(120):
        words = [tiny_reviews.WORDS[int(k)] for k in torch.randint(6, 12, (4,), generator=generator)]
        same = i % 2
        rows.append(f"{' '.join(words)},{'good' if same else 'bad'} {' '.join(words)},{'yes' if same else 'no'}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    recipe = hinton.Recipe(data=str(tmp_path / "pairs.csv"), **SHORT)
    results, shown = _run(tmp_path / "run", recipe)
    assert results["student"]["accuracy"] > 0.9
    assert "pairs.csv" in shown
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student")
    assert set(model.config.id2label.values()) == {"yes", "no"}


def test_classes_in_another_order_are_refused(runs: Callable[[str], Finished], tmp_path: Path) -> None:
    _, folder, _, _ = runs("hinton")
    teacher = AutoModelForSequenceClassification.from_pretrained(folder / "teacher")
    teacher.config.id2label = {0: "positive", 1: "negative"}
    teacher.config.label2id = {"positive": 0, "negative": 1}
    teacher.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(folder / "teacher").save_pretrained(tmp_path / "teacher")
    recipe = dataclasses.replace(RECIPES["hinton"], teacher=str(tmp_path / "teacher"))
    with pytest.raises(
        ValueError, match="expected the classes in the data's order, negative, positive, got positive, negative"
    ):
        _run(tmp_path / "run", recipe)


def test_folder_with_other_settings(tmp_path: Path) -> None:
    folder, recipe = tmp_path / "run", RECIPES["hinton"]
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({**recipe.as_dict(), "epochs": 7}))
    with pytest.raises(ValueError, match=r"epochs: expected 7, as the run in .* has, got 3"):
        _run(folder, recipe)
    (folder / "config.yaml").unlink()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="an empty folder or one with a run, got other files"):
        _run(folder, recipe, fresh=True)
    assert (folder / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("recipe: minilm", "expected the recipe hinton, got minilm"),
        ("epoch: 3", "expected settings of hinton, got epoch; it has alpha, base"),
        ("- 3", "expected settings by name, got none"),
        ("a: [", "expected YAML, got other text: "),
    ],
)
def test_mistakes_in_a_config(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=expected):
        hinton.Recipe.read_yaml(tmp_path / "config.yaml")


def test_patient_kd_of_glue_has_the_authors_selection() -> None:
    recipe = patient_kd.Recipe.for_glue("rte", 3, seed=4)
    assert (recipe.data, recipe.normalize, recipe.beta, recipe.learning_rate, recipe.seed) == (
        "rte",
        False,
        10.0,
        2e-5,
        4,
    )
    stage = patient_kd.Recipe(layers="skip").stages(6, 12, "classification")[0]
    assert tuple(stage.cls_layers) == (2, 4, 6, 8, 10)
    stage = patient_kd.Recipe(layers="last").stages(6, 12, "classification")[0]
    assert tuple(stage.cls_layers) == (7, 8, 9, 10, 11)


def test_first_token_only_changes_no_logit_and_no_gradient() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    model = BertForSequenceClassification(config).eval()
    batch = {
        "input_ids": torch.randint(11, (4, 6)),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]] * 2),
        "labels": torch.tensor([0, 1, 1, 0]),
    }
    tokens = []
    watch = model.bert.encoder.layer[-1].output.register_forward_hook(lambda m, a, out: tokens.append(out.shape[1]))

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        outputs = model(**batch)
        outputs.loss.backward()
        return [outputs.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = step()
    with first_token_only(model):
        first = step()
    again = step()
    watch.remove()
    assert tokens == [6, 1, 6]
    for a, b, c in zip(expected, first, again, strict=True):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c, a)


def test_distance_to_the_teacher_by_hand() -> None:
    student = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 4.0]])
    p, q = (torch.softmax(logits, -1) for logits in (teacher, student))
    measured = measure.against_teacher(student, teacher)
    assert measured["agreement"] == pytest.approx(1 / 3)
    assert measured["kl_to_teacher"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)


def test_predicted_logits_keep_the_order_of_rows(assets: dict[str, Path]) -> None:
    folder = assets[demo.MINILM.requirement]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = [" ".join(tiny_reviews.WORDS[: 1 + (5 * i) % 7]) for i in range(10)]
    rows = [{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]]
    logits = measure.predict_logits(model, rows, tokenizer, "", batch_size=4)
    for text, row in zip(texts, logits, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
    assert kdfast.kl_div(logits[:1], logits[1:2]) > 0


def test_passes_of_the_student_on_the_labels_alone() -> None:
    def epochs(recipe: hinton.Recipe) -> list[int | None]:
        return [stage.epochs for stage in recipe.all_stages(3, 6, "classification")]

    assert epochs(hinton.Recipe(baseline_epochs=26)) == [26, None]
    assert epochs(hinton.Recipe()) == [None, None]
    with pytest.raises(ValueError, match=r"^baseline_epochs: expected .*1.*, got 0"):
        hinton.Recipe(baseline_epochs=0)
