"""The recipe of encoder-decoders from end to end, on tiny random T5 and BART; and rows out of pairs of texts."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from language_models import check_per_token
from quantised import check_run
from rich.console import Console
from tiny_pairs import bart, of, pair, plain_pairs, recipe, saved, t5
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartForSequenceClassification,
    TrainerCallback,
    get_linear_schedule_with_warmup,
)
from typer.testing import CliRunner

from kdfast import runs
from kdfast.cli.main import app
from kdfast.data import pairs
from kdfast.recipes import seq2seq
from kdfast.results.compare import compare
from kdfast.runs import adapters, stages
from kdfast.runs.seq2seq import Seq2SeqRun

__all__ = ["recipe"]  # a fixture
EPSILON = 1e-4  # of Adam: its default would make steps of full size of the rounding of gradients that are zero
KINDS = pytest.mark.parametrize("kind", ["t5", "bart"])


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


def prepared(recipe: seq2seq.Recipe, folder: Path) -> Seq2SeqRun:
    run = Seq2SeqRun(recipe, folder, quiet())
    run.prepare()
    return run


# ---- rows ----
def test_sources_and_targets_are_found() -> None:
    text, summary = "w1 w2 w3", "w1"
    for names in (("source", "target"), ("document", "summary"), ("article", "highlights"), ("dialogue", "summary")):
        part = Dataset.from_list([{"id": "7", **dict(zip(names, (text, summary), strict=True))}])
        assert pairs.texts(pairs.flat(part)) == [(text, summary)]
        assert pairs.has_targets(part)
    part = Dataset.from_list([{"a": text, "source": summary}])
    assert pairs.texts(part, "source", "a") == [(summary, text)]
    languages = pairs.flat(Dataset.from_list([{"translation": {"de": "w4", "en": "w5"}}]))
    assert pairs.texts(languages, "en", "de") == [("w5", "w4")]
    lacking = [{"text": text, "summary": None}, {"text": "", "summary": "w"}, {"text": "w", "summary": "w"}]
    assert pairs.texts(Dataset.from_list(lacking)) == [("w", "w")]
    assert not pairs.has_targets(Dataset.from_list([{"text": text, "summary": None}]))
    assert not pairs.has_targets(Dataset.from_list([{"text": text}]))


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        (
            {"text": "a", "label": "b"},
            (),
            "data: expected a column target or summary .*, got columns text, label; --target-col",
        ),
        (
            {"translation": {"de": "a", "en": "b"}},
            ("en",),
            "data: expected a column target .* columns de, en; --target",
        ),
        ({"source": "a"}, ("source", "source"), "target_column: expected another column than the sources', got source"),
        ({"source": "a", "target": 7}, (), "data: expected texts in columns source and target, got 7"),
    ],
)
def test_columns_that_do_not_fit(row: dict[str, Any], columns: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        pairs.texts(pairs.flat(Dataset.from_list([row])), *columns)


@KINDS
def test_tokens_of_pairs(kind: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved(tmp_path, kind, layers=1, seed=0))
    begin, first = ([], 3) if kind == "t5" else ([0], 4)
    end = tokenizer.eos_token_id
    row, cut = pairs.rows([("w1 w2", "w3"), ("w1 w2 w3 w4 w5", "w1 w2 w3 w4")], tokenizer, 5, 4, prefix="w9 ")
    assert row == {
        "input_ids": [*begin, first + 9, first + 1, first + 2, end],
        "labels": [*begin, first + 3, end],
    }
    assert len(cut["input_ids"]) == 5
    assert len(cut["labels"]) == 4
    assert cut["input_ids"][-1] == cut["labels"][-1] == end


# ---- the recipe ----
@KINDS
def test_student_comes_closer_to_the_teacher(kind: str, recipe: seq2seq.Recipe, tmp_path: Path) -> None:
    shown, recipe = io.StringIO(), of(kind, recipe, tmp_path)
    results = runs.run(recipe, tmp_path / "run", Console(file=shown, width=100))
    assert list(results) == ["teacher", "start", "student"]
    assert results["teacher"]["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert results["student"]["kl_to_teacher"] < 0.5 * results["start"]["kl_to_teacher"]
    assert results["student"]["tokens_per_second"] > 0
    on_disk = (Path(str(recipe.teacher)) / "model.safetensors").stat().st_size / 1e6
    assert 1 > results["teacher"]["megabytes"] == on_disk > results["student"]["megabytes"] > 0.05
    assert results["start"]["megabytes"] == pytest.approx(results["student"]["megabytes"], rel=0.1)  # but its header
    assert f" {on_disk:.2f} " in shown.getvalue()
    student = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "student")
    decoder = {"t5": "num_decoder_layers", "bart": "decoder_layers"}[kind]
    assert (student.config.num_hidden_layers, getattr(student.config, decoder)) == (3, 2)
    assert results["student"]["parameters"] < results["teacher"]["parameters"]
    assert "pairs.jsonl: 54 training rows, 6 held out" in shown.getvalue()
    assert f" {results['student']['perplexity']:.2f} " in shown.getvalue()
    stored = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert stored["models"] == results
    assert stored["settings"] == recipe.as_dict()
    again = io.StringIO()
    assert runs.run(recipe, tmp_path / "run", Console(file=again, width=100)) == results
    assert again.getvalue() == shown.getvalue()


@KINDS
def test_measured_as_plain_torch_does(kind: str, recipe: seq2seq.Recipe, tmp_path: Path) -> None:
    run = prepared(of(kind, recipe, tmp_path), tmp_path / "run")
    models = {"teacher": run.teacher, "start": run.start}
    found, batch = run.quality(models), run.collate(run.test)
    check_per_token(found, models, lambda model, of: plain_pairs(model, run.teacher, batch, of), rel=1e-4, abs=1e-5)
    assert found["start"]["kl_to_teacher"] > 0.1


@KINDS
def test_training_follows_a_plain_loop(kind: str, recipe: seq2seq.Recipe, tmp_path: Path) -> None:
    run = prepared(dataclasses.replace(of(kind, recipe, tmp_path), alpha=0.7, temperature=2.0), tmp_path / "run")
    trainer, student = run.trainer(tmp_path / "run"), AutoModelForSeq2SeqLM.from_config(run.start.config).train()
    student.load_state_dict(run.start.state_dict())
    trainer.args.logging_steps, trainer.args.adam_epsilon, trainer.args.save_strategy = 1, EPSILON, "no"
    steps = trainer.args.max_steps = 8
    batches = list(trainer.get_train_dataloader())[:steps]
    decays = [("bias" not in name and "norm" not in name, p) for name, p in student.named_parameters()]
    groups = [{"params": [p for d, p in decays if d is on], "weight_decay": 0.01 * on} for on in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=5e-3, eps=EPSILON)
    schedule, losses = get_linear_schedule_with_warmup(optimizer, 1, steps), []
    for batch in batches:
        loss = plain_pairs(student, run.teacher, batch, run.recipe.objective())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    trainer.train()
    assert max(losses) > 1.05 * min(losses) > 0
    found = [event["loss"] for event in trainer.state.log_history if "loss" in event]
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-5)
    for (name, a), b in zip(trainer.model.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


class _Signal(TrainerCallback):
    """Sends Ctrl-C to this process in the middle of a step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 10:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("lora", [None, 4])
