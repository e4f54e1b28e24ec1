"""`kdfast evaluate` and `kdfast compare`: numbers by hand and in plain torch, what they write, and mistakes in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_reviews
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from kdfast import cli, tasks
from kdfast.compare import compare
from kdfast.recipes import hinton, minilm, patient_kd


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["kdfast", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code or 0


def _refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert _run(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    message: str = err.splitlines()[-1]
    assert message.startswith("kdfast: ")
    return message


def _width(shown: str) -> int:
    """Of all lines but the last, which may have a long path."""
    return max(map(len, shown.splitlines()[:-1]))


# ---- compare ----
def _row(accuracy: float, **more: float) -> dict[str, float]:
    of_all = {"kl_to_teacher": 0.1, "agreement": 0.9, "parameters": 17_390_594, "megabytes": 70.0}
    return {
        "accuracy": accuracy,
        **of_all,
        "latency_ms_batch_1": 13.2,
        "latency_ms_batch_32": 79.0,
        "training_seconds": 180.0,
        **more,
    }


def _classifier_run(folder: Path, recipe: Any, metric: str = "accuracy", **models: dict[str, float]) -> Path:
    folder.mkdir(parents=True)
    task = {"data": recipe.data or "movie_reviews", "kind": "classification", "metric": metric, "titles": {}}
    stored = {"settings": recipe.as_dict(), "versions": {}, "task": task, "models": models}
    (folder / "metrics.json").write_text(json.dumps(stored))
    return folder


def _language_run(folder: Path, settings: dict[str, Any], **perplexities: float) -> Path:
    folder.mkdir(parents=True)
    models = {
        name: {"perplexity": value, "kl_to_teacher": 0.5, "parameters": 1e8, "tokens_per_second": 300.0}
        for name, value in perplexities.items()
    }
    (folder / "metrics.json").write_text(json.dumps({"settings": settings, "versions": {}, "models": models}))
    return folder


TEACHER, ALONE, STUDENT = (0.86, 0.87, 0.88), (0.79, 0.80, 0.81), (0.80, 0.82, 0.87)
PATIENT, MINILM = (0.85, 0.85, 0.88), (0.7, 0.7, 0.7)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three recipes with three seeds each; Hinton's runs have the teachers, and the students on the labels alone."""
    made = []
    layers: dict[str, Any] = {"student_layers": (0, 2, 4), "epochs": 3, "learning_rate": 1e-4, "warmup": 0.06}
    for seed in range(3):
        teacher = _row(TEACHER[seed], kl_to_teacher=0.0, agreement=1.0, latency_ms_batch_1=25.0)
        path = tmp_path / f"hinton-{seed}"
        alone, student = _row(ALONE[seed]), _row(STUDENT[seed])
        made.append(
            _classifier_run(
                path, hinton.Recipe(seed=seed, **layers), teacher=teacher, labels_only=alone, student=student
            )
        )
        # One path as the other commands might have been given it: relative to the folder of all runs.
        recipe: Any = patient_kd.Recipe(seed=seed, teacher=f"hinton-{seed}/teacher", student_start="teacher", **layers)
        made.append(_classifier_run(tmp_path / f"patient-{seed}", recipe, teacher=teacher, student=_row(PATIENT[seed])))
        recipe = minilm.Recipe(seed=seed, teacher=str(path / "teacher"), base="/minilm", **layers)
        made.append(_classifier_run(tmp_path / f"minilm-{seed}", recipe, teacher=teacher, student=_row(MINILM[seed])))
    return made


def test_mean_and_standard_error_over_seeds(runs: list[Path]) -> None:
    rows = {row["name"]: row for row in compare(runs).as_dict()["rows"]}
    assert list(rows) == ["teacher", "hinton/labels_only", "hinton/student", "patient/student", "minilm/student"]
    assert all(row["seeds"] == [0, 1, 2] and row["n"] == 3 for row in rows.values())
    assert rows["patient/student"]["runs"] == [str(run) for run in runs if run.name.startswith("patient")]
    # Deviations -3, -1, 4 %: sqrt((9 + 1 + 16) / 2) / sqrt(3) = 2.0817.
    student = rows["hinton/student"]["metrics"]["accuracy"]
    assert student == {"mean": pytest.approx(0.83), "standard_error": pytest.approx(0.020816660), "n": 3}
    assert rows["teacher"]["metrics"]["latency_ms_batch_1"] == {"mean": 25.0, "standard_error": 0.0, "n": 3}


