"""The Hinton recipe from end to end on a tiny random BERT and made-up reviews."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

import kdfast
from kdfast import data, report, stages
from kdfast.recipes import hinton

WORDS = ["good", "fine", "great", "bad", "poor", "awful", "film", "plot", "actor", "scene", "the", "a"]
SETTINGS = hinton.Settings(epochs=3, teacher_epochs=4, learning_rate=1e-3, batch_size=8, train_rows=240, test_rows=64)


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A 6-layer encoder with its tokenizer, and reviews whose first word tells the label."""
    model, reviews = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("reviews")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertForSequenceClassification(config).bert.save_pretrained(model)
    (model / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    generator = torch.Generator().manual_seed(1)
    lines = []
    for i in range(2300):  # movie_reviews keeps 2,000 of them for the test set
        label = i % 2
        first = WORDS[int(torch.randint(3, (), generator=generator)) + 3 * (1 - label)]
        length = int(torch.randint(2, 9, (), generator=generator))
        rest = [WORDS[6 + int(k)] for k in torch.randint(6, (length,), generator=generator)]
        lines.append(f"{i}\t{1.0 if label else -1.0}\t{' '.join([first, *rest])}")
    (reviews / "movie_reviews.tsv").write_text("\n".join(lines))
    return {data.MINILM.requirement: model, data.MOVIE_REVIEWS.requirement: reviews}


@pytest.fixture(autouse=True)
def _no_download(assets: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "fetch", lambda package: assets[package.requirement])


def _run(folder: Path, settings: hinton.Settings = SETTINGS, fresh: bool = False) -> tuple[dict[str, Any], str]:
    shown = io.StringIO()
    results = hinton.HintonRun(settings, folder, Console(file=shown, width=120), fresh).execute()
    return results, shown.getvalue()


@pytest.fixture(scope="module")
def finished(assets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("runs") / "hinton"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "fetch", lambda package: assets[package.requirement])
        results, shown = _run(folder)
    return folder, results, shown


def test_all_three_models_learn(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, results, _ = finished
    assert list(results) == ["teacher", "labels_only", "student"]
    assert all(row["accuracy"] > 0.9 for row in results.values())
    assert results["teacher"]["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert results["teacher"]["agreement"] == 1
    assert 0 < results["student"]["kl_to_teacher"] < results["labels_only"]["kl_to_teacher"]


def test_what_is_left_behind(finished: tuple[Path, dict[str, Any], str]) -> None:
    folder, results, shown = finished
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *hinton.MODELS,
        "settings.json",
        "teacher_logits.safetensors",
        "metrics.json",
        "learning_curves.png",
    }
    assert json.loads((folder / "metrics.json").read_text())["models"] == results
    assert (folder / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    for title in hinton.MODELS.values():
        assert title in shown
    assert f" {100 * results['student']['accuracy']:.1f} " in shown


def test_saved_student_is_the_measured_one(finished: tuple[Path, dict[str, Any], str], assets: dict[str, Path]) -> None:
    folder, results, _ = finished
    model = AutoModelForSequenceClassification.from_pretrained(folder / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    assert model.config.num_hidden_layers == 3
    assert model.config.id2label == {0: "negative", 1: "positive"}
    _, test = data.movie_reviews(assets[data.MOVIE_REVIEWS.requirement])
    test = test[: SETTINGS.test_rows]
    with torch.no_grad():
        logits = model(**tokenizer([r.text for r in test], padding=True, return_tensors="pt")).logits
    correct = (logits.argmax(-1) == torch.tensor([r.label for r in test])).float().mean().item()
    assert correct == pytest.approx(results["student"]["accuracy"])
    assert results["student"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert results["student"]["megabytes"] == pytest.approx((folder / "student/model.safetensors").stat().st_size / 1e6)


def test_embeddings_stay_frozen(finished: tuple[Path, dict[str, Any], str], assets: dict[str, Path]) -> None:
    folder, _, _ = finished
    start = AutoModelForSequenceClassification.from_pretrained(assets[data.MINILM.requirement])
    trained = AutoModelForSequenceClassification.from_pretrained(folder / "student")
    for a, b in zip(start.bert.embeddings.parameters(), trained.bert.embeddings.parameters(), strict=True):
        assert torch.equal(a, b)
    first = [model.bert.encoder.layer[0].output.dense.weight for model in (start, trained)]
    assert not torch.equal(*first)


def test_same_command_continues_without_repeating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = dataclasses.replace(SETTINGS, epochs=1, teacher_epochs=1, train_rows=48)
    results, shown = _run(tmp_path / "through", short)
    train_stage, trained = stages.train_stage, []

    def stop_at_the_student(trainer: Any, stage: Path, title: str) -> Any:
        if stage.name == "student" and "student" not in trained:
            trained.append("student")
            raise stages.StageInterrupted
        trained.append(stage.name)
        return train_stage(trainer, stage, title)

    monkeypatch.setattr(stages, "train_stage", stop_at_the_student)
    with pytest.raises(stages.StageInterrupted):
        _run(tmp_path / "run", short)
    again, _ = _run(tmp_path / "run", short)
    assert trained == ["teacher", "labels_only", "student", "student"]
    for name, row in results.items():  # and the result is that of the uninterrupted run
        assert again[name]["kl_to_teacher"] == pytest.approx(row["kl_to_teacher"], rel=1e-5, abs=1e-9)
    trained.clear()
    assert _run(tmp_path / "through", short) == (results, shown)
    assert trained == []


def test_folder_with_other_settings(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"epochs": 7}))
    with pytest.raises(ValueError, match="with epochs 7, not 3"):
        _run(folder)
    hinton.HintonRun(SETTINGS, folder, Console(), fresh=True)
    assert not folder.exists()
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds no run"):
        hinton.HintonRun(SETTINGS, folder, Console(), fresh=True)
    assert (folder / "thesis.tex").exists()


def test_student_keeps_the_chosen_layers() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=6, num_attention_heads=2, intermediate_size=8)
    teacher = BertForSequenceClassification(config)
    student = hinton.student_from(teacher, (1, 4))
    assert student.config.num_hidden_layers == 2
    assert len(teacher.bert.encoder.layer) == teacher.config.num_hidden_layers == 6
    for mine, its in ((0, 1), (1, 4)):
        a, b = student.bert.encoder.layer[mine].state_dict(), teacher.bert.encoder.layer[its].state_dict()
        assert all(torch.equal(a[name], b[name]) for name in b)
    for name in ("bert.embeddings", "bert.pooler", "classifier"):
        a, b = student.get_submodule(name).state_dict(), teacher.get_submodule(name).state_dict()
        assert all(torch.equal(a[key], b[key]) for key in b)
    with torch.no_grad():  # a copy: training one leaves the other alone
        student.classifier.weight.zero_()
    assert teacher.classifier.weight.abs().max() > 0


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
    with hinton.first_token_only(model):
        first = step()
    again = step()
    watch.remove()
    assert tokens == [6, 1, 6]
    for a, b, c in zip(expected, first, again, strict=True):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c, a)


def test_quality_by_hand() -> None:
    student = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 4.0]])
    p, q = (torch.softmax(logits / 2.0, -1) for logits in (teacher, student))
    measured = report.quality(student, torch.tensor([0, 1, 1]), teacher, temperature=2.0)
    assert measured["accuracy"] == pytest.approx(2 / 3)
    assert measured["agreement"] == pytest.approx(1 / 3)
    assert measured["kl_to_teacher"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)


def test_predicted_logits_keep_the_order_of_rows(assets: dict[str, Path]) -> None:
    folder = assets[data.MINILM.requirement]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = [" ".join(WORDS[: 1 + (5 * i) % 7]) for i in range(10)]
    rows = [{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]]
    logits = stages.predict_logits(model, rows, tokenizer, "", batch_size=4)
    for text, row in zip(texts, logits, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
    assert kdfast.kl_div(logits[:1], logits[1:2]) > 0