def test_stopped_run_continues_to_the_same_student(
    lora: int | None, recipe: seq2seq.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(recipe, lora=lora)
    expected = runs.run(recipe, tmp_path / "through", quiet())
    train_stage = stages.train_stage

    def stop(trainer: Any, *others: Any) -> Any:
        trainer.add_callback(_Signal())
        return train_stage(trainer, *others)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "train_stage", stop)
        with pytest.raises(stages.StageInterrupted):
            runs.run(recipe, tmp_path / "run", quiet())
    results = runs.run(recipe, tmp_path / "run", quiet())
    assert results["student"]["kl_to_teacher"] == expected["student"]["kl_to_teacher"]
    through, run = (AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name / "student") for name in ("through", "run"))
    assert all(torch.equal(a, b) for a, b in zip(through.parameters(), run.parameters(), strict=True))


@KINDS
def test_targets_that_the_teacher_writes(kind: str, recipe: seq2seq.Recipe, tmp_path: Path) -> None:
    """They are those of a search for each source alone, and searched for once."""
    recipe = dataclasses.replace(of(kind, recipe, tmp_path), targets="teacher", beams=3, epochs=1)
    run = prepared(recipe, tmp_path / "run")
    stages.write_config(tmp_path / "run", recipe.as_dict())
    sources = {str(row["input_ids"]): row["labels"] for row in run.train}
    run.train_teacher()
    lines = [json.loads(line) for line in (tmp_path / "run" / "targets.jsonl").read_text().splitlines()]
    assert len(lines) == 54
    labels = [of["tokens"] for of in lines if of["text"].strip()]  # not those of embeddings that are no token's
    assert len(labels) > 27
    assert [row["labels"] for row in run.train] == labels
    for row in run.train[::9]:
        ids = torch.tensor([row["input_ids"]])
        found = run.teacher.generate(ids, num_beams=3, do_sample=False, max_new_tokens=8)[0, 1:].tolist()
        assert row["labels"] == found
    assert any(row["labels"] != sources[str(row["input_ids"])] for row in run.train)
    written = (tmp_path / "run" / "targets.jsonl").read_text()
    (tmp_path / "run" / "targets.jsonl").write_text(written[: len(written) // 2])  # stopped in the middle of a line
    assert len(written[: len(written) // 2].splitlines()) > 16
    again = prepared(recipe, tmp_path / "run")
    again.train_teacher()
    assert again.train == run.train
    assert (tmp_path / "run" / "targets.jsonl").read_text() == written
    again.teacher.generate = None  # nothing is left to search
    again.train_teacher()
    assert again.train == run.train


def test_run_on_targets_of_the_teacher(recipe: seq2seq.Recipe, tmp_path: Path) -> None:
    """The baseline has the data's own, and no teacher."""
    teacher = str(saved(tmp_path / "writer", "t5", layers=3, seed=3))  # of text
    recipe = dataclasses.replace(recipe, teacher=teacher, targets="teacher", beams=2, baseline=True, epochs=6)
    results = runs.run(recipe, tmp_path / "run", quiet())
    assert list(results) == ["teacher", "start", "labels_only", "student"]
    assert results["student"]["kl_to_teacher"] < results["start"]["kl_to_teacher"]
    assert results["labels_only"]["perplexity"] < 0.9 * results["student"]["perplexity"]  # the teacher is random
    assert "targets.jsonl" in {path.name for path in (tmp_path / "run").iterdir()}
    told = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run")])
    assert told.exit_code == 2
    shown = re.sub(r"[│\s]+", " ", told.output)
    assert "expected a run of classifiers (hinton, " in shown
    assert "got one of seq2seq, whose table the run itself measures" in shown
    told = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run" / "student"), "--data", str(recipe.data)])
    assert told.exit_code == 2
    expected = (
        "got an encoder-decoder (T5ForConditionalGeneration), which only its run measures: kdfast distill seq2seq"
    )
    assert expected in re.sub(r"[│\s]+", " ", told.output)


def test_student_of_ones_own(recipe: seq2seq.Recipe, tmp_path: Path) -> None:
    """Narrower, with embeddings of a few tokens more, as some are padded."""
    own = saved(tmp_path / "own", "t5", layers=1, seed=3)
    t5(3, 1, std=None, d_model=16, vocab_size=70).save_pretrained(own)
    given = dataclasses.replace(recipe, student=str(own))
    assert prepared(given, tmp_path / "run").vocabulary == 64
    results = runs.run(given, tmp_path / "run", quiet())
    assert results["student"]["kl_to_teacher"] < results["start"]["kl_to_teacher"]
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "student").config.d_model == 16


@pytest.mark.parametrize(("library", "kind"), [("torchao", "t5"), ("bitsandbytes", "t5"), ("bitsandbytes", "bart")])
def test_quantised_teachers(library: str, kind: str, recipe: seq2seq.Recipe, tmp_path: Path) -> None:
    own = saved(tmp_path / "own", kind, layers=1, seed=3)
    check_run(library, AutoModelForSeq2SeqLM, of(kind, recipe, tmp_path), own, tmp_path)


@KINDS
def test_adapters_alone_are_trained_and_merged(kind: str, recipe: seq2seq.Recipe, tmp_path: Path) -> None:
    recipe = dataclasses.replace(of(kind, recipe, tmp_path), lora=4, baseline=True)
    results = runs.run(recipe, tmp_path / "run", quiet())
    assert results["student"]["kl_to_teacher"] < 0.9 * results["start"]["kl_to_teacher"]
    assert results["student"]["kl_to_teacher"] < results["labels_only"]["kl_to_teacher"]
    assert results["student"]["parameters"] == results["start"]["parameters"]
    run = prepared(recipe, tmp_path / "run")
    trained = {name for name, p in run.trained().named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in trained} == {"lora_A", "lora_B"}
    start, student = run.start, AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "student")
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, start.get_parameter(n))}
    assert changed == {name.split("base_model.model.")[1].split(".lora_")[0] + ".weight" for name in trained}


