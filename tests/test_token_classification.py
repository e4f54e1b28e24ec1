"""A class for each word: rows out of words, names in texts, and the recipe from end to end on tiny models."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command_line import call, refused, width
from datasets import ClassLabel, Dataset, Features, List, Value
from quantised import LIBRARIES, check_run
from rich.console import Console
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertTokenizer,
)

from kdfast import runs
from kdfast.data import words
from kdfast.data.text import OFF
from kdfast.recipes import token_classification
from kdfast.results.compare import compare
from kdfast.runs import stages
from kdfast.runs.token_classification import TokenClassificationRun

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ada", "bo", "##b", "lives", "in", "rome", "and", "oslo"]
NAMES = ["O", "B-PER", "I-PER", "B-LOC"]
CLASSES = {name: number for number, name in enumerate(NAMES)}
TAGS = {"ada": "B-PER", "bobb": "I-PER", "rome": "B-LOC", "oslo": "B-LOC"}


def sentence(i: int) -> list[str]:
    return [
        *["ada", "bobb"][: 1 + i % 2],
        "lives",
        "in",
        ["rome", "oslo"][i % 3 % 2],
        *["and", "oslo"][: 2 * (i % 4 == 0)],
    ]


def rows(count: int) -> list[dict[str, Any]]:
    return [{"tokens": sentence(i), "ner_tags": [TAGS.get(word, "O") for word in sentence(i)]} for i in range(count)]


def saved(folder: Path, layers: int, seed: int, names: list[str] = NAMES) -> Path:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": len(VOCABULARY)}
    config = BertConfig(num_hidden_layers=layers, id2label=dict(enumerate(names)), initializer_range=0.3, **sizes)
    BertForTokenClassification(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return folder


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> token_classification.Recipe:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows(60))))
    return token_classification.Recipe(
        data=str(tmp_path / "rows.jsonl"),
        teacher=str(saved(tmp_path / "teacher", layers=3, seed=0)),
        max_length=16,
        epochs=4,
        learning_rate=5e-3,
        precision="float32",
    )


def tokenizer(folder: Path) -> Any:
    return BertTokenizer.from_pretrained(saved(folder / "words", layers=1, seed=0))


# ---- rows ----
def test_a_word_has_its_label_at_its_first_token(tmp_path: Path) -> None:
    made = words.rows(Dataset.from_list(rows(2)), CLASSES, tokenizer(tmp_path), 16)
    assert made[0] == {"input_ids": [2, 5, 8, 9, 10, 11, 12, 3], "labels": [OFF, 1, 0, 0, 3, 0, 3, OFF]}
    assert made[1] == {"input_ids": [2, 5, 6, 7, 7, 8, 9, 12, 3], "labels": [OFF, 1, 2, OFF, OFF, 0, 0, 3, OFF]}
    cut = words.rows(Dataset.from_list(rows(2)), CLASSES, tokenizer(tmp_path), 8)
    assert cut[1]["labels"] == [OFF, 1, 2, OFF, OFF, 0, 0, OFF]


def test_labels_are_the_models_by_their_names(tmp_path: Path) -> None:
    turned = ["B-LOC", "O", "B-PER", "I-PER"]
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=turned))})
    part = Dataset.from_list(rows(1), features)
    assert part[0]["ner_tags"][0] == 2
    made = words.rows(part, CLASSES, tokenizer(tmp_path), 16)
    assert made[0]["labels"][1:5] == [1, 0, 0, 3]
    plain = Dataset.from_dict({"words": [["ada", "in"], []], "tags": [[1, 0], []]})
    assert [row["labels"] for row in words.rows(plain, CLASSES, tokenizer(tmp_path), 16)] == [[OFF, 1, 0, OFF]]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"words": ["ada"], "tags": ["B-ORG"]}, "expected the teacher's labels, O, B-PER, I-PER, B-LOC, got B-ORG"),
        ({"words": ["ada"], "tags": [7]}, "expected the teacher's labels, .*, got 7"),
        (
            {"words": ["ada", "in"], "tags": ["O"]},
            "expected a list of words and one of as many labels .*, got 2: \\['ada', 'in'\\] and 1: \\['O'\\]",
        ),
        ({"text": "ada", "tags": ["O"]}, "expected a column tokens or words, got columns text, tags"),
    ],
)
def test_rows_that_do_not_fit(row: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=expected):
        words.rows(Dataset.from_list([row]), CLASSES, tokenizer(tmp_path), 16)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-A I-A O", [("A", 1, 3)]),
        ("B-A B-A I-A", [("A", 0, 1), ("A", 1, 3)]),
        ("I-A I-B O I-B", [("A", 0, 1), ("B", 1, 2), ("B", 3, 4)]),
        ("S-A B-B E-B I-B", [("A", 0, 1), ("B", 1, 3), ("B", 3, 4)]),
        ("O O", []),
    ],
)
def test_names_in_tags(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert words.entities(tags.split()) == expected


def test_quality() -> None:
    right = [["B-A", "I-A", "O"], ["B-B", "O"]]
    assert words.quality(right, right) == {"f1": 1.0, "accuracy": 1.0}
    found = words.quality([["B-A", "O", "O"], ["B-B", "B-B"]], right)  # one of three is right, of two that there are
    assert found == {"f1": pytest.approx(2 / 5), "accuracy": pytest.approx(3 / 5)}
    assert words.quality([["NOUN", "VERB"]], [["NOUN", "NOUN"]]) == {"accuracy": 0.5}


# ---- the recipe ----
def test_student_comes_closer_to_the_teacher(recipe: token_classification.Recipe, tmp_path: Path) -> None:
    shown = io.StringIO()
    results = runs.run(recipe, tmp_path / "run", Console(file=shown, width=100))
    assert results["teacher"]["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert results["student"]["kl_to_teacher"] < 0.5 * results["start"]["kl_to_teacher"]
    assert "student, distilled" in shown.getvalue()
    assert {"f1", "accuracy", "tokens_per_second"} <= results["student"].keys()
    student = AutoModelForTokenClassification.from_pretrained(tmp_path / "run" / "student")
    assert student.config.num_hidden_layers == 2  # 0 and 2 of three
    assert list(student.config.id2label.values()) == NAMES
    stored = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert stored["task"]["metric"] == "f1"
    assert stored["models"] == results
    compared = compare([tmp_path / "run"])
    assert [row.values["f1"] for row in compared.rows]
    again = io.StringIO()
    assert runs.run(recipe, tmp_path / "run", Console(file=again, width=100)) == results


def test_measured_as_plain_torch_does(recipe: token_classification.Recipe, tmp_path: Path) -> None:
    run = TokenClassificationRun(recipe, tmp_path / "run", Console(file=io.StringIO()))
    run.prepare()
    found = run.quality({"teacher": run.teacher, "start": run.start})["start"]
    hits, words_, apart = 0, 0, 0.0
    for row in run.test:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            s, t = (model(input_ids=ids).logits[0].double().log_softmax(-1) for model in (run.start, run.teacher))
        on = labels != OFF
        hits, words_ = hits + int((s.argmax(-1) == labels)[on].sum()), words_ + int(on.sum())
        apart += F.kl_div(s[on], t[on], log_target=True, reduction="sum").item()
    assert found["accuracy"] == pytest.approx(hits / words_)
    assert found["kl_to_teacher"] == pytest.approx(apart / words_, rel=1e-4)


def test_student_of_ones_own(recipe: token_classification.Recipe, tmp_path: Path) -> None:
    """An encoder without a head, whose classes become the teacher's."""
    own = saved(tmp_path / "own", layers=1, seed=3)
    AutoModelForTokenClassification.from_pretrained(own).bert.save_pretrained(own)
    short = dataclasses.replace(recipe, student=str(own), epochs=2, tokens="all")
    results = runs.run(short, tmp_path / "run", Console(file=io.StringIO()))
    assert results["student"]["kl_to_teacher"] < results["start"]["kl_to_teacher"]