def test_difference_to_the_same_student_on_the_labels_alone(runs: list[Path]) -> None:
    rows = {row["name"]: row["difference_to_labels_only"] for row in compare(runs).as_dict()["rows"]}
    # 1, 2 and 6 %, seed by seed: sqrt((4 + 1 + 9) / 2) / sqrt(3) = 1.5275.
    assert rows["hinton/student"] == {"mean": pytest.approx(0.03), "standard_error": pytest.approx(0.015275252), "n": 3}
    # Of another run, with the same teacher, start and training: 6, 5 and 7 %.
    assert rows["patient/student"] == {"mean": pytest.approx(0.06), "standard_error": pytest.approx(0.0057735), "n": 3}
    assert rows["minilm/student"] is None  # starts from the base
    assert rows["teacher"] is None
    assert rows["hinton/labels_only"] is None


def test_hinton_with_alpha_0_is_training_on_the_labels_alone(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "teacher": "org/teacher",
        "base": "org/base",
        "student_start": "base",
        "baseline": False,
    }
    start = {"epochs": 3, "learning_rate": 1e-4, "warmup": 0.06}
    alone = hinton.Recipe(alpha=0.0, **settings, **start)
    runs = [
        _classifier_run(tmp_path / "alone", alone, teacher=_row(0.9), student=_row(0.6)),
        _classifier_run(tmp_path / "minilm", minilm.Recipe(**settings, **start), teacher=_row(0.9), student=_row(0.7)),
    ]
    rows = {row.name: row for row in compare(runs).rows}
    assert list(rows) == ["teacher", "alone/student", "minilm/student"]
    assert rows["alone/student"].differences == []
    assert rows["minilm/student"].differences == [pytest.approx(0.1)]


def test_single_runs_have_no_standard_error(runs: list[Path]) -> None:
    row = compare(runs[:1]).as_dict()["rows"][2]
    assert row["name"] == "hinton-0/student"
    assert row["metrics"]["accuracy"] == {"mean": 0.8, "standard_error": None, "n": 1}
    assert row["difference_to_labels_only"]["standard_error"] is None


def test_runs_called_the_same_are_told_by_their_settings(tmp_path: Path) -> None:
    runs = [
        _classifier_run(tmp_path / part / name, hinton.Recipe(alpha=alpha, seed=seed), student=_row(0.8))
        for part, alpha in (("a", 0.5), ("b", 0.9))
        for seed, name in enumerate(("run-seed1", "run-seed2"))
    ]
    assert [row.name for row in compare(runs).rows] == ["hinton alpha 0.5/student", "hinton alpha 0.9/student"]
    assert [row.name for row in compare(runs[:2]).rows] == ["run/student"]
    # As often as it is given, a folder is one run.
    assert len(compare([runs[0], runs[0], tmp_path / "a" / ".." / "a" / "run-seed1"]).rows[0].runs) == 1


def test_each_teacher_of_its_own_has_a_row(tmp_path: Path) -> None:
    runs = [
        _classifier_run(tmp_path / f"run-{part}", hinton.Recipe(alpha=alpha), teacher=_row(0.9), student=_row(0.8))
        for part, alpha in (("a", 0.5), ("b", 0.9))
    ]
    assert [row.name for row in compare(runs).rows][::2] == ["run-a/teacher", "run-b/teacher"]


