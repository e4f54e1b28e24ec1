"""Questions answered by a part of a text: rows, answers, SQuAD's measures, and the recipe on tiny models."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call, refused, width
from datasets import Dataset
from quantised import LIBRARIES, check_run
from rich.console import Console
from transformers import AutoModelForQuestionAnswering, BertConfig, BertForQuestionAnswering, BertTokenizer

from kdfast import kl_div, runs
from kdfast.data import answers
from kdfast.recipes import question_answering
from kdfast.runs import stages
from kdfast.runs.question_answering import QuestionAnsweringRun

WORDS = ["where", "who", "lives", "ada", "bob", "in", "rome", "oslo", "and", "now", "here", ".", "?"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
CONTEXT = "ada lives in rome . bob lives in oslo ."


def asked(context: str, answer: str | None, question: str = "who lives here ?") -> dict[str, Any]:
    found = (
        {"text": [], "answer_start": []}
        if answer is None
        else {"text": [answer], "answer_start": [context.index(answer)]}
    )
    return {"question": question, "context": context, "answers": found}


def questions(count: int) -> list[dict[str, Any]]:
    made = []
    for i in range(count):
        who, where = ["ada", "bob"][i % 2], ["in rome", "in oslo"][i % 3 % 2]
        context = " ".join(["now here ."] * (i % 4) + [f"{who} lives {where} ."])
        made.append(asked(context, where, f"where lives {who} ?"))
    return made


def saved(folder: Path, layers: int, seed: int) -> Path:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": len(VOCABULARY)}
    BertForQuestionAnswering(BertConfig(num_hidden_layers=layers, initializer_range=0.3, **sizes)).save_pretrained(
        folder
    )
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return folder


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return BertTokenizer.from_pretrained(saved(tmp_path / "teacher", layers=3, seed=0))


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> question_answering.Recipe:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, questions(60))))
    return question_answering.Recipe(
        data=str(tmp_path / "rows.jsonl"),
        teacher=str(tmp_path / "teacher"),
        max_length=16,
        stride=2,
        epochs=4,
        learning_rate=5e-3,
        precision="float32",
    )


# ---- rows ----
def test_positions_are_those_of_the_answer(tokenizer: Any) -> None:
    made = answers.rows(Dataset.from_list([asked(CONTEXT, "in oslo"), asked(CONTEXT, None)]), tokenizer, 64, 8)
    assert [row["token_type_ids"] for row in made.rows] == [[0] * 6 + [1] * 11] * 2
    first, last = made.rows[0]["start_positions"], made.rows[0]["end_positions"]
    begin, end = made.places[0][first][0], made.places[0][last][1]
    assert CONTEXT[begin:end] == "in oslo"
    assert made.rows[1]["start_positions"] == made.rows[1]["end_positions"] == 0
    assert made.right == [["in oslo"], []]
    assert made.places[0][:6] == [(0, 0)] * 6  # of the question


def test_long_texts_are_several_rows(tokenizer: Any) -> None:
    made = answers.rows(Dataset.from_list([asked(CONTEXT, "rome . bob"), asked(CONTEXT, "oslo")]), tokenizer, 12, 2)
    assert made.question == [0, 0, 0, 1, 1, 1]
    texts = [[tokenizer.convert_ids_to_tokens(row["input_ids"])[6:-1]] for row in made.rows[:3]]
    assert texts == [
        [["ada", "lives", "in", "rome", "."]],
        [["rome", ".", "bob", "lives", "in"]],
        [["lives", "in", "oslo", "."]],
    ]
    assert [(row["start_positions"], row["end_positions"]) for row in made.rows] == [(0, 0), (6, 8), (0, 0)] + [
        (0, 0)
    ] * 2 + [(8, 8)]


@pytest.mark.parametrize(
    ("row", "length", "expected"),
    [
        (
            {"question": "who ?", "context": "ada"},
            16,
            "expected columns question, context, answers, got question, context, without answers",
        ),
        (
            asked(CONTEXT, "rome") | {"answers": {"text": ["rome"], "answer_start": [2]}},
            16,
            "the answer 'rome' .* got 'a li'",
        ),
        (
            asked(CONTEXT, "rome"),
            10,
            r"max_length: expected room for more than stride 4 tokens .* 'who lives here \?', got 3 of 10",
        ),
        (asked(CONTEXT, "rome") | {"answers": "rome"}, 16, r"expected answers like .*, got \"rome\""),
        (asked(CONTEXT, "rome") | {"answers": {"text": ["rome"]}}, 16, r"expected answers like .* 'who lives here \?'"),
    ],
)
def test_rows_that_do_not_fit(row: dict[str, Any], length: int, expected: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=expected):
        answers.rows(Dataset.from_list([row]), tokenizer, length, 4)


def test_forms_of_answers(tokenizer: Any) -> None:
    known = asked(CONTEXT, "rome")
    expected = answers.rows(Dataset.from_list([known]), tokenizer, 16, 4)
    assert answers.rows(Dataset.from_list([known | {"answers": single(known)}]), tokenizer, 16, 4) == expected
    assert any(row["start_positions"] for row in expected.rows)
    none = answers.rows(Dataset.from_list([known | {"answers": None}, known]), tokenizer, 16, 4)
    assert none.right == [[], ["rome"]]
    assert [answers.some(of) for of in (None, [], single(known), known["answers"], {"text": []})] == [
        False,
        False,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("form", ["lines", "indented", "table"])
def test_files_of_questions(form: str, recipe: question_answering.Recipe, tmp_path: Path) -> None:
    """SQuAD's own, of articles of paragraphs, in a line or several; and tables, with answers as JSON."""
    of_lines, path = questions(60), tmp_path / f"squad.{'csv' if form == 'table' else 'json'}"
    if form == "table":
        with path.open("w") as file:
            written = csv.writer(file)
            written.writerow(answers.COLUMNS)
            written.writerows([one["question"], one["context"], json.dumps(one["answers"])] for one in of_lines)
    else:
        paragraphs = [
            {
                "context": one["context"],
                "qas": [{"id": str(i), "question": one["question"], "is_impossible": False, "answers": single(one)}],
            }
            for i, one in enumerate(of_lines)
        ]
        articles = [{"title": f"t{i}", "paragraphs": paragraphs[i : i + 20]} for i in range(0, 60, 20)]
        path.write_text(json.dumps({"version": "2.0", "data": articles}, indent=1 if form == "indented" else None))
    expected, found = (
        QuestionAnsweringRun(dataclasses.replace(recipe, data=str(data)), tmp_path / "run", Console())
        for data in (recipe.data, path)
    )
    for run in (expected, found):
        run.prepare()
    assert found.train == expected.train
    assert any(row["start_positions"] for row in found.train)