def test_classes_of_a_student_take_the_teachers_order(recipe: token_classification.Recipe, tmp_path: Path) -> None:
    own = saved(tmp_path / "own", layers=1, seed=3, names=NAMES[::-1])
    run = TokenClassificationRun(dataclasses.replace(recipe, student=str(own)), tmp_path / "run", Console())
    run.prepare()
    ids = torch.tensor([[2, 5, 8, 3]])
    with torch.no_grad():
        expected = AutoModelForTokenClassification.from_pretrained(own)(ids).logits.flip(-1)
        assert torch.equal(run.start(ids).logits, expected)
    assert list(run.start.config.id2label.values()) == NAMES


def test_student_of_other_classes(recipe: token_classification.Recipe, tmp_path: Path) -> None:
    own = saved(tmp_path / "own", layers=1, seed=3, names=[*NAMES, "B-ORG"])
    run = TokenClassificationRun(dataclasses.replace(recipe, student=str(own)), tmp_path / "run", Console())
    with pytest.raises(ValueError, match=r"expected classifier.bias of \[4\], for .* 4 classes, got \[5\]$") as refusal:
        run.prepare()
    assert str(refusal.value).startswith(f"student {own}: ")


def test_tables(recipe: token_classification.Recipe, tmp_path: Path) -> None:
    """Their words and labels are divided by spaces."""
    with (tmp_path / "rows.csv").open("w") as file:
        written = csv.writer(file)
        written.writerow(["words", "tags"])
        written.writerows([" ".join(row["tokens"]), " ".join(row["ner_tags"])] for row in rows(60))
    of_lists, of_texts = (
        TokenClassificationRun(dataclasses.replace(recipe, data=str(tmp_path / name)), tmp_path / "run", Console())
        for name in ("rows.jsonl", "rows.csv")
    )
    for run in (of_lists, of_texts):
        run.prepare()
    assert of_texts.train == of_lists.train
    assert any(label not in (OFF, 0) for label in of_texts.train[0]["labels"])


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"data": None}, "data: expected labelled rows, a file, a folder or a Hub name, got none"),
        ({"teacher": None}, "teacher: expected a token classifier, a folder or Hub name, got none"),
        ({"tokens": "some"}, "tokens: expected one of labels, all, got some"),
        ({"alpha": 2.0}, "alpha: expected 0 to 1, got 2.0"),
        ({"word_column": "text"}, "data: expected a column text, got columns tokens, ner_tags"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes(wrong: dict[str, Any], expected: str, recipe: token_classification.Recipe, tmp_path: Path) -> None:
    def prepare() -> None:
        changed = dataclasses.replace(recipe, **wrong)
        TokenClassificationRun(changed, tmp_path / "run", Console(file=io.StringIO())).prepare()

    with pytest.raises(ValueError, match=expected):
        prepare()


def test_teacher_of_whole_sequences_is_refused(recipe: token_classification.Recipe, tmp_path: Path) -> None:
    """Its head has the same names."""
    model = AutoModelForTokenClassification.from_pretrained(str(recipe.teacher))
    other = BertForSequenceClassification(model.config)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(str(recipe.teacher)).save_pretrained(tmp_path / "other")
    wrong = dataclasses.replace(recipe, teacher=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="expected a token classifier, got BertForSequenceClassification"):
        runs.run(wrong, tmp_path / "run", Console(file=io.StringIO()))


# ---- the baseline, and models that are there already ----
QUALITY = ("f1", "accuracy", "kl_to_teacher")


def test_baseline_has_the_labels_alone(recipe: token_classification.Recipe, tmp_path: Path) -> None:
    """As the same student has where the teacher's term weighs nothing."""
    alone = dataclasses.replace(recipe, alpha=0.0, epochs=1, baseline=True)
    results = runs.run(alone, tmp_path / "run", Console(file=io.StringIO()))
    assert list(results) == ["teacher", "start", "labels_only", "student"]
    start, baseline, student = ([results[name][of] for of in QUALITY] for name in ("start", "labels_only", "student"))
    assert baseline == pytest.approx(student, rel=1e-5)
    assert baseline[2] != start[2]
    history = stages.finished(tmp_path / "run" / "labels_only") or []
    assert any("ce" in event for event in history)
    assert not any("kl" in event for event in history)


def test_a_run_of_before_a_setting_came_has_its_default(recipe: token_classification.Recipe, tmp_path: Path) -> None:
    stages.write_config(tmp_path, {name: of for name, of in recipe.as_dict().items() if name != "baseline"})
    stages.check_run_folder(tmp_path, recipe)
    with pytest.raises(ValueError, match=r"baseline: expected False, as the run in the output folder .* has, got True"):
        stages.check_run_folder(tmp_path, dataclasses.replace(recipe, baseline=True))


def test_evaluate(
    recipe: token_classification.Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, output = tmp_path / "run", tmp_path / "out.json"
    results = runs.run(dataclasses.replace(recipe, epochs=2, baseline=True), run, Console(width=200))
    alone, student = results["labels_only"], results["student"]
    gain = student["f1"] - alone["f1"]
    assert student["kl_to_teacher"] < alone["kl_to_teacher"]
    assert f"on the labels alone {100 * alone['f1']:.1f} % ({100 * gain:+.1f} points)" in capsys.readouterr().out
    differences = {row.name: row.differences for row in compare([run]).rows}
    assert differences == {
        "teacher": [],
        "run/start": [],
        "run/labels_only": [],
        "run/student": [pytest.approx(gain)],
    }

    assert call(monkeypatch, "evaluate", run, "--output", output) == 0
    shown = capsys.readouterr().out
    assert width(shown) <= 80
    assert "rows.jsonl: on 6 test rows" in shown
    stored = json.loads(output.read_text())
    task = {"data": recipe.data, "kind": "token-classification", "metric": "f1", "rows": 6, "max_length": 16}
    assert stored["task"] == task
    titles = {"teacher": "teacher", "labels_only": "student, labels alone", "student": "student, distilled"}
    assert list(stored["models"]) == [*titles.values()]
    for name, title in titles.items():
        measured = stored["models"][title]
        own = {key: measured[key] for key in (*QUALITY, "parameters")}
        assert own == pytest.approx({key: results[name][key] for key in own}, rel=1e-5, abs=1e-6)
        assert measured["gflop"] > 0
        assert measured["latency_ms_batch_32"] > 0
    assert call(monkeypatch, "evaluate", run / "student", "--batch-size", 4, "--output", output) == 0
    of_student = json.loads(output.read_text())
    assert of_student["task"] == task
    assert "kl_to_teacher" not in of_student["models"]["student"]
    assert of_student["models"]["student"]["f1"] == stored["models"]["student, distilled"]["f1"]

    capsys.readouterr()
    told = refused(monkeypatch, capsys, "evaluate", run, "--teacher", recipe.teacher)
    assert f"teacher: expected none beside the run {run}, which has its own, got {recipe.teacher}" in told
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows(50))))
    told = refused(monkeypatch, capsys, "evaluate", run)
    assert f"run {run}: data: expected the test rows that it was measured on (6 rows, " in told


