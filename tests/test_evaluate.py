"""`kdfast evaluate`: numbers in plain torch, what it writes, and mistakes in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_reviews
import torch
from command_line import call, classifier_run, refused, width
from huggingface_hub.errors import HFValidationError
from rich.console import Console
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from kdfast import prune
from kdfast.data import metrics, tasks
from kdfast.models import cost, loading
from kdfast.recipes import hinton
from kdfast.results import measure, tables

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
    assert call(monkeypatch, *arguments) == 0
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
    middle = sorted(test["text"], key=lambda text: len(text.split()))[len(test) // 2]
    row_of_median_length = AutoTokenizer.from_pretrained(its)(middle, return_tensors="pt")
    assert stored["models"]["teacher"]["gflop"] == cost.flops(teacher, row_of_median_length) / 1e9
    assert 0 < stored["models"]["model"]["gflop"] < stored["models"]["teacher"]["gflop"]
    assert 0 < stored["models"]["model"]["agreement"] < 1
    assert stored["models"]["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert stored["models"]["model"]["megabytes"] == (folder / "model.safetensors").stat().st_size / 1e6
    for text in ("reviews: on 50 test rows", "accuracy", "KL to", "agrees", "ms,", f"{100 * row['accuracy']:.1f}"):
        assert text in shown
    assert width(shown) <= 80
    assert call(monkeypatch, *arguments[:4], "--test-rows", "20", "--max-length", "5", "--output", output) == 0
    alone = json.loads(output.read_text())
    assert (alone["task"]["rows"], alone["task"]["max_length"]) == (20, 5)
    assert "kl_to_teacher" not in alone["models"]["model"]
    assert list(alone["models"]) == ["model"]


def test_pruned_folder_beside_its_original(
    reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Heads and neurons that differ by layer, none in the last one."""
    model = _bert(2, **NAMES)
    masks = prune.Masks.full(model)
    masks.heads[0][0] = False
    masks.heads[1][:] = False
    masks.neurons[0][3:] = False
    smaller = prune.compact(model, masks)
    folder, its = _save(smaller, tmp_path / "pruned"), _save(model, tmp_path / "whole")
    output = tmp_path / "out.json"
    assert call(monkeypatch, "evaluate", folder, "--data", reviews, "--teacher", its, "--output", output) == 0
    pruned, whole = json.loads(output.read_text())["models"].values()
    test = tasks.load(reviews).test
    logits, labels = _logits(smaller, folder, test["text"]), torch.tensor(test["labels"])
    assert pruned["accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    assert pruned["kl_to_teacher"] > 1e-4
    assert pruned["parameters"] == sum(p.numel() for p in smaller.parameters()) < whole["parameters"]
    assert 0 < pruned["gflop"] < whole["gflop"]
    assert pruned["megabytes"] < whole["megabytes"]
    shown = capsys.readouterr().out
    assert "GFLOP" in shown
    assert width(shown) <= 80


def test_what_computes_less_and_is_no_faster_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def row(gflop: float, ms: float) -> dict[str, float]:
        latency = {"latency_ms_batch_32" + part: ms for part in ("", measure.FAST, measure.SLOW)}
        return {"accuracy": 0.9, "parameters": 1e6 * gflop, "megabytes": 4.0, "gflop": gflop, **latency}

    models = {"fast": row(1, 10), "slow": row(1, 19.5), "as large": row(2, 20), "teacher": row(2, 20)}
    for teacher, told in (("teacher", True), (None, False)):
        Console(width=80).print(tables.evaluation_table(models, "reviews", 8, teacher))
        shown = " ".join(capsys.readouterr().out.split())
        assert (
            "slow with 32 rows: nothing got faster (1.03 × as fast): 50 % of the arithmetic is gone" in shown
        ) is told
        assert shown.count("nothing got faster") == told
        assert "GFLOP" in shown


def test_regressor_has_both_correlations(reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _bert(3, num_labels=1)
    folder = _save(model, tmp_path / "model")
    options, output = ["--data", reviews, "--label-column", "stars", "--text-columns", "text"], tmp_path / "out.json"
    assert call(monkeypatch, "evaluate", folder, *options, "--teacher", folder, "--output", output) == 0
    row = json.loads(output.read_text())["models"]["model"]
    test = tasks.load(reviews, label_column="stars").test
    expected = metrics.metrics("pearson", _logits(model, folder, test["text"]), torch.tensor(test["labels"]))
    assert (row["pearson"], row["spearman"]) == pytest.approx((expected["pearson"], expected["spearman"]), abs=1e-4)
    assert "kl_to_teacher" not in row


@pytest.fixture
def run(reviews: Path, tmp_path: Path) -> Path:
    """A finished run of two models, without the training."""
    folder = tmp_path / "runs" / "mine"
    recipe = hinton.Recipe(data=str(reviews), test_rows=30, max_length=6)
    classifier_run(folder, recipe)
    (folder / "config.yaml").write_text(recipe.to_yaml())
    titles = {"teacher": "teacher", "student": "student, distilled"}
    (folder / "metrics.json").write_text(json.dumps({"task": {"titles": titles}, "models": {}}))
    for seed, name in enumerate(titles):
        _save(_bert(seed, **NAMES), folder / name)
    return folder


def test_run_is_measured_on_its_own_data(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.json"
    assert call(monkeypatch, "evaluate", run, "--output", output) == 0
    whole = json.loads(output.read_text())
    assert list(whole["models"]) == ["teacher", "student, distilled"]
    assert (whole["task"]["rows"], whole["task"]["max_length"]) == (30, 6)
    assert whole["models"]["student, distilled"]["kl_to_teacher"] > 0
    # One of its models alone has its data too, and what is given goes before it.
    assert call(monkeypatch, "evaluate", run / "student", "--output", output) == 0
    alone = json.loads(output.read_text())
    assert alone["task"] == whole["task"]
    assert alone["models"]["student"]["accuracy"] == whole["models"]["student, distilled"]["accuracy"]
    options = ["--test-rows", "25", "--max-length", "8", "--teacher", run / "teacher"]
    assert call(monkeypatch, "evaluate", run / "teacher", *options, "--output", output) == 0
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
        ((tmp_path / "none", *data), f"{tmp_path}/none: expected the folder of a model, got no folder"),
        ((three, *data), f"three {three}: expected 2 classes, as the data has, got 3"),
        (
            (turned, *data),
            f"turned {turned}: expected the classes in the data's order, negative, positive, got positive, negative",
        ),
        ((run / "student", "--teacher", three), f"teacher {three}: expected 2 classes, as the data has, got 3"),
        (
            (headless, *data),
            f"headless {headless}: expected a classifier, got a model without weights for classifier.bias",
        ),
        ((bare, *data), f"bare {bare}: expected a model with a tokenizer, got one without; save it"),
        ((reviews, *data), f"reviews {reviews}: expected what transformers loads, got Unrecognized model"),
        ((run / "student", *data, "--max-length", "65"), "max_length: expected at most 64, the positions of student"),
        ((run / "student", "--data", tmp_path / "none.csv"), "value: data: expected a file"),
        ((run / "student", "--label-column", "mood"), "label_column: expected mood"),
        (
            (run, "--teacher", three),
            f"teacher: expected none beside the run {run}, which has its own, got {three}; one of its models",
        ),
        ((run, "--output", tmp_path), f"output {tmp_path}: expected a JSON file, got a folder"),
        ((run, "--test-rows", "0"), "--test-rows"),
        (
            (language,),
            "language: expected a run of classifiers (hinton, patient-kd, minilm, ",
        ),
        ((language,), "got one of distilbert, whose table the run itself measures (metrics.json); kdfast compare sets"),
        ((unfinished,), "unfinished: expected a finished run, got one without metrics.json; the same kdfast distill"),
        ((), "Missing argument"),
    ):
        assert expected in refused(monkeypatch, capsys, "evaluate", *given)


def test_models_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(error: Exception | None) -> None:
        def model_info(self: Any, name: str, timeout: float) -> None:
            asked.append(name)
            if error is not None:
                raise error

        monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)

    class Kind:
        """A class of transformers that finds nothing, and tells its options."""

        @staticmethod
        def from_pretrained(source: Any, **options: Any) -> Any:
            if source == "here":
                return options
            raise OSError(f"{source} is nowhere\nat all")

    answer(ConnectionError("no network\nat all"))
    nowhere = "expected a folder or a name on the Hub, got no folder, and no answer from the Hub (no network)"
    for argument, source, expected in (
        ("base", "org/model", f"base org/model: {nowhere}"),
        ("base", "base", f"base: {nowhere}"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            loading.pretrained(Kind, argument, source)
    assert loading.pretrained(Kind, "base", "here", dtype=1) == {"dtype": 1, "local_files_only": True}
    answer(None)
    assert loading.pretrained(Kind, "base", "here") == {}
    with pytest.raises(
        ValueError, match=r"^base org/model: expected what transformers loads, got org/model is nowhere$"
    ):
        loading.pretrained(Kind, "base", "org/model")
    answer(HFValidationError("no name"))
    with pytest.raises(
        ValueError,
        match=r"^base a b: expected a folder or a name on the Hub, got no folder, and no model that you may read",
    ):
        loading.pretrained(Kind, "base", "a b")
    asked.clear()
    (tmp_path / "file").touch()
    for source in ("./none", "runs/mine/student", "~/none", tmp_path / "none"):
        with pytest.raises(ValueError, match=r"expected the folder of a model, got no folder$"):
            loading.pretrained(Kind, "base", source)
    with pytest.raises(ValueError, match=r"expected a folder or a name on the Hub, got a file$"):
        loading.pretrained(Kind, "base", tmp_path / "file")
    with pytest.raises(ValueError, match=r"is nowhere$"):
        loading.pretrained(Kind, "base", tmp_path)
    assert asked == []


def test_help_fits_and_needs_no_transformers() -> None:
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['datasets'] = sys.modules['matplotlib'] = None; "
        "from kdfast.cli import main; main.main()"
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