def single(one: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers as a list of single ones."""
    columns = zip(*(one["answers"][name] for name in ("text", "answer_start")), strict=True)
    return [{"text": text, "answer_start": start} for text, start in columns]


# ---- answers ----
def test_best_answer_by_trying_all() -> None:
    generator = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 50, generator=generator)
    places = [(0, 0)] * 6 + [(3 * i, 3 * i + 2) for i in range(40)] + [(0, 0)] * 4  # the last are padding
    tried = {(i, j): float(start[i] + end[j]) for i in range(6, 46) for j in range(i, min(i + answers.LONGEST, 46))}
    i, j = max(tried, key=lambda pair: tried[pair])
    above, found = answers.best(start, end, places)
    assert found == (places[i][0], places[j][1])
    assert above == pytest.approx(tried[i, j] - float(start[0] + end[0]))
    start[20], end[6], end[20 + answers.LONGEST - 1 - 6] = 50, 50, 40  # before its start; and just short enough
    assert answers.best(start, end, places)[1] == (places[20][0], places[43][1])


def test_quality() -> None:
    right = [["the Rome!", "in Rome"], ["Ada"], []]
    assert answers.quality(["rome", "ada", ""], right) == {"f1": 1.0, "exact_match": 1.0}
    found = answers.quality(["in a rome", "bob", "ada"], right)
    assert found == {"f1": pytest.approx(1 / 3), "exact_match": pytest.approx(1 / 3)}
    half = answers.quality(["rome or oslo"], [["rome"]])
    assert half == {"f1": pytest.approx(2 / 4), "exact_match": 0.0}


# ---- the recipe ----
def test_student_comes_closer_to_the_teacher(recipe: question_answering.Recipe, tmp_path: Path) -> None:
    shown = io.StringIO()
    results = runs.run(recipe, tmp_path / "run", Console(file=shown, width=100))
    assert results["teacher"]["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert results["student"]["kl_to_teacher"] < 0.7 * results["start"]["kl_to_teacher"]
    assert "student, distilled" in shown.getvalue()
    assert {"f1", "exact_match", "tokens_per_second"} <= results["student"].keys()
    student = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "run" / "student")
    assert student.config.num_hidden_layers == 2  # 0 and 2 of three
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["task"]["metric"] == "f1"
    assert runs.run(recipe, tmp_path / "run", Console(file=io.StringIO())) == results


@LIBRARIES
def test_quantised_teachers(library: str, recipe: question_answering.Recipe, tmp_path: Path) -> None:
    check_run(library, AutoModelForQuestionAnswering, recipe, saved(tmp_path / "own", layers=1, seed=1), tmp_path)


@pytest.mark.parametrize("without", [False, True])
def test_measured_row_by_row(recipe: question_answering.Recipe, without: bool, tmp_path: Path) -> None:
    """Every row alone: distances, and the answer of the question's best row; none where that is the first token."""
    unanswered = [asked(row["context"], None) for row in questions(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, questions(60) + unanswered * without)))
    run = QuestionAnsweringRun(
        dataclasses.replace(recipe, max_length=13), tmp_path / "run", Console(file=io.StringIO())
    )
    run.prepare()
    assert (not all(run.asked.right)) == without
    assert len(run.asked.rows) > len(run.asked.texts)
    models = {"teacher": run.teacher, "start": run.start}
    apart, best = 0.0, [(float("-inf"), "")] * len(run.asked.texts)
    for row, places, of in zip(run.asked.rows, run.asked.places, run.asked.question, strict=True):
        inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "token_type_ids")}
        with torch.no_grad():
            s, t = run.start(**inputs), run.teacher(**inputs)
        for name in ("start_logits", "end_logits"):
            apart += kl_div(s[name], t[name]).item() / 2
        above, (begin, end) = answers.best(s.start_logits[0], s.end_logits[0], places)
        best[of] = max(best[of], (above, run.asked.texts[of][begin:end]))
    chosen = ["" if without and above <= 0 else answer for above, answer in best]
    found = run.quality(models)["start"]
    assert found["kl_to_teacher"] == pytest.approx(apart / len(run.asked.rows), rel=1e-4)
    assert found["f1"] == pytest.approx(answers.quality(chosen, run.asked.right)["f1"])