def test_table_at_80_columns_and_files(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "out"
    assert _run(monkeypatch, "compare", *runs, "--output", folder) == 0
    shown = capsys.readouterr().out
    assert _width(shown) <= 80
    assert "…" not in shown
    for word in ("accuracy", "labels", "teacher", "agrees", "params", "ms,", "32", "train", "83.0±2.1", "+3.0±1.5"):
        assert word in shown
    assert json.loads((folder / "comparison.json").read_text()) == {
        "family": "classifier",
        "metric": "accuracy",
        "measured_on": {"data": None, "text_columns": None, "label_column": None, "test_rows": None},
        "rows": compare(runs).as_dict()["rows"],
    }
    lines = (folder / "comparison.md").read_text().splitlines()
    assert lines[0].startswith("movie reviews: runs compared. n seeds: mean ± standard error. ")
    assert "| hinton/student | 3 | 83.0±2.1 | +3.0±1.5 | 0.1000±0.0000 | 90.0±0.0 | 17.4 | 13.2±0.0 |" in lines[6]
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_another_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = _classifier_run(tmp_path / "r", hinton.Recipe(data="qqp"), "f1", student={"f1": 0.75, "accuracy": 0.5})
    assert _run(monkeypatch, "compare", run) == 0
    assert " 75.0" in capsys.readouterr().out
    assert _run(monkeypatch, "compare", run, "--metric", "accuracy", "--output", tmp_path / "o") == 0
    shown = capsys.readouterr().out
    assert " 50.0" in shown
    assert "75.0" not in shown
    assert "metric must be one of accuracy, f1, got auc" in _refused(
        monkeypatch, capsys, "compare", run, "--metric", "auc"
    )


def test_language_models_among_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"recipe": "causal-lm", "data": None, "teacher": None, "test_rows": 64, "max_length": 256}
    runs = [
        _language_run(tmp_path / f"{name}{seed}", {**settings, "seed": seed, "alpha": alpha}, **perplexities)
        for name, alpha, student in (("kd-", 0.9, 30.0), ("ce-", 0.0, 40.0))
        for seed in (0, 1)
        for perplexities in [{"teacher": 20.0, "start": 1.5e6, "student": student + 2 * seed}]
    ]
    rows = compare(runs).as_dict()["rows"]
    assert [row["name"] for row in rows] == ["teacher", "kd/start", "kd/student", "ce/start", "ce/student"]
    assert rows[0]["n"] == 1  # the one of the demonstration
    assert rows[2]["metrics"]["perplexity"] == {"mean": 31.0, "standard_error": pytest.approx(1.0), "n": 2}
    assert _run(monkeypatch, "compare", *runs, "--output", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "31.00±1.00" in shown
    assert "1.5e+06±0.0e+00" in shown
    other = _language_run(tmp_path / "short", {**settings, "max_length": 128, "seed": 5}, student=9.0)
    message = _refused(monkeypatch, capsys, "compare", runs[0], other)
    assert "are measured on different rows: max_length 256 and 128" in message
    sampled = _language_run(tmp_path / "gkd", {**settings, "on_policy": 1.0}, student=9.0)
    assert "different rows: on_policy 0.0 and above 0" in _refused(monkeypatch, capsys, "compare", runs[0], sampled)


def test_what_cannot_be_compared(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    causal = _language_run(tmp_path / "causal", {"recipe": "causal-lm", "seed": 0}, student=30.0)
    masked = _language_run(tmp_path / "masked", {"recipe": "distilbert", "seed": 0}, student=5.0)
    other = _classifier_run(tmp_path / "other", hinton.Recipe(data="sst2"), student=_row(0.8))
    fewer = _classifier_run(tmp_path / "fewer", hinton.Recipe(test_rows=100), student=_row(0.8))
    again = _classifier_run(tmp_path / "again", hinton.Recipe(data="sst2"), student=_row(0.9))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.json").write_text('{"settings": {}, "models": {"student": {"accuracy": 0.8}}}')
    (tmp_path / "empty").mkdir()
    for given, expected in (
        ((runs[0], causal), f"{runs[0]} is a run of classifiers, {causal} of language models (causal-lm)"),
        ((causal, masked), "language models (causal-lm), "),
        ((runs[0], other), "are measured on different rows: data None and sst2"),
        ((runs[0], fewer), "are measured on different rows: test_rows None and 100"),
        ((other, again), f"{other} and {again} have the same settings and seed, 0"),
        ((tmp_path / "none",), "none: there is no such folder"),
        ((tmp_path / "empty",), "empty is no finished run: it has no metrics.json"),
        ((tmp_path,), f"it has no metrics.json; there are runs in it: {tmp_path / 'again'}"),
        ((tmp_path / "old",), "metrics.json is not of a run of this version of kdfast: KeyError('task')"),
        ((runs[0], "--output", runs[0] / "metrics.json"), "metrics.json is not a folder"),
        ((), "Missing argument"),
    ):
        assert expected in _refused(monkeypatch, capsys, "compare", *given)


# ---- evaluate ----
NAMES = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}


def _bert(seed: int, **options: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=17, max_position_embeddings=64, initializer_range=0.5, **sizes, **options)
    return BertForSequenceClassification(config).eval()


def _save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *tiny_reviews.WORDS]
    (folder / "vocab.txt").write_text("\n".join(words))
    kind = "DistilBertTokenizer" if "distil" in model.config.model_type else "BertTokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    return folder


