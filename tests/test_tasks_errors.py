"""Labelled text: names, files and labels that are refused, and datasets on the Hub, which is played."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from kdfast import tasks
from kdfast.tasks import TaskError


@pytest.fixture(autouse=True)
def _no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and a `datasets` cache that is empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def _json(path: Path, **columns: list[Any]) -> Path:
    rows = zip(*columns.values(), strict=True)
    path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"body": ["a", "b"], "label": [0, 1]}, {}, "text_columns: expected text, sentence1\\+sentence2, .*, got columns body, label"),
        ({"text": ["a", "b"], "class": [0, 1]}, {}, "label_column: expected label or labels or target or score in .*, got columns text, class"),
        ({"text": ["a", "b"], "label": [0, 1]}, {"text_columns": ["text", "b"]}, "text_columns: expected text, b in .*, got columns text, label"),
        ({"text": ["a", "b"], "label": [0, 1]}, {"text_columns": "text"}, "text_columns: expected a list of one name, .*, got 'text'"),
        ({"text": ["a", "b"], "label": [0, 1]}, {"label_column": "y"}, "label_column: expected y in .*, got columns text, label"),
        ({"text": ["a", "b"], "label": [0, 1]}, {"train_rows": 0}, "train_rows: expected at least 1, got 0"),
        ({"text": [1, 2], "label": [0, 1]}, {}, "text_columns: expected texts in column text of .*, got int64"),
        ({"text": ["a", "b", "c"], "label": [0, -1, 1]}, {}, r"source: expected labels \(not -1\) in column label of the training rows of .*, got 1 rows without"),
        ({"text": ["a", "b"], "label": [0, None]}, {}, "source: expected labels .*, got 1 rows without"),
        ({"text": ["a", "b"], "label": [[0], [-1]]}, {}, "source: expected labels .*, got 1 rows without"),
        ({"text": ["a", "b"], "label": [[], []]}, {}, "label_column: expected labels that are integers, .*, got empty lists"),
        ({"text": ["a", "b"], "label": [{"a": 1}, {"a": 2}]}, {}, "label_column: expected labels that are integers, .*, got dict"),
        ({"text": ["a", "b", "c"], "label": [1, 1, 1]}, {}, "source: expected more than one label in the training rows of .*, got label 1"),
        ({"text": ["", " "], "label": [0, 1]}, {}, "source: expected text in text of .*, got none"),
        ({"text": ["a", " "], "label": [0, 1]}, {}, "source: expected at least 2 rows with text in .*, got 1"),
    ],
)  # fmt: skip
def test_mistakes_are_named(
    columns: dict[str, list[Any]], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TaskError, match=f"^tasks: {message}"):
        tasks.load(_json(tmp_path / "a.jsonl", **columns), **options)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0, 1], [0, 2], "test labels of .* among 0, 1, got 2"),
        (["a", "b"], [0, 1], "test labels of .* among a, b, got 0, 1"),
        ([[1, 0], [0, 1]], [[1, 0, 1], [1, 1, 1]], r"test labels of .* among 0, 1, got \[1, 0, 1\], \[1, 1, 1\]"),
        (["a", "b"], ["a", None], r"labels \(not -1\) in column label of the test rows of .*, got 1 rows without"),
    ],
)
def test_other_labels_for_test_than_for_training(
    train: list[Any], test: list[Any], message: str, tmp_path: Path
) -> None:
    _json(tmp_path / "train.jsonl", text=["a", "b"], label=train)
    _json(tmp_path / "test.jsonl", text=["a", "b"], label=test)
    with pytest.raises(TaskError, match=f"^tasks: source: expected {message}"):
        tasks.load(tmp_path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": [')
    (tmp_path / "a.docx").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    for name in ("train.csv", "test.tsv"):
        (tmp_path / "mixed" / name).write_text("text\n")
    for name, message in {
        "none.csv": "a file .*none.csv, got none",
        "none": "a file .*none, got none",
        "a.docx": r"a file that ends in \.txt, .*, got .*a.docx",
        "a.jsonl": "rows that `datasets` can read in .*a.jsonl, got JSON parse error",
        "empty": "files in .*empty that begin with train, .*, got none",
        "mixed": r"files of one kind in .*mixed, got \.csv, \.tsv",
    }.items():
        with pytest.raises(TaskError, match=f"^tasks: source: expected {message}"):
            tasks.load(tmp_path / name)


@pytest.mark.parametrize("source", ["sst2", "imdb", "org/name:config"])
def test_hub_name_without_network(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = r"a name on the Hub, which needs a network or that it was loaded here before, got '.*' and no answer"
    for offline, reason in ((True, "offline mode is enabled"), (False, "Name or service|[Cc]onnect|refused")):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://localhost:9")
        start = time.perf_counter()
        with pytest.raises(TaskError, match=f"{expected}.*({reason})"):
            tasks.load(source)
        assert time.perf_counter() - start < 10  # load_dataset alone takes half a minute
    assert datasets.config.HF_HUB_OFFLINE is False


def test_name_that_is_none() -> None:
    with pytest.raises(
        TaskError, match="expected a file, a folder or a dataset on the Hub, got 'a/b/c', which is none"
    ):
        tasks.load("a/b/c")


class _Hub:
    """Answers for the Hub: a dataset of some splits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, features: Features, **splits: dict[str, list[Any]]) -> None:
        self.asked: list[Any] = []
        self.splits = DatasetDict({part: Dataset.from_dict(rows, features) for part, rows in splits.items()})
        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda api, name, timeout: None)
        monkeypatch.setattr("datasets.load_dataset", self.load)

    def load(self, name: str, config: str | None) -> DatasetDict:
        self.asked.append((name, config))
        return self.splits