def test_evaluate_a_model_of_no_run(
    recipe: token_classification.Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, other = tmp_path / "out.json", saved(tmp_path / "other", layers=1, seed=5)
    arguments = ["evaluate", other, "--data", recipe.data, "--text-columns", "tokens", "--output", output]
    assert call(monkeypatch, *arguments, "--teacher", recipe.teacher, "--test-rows", 3, "--max-length", 8) == 0
    capsys.readouterr()
    stored = json.loads(output.read_text())
    assert (stored["task"]["rows"], stored["task"]["max_length"]) == (3, 8)
    assert list(stored["models"]) == ["other", "teacher"]
    assert stored["models"]["other"]["kl_to_teacher"] > 0.01
    assert stored["models"]["teacher"]["kl_to_teacher"] == pytest.approx(0, abs=1e-6)

    fewer = saved(tmp_path / "fewer", layers=1, seed=5, names=["O", "B-PER"])
    turned = saved(tmp_path / "turned", layers=1, seed=5, names=NAMES[::-1])
    data, teacher = ("--data", recipe.data), ("--teacher", recipe.teacher)
    for given, expected in (
        ((other, *data, "--kind", "regression"), "kind: expected none for models of token-classification, got regr"),
        ((other, *data, "--label-column", "mood"), "data: expected a column mood, got columns tokens, ner_tags"),
        ((fewer, *data, *teacher), f"fewer {fewer}: expected 4 classes, as the teacher has, got 2"),
        ((turned, *data, *teacher), f"turned {turned}: expected the classes (id2label of its config)"),
        ((other,), "data: expected labelled rows, a file, a folder or a Hub name, got none"),
    ):
        assert expected in refused(monkeypatch, capsys, "evaluate", *given)


@LIBRARIES
def test_quantised_teachers(
    library: str,
    recipe: token_classification.Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`evaluate` measures them too, and counts their arithmetic as that of the model that was quantised."""
    run = check_run(library, AutoModelForTokenClassification, recipe, saved(tmp_path / "own", 1, seed=1), tmp_path)
    assert call(monkeypatch, "evaluate", run, "--output", tmp_path / "run.json") == 0
    arguments = ("evaluate", recipe.teacher, "--teacher", run.parent / "teacher-quantised", "--data", recipe.data)
    assert call(monkeypatch, *arguments, "--max-length", 16, "--output", tmp_path / "plain.json") == 0
    of_run, beside = (json.loads((tmp_path / f"{name}.json").read_text())["models"] for name in ("run", "plain"))
    plain, its = beside.pop(str(recipe.teacher)), of_run["teacher"]
    assert (plain["gflop"], plain["parameters"]) == (its["gflop"], its["parameters"])
    assert plain["megabytes"] > 1.3 * its["megabytes"]
    assert 0 < plain["kl_to_teacher"] < 0.01 < of_run["student, distilled"]["kl_to_teacher"]
