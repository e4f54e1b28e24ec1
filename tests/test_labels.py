"""What labels are taken for, classes that are matched with a teacher's, and rows that are left out: told, decided or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import call, refused
from transformers import AutoModelForSequenceClassification
from word_classifiers import bert, run, save, tokenizer, write_reviews

from kdfast.data import metrics, tasks
from kdfast.data.tasks import TaskError
from kdfast.models import pairing
from kdfast.objective import Hinton
from kdfast.recipes import hinton
from kdfast.results import measure
from kdfast.runs import stages
from kdfast.train.trainer import DistillationTrainer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def _names(*names: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def _json(path: Path, labels: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"text": f"w{i}", "label": label}) + "\n" for i, label in enumerate(labels)))
    return path


# ---- kinds
GUESS = "labels 0.0, 1.0, 2.0 are decimal numbers: a regression; kind classification makes classes of them"


@pytest.mark.parametrize(
    ("labels", "kind", "expected"),
    [
        ([0.0, 2.0, 1.0, 1.0], None, ("regression", (), [0, 2, 1, 1], (GUESS,))),
        ([0.0, 2.0, 1.0, 1.0], "regression", ("regression", (), [0, 2, 1, 1], ())),
        ([0.0, 2.0, 1.0, 1.0], "classification", ("classification", ("0", "1", "2"), [0, 2, 1, 1], ())),
        ([0.5, 2.0, 1.0, 1.0], None, ("regression", (), [0.5, 2, 1, 1], ())),
        ([1, -1, 0, 2], "regression", ("regression", (), [1, -1, 0, 2], ())),
        ([3, 5, 3, 5], "classification", ("classification", ("3", "5"), [0, 1, 0, 1], ())),
        ([[1, 0], [0, 1], [1, 1], [0, 0]], "multi_label", ("multi_label", ("0", "1"), [[1, 0], [0, 1], [1, 1], [0, 0]], ())),
    ],
)  # fmt: skip
def test_kinds(labels: list[Any], kind: str | None, expected: tuple[Any, ...], tmp_path: Path) -> None:
    for part in ("train", "test"):
        _json(tmp_path / f"{part}.jsonl", labels)
    task = tasks.load(tmp_path, kind=kind)
    assert (task.kind, task.names, list(task.train["labels"]), task.notes) == expected
    assert task.test["labels"] == task.train["labels"]
    assert task.metric == metrics.METRICS[task.kind]


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ([0, 1], "classes", "kind: expected one of classification, regression, multi_label, got 'classes'"),
        (["a", "b"], "regression", r"label_column: expected a number of each row in .* \(kind regression\), got str"),
        ([[1, 0], [0, 1]], "classification", r"label_column: expected a class of each row in .*, got lists"),
        ([[1, 0], [0, 1]], "regression", r"label_column: expected a number of each row in .*, got lists"),
        ([0, 1], "multi_label", r"label_column: expected lists of classes, or of a 0 or 1 for each, in .*, got int"),
        ([0.5, 1.0], "classification", "label_column: expected labels that are integers, .*, got float"),
        ([1.0, -1.0, None], "regression", r"source: expected labels .*, got 1 rows without"),
        ([1, 1, 1], None, "source: expected more than one label in the training rows of .*, got label 1"),
        (["good", "good"], None, "source: expected more than one label in .*, got label good"),
        ([7.0, 7.0], "classification", "source: expected more than one label in .*, got label 7"),
    ],
)
def test_labels_that_are_not_of_the_kind(labels: list[Any], kind: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=f"^tasks: {message}"):
        tasks.load(_json(tmp_path / "a.jsonl", labels), kind=kind)


def test_as_many_classes_as_rows_where_that_is_sure(tmp_path: Path) -> None:
    for part in ("train", "test"):
        _json(tmp_path / f"{part}.jsonl", list(range(30)))
    with pytest.raises(
        TaskError, match=r"decimal numbers, or kind to say what they are, in .*, got 30 different labels"
    ):
        tasks.load(tmp_path)
    assert tasks.load(tmp_path, kind="classification").names == tuple(map(str, range(30)))
    assert list(tasks.load(tmp_path, kind="regression").train["labels"]) == list(range(30))


def test_texts_among_the_numbers_of_test_rows(tmp_path: Path) -> None:
    _json(tmp_path / "train.jsonl", [0.5, 1.5])
    _json(tmp_path / "test.jsonl", ["high", "low"])
    with pytest.raises(TaskError, match=r"expected test labels of .* among numbers, got high, low"):
        tasks.load(tmp_path)


def test_kind_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_reviews(tmp_path / "reviews.csv", labels=(0.0, 1.0))
    model, regressor = save(tmp_path / "model", bert(0)), save(tmp_path / "regressor", bert(0, num_labels=1))
    output = tmp_path / "out.json"
    command = ["evaluate", "--data", data, "--max-length", 16, "--output", output]
    assert call(monkeypatch, *command, regressor) == 0
    assert "labels 0.0, 1.0 are decimal numbers: a regression; kind classification makes" in capsys.readouterr().out
    assert json.loads(output.read_text())["task"]["kind"] == "regression"
    assert call(monkeypatch, *command, model, "--kind", "classification") == 0
    assert "decimal" not in capsys.readouterr().out
    assert json.loads(output.read_text())["task"]["kind"] == "classification"
    assert "kind: expected one of classification, regression, multi_label" in refused(
        monkeypatch, capsys, *command, model, "--kind", "classes"
    )
    distill = ["distill", "hinton", "--data", data, "--teacher", model, "--output", tmp_path / "run"]
    wrong = refused(monkeypatch, capsys, *distill, "--kind", "classes")
    assert "kind: expected one of classification, regression, multi_label, got classes" in wrong


def test_a_run_tells_and_keeps_its_kind(tmp_path: Path) -> None:
    data = write_reviews(tmp_path / "reviews.csv", labels=(1.0, 2.0))
    recipe = hinton.Recipe(
        data=data, kind="classification", teacher=save(tmp_path / "teacher", bert(0)), max_length=16, epochs=1
    )
    results, shown = run(tmp_path / "run", recipe)
    assert "54 training rows, 6 test rows, held out of the file's; 2 classes\n" in shown
    assert (
        "the data's classes are matched with those of the teacher by their numbers alone: 1 = LABEL_0, 2 = LABEL_1"
        in shown
    )
    assert "accuracy" in results["student"]
    assert hinton.Recipe.read_yaml(tmp_path / "run" / "config.yaml")["kind"] == "classification"


# ---- classes of models
def test_classes_that_only_numbers_match() -> None:
    def told(data: tuple[str, ...], *names: str) -> str | None:
        return pairing.matched_by_number("it", bert(0, **_names(*names)).config, data)

    assert told(("negative", "positive"), "NEGATIVE", "Positive") is None
    assert told(("0", "1"), "LABEL_0", "LABEL_1") is None
    assert told(("0", "1"), "0", "1") is None
    assert told((), "LABEL_0") is None  # a regression
    numbers = "the data's classes are matched with those of it by their numbers alone: "
    assert told(("0", "1"), "POSITIVE", "NEGATIVE") == numbers + "0 = POSITIVE, 1 = NEGATIVE"
    assert told(("neg", "pos"), "LABEL_0", "LABEL_1") == numbers + "neg = LABEL_0, pos = LABEL_1"
    assert told(("1", "2"), "LABEL_0", "LABEL_1") == numbers + "1 = LABEL_0, 2 = LABEL_1"
    assert told(tuple("abcde"), *"vwxyz") == numbers + "a = v, b = w, c = x, d = y, …"


def test_integers_beside_a_teacher_with_names_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_reviews(tmp_path / "reviews.csv")
    teacher = save(tmp_path / "teacher", bert(0, **_names("POSITIVE", "NEGATIVE")))
    matched = "by their numbers alone: 0 = POSITIVE, 1 = NEGATIVE"
    with pytest.warns(UserWarning, match=f"those of it {teacher} {matched}"):
        measure.evaluate({"it": teacher}, tasks.load(data), max_length=16)
    assert call(monkeypatch, "evaluate", teacher, "--data", data, "--max-length", 16) == 0
    assert f"classes are matched with those of {teacher} {matched}\n" in capsys.readouterr().out
    recipe = hinton.Recipe(data=data, teacher=teacher, max_length=16, epochs=1, baseline=False)
    _, shown = run(tmp_path / "run", recipe)
    assert f"classes are matched with those of the teacher {matched}\n" in shown
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student")
    assert student.config.id2label == {0: "POSITIVE", 1: "NEGATIVE"}


def test_opposite_classes_are_refused_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "train_stage", lambda *a: pytest.fail("trained"))
    student, teacher = bert(0, **_names("NEG", "pos")), bert(1, **_names("POS", "NEG"))
    expected = r"expected the classes \(id2label of its config\) in the teacher's order, pos, neg, got neg, pos"
    with pytest.raises(ValueError, match=f"^DistillationTrainer: model: {expected}$"):
        DistillationTrainer(student, teacher=teacher, objective=Hinton())
    DistillationTrainer(bert(0), teacher=teacher, objective=Hinton())  # LABEL_0 says nothing
    DistillationTrainer(bert(0, **_names("neg", "other")), teacher=teacher, objective=Hinton())
    data = write_reviews(tmp_path / "reviews.csv")  # whose classes are numbers
    sources = {"student": save(tmp_path / "student", student), "teacher": save(tmp_path / "teacher", teacher)}
    with pytest.raises(ValueError, match=f"^student {sources['student']}: {expected}$"):
        measure.evaluate(sources, tasks.load(data), max_length=16, teacher="teacher", tell=str)
    with pytest.raises(ValueError, match=f"^student {sources['student']}: {expected}$"):
        run(tmp_path / "run", hinton.Recipe(data=data, **sources, max_length=16))
    # A base or a student that has no classifier of the data's, or one with its classes turned.
    named = write_reviews(tmp_path / "named.csv", labels=("neg", "pos"))
    for argument in ("base", "student"):
        given = {argument: save(tmp_path / "turned", teacher, tokenizer())}
        other = {"base": save(tmp_path / "other", bert(2))} if argument == "student" else {}
        with pytest.raises(
            ValueError, match=f"^{argument} .*turned: expected the classes in the data's order, neg, pos, got pos, neg$"
        ):
            run(tmp_path / "run", hinton.Recipe(data=named, **given, **other, max_length=16))
    assert not (tmp_path / "run").exists()


# ---- rows
def test_rows_that_are_left_out_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "reviews"
    folder.mkdir()
    for part, empty in (("train", [",1", "  ,0", ",0"]), ("test", [",1"])):
        write_reviews(folder / f"{part}.csv", rows=2000 if part == "train" else 60)
        with (folder / f"{part}.csv").open("a") as file:
            file.write("\n" + "\n".join(empty))
    task = tasks.load(folder)
    assert (len(task.train), len(task.test)) == (2000, 60)
    assert task.notes == (
        "3 of 2,003 training rows have no text and are left out",
        "1 of 61 test rows have no text and are left out",
    )
    assert call(monkeypatch, "evaluate", save(tmp_path / "model", bert(0)), "--data", folder, "--max-length", 16) == 0
    shown = capsys.readouterr().out
    for note in task.notes:
        assert f"{note}\n" in shown


def test_teacher_has_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    data = write_reviews(tmp_path / "reviews.csv")
    base = save(tmp_path / "base", bert(0))
    peaks: dict[float | None, dict[str, float]] = {}
    for rate in (None, 3e-5):
        recipe = hinton.Recipe(
            data=data, base=base, teacher_learning_rate=rate, learning_rate=1e-3, batch_size=4, max_length=16, epochs=1
        )
        run(tmp_path / str(rate), recipe)
        peaks[rate] = {
            stage: max(event.get("learning_rate", 0.0) for event in stages.finished(tmp_path / str(rate) / stage) or [])
            for stage in ("teacher", "student")
        }
    assert peaks[None]["teacher"] == pytest.approx(1e-3, rel=0.5)
    assert peaks[3e-5]["teacher"] == pytest.approx(peaks[None]["teacher"] * 0.03)
    assert peaks[3e-5]["student"] == peaks[None]["student"]
    with pytest.raises(ValueError, match=r"teacher_learning_rate: expected above 0 and below 1, got 1\.5"):
        hinton.Recipe(teacher_learning_rate=1.5)
    with pytest.raises(
        ValueError,
        match="teacher_learning_rate: expected none beside teacher, as it is of one that is fine-tuned here, got",
    ):
        hinton.Recipe(teacher="of-my-own", teacher_learning_rate=1e-4)