@pytest.mark.parametrize(
    ("name", "pair", "classes", "metric"),
    [
        ("sst2", ("sentence",), ["negative", "positive"], "accuracy"),
        ("mrpc", ("sentence1", "sentence2"), ["not_equivalent", "equivalent"], "f1"),
        ("qqp", ("question1", "question2"), ["not_duplicate", "duplicate"], "f1"),
        ("qnli", ("question", "sentence"), ["entailment", "not_entailment"], "accuracy"),
        ("cola", ("sentence",), ["unacceptable", "acceptable"], "matthews"),
        ("stsb", ("sentence1", "sentence2"), None, "pearson"),
    ],
)
def test_glue(
    name: str, pair: tuple[str, ...], classes: list[str] | None, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GLUE is on the Hub: an index, and test rows with labels of -1, but mrpc's."""
    label, absent = (Value("float32"), -1.0) if classes is None else (ClassLabel(names=classes), -1)
    features = Features({**{column: Value("string") for column in pair}, "label": label, "idx": Value("int32")})

    def rows(part: str, labels: list[Any]) -> dict[str, list[Any]]:
        return {column: [f"{part} {column}"] * 3 for column in pair} | {"label": labels, "idx": [0, 1, 2]}

    numbers = [0, 1, 1] if classes else [0.0, 2.5, 5.0]
    hub = _Hub(
        monkeypatch,
        features,
        train=rows("train", numbers),
        validation=rows("validation", numbers[::-1]),
        test=rows("test", numbers if name == "mrpc" else [absent] * 3),
    )
    task = tasks.load(name)
    assert hub.asked == [("nyu-mll/glue", name)]
    assert (task.name, task.metric, task.names) == (name, metric, tuple(classes or ()))
    assert task.test[0]["text"] == f"validation {pair[0]}"
    assert task.test["labels"] == numbers[::-1]
    assert ("text_pair" in task.test.column_names) == (len(pair) == 2)
    assert "idx" not in task.train.column_names
    if classes is None:
        assert task.head == {"num_labels": 1, "problem_type": "regression"}


def test_mnli_is_tested_on_the_matched_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ClassLabel(names=["entailment", "neutral", "contradiction"])
    features = Features({"premise": Value("string"), "hypothesis": Value("string"), "label": names})
    labels = {"train": [0, 1, 2], "validation_matched": [0, 1, 1], "validation_mismatched": [2, 2, 2]}
    labels |= {"test_matched": [-1] * 3, "test_mismatched": [-1] * 3}
    _Hub(
        monkeypatch,
        features,
        **{p: {"premise": [p] * 3, "hypothesis": [p] * 3, "label": of} for p, of in labels.items()},
    )
    assert set(tasks.load("mnli").test["text"]) == {"validation_matched"}


def test_other_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = {"text": ["a", "b"], "label": [0, 1]}
    hub = _Hub(monkeypatch, features, train=rows, test=rows, unsupervised={"text": ["c"], "label": [-1]})
    for source in ("imdb", "org/name", "org/name:plain"):
        assert tasks.load(source).names == ("neg", "pos")
    assert hub.asked == [("imdb", None), ("org/name", None), ("org/name", "plain")]
    hub.splits.pop("train")
    with pytest.raises(TaskError, match="expected a split train in imdb, got test, unsupervised"):
        tasks.load("imdb")


def test_dataset_that_was_loaded_before_needs_no_network(tmp_path: Path) -> None:
    """As `datasets` leaves one in its cache, under the name of the Hub."""
    file = _json(tmp_path / "toy.jsonl", text=[f"text {i}" for i in range(20)], label=[0, 1] * 10)
    datasets.load_dataset("json", data_files=str(file))
    (built,) = (tmp_path / "datasets" / "json").glob("*/*/*/")
    cached = tmp_path / "datasets" / "org___toy" / "default" / "0.0.0" / built.name
    cached.parent.mkdir(parents=True)
    built.rename(cached)
    (cached / "json-train.arrow").rename(cached / "toy-train.arrow")
    information = json.loads((cached / "dataset_info.json").read_text())
    (cached / "dataset_info.json").write_text(json.dumps({**information, "dataset_name": "toy"}))
    task = tasks.load("org/toy")
    assert (len(task.train), len(task.test)) == (18, 2)