@pytest.fixture
def reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 8 rows to train on and 50 of different lengths to test on."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "reviews"
    folder.mkdir()
    for part, count in (("train", 8), ("test", 50)):
        lines = ["text,label,stars"]
        for i in range(count):
            words = [tiny_reviews.WORDS[int(k)] for k in torch.randint(12, (2 + 5 * i % 11,), generator=generator)]
            lines.append(f"{' '.join(words)},{('negative', 'positive')[i % 2]},{0.25 + i % 5}")
        (folder / f"{part}.csv").write_text("\n".join(lines))
    return folder


@torch.no_grad()
def _logits(model: Any, folder: Path, texts: list[str]) -> torch.Tensor:
    """Row by row, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])


def test_models_measured_as_plain_torch_does(
    reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    small = DistilBertConfig(
        vocab_size=17,
        dim=8,
        hidden_dim=8,
        n_layers=1,
        n_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        **NAMES,
    )  # does not know the token types that its teacher has
    model, teacher = DistilBertForSequenceClassification(small).eval(), _bert(2, **NAMES)
    folder, its = _save(model, tmp_path / "model"), _save(teacher, tmp_path / "big" / "model")
    output = tmp_path / "results" / "out.json"
    arguments = ["evaluate", folder, "--data", reviews, "--teacher", its, "--batch-size", "7", "--output", output]
    assert _run(monkeypatch, *arguments) == 0
    shown = capsys.readouterr().out
    test = tasks.load(reviews).test
    ours, theirs = _logits(model, folder, test["text"]), _logits(teacher, its, test["text"])
    stored = json.loads(output.read_text())
    assert stored["task"] == {
        "data": str(reviews),
        "kind": "classification",
        "metric": "accuracy",
        "rows": 50,
        "max_length": 64,
    }
    assert stored["sources"] == {"model": str(folder), "teacher": str(its)}
    assert set(stored["versions"]) == {"kdfast", "torch", "transformers"}
    labels = torch.tensor(test["labels"])
    for name, logits in (("model", ours), ("teacher", theirs)):
        row = stored["models"][name]
        assert row["accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
        log_p, log_q = theirs.log_softmax(-1), logits.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
        assert row["kl_to_teacher"] == pytest.approx(kl, rel=1e-4, abs=1e-6)
        assert row["agreement"] == pytest.approx((logits.argmax(-1) == theirs.argmax(-1)).float().mean().item())
        assert row["latency_ms_batch_1"] > 0
        assert row["latency_ms_batch_32"] > 0
    assert 0 < stored["models"]["model"]["agreement"] < 1
    assert stored["models"]["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert stored["models"]["model"]["megabytes"] == (folder / "model.safetensors").stat().st_size / 1e6
    for text in ("reviews: on 50 test rows", "accuracy", "KL to", "agrees", "ms,", f"{100 * row['accuracy']:.1f}"):
        assert text in shown
    assert _width(shown) <= 80
    assert _run(monkeypatch, *arguments[:4], "--test-rows", "20", "--max-length", "5", "--output", output) == 0
    alone = json.loads(output.read_text())
    assert (alone["task"]["rows"], alone["task"]["max_length"]) == (20, 5)
    assert "kl_to_teacher" not in alone["models"]["model"]
    assert list(alone["models"]) == ["model"]


def test_regressor_has_both_correlations(reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _bert(3, num_labels=1)
    folder = _save(model, tmp_path / "model")
    options, output = ["--data", reviews, "--label-column", "stars", "--text-columns", "text"], tmp_path / "out.json"
    assert _run(monkeypatch, "evaluate", folder, *options, "--teacher", folder, "--output", output) == 0
    row = json.loads(output.read_text())["models"]["model"]
    test = tasks.load(reviews, label_column="stars").test
    expected = tasks.metrics("pearson", _logits(model, folder, test["text"]), torch.tensor(test["labels"]))
    assert (row["pearson"], row["spearman"]) == pytest.approx((expected["pearson"], expected["spearman"]), abs=1e-4)
    assert "kl_to_teacher" not in row


@pytest.fixture
def run(reviews: Path, tmp_path: Path) -> Path:
    """A finished run of two models, without the training."""
    folder = tmp_path / "runs" / "mine"
    recipe = hinton.Recipe(data=str(reviews), test_rows=30, max_length=6)
    _classifier_run(folder, recipe)
    (folder / "config.yaml").write_text(recipe.to_yaml())
    titles = {"teacher": "teacher", "student": "student, distilled"}
    (folder / "metrics.json").write_text(json.dumps({"task": {"titles": titles}, "models": {}}))
    for seed, name in enumerate(titles):
        _save(_bert(seed, **NAMES), folder / name)
    return folder


def test_run_is_measured_on_its_own_data(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.json"
    assert _run(monkeypatch, "evaluate", run, "--output", output) == 0
    whole = json.loads(output.read_text())
    assert list(whole["models"]) == ["teacher", "student, distilled"]
    assert (whole["task"]["rows"], whole["task"]["max_length"]) == (30, 6)
    assert whole["models"]["student, distilled"]["kl_to_teacher"] > 0
    # One of its models alone has its data too, and what is given goes before it.
    assert _run(monkeypatch, "evaluate", run / "student", "--output", output) == 0
    alone = json.loads(output.read_text())
    assert alone["task"] == whole["task"]
    assert alone["models"]["student"]["accuracy"] == whole["models"]["student, distilled"]["accuracy"]
    options = ["--test-rows", "25", "--max-length", "8", "--teacher", run / "teacher"]
    assert _run(monkeypatch, "evaluate", run / "teacher", *options, "--output", output) == 0
    other = json.loads(output.read_text())
    assert (other["task"]["rows"], other["task"]["max_length"]) == (25, 8)
    assert list(other["models"]) == [str(run / "teacher"), "teacher"]


def test_what_cannot_be_evaluated(
    run: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    three = _save(_bert(0, num_labels=3), tmp_path / "three")
    swapped = {"id2label": {0: "positive", 1: "negative"}, "label2id": {"positive": 0, "negative": 1}}
    turned = _save(_bert(0, **swapped), tmp_path / "turned")
    headless = _save(BertModel(_bert(0).config), tmp_path / "headless")
    bare = tmp_path / "bare"
    _bert(0, **NAMES).save_pretrained(bare)
    language = tmp_path / "language"
    language.mkdir()
    (language / "config.yaml").write_text("recipe: distilbert")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text(hinton.Recipe().to_yaml())
    data = ["--data", reviews]
    for given, expected in (
        ((tmp_path / "none", *data), f"{tmp_path}/none: there is no such folder"),
        ((three, *data), f"three {three} has 3 classes, the data 2"),
        (
            (turned, *data),
            f"turned {turned} has the classes in the order positive, negative, the data negative, positive",
        ),
        ((run / "student", "--teacher", three), f"teacher {three} has 3 classes, the data 2"),
        ((headless, *data), f"headless {headless} is no classifier: it has no weights for classifier.bias"),
        ((bare, *data), f"bare {bare} has no tokenizer"),
        ((reviews, *data), f"reviews {reviews}: Unrecognized model"),
        ((run / "student", *data, "--max-length", "65"), "max_length must be at most 64, the positions of student"),
        ((run / "student", "--data", tmp_path / "none.csv"), "source: expected a file"),
        ((run / "student", "--label-column", "mood"), "label_column: expected mood"),
        ((run, "--teacher", three), f"teacher: the run {run} has its own"),
        ((run, "--output", tmp_path), "is a folder, not a JSON file"),
        ((run, "--test-rows", "0"), "--test-rows"),
        (
            (language,),
            "language is a run, but not of classifiers: evaluate measures those of hinton, patient-kd, minilm",
        ),
        ((unfinished,), "unfinished is not finished: no metrics.json"),
        ((), "Missing argument"),
    ):
        assert expected in _refused(monkeypatch, capsys, "evaluate", *given)


# ---- both ----
def test_help_fits_and_needs_no_transformers() -> None:
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['datasets'] = sys.modules['matplotlib'] = None; "
        "from kdfast import cli; cli.main()"
    )
    plain = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    for command, words in {
        "evaluate": ["--data", "--teacher", "--max-length", "--test-rows", "--batch-size", "--output"],
        "compare": ["--output", "--metric", "standard error"],
    }.items():
        done = subprocess.run(
            [sys.executable, "-c", code, command, "--help"], capture_output=True, text=True, check=False, env=plain
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert max(map(len, done.stdout.splitlines())) <= 80
        assert all(word in done.stdout for word in words)