def test_chosen_layers(recipe: seq2seq.Recipe, tmp_path: Path) -> None:
    """In their order; one that is named twice is there in two copies."""
    chosen = dataclasses.replace(recipe, student_layers=(2, 0), decoder_layers=(1, 1))
    run = prepared(chosen, tmp_path / "run")
    theirs, ours = run.teacher.state_dict(), run.start.state_dict()
    inner = "layer.0.SelfAttention.q.weight"
    for side, layers in (("encoder", chosen.student_layers), ("decoder", chosen.decoder_layers)):
        for mine, its in enumerate(layers or ()):
            assert torch.equal(ours[f"{side}.block.{mine}.{inner}"], theirs[f"{side}.block.{its}.{inner}"])
    first, second = (ours[f"decoder.block.{mine}.{inner}"] for mine in (0, 1))
    assert first.data_ptr() != second.data_ptr()


def test_tables_and_folders_of_files(recipe: seq2seq.Recipe, tmp_path: Path) -> None:
    """CSV, with test rows of their own, of which one lacks its target; runs on them are compared."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, numbers in (("train", range(24)), ("test", range(24, 32))):
        with (folder / f"{name}.csv").open("w") as file:
            csv.writer(file).writerows([("document", "summary"), *map(pair, numbers)])
    with (folder / "test.csv").open("a") as file:
        file.write("w1 w2,\n")
    shown = io.StringIO()
    for name, seed in (("a", 0), ("b", 1)):
        short = dataclasses.replace(recipe, data=str(folder), epochs=1, seed=seed)
        runs.run(short, tmp_path / name, Console(file=shown, width=100))
    assert "data: 24 training rows, 8 held out" in shown.getvalue()
    assert "1 test rows without a source or a target are left out" in shown.getvalue()
    compared = compare([tmp_path / "a", tmp_path / "b"])
    assert (compared.metric, compared.family) == ("perplexity", "seq2seq")
    assert [row.model for row in compared.rows] == ["teacher", "start", "student"]
    assert len(compared.rows[2].values["perplexity"]) == 2
    other = runs.run(dataclasses.replace(recipe, epochs=1), tmp_path / "c", quiet())
    assert other
    with pytest.raises(ValueError, match=r"expected a run measured on the test rows of .* \(8 rows\), got 6 rows$"):
        compare([tmp_path / "a", tmp_path / "c"])
    bart = dataclasses.replace(of("bart", recipe, tmp_path), epochs=1)
    runs.run(bart, tmp_path / "d", quiet())
    with pytest.raises(ValueError, match=r"/d: expected the tokenizer of .*/c, got another; what is measured per"):
        compare([tmp_path / "c", tmp_path / "d"])


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"data": None}, "data: expected pairs of texts, a source and its target, a file, a folder or .*, got none$"),
        ({"data": None, "teacher": None}, "Hub name, got none; teacher: expected an encoder-decoder of text, a folder"),
        ({"teacher": None}, "teacher: expected an encoder-decoder of text, a folder or Hub name, got none"),
        ({"targets": "mine"}, "targets: expected one of data, teacher, got mine"),
        ({"beams": 0}, "beams: expected at least 1, got 0"),
        ({"lora": 0}, "lora: expected at least 1, got 0"),
        ({"divergence": "kl"}, "divergence: expected one of"),
        ({"student": "a", "decoder_layers": (0,)}, r"decoder_layers: expected none beside student, got \[0\]"),
        ({"student_layers": (3,)}, r"layers: expected numbers from 0 to 2, got \[3\]"),
        ({"decoder_layers": (0, 5)}, r"decoder_layers: expected numbers from 0 to 2, got \[0, 5\]"),
        ({"source_column": "text"}, "data: expected a column text, got columns source, target"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes(wrong: dict[str, Any], expected: str, recipe: seq2seq.Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=expected):
        prepared(dataclasses.replace(recipe, **wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_single_row(recipe: seq2seq.Recipe, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"source": "w1", "target": "w2"}')
    one = dataclasses.replace(recipe, data=str(tmp_path / "one.jsonl"))
    refused(one, tmp_path, f"data: expected at least 2 rows with text in {one.data}, got 1")


def test_adapters_need_peft(recipe: seq2seq.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    refused(dataclasses.replace(recipe, lora=4), tmp_path, "lora: expected peft to be installed, got none for rank 4")


def refused(recipe: seq2seq.Recipe, folder: Path, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)) as refusal:
        prepared(recipe, folder / "run")
    assert "\n" not in str(refusal.value)


def test_models_that_do_not_fit(recipe: seq2seq.Recipe, tmp_path: Path) -> None:
    other = of("bart", recipe, tmp_path)
    long = dataclasses.replace(other, max_target_length=65)
    refused(long, tmp_path, f"max_target_length: expected at most 64, the positions of teacher {other.teacher}, got 65")
    refused(dataclasses.replace(recipe, student=other.teacher), tmp_path, "expected the teacher's tokenizer, in which")
    with pytest.raises(ValueError, match=r"tokens differ\)$"):
        prepared(dataclasses.replace(recipe, student=other.teacher), tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(str(recipe.teacher))
    small = t5(0, 1, vocab_size=50)
    BartForSequenceClassification(bart(0, 1).config).save_pretrained(tmp_path / "classes")
    small.save_pretrained(tmp_path / "small")
    t5(0, 1, decoder_start_token_id=None).save_pretrained(tmp_path / "beginless")
    for name, expected in (
        ("beginless", "expected an encoder-decoder of text that takes these rows, got "),
        ("classes", "expected an encoder-decoder of text, got BartForSequenceClassification"),
        ("small", "expected a tokenizer of the 50 tokens that it knows, got one that made"),
    ):
        tokenizer.save_pretrained(tmp_path / name)
        wrong = dataclasses.replace(recipe, teacher=str(tmp_path / name))
        refused(wrong, tmp_path, f"teacher {tmp_path / name}: {expected}")
    far = [json.dumps({"source": "w1", "target": "w55"})] * 20
    (tmp_path / "far.jsonl").write_text("\n".join(far))
    wrong = dataclasses.replace(recipe, teacher=str(tmp_path / "small"), data=str(tmp_path / "far.jsonl"))
    refused(wrong, tmp_path, "expected targets of the 50 tokens that teacher and student know, got token 58")