def test_stride_out_of_range() -> None:
    with pytest.raises(ValueError, match="stride: expected 0 to less than max_length 16 - 4, got 12"):
        question_answering.Recipe(max_length=16, stride=12)


# ---- the baseline, and models that are there already ----
def test_evaluate_gives_the_runs_table(
    recipe: question_answering.Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = dataclasses.replace(recipe, epochs=2, baseline=True)
    results = runs.run(short, tmp_path / "run", Console(file=io.StringIO()))
    assert results["labels_only"]["kl_to_teacher"] > results["student"]["kl_to_teacher"] > 0
    history = stages.finished(tmp_path / "run" / "labels_only") or []
    assert any("ce" in event for event in history)
    assert not any("kl" in event for event in history)
    output = tmp_path / "out.json"
    assert call(monkeypatch, "evaluate", tmp_path / "run", "--output", output) == 0
    shown = capsys.readouterr().out
    assert width(shown) <= 80
    for word in ("F1", "exact", "KL to", "student, labels alone"):
        assert word in shown
    stored = json.loads(output.read_text())
    assert (stored["task"]["kind"], stored["task"]["metric"]) == ("question-answering", "f1")
    titles = {"teacher": "teacher", "labels_only": "student, labels alone", "student": "student, distilled"}
    for name, title in titles.items():
        own = {key: stored["models"][title][key] for key in ("f1", "exact_match", "kl_to_teacher")}
        assert own == pytest.approx({key: results[name][key] for key in own}, rel=1e-5, abs=1e-6)
    student = tmp_path / "run" / "student"
    told = refused(monkeypatch, capsys, "evaluate", student, "--text-columns", "question")
    assert "text_columns: expected none for models of question-answering, got question" in told
    arguments = ("evaluate", student, "--data", recipe.data, "--teacher", recipe.teacher, "--output", output)
    assert call(monkeypatch, *arguments) == 0
    again = json.loads(output.read_text())["models"]["student"]
    assert again["kl_to_teacher"] == pytest.approx(results["student"]["kl_to_teacher"], rel=1e-5)
