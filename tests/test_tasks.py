"""Labelled text: what becomes of columns, labels and splits, what is refused, and metrics against worked examples."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_teacher
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification, DataCollatorWithPadding

from kdfast.data import demo, metrics, tasks
from kdfast.data.tasks import TaskError


@pytest.fixture(autouse=True)
def _no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and a `datasets` cache that is empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def _json(path: Path, **columns: list[Any]) -> Path:
    rows = zip(*columns.values(), strict=True)
    path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    return path


def _texts(count: int) -> list[str]:
    return [f"w{i % 40 + 2} w3" for i in range(count)]


def _both(task: tasks.Task, column: str = "labels") -> list[Any]:
    return [*task.train[column], *task.test[column]]


# ---- files, folders and splits


FORMATS = {
    "a.csv": 'text,label\n"good, ""very"" good",pos\nNA,none\n,pos\nnull,none\n   ,pos\n',
    "a.tsv": 'text\tlabel\n"good\tpos\nNA\tnone\n\tpos\nnull\tnone\n   \tpos\n',
    "a.json": json.dumps([{"text": text, "label": text[:1]} for text in ("good", "NA", "", "null", "  ")]),
    "a.jsonl": '{"text": "good", "label": 1}\n{"text": "NA", "label": 2}\n{"text": null, "label": 2}\n{"text": "b", "label": 2}',
}


def _files(folder: Path) -> None:
    for name, content in FORMATS.items():
        (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("file", "texts", "names"),
    [
        ("a.csv", ['good, "very" good', "NA", "null"], ("none", "pos")),
        ("a.tsv", ['"good', "NA", "null"], ("none", "pos")),  # a quotation mark is one
        ("a.json", ["good", "NA", "null"], ("", " ", "N", "g", "n")),
        ("a.jsonl", ["good", "NA", "b"], ("1", "2")),
    ],
)
def test_files(file: str, texts: list[str], names: tuple[str, ...], tmp_path: Path) -> None:
    _files(tmp_path)
    task = tasks.load(tmp_path / file)
    assert task.name == str(tmp_path / file)
    assert sorted(_both(task, "text")) == sorted(texts)
    assert task.names == names


def test_parquet_keeps_the_names_of_classes(tmp_path: Path) -> None:
    labels = ClassLabel(names=["negative", "neutral", "positive"])  # one of which has no row
    features = Features({"sentence": Value("string"), "label": labels})
    rows = {"sentence": _texts(30), "label": [0, 2] * 15}
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "a.parquet")
    task = tasks.load(tmp_path / "a.parquet")
    assert (task.kind, task.names, task.metric) == ("classification", ("negative", "neutral", "positive"), "accuracy")
    assert set(_both(task)) == {0, 2}
    assert task.head["id2label"] == {0: "negative", 1: "neutral", 2: "positive"}
    assert task.head["problem_type"] == "single_label_classification"
    assert len(task.test) == 3


def test_held_out_rows_are_the_same_in_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "HELD_OUT", 200)
    texts = [f"row {number}" for number in range(2500)]
    file = _json(tmp_path / "a.jsonl", text=texts, label=[number // 1250 for number in range(2500)])
    torch.manual_seed(0)
    first = tasks.load(file)
    assert (len(first.train), len(first.test)) == (2300, 200)
    assert sorted(_both(first, "text")) == sorted(texts)
    assert 70 < sum(first.test["labels"]) < 130
    torch.manual_seed(1)
    part = tasks.load(file, train_rows=100, test_rows=10)
    assert (len(part.train), len(part.test)) == (100, 10)
    assert 30 < sum(part.train["labels"]) < 70  # not the beginning of a sorted file
    assert set(part.test["text"]) < set(first.test["text"])
    assert part.train[:] == tasks.load(file, train_rows=100).train[:]
    assert tasks.load(file, train_rows=10**6, test_rows=10**6).train[:] == first.train[:]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"train": [0, 1], "test": [1], "validation": [0]}, ["test"]),
        ({"train": [0, 1], "test": [-1, -1], "validation": [0]}, ["validation"]),  # a competition's
        ({"train": [0, 1], "test": None, "dev": [0]}, ["dev"]),
        ({"train-0": [0], "train-1": [1, 1], "test_1": [0], "test_2": [1]}, ["test_1", "test_2"]),
    ],
)
def test_folders(files: dict[str, list[int] | None], expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("about")
    for name, labels in files.items():
        columns: dict[str, list[Any]] = {"text": [f"{name} {i}" for i in range(len(labels or [0]))]}
        if labels is not None:
            columns["label"] = labels
        _json(tmp_path / f"{name}.jsonl", **columns)
    task = tasks.load(str(tmp_path))
    assert {text.split()[0] for text in task.test["text"]} == set(expected)
    assert {text.split()[0] for text in task.train["text"]} == {name for name in files if name.startswith("train")}


def test_folder_whose_test_rows_have_no_labels_and_nothing_else(tmp_path: Path) -> None:
    _json(tmp_path / "train.jsonl", text=_texts(20), label=[0, 1] * 10)
    _json(tmp_path / "test.jsonl", text=["unknown"], label=[-1])
    task = tasks.load(tmp_path)
    assert (len(task.train), len(task.test)) == (18, 2)


# ---- columns and labels


@pytest.mark.parametrize("columns", tasks.TEXT_COLUMNS)
def test_text_columns_are_found(columns: tuple[str, ...], tmp_path: Path) -> None:
    rows = {"idx": list(range(20)), "title": _texts(20)}
    rows |= {column: [f"{column} {i}" if i else "" for i in range(20)] for column in columns}
    task = tasks.load(_json(tmp_path / "a.jsonl", **rows, label=[0, 1] * 10))
    assert task.train.column_names == [*("text", "text_pair")[: len(columns)], "labels"]
    for ours, theirs in zip(("text", "text_pair"), columns, strict=False):
        assert sorted(_both(task, ours)) == sorted(f"{theirs} {i}" for i in range(1, 20))
    named = tasks.load(tmp_path / "a.jsonl", text_columns=["title"], label_column="idx")
    assert sorted(_both(named, "text")) == sorted(rows["title"])
    assert len(named.names) == 20


def test_pairs_with_an_empty_half_are_left_out(tmp_path: Path) -> None:
    rows = {"premise": ["a", "b", "", "d", None], "hypothesis": ["e", " ", "g", "h", "i"], "label": [0, 1, 0, 1, 0]}
    features = Features({"premise": Value("string"), "hypothesis": Value("string"), "label": Value("int64")})
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "train.parquet")
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "test.parquet")
    assert tasks.load(tmp_path).train[:] == {"text": ["a", "d"], "text_pair": ["e", "h"], "labels": [0, 1]}


@pytest.mark.parametrize(
    ("values", "kind", "names", "numbers"),
    [
        ([0, 1, 1], "classification", ("0", "1"), [0, 1, 1]),
        ([5, 3, 9], "classification", ("3", "5", "9"), [1, 0, 2]),
        (["yes", "no", "yes"], "classification", ("no", "yes"), [1, 0, 1]),
        ([True, False, True], "classification", ("False", "True"), [1, 0, 1]),
        ([0.5, -1.0, 3.25], "regression", (), [0.5, -1.0, 3.25]),
        ([[1, 0, 0], [1, 1, 0], [0, 0, 0]], "multi_label", ("0", "1", "2"), [[1, 0, 0], [1, 1, 0], [0, 0, 0]]),
        ([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], "multi_label", ("0", "1"), [[1, 0], [0, 0], [1, 1]]),
        ([[7], [3, 7], []], "multi_label", ("3", "7"), [[0, 1], [1, 1], [0, 0]]),
        ([["b"], ["b"], ["a"]], "multi_label", ("a", "b"), [[0, 1], [0, 1], [1, 0]]),
    ],
)
def test_labels(values: list[Any], kind: str, names: tuple[str, ...], numbers: list[Any], tmp_path: Path) -> None:
    for part in ("train", "test"):
        _json(tmp_path / f"{part}.jsonl", text=["a", "b", "c"], target=values)
    task = tasks.load(tmp_path)
    metric = {"classification": "accuracy", "regression": "pearson", "multi_label": "micro_f1"}[kind]
    assert (task.kind, task.names, task.metric) == (kind, names, metric)
    assert task.train["labels"] == task.test["labels"] == numbers
    batch = torch.tensor(task.train["labels"])
    assert batch.dtype == (torch.int64 if kind == "classification" else torch.float32)


def test_named_classes_in_lists(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "labels": List(ClassLabel(names=["joy", "fear", "anger"]))})
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "labels": [[0], [0, 2], [2]]}, features)
    for part in ("train", "test"):
        rows.to_parquet(tmp_path / f"{part}.parquet")
    task = tasks.load(tmp_path)
    assert task.names == ("joy", "fear", "anger")
    assert task.train["labels"] == [[1, 0, 0], [1, 0, 1], [0, 0, 1]]
    assert task.head["problem_type"] == "multi_label_classification"


def test_movie_reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"{i}\t{(-1) ** i * 1.5}\ttext {i}" for i in range(2100)]
    (tmp_path / "movie_reviews.tsv").write_text("\n".join(lines))
    monkeypatch.setattr(demo, "fetch", lambda package: tmp_path)
    task = tasks.load()
    train, test = demo.movie_reviews(tmp_path)
    assert (task.name, task.kind, task.names) == ("movie_reviews", "classification", ("negative", "positive"))
    for part, reviews in ((task.train, train), (task.test, test)):
        assert part["text"] == [review.text for review in reviews]
        assert part["labels"] == [review.label for review in reviews]
    assert (len(task.train), len(task.test)) == (100, 2000)


# ---- rows of numbers


def test_tokenize(tmp_path: Path) -> None:
    texts = ["w2 w3 w4 w5", "w6", "w7 w8"]
    for part in ("train", "test"):
        _json(
            tmp_path / f"{part}.jsonl", sentence1=texts, sentence2=["w9", "w10 w11 w12", "w13"], label=[2.5, 1.0, 0.0]
        )
    task = tasks.load(tmp_path)
    tokenizer = tiny_teacher.tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # as of BERT
    train, test = tasks.tokenize(task, tokenizer, 4)
    assert train["input_ids"] == test["input_ids"] == [[2, 3, 4, 9], [6, 10, 11, 12], [7, 8, 13]]
    assert train["labels"] == [2.5, 1.0, 0.0]
    assert sorted(train.column_names) == ["input_ids", "labels", "token_type_ids"]
    single = tasks.load(tmp_path, text_columns=["sentence1"])
    assert tasks.tokenize(single, tiny_teacher.TOKENIZER, 4)[0]["input_ids"] == [[2, 3, 4, 5], [6], [7, 8]]


@pytest.mark.parametrize(
    "labels",
    [[0, 1, 2] * 4, [0.5, 1.5, -2.0] * 4, [[1, 0, 0], [1, 1, 0], [0, 0, 1]] * 4, [["a"], ["b", "c"], ["c"]] * 4],
)
def test_models_take_the_rows_and_the_head(labels: list[Any], tmp_path: Path) -> None:
    task = tasks.load(_json(tmp_path / "a.jsonl", text=_texts(12), label=labels))
    rows, _ = tasks.tokenize(task, tiny_teacher.TOKENIZER, 8)
    model = tiny_teacher.bert(BertForSequenceClassification, **task.head)
    loader = DataLoader(rows, batch_size=11, collate_fn=DataCollatorWithPadding(tiny_teacher.TOKENIZER))
    (batch,) = loader
    answer = model(**batch)
    logits = answer.logits.squeeze(-1) if task.kind == "regression" else answer.logits
    loss = {
        "classification": torch.nn.functional.cross_entropy,
        "regression": torch.nn.functional.mse_loss,
        "multi_label": torch.nn.functional.binary_cross_entropy_with_logits,
    }[task.kind](logits, batch["labels"])
    torch.testing.assert_close(answer.loss, loss)
    assert all(0 <= abs(value) <= 1 for value in metrics.metrics(task.metric, answer.logits, batch["labels"]).values())


# ---- metrics, by hand


def _logits(predicted: list[int], classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predicted), classes) * 2.0 - 1.0


def test_accuracy() -> None:
    assert metrics.metrics("accuracy", _logits([2, 0, 1, 1], 3), torch.tensor([2, 1, 1, 1])) == {"accuracy": 0.75}


def test_f1_is_of_class_1() -> None:
    predicted, labels = [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]  # 2 found, 1 wrongly, 1 missed: 4 / (4 + 1 + 1)
    expected = {"f1": pytest.approx(2 / 3), "accuracy": pytest.approx(4 / 6)}
    assert metrics.metrics("f1", _logits(predicted, 2), torch.tensor(labels)) == expected
    assert metrics.metrics("f1", _logits([0, 0], 2), torch.tensor([0, 0])) == {"f1": 0.0, "accuracy": 1.0}


def test_matthews() -> None:
    # TP 2, TN 3, FP 1, FN 2: (2·3 - 1·2) / √(3·4·4·5)
    predicted, labels = [1, 1, 0, 0, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0, 1, 1]
    expected = {"matthews": pytest.approx(4 / 240**0.5), "accuracy": 5 / 8}
    assert metrics.metrics("matthews", _logits(predicted, 2), torch.tensor(labels)) == expected
    assert metrics.metrics("matthews", _logits([0, 1], 2), torch.tensor([1, 0]))["matthews"] == pytest.approx(-1)
    assert metrics.metrics("matthews", _logits([1, 1], 2), torch.tensor([1, 0]))["matthews"] == 0
    # Three classes (Gorodkin): (c·s - Σ p·t) / √((s² - Σp²)(s² - Σt²)) with s 4, c 3, p [1, 1, 2], t [1, 2, 1]
    three = metrics.metrics("matthews", _logits([0, 1, 2, 2], 3), torch.tensor([0, 1, 1, 2]))
    assert three["matthews"] == pytest.approx((3 * 4 - 5) / 10)


def test_correlations() -> None:
    # Deviations -2 -1 0 1 2 and -2 -1 -1 0 4: 13 / √(10·22). Ranks 1 to 5, and 1 2.5 2.5 4 5: 9.5 / √(10·9.5)
    logits, labels = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([0.0, 1.0, 1.0, 2.0, 6.0])
    expected = {"pearson": pytest.approx(13 / 220**0.5), "spearman": pytest.approx(9.5 / 95**0.5)}
    assert metrics.metrics("pearson", logits[:, None], labels) == expected
    assert metrics.metrics("pearson", logits, logits.exp())["spearman"] == pytest.approx(1)
    assert metrics.metrics("pearson", torch.ones(5), labels) == {"pearson": 0.0, "spearman": 0.0}


def test_multi_label_metrics() -> None:
    logits = torch.tensor([[1.0, -1.0, 2.0], [-1.0, 1.0, 1.0], [-1.0, -2.0, -3.0]])
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    # 3 found, 1 wrongly, 1 missed; the first row is right as a whole.
    expected = {"micro_f1": pytest.approx(6 / 8), "exact_match": pytest.approx(1 / 3)}
    assert metrics.metrics("micro_f1", logits, labels) == expected


def test_unknown_metric() -> None:
    known = "accuracy, f1, matthews, micro_f1, pearson"
    with pytest.raises(TaskError, match=re.escape(f"tasks: metric: expected one of {known}, got 'bleu'")):
        metrics.metrics("bleu", torch.zeros(2, 2), torch.zeros(2))
