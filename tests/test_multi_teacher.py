"""Several teachers: what they say together by its definitions, tokenizers of their own, and the recipe."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_reviews
import torch
import torch.nn.functional as F
from command_line import call
from rich.console import Console
from test_objective_originals import agree
from test_recipes_by_hand import SETTINGS, Loss, follow, inputs
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    MPNetConfig,
    MPNetForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    TrainingArguments,
    XLNetConfig,
    XLNetForSequenceClassification,
)
from word_classifiers import LIMIT, SIZES, WIDE, WORDS, bert, run, save, tokenizer, write_reviews

from kdfast.data import tasks
from kdfast.data.sampler import TeacherCollator
from kdfast.models.teachers import Teachers
from kdfast.objective import Ensemble, Labels, Terms
from kdfast.objective.ensemble import COMBINED, combined, confidence
from kdfast.recipes import multi_teacher
from kdfast.results import compare
from kdfast.runs import run as run_recipe
from kdfast.runs import stages
from kdfast.train.trainer import DistillationTrainer

ROWS, TEACHERS, CLASSES = 6, 3, 4


def given(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64)
    ensemble = 3 * torch.randn(ROWS, TEACHERS, CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    return s.to(dtype).requires_grad_(), ensemble.to(dtype), labels


def by_ca_mkd(ensemble: Tensor, labels: Tensor) -> Tensor:
    """Weights [B, K], as the paper prints them."""
    ce = torch.stack([F.cross_entropy(ensemble[:, k], labels, reduction="none") for k in range(ensemble.shape[1])], 1)
    return (1 - ce.exp() / ce.exp().sum(1, keepdim=True)) / (ensemble.shape[1] - 1)


def target(ensemble: Tensor, combine: str, labels: Tensor, t: float) -> Tensor:
    """Probabilities [B, C]."""
    if combine == "logits":
        return (ensemble.mean(1) / t).softmax(-1)
    w = (
        by_ca_mkd(ensemble, labels)
        if combine == "confidence"
        else ensemble.new_full(ensemble.shape[:2], 1 / ensemble.shape[1])
    )
    return (w[..., None] * (ensemble / t).softmax(-1)).sum(1)


@pytest.mark.parametrize("column", [False, True], ids=["teacher", "column"])
@pytest.mark.parametrize("combine", COMBINED)
def test_loss_and_gradient_by_definition(combine: str, column: bool) -> None:
    s, ensemble, labels = given()
    objective = Terms(kl=Ensemble(combine, temperature=3.0))
    batch: dict[str, Any] = {"labels": labels} | ({"teacher_ensemble": ensemble} if column else {})
    teacher = None if column else SimpleNamespace(ensemble=ensemble)
    got = objective(SimpleNamespace(logits=s), teacher, batch)["kl"]
    p = target(ensemble, combine, labels, 3.0)
    expected = 9 * F.kl_div((s / 3).log_softmax(-1), p, reduction="batchmean")
    agree(got, expected.detach(), 1e-10)
    agree(torch.autograd.grad(got, s)[0], torch.autograd.grad(expected, s)[0], 1e-10)


def test_confidence_has_the_gradient_of_the_papers_sum() -> None:
    s, ensemble, labels = given()
    w = by_ca_mkd(ensemble, labels)
    torch.testing.assert_close(w.sum(1), torch.ones_like(w[:, 0]))
    assert float(w.std()) > 0.05
    torch.testing.assert_close(confidence(ensemble, labels), w)
    log_s = (s / 2).log_softmax(-1)
    each = torch.stack([F.kl_div(log_s, (z / 2).softmax(-1), reduction="none").sum(-1) for z in ensemble.unbind(1)], 1)
    (expected,) = torch.autograd.grad(4 * (w * each).sum(1).mean(), s)
    loss = Terms(kl=Ensemble("confidence", temperature=2.0))(
        SimpleNamespace(logits=s), None, {"labels": labels, "teacher_ensemble": ensemble}
    )["kl"]
    agree(torch.autograd.grad(loss, s)[0], expected, 1e-10)


def test_rows_without_labels_have_equal_weights() -> None:
    _, ensemble, labels = given()
    labels[2] = -100
    w = confidence(ensemble, labels)
    assert w[2].tolist() == pytest.approx([1 / TEACHERS] * TEACHERS)
    assert float(w[:2].std()) > 0.05
    together, plain = (combined(ensemble, one, labels, 2.0) for one in ("confidence", "probabilities"))
    torch.testing.assert_close(together[2].softmax(-1), plain[2].softmax(-1))
    torch.testing.assert_close(combined(ensemble, "confidence"), combined(ensemble, "probabilities"))


@pytest.mark.parametrize("combine", COMBINED)
def test_columns_of_rows(combine: str) -> None:
    s, ensemble, labels = given()
    weight, t = torch.rand(ROWS, dtype=torch.float64), torch.linspace(1, 5, ROWS, dtype=torch.float64)
    columns = {"labels": labels, "teacher_ensemble": ensemble, "sample_weight": weight, "sample_temperature": t}
    got = Terms(kl=Ensemble(combine))(SimpleNamespace(logits=s), None, columns)["kl"]
    rows = []
    for i in range(ROWS):
        p = target(ensemble[i : i + 1], combine, labels[i : i + 1], float(t[i]))
        rows.append(weight[i] * t[i] ** 2 * F.kl_div((s[i : i + 1] / t[i]).log_softmax(-1), p, reduction="batchmean"))
    agree(got, torch.stack(rows).mean().detach(), 1e-10)


@pytest.mark.parametrize("combine", COMBINED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype, combine: str) -> None:
    s, ensemble, labels = given(dtype)
    columns = {"labels": labels, "teacher_ensemble": ensemble}
    got = Terms(kl=Ensemble(combine, temperature=2.0))(SimpleNamespace(logits=s), None, columns)["kl"]
    p = target(ensemble.double(), combine, labels, 2.0)
    agree(got, 4 * F.kl_div((s.detach().double() / 2).log_softmax(-1), p, reduction="batchmean"), 1e-5)


def test_regressions_have_mean_numbers() -> None:
    s, ensemble, _ = given()
    term = Ensemble(divergence="logit_mse", temperature=2.0)
    got = Terms(mse=term)(SimpleNamespace(logits=s[:, :1]), SimpleNamespace(ensemble=ensemble[..., :1]), {"labels": s})
    agree(got["mse"], F.mse_loss(s[:, :1], ensemble[..., :1].mean(1)).detach(), 1e-10)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"combine": "votes"}, "combine: expected one of logits, probabilities, confidence, got 'votes'"),
        (
            {"tokens": "all"},
            "tokens: expected None, as teachers of other tokens agree on whole sequences alone, got 'all'",
        ),
        ({"divergence": "logit_mse", "combine": "confidence"}, "combine: expected 'logits' beside 'logit_mse', .*"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=f"^Ensemble: {expected}$"):
        Ensemble(**settings)


def test_batches_that_are_refused() -> None:
    s, ensemble, labels = given()
    student, objective = SimpleNamespace(logits=s), Terms(kl=Ensemble("confidence"))
    with pytest.raises(ValueError, match=r"Ensemble: teacher: expected one, or rows with a teacher_ensemble column"):
        objective(student, None, {"labels": labels})
    with pytest.raises(ValueError, match=r"ensemble: expected logits .* of 2 teachers or more, got \[6, 1, 4\]"):
        objective(student, None, {"labels": labels, "teacher_ensemble": ensemble[:, :1]})
    with pytest.raises(
        ValueError, match=r"labels: expected class numbers \[batch\] for 'confidence', got 'torch.float32"
    ):
        objective(student, None, {"labels": labels.float(), "teacher_ensemble": ensemble})
    with pytest.raises(ValueError, match="Teachers: models: expected at least one, got none"):
        Teachers([])


# ---- tokenizers of their own ----
def others(folder: Path) -> dict[str, str]:
    """Teachers of four kinds, each with words in another order."""
    small = {**SIZES, **WIDE, "max_position_embeddings": LIMIT + 4, "initializer_range": 0.5, "pad_token_id": 1}
    orders = {
        kind: [*WORDS[:3][::-1], *WORDS[3 + i :], *WORDS[3 : 3 + i]]
        for i, kind in enumerate(("roberta", "mpnet", "xlnet"))
    }
    torch.manual_seed(3)
    made = {
        "roberta": RobertaForSequenceClassification(RobertaConfig(**small | {"pad_token_id": 2})),
        "mpnet": MPNetForSequenceClassification(MPNetConfig(**small | {"pad_token_id": 2})),
        "xlnet": XLNetForSequenceClassification(
            XLNetConfig(
                vocab_size=len(WORDS),
                d_model=16,
                n_layer=2,
                n_head=2,
                d_inner=32,
                pad_token_id=2,
                initializer_range=0.5,
            )
        ),
    }
    sides = {"padding_side": "left"}
    found = {"bert": save(folder / "bert", bert(7))}
    for kind, model in made.items():
        words = tokenizer(orders[kind], **(sides if kind == "xlnet" else {}))
        found[kind] = save(folder / kind, model.eval(), words)
    return found


def test_live_teachers_of_other_tokens(tmp_path: Path) -> None:
    """In a batch of the trainer each teacher makes the logits that it makes of its own rows alone."""
    sources = others(tmp_path)
    texts = ["good film", "the plot the film bad", "poor"]
    tokenizers = [AutoTokenizer.from_pretrained(of) for of in sources.values()]
    teachers = [AutoModelForSequenceClassification.from_pretrained(of).eval() for of in sources.values()]
    rows: list[dict[str, Any]] = []
    for i, text in enumerate(texts):
        row: dict[str, Any] = {"input_ids": tokenizer()(text)["input_ids"], "labels": i % 2}
        for k, own in enumerate(tokenizers[1:], 1):
            row[f"teacher_{k}_input_ids"] = own(text)["input_ids"]
        rows.append(row)

    def inner(given: list[dict[str, Any]]) -> dict[str, Any]:
        labels = torch.tensor([row["labels"] for row in given])
        own = [{"input_ids": row["input_ids"]} for row in given]
        return {**tokenizer().pad(own, return_tensors="pt"), "labels": labels}

    collate: Any = inner
    for k, own in enumerate(tokenizers[1:], 1):
        collate = TeacherCollator(collate, own, number=k)
    batch = collate(rows)
    expected = []
    with torch.no_grad():
        for own, model in zip(tokenizers, teachers, strict=True):
            of_rows = [model(torch.tensor([own(text)["input_ids"]])).logits[0] for text in texts]
            expected.append(torch.stack(of_rows))
    arguments = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = DistillationTrainer(
        bert(0),
        arguments,
        teacher=Teachers(teachers),
        objective=Terms(kl=Ensemble(), ce=Labels()),
        train_dataset=rows,
        data_collator=collate,
    )
    found = trainer._teacher_outputs(batch)
    torch.testing.assert_close(found.ensemble, torch.stack(expected, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits, torch.stack(expected).mean(0), rtol=1e-4, atol=1e-5)
    assert float(found.ensemble.std(1).min()) > 1e-3
    assert trainer.train().training_loss > 1e-3


@pytest.mark.parametrize("cached", [True, False])
def test_teachers_of_four_kinds(cached: bool, tmp_path: Path) -> None:
    data, sources = write_reviews(tmp_path / "reviews.csv"), others(tmp_path)
    recipe = multi_teacher.Recipe(
        data=data, teacher=tuple(sources.values()), base=sources["bert"], student_start="base", epochs=1, batch_size=4,
        learning_rate=1e-3, max_length=LIMIT, cached=cached, combine="probabilities", student_layers=(0,), precision="float32",
    )  # fmt: skip
    results, shown = run(tmp_path / "run", recipe)
    assert list(results) == ["teacher", "teacher_0", "teacher_1", "teacher_2", "teacher_3", "student"]
    sizes = [results[f"teacher_{k}"]["parameters"] for k in range(4)]
    assert results["teacher"]["parameters"] == sum(sizes)
    assert results["teacher"]["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert min(results[name]["kl_to_teacher"] for name in results if name != "teacher") > 1e-4
    assert "teachers together" in shown
    history = stages.finished(tmp_path / "run" / "student") or []
    assert next(event["kl"] for event in history if "kl" in event) > 1e-4
    # Each teacher is as good on its own rows as it is alone.
    own = AutoTokenizer.from_pretrained(sources["xlnet"])
    model = AutoModelForSequenceClassification.from_pretrained(sources["xlnet"]).eval()
    test = tasks.load(data).test
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([own(text)["input_ids"]])).logits[0] for text in test["text"]])
    right = (logits.argmax(-1) == torch.tensor(test["labels"])).float().mean().item()
    assert results["teacher_3"]["accuracy"] == pytest.approx(right)


def test_cached_and_live_train_alike(tmp_path: Path) -> None:
    data, sources = write_reviews(tmp_path / "reviews.csv"), others(tmp_path)
    found = {}
    for cached in (True, False):
        recipe = multi_teacher.Recipe(
            data=data, teacher=(sources["bert"], sources["xlnet"]), epochs=1, batch_size=4, learning_rate=1e-3,
            max_length=LIMIT, cached=cached, combine="confidence", student_layers=(0,), precision="float32",
        )  # fmt: skip
        run(tmp_path / str(cached), recipe)
        found[cached] = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / str(cached) / "student"
        ).state_dict()
    start = bert(7).state_dict()["classifier.weight"]
    assert (found[True]["classifier.weight"] - start).abs().max() > 1e-3
    for name, value in found[True].items():
        if name.endswith("key.bias"):  # whose gradient is rounding, as softmax ignores it; Adam makes steps of that
            continue
        torch.testing.assert_close(
            value, found[False][name], rtol=0, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


# ---- the recipe ----
def of_all(combine: str) -> Loss:
    def loss(student: Any, teachers: Any, batch: dict[str, Tensor]) -> Tensor:
        alpha, t = 0.9, 2.0
        z = student(**inputs(batch)).logits
        with torch.no_grad():
            ensemble = torch.stack([teacher(**inputs(batch)).logits for teacher in teachers], 1)
        p = target(ensemble, combine, batch["labels"], t)
        kl = F.kl_div((z / t).log_softmax(-1), p, reduction="batchmean")
        return alpha * t**2 * kl + (1 - alpha) * F.cross_entropy(z, batch["labels"])

    return loss


@pytest.mark.parametrize(
    ("combine", "cached"), [("logits", True), ("probabilities", False), ("confidence", True), ("confidence", False)]
)
def test_recipe_follows_a_plain_loop(
    combine: str, cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = multi_teacher.Recipe(**SETTINGS, teachers=2, combine=combine, cached=cached)
    follow(recipe, {"student": (of_all(combine), "teacher_0,teacher_1")}, tmp_path, monkeypatch)
    seeds = [AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / f"teacher_{k}") for k in range(2)]
    assert (seeds[0].classifier.weight - seeds[1].classifier.weight).abs().max() > 1e-2
    stored = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert stored["models"]["teacher"]["training_seconds"] == pytest.approx(
        sum(stored["models"][f"teacher_{k}"]["training_seconds"] for k in range(2))
    )
    rows = compare.compare([tmp_path / "run"]).rows
    assert [row.model for row in rows] == ["teacher", "teacher_0", "teacher_1", "student"]


def test_stopped_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets = tiny_reviews.make(tmp_path)
    monkeypatch.setattr("kdfast.data.demo.fetch", lambda package: assets[package.requirement])
    recipe = multi_teacher.Recipe(**SETTINGS | {"train_rows": 48}, teachers=2)
    train_stage, trained = stages.train_stage, []

    def stop_once(trainer: Any, folder: Path, title: str, dtype: str) -> Any:
        trained.append(folder.name)
        if trained == ["teacher_0", "teacher_1"]:
            raise stages.StageInterrupted
        return train_stage(trainer, folder, title, dtype)

    monkeypatch.setattr(stages, "train_stage", stop_once)
    with pytest.raises(stages.StageInterrupted):
        run_recipe(recipe, tmp_path / "run", Console(file=io.StringIO()))
    first = run_recipe(recipe, tmp_path / "run", Console(file=io.StringIO()))
    assert trained == ["teacher_0", "teacher_1", "teacher_1", "student"]
    assert run_recipe(recipe, tmp_path / "run", Console(file=io.StringIO())) == first
    with pytest.raises(ValueError, match="teachers: expected 2, as the run in the output folder"):
        run_recipe(multi_teacher.Recipe(**SETTINGS | {"train_rows": 48}, teachers=3), tmp_path / "run", Console())


def test_settings_that_are_refused() -> None:
    for settings, expected in (
        ({"combine": "confidence", "teachers": 1}, "combine: expected 2 teachers or more for confidence, got 1"),
        ({"combine": "confidence", "teacher": ("a",)}, "combine: expected 2 teachers or more for confidence, got 1"),
        ({"teacher": ()}, "teacher: expected one or more, or none at all, got an empty list"),
        ({"teachers": 0}, "teachers: expected at least 1, got 0"),
        ({"combine": "max"}, "combine: expected one of logits, probabilities, confidence, got max"),
    ):
        with pytest.raises(ValueError, match=f"^{expected}$"):
            multi_teacher.Recipe(**settings)
    with pytest.raises(ValueError, match="combine: expected logits of a regression, which has no classes"):
        multi_teacher.Recipe(combine="probabilities").stages(3, 6, "regression")


def test_teachers_on_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr("kdfast.runs.run", lambda recipe, folder, console, fresh: seen.append(recipe))
    assert (
        call(
            monkeypatch, "distill", "multi-teacher", "--teacher", "a,b", "--teacher", "org/c", "--output", str(tmp_path)
        )
        == 0
    )
    assert seen[0].teacher == ("a,b", "org/c")
    (tmp_path / "config.yaml").write_text(seen[0].to_yaml())
    assert type(seen[0])(**multi_teacher.Recipe.read_yaml(tmp_path / "config.yaml")) == seen[0]
    assert call(monkeypatch, "distill", "multi-teacher", "--teachers", "2") == 0
    assert (seen[1].teacher, seen[1].teachers) == (None, 2)
