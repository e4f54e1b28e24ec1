"""The recipe of causal language models from end to end, on a tiny random Llama and made-up texts."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_texts
import torch
import yaml
from language_models import PAD, check_per_token, llama, plain_loss
from quantised import HOW, LIBRARIES, check_run
from rich.console import Console
from tiny_berts import bert
from tiny_texts import sentence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    TrainerCallback,
)

from kdfast import runs
from kdfast.data import demo, text
from kdfast.models import loading
from kdfast.recipes import causal_lm
from kdfast.runs import stages
from kdfast.runs.causal_lm import CausalLMRun
from kdfast.runs.language import per_token
from kdfast.teacher_cache._identity import tokenizer_sha256

SETTINGS = causal_lm.Recipe(
    student_layers=(0, 2), steps=12, learning_rate=1e-2, max_length=16, max_new_tokens=6, batch_size=4, test_rows=10
)


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_texts.causal(tmp_path_factory.mktemp("assets"))


@pytest.fixture(autouse=True)
def _no_download(assets: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "fetch", lambda package: assets[package.folder])


def _run(folder: Path, settings: causal_lm.Recipe = SETTINGS, fresh: bool = False) -> tuple[dict[str, Any], str]:
    shown = io.StringIO()
    return runs.run(settings, folder, Console(file=shown, width=80), fresh), shown.getvalue()


@pytest.mark.parametrize("on_policy", [0.0, 0.5], ids=["text", "on-policy"])
def test_student_comes_closer_to_the_teacher(tmp_path: Path, on_policy: float) -> None:
    results, shown = _run(tmp_path / "run", dataclasses.replace(SETTINGS, on_policy=on_policy))
    assert list(results) == ["teacher", "start", "student"]
    assert results["teacher"]["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert results["student"]["kl_to_teacher"] < results["start"]["kl_to_teacher"]
    assert results["student"]["perplexity"] < results["start"]["perplexity"]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "student",
        "config.yaml",
        "metrics.json",
        "learning_curve.png",
    }
    stored = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert stored["models"] == results
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["settings"] == config == dataclasses.replace(SETTINGS, on_policy=on_policy).as_dict()
    assert stored["training"]["tokens_per_second"] > 0
    assert stored["training"]["peak_memory_mb"] > 0
    assert stored["tokenizer"] == tokenizer_sha256(AutoTokenizer.from_pretrained(tmp_path / "run" / "student"))[:12]
    assert "demonstration: " in shown
    assert " training rows, 10 held out" in shown
    assert (tmp_path / "run" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert f" {results['student']['perplexity']:.2f} " in shown
    assert "…" not in shown
    assert _run(tmp_path / "run", dataclasses.replace(SETTINGS, on_policy=on_policy)) == (results, shown)


def test_measured_as_plain_torch_does(tmp_path: Path) -> None:
    run = CausalLMRun(SETTINGS, tmp_path, Console(file=io.StringIO()))
    run.prepare()
    models = {"teacher": run.teacher, "start": run.start}
    measured = per_token(models, run.test[:6], run.collate)
    batch = run.collate(run.test[:6])
    check_per_token(measured, models, lambda model, of: plain_loss(model, run.teacher, batch, of), rel=1e-5, abs=1e-6)


class _Signal(TrainerCallback):
    """Sends Ctrl-C to this process in the middle of a step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGINT)


def _stopped(folder: Path, settings: causal_lm.Recipe, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """A run that a signal stops while it trains; the names of the parameters that it trains."""
    train_stage, trained = stages.train_stage, set()

    def stop(trainer: Any, stage: Path, title: str, dtype: str) -> Any:
        trained.update(name for name, p in trainer.model.named_parameters() if p.requires_grad)
        trainer.add_callback(_Signal())
        return train_stage(trainer, stage, title, dtype)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "train_stage", stop)
        with pytest.raises(stages.StageInterrupted):
            _run(folder, settings)
    return trained


def test_stopped_run_continues_to_the_same_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(SETTINGS, on_policy=0.5)
    expected, _ = _run(tmp_path / "through", settings)
    _stopped(tmp_path / "run", settings, monkeypatch)
    results, _ = _run(tmp_path / "run", settings)
    assert results["student"]["kl_to_teacher"] == expected["student"]["kl_to_teacher"]
    students = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "student") for name in ("through", "run")]
    for a, b in zip(*(student.parameters() for student in students), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_adapters_alone_are_trained_and_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a run that was stopped and continued."""
    settings = dataclasses.replace(SETTINGS, lora=4, learning_rate=1e-2, steps=8)
    results, _ = _run(tmp_path / "through", settings)
    assert results["student"]["kl_to_teacher"] < results["start"]["kl_to_teacher"]
    assert results["student"]["parameters"] == results["start"]["parameters"]
    trained = _stopped(tmp_path / "run", settings, monkeypatch)
    assert {name.split(".")[-3] for name in trained} == {"lora_A", "lora_B"}
    _run(tmp_path / "run", settings)
    through, run = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "student") for name in ("through", "run"))
    start = llama(0, 4).model
    assert torch.equal(run.model.embed_tokens.weight, start.embed_tokens.weight)
    assert not torch.equal(run.model.layers[1].mlp.up_proj.weight, start.layers[2].mlp.up_proj.weight)
    for a, b in zip(through.parameters(), run.parameters(), strict=True):
        assert torch.equal(a, b)


def test_student_is_made_of_the_chosen_layers(tmp_path: Path) -> None:
    def start_of(layers: tuple[int, ...] | None) -> Any:
        run = CausalLMRun(dataclasses.replace(SETTINGS, student_layers=layers), tmp_path / "run", Console())
        run.prepare()
        return run.start.state_dict()

    teacher = llama(0, 4).model.layers
    for layers in ((0, 2), (3,), None):
        start = start_of(layers)
        for mine, its in enumerate((0, 3) if layers is None else layers):  # every third of four
            weight = teacher[its].mlp.up_proj.weight
            assert torch.equal(start[f"model.layers.{mine}.mlp.up_proj.weight"], weight)


def test_rows_of_files(tmp_path: Path) -> None:
    def rows_of(settings: causal_lm.Recipe) -> list[text.Row]:
        run = CausalLMRun(settings, tmp_path / "run", Console())
        run.prepare()
        assert len(run.test) == 2  # a tenth
        return run.train

    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"w{i} w1 ", "completion": f"w{i + 1}"}) for i in range(20))
    )
    rows = rows_of(dataclasses.replace(SETTINGS, data=str(tmp_path / "rows.jsonl")))
    assert len(rows) == 18
    assert all(row["labels"] == [-100, -100, *row["input_ids"][2:]] and row["input_ids"][-1] == PAD for row in rows)
    (tmp_path / "texts.txt").write_text("\n\n".join(sentence(i) for i in range(40)))
    settings = dataclasses.replace(SETTINGS, data=str(tmp_path / "texts.txt"))
    assert all(row["labels"] == row["input_ids"] and len(row["labels"]) == 16 for row in rows_of(settings))
    rows = rows_of(dataclasses.replace(settings, on_policy=1.0))
    assert all(row["labels"] == [-100] * 4 + row["input_ids"][4:] for row in rows)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"learning_rate": 2.0}, "learning_rate: expected above 0 and below 1, got 2.0"),
        ({"lora": 0}, "lora: expected at least 1, got 0"),
        ({"on_policy": -1.0}, "on_policy: expected 0 to 1, got -1"),
        ({"divergence": "kl"}, "divergence: expected one of"),
        ({"student_layers": (7,)}, "layers: expected numbers from 0 to 3, got"),
        ({"data": "no-such.jsonl"}, "data no-such.jsonl: expected a .jsonl file .*, got no file"),
        ({"teacher": "/no/such/model"}, "teacher /no/such/model: "),
        ({"max_length": 500}, "max_length: expected at most 64, the positions of teacher .*, got 500"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes(wrong: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        CausalLMRun(dataclasses.replace(SETTINGS, **wrong), tmp_path, Console()).prepare()
    assert not any(tmp_path.iterdir())


def _refused(folder: Path, expected: str, **wrong: Any) -> None:
    """Before anything is written, in one line."""
    with pytest.raises(ValueError, match=re.escape(expected)) as refusal:
        CausalLMRun(dataclasses.replace(SETTINGS, **wrong), folder, Console()).prepare()
    assert "\n" not in str(refusal.value)
    assert not folder.exists()


def test_files_that_are_no_text(tmp_path: Path) -> None:
    kinds = (
        "expected a .jsonl file with prompt and completion, or messages, in each line, or a text file with empty lines"
    )
    few = "expected 10 rows or more (of max_length 16 tokens where texts are packed), one in ten to hold out, got"
    for name, content, expected in (
        ("rows.csv", b"text,label\nw1 w2,1\n", f": {kinds} between the texts, got a file that ends in .csv"),
        ("rows.JSON", b"[]", f": {kinds}"),
        ("texts.txt.gz", gzip.compress(b"w1 w2"), f": {kinds}"),
        ("image.png", b"\x89PNG", ": expected text in UTF-8, got other bytes, the first at 0"),
        ("wide.txt", "w1 w2".encode("utf-16-le"), ": expected text in UTF-8, got a zero byte at character 1"),
        (
            "rows.jsonl",
            b'{"text": "w1"}',
            ':1: expected {"prompt": "...", "completion": "..."} or {"messages": [...]}, got {"text": "w1"}',
        ),
        ("one.jsonl", b'{"prompt": "w1", "completion": "w2"}', f": {few} 1"),
        ("texts.txt", b"w1 w2\n\nw3", f": {few} 0"),
    ):
        (tmp_path / name).write_bytes(content)
        _refused(tmp_path / "run", f"data {tmp_path / name}{expected}", data=str(tmp_path / name))
    _refused(tmp_path / "run", f"data {tmp_path}: {kinds} between the texts, got no file", data=str(tmp_path))


def test_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(path: Path, encoding: str | None = None) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    data = tmp_path / "texts.txt"
    data.touch()
    monkeypatch.setattr(Path, "read_text", read_text)
    expected = f"data {data}: expected a file that can be read, got permission denied"
    _refused(tmp_path / "run", expected, data=str(data))


def test_teachers_that_are_no_causal_language_models(assets: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets[demo.SMOLLM2.folder])
    decoder = bert(0, layers=3).config
    decoder.is_decoder = True
    no_model = ": expected a causal language model, got "
    for name, model, expected in (
        ("encoder", bert(0, kind=BertModel), no_model + "a model without cls.predictions.bias, "),
        # Has all the weights of BertLMHeadModel.
        (
            "masked",
            bert(0, kind=BertForMaskedLM),
            no_model + "one whose prediction of a token depends on the tokens after it",
        ),
        (
            "small",
            BertLMHeadModel(decoder),
            ": expected a tokenizer of the 40 tokens that it knows, got one that made 42",
        ),
        ("endless", llama(0, 2), ": expected a tokenizer with an end-of-text token (eos_token)"),
        ("mute", llama(0, 2), ": expected a model with a tokenizer, got one without; save it beside the model"),
    ):
        tokenizer.eos_token = None if name == "endless" else "<end>"
        model.save_pretrained(tmp_path / name)
        if name != "mute":
            tokenizer.save_pretrained(tmp_path / name)
        _refused(tmp_path / "run", f"teacher {tmp_path / name}{expected}", teacher=str(tmp_path / name))


def _student_of_ones_own(folder: Path, assets: dict[str, Path]) -> Path:
    """Narrower than the teacher, of two layers, with embeddings of a few tokens more, as some are padded."""
    config = AutoModelForCausalLM.from_pretrained(assets[demo.SMOLLM2.folder]).config
    config.update(
        {"hidden_size": 16, "intermediate_size": 24, "head_dim": 4, "num_hidden_layers": 2, "vocab_size": 304}
    )
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(assets[demo.SMOLLM2.folder]).save_pretrained(folder)
    return folder


def test_student_of_ones_own_on_conversations(assets: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(assets[demo.SMOLLM2.folder], tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' <end> ' }}{% endfor %}"
    tokenizer.save_pretrained(source)
    turns = [[("user", f"w{i} w{i + 1}"), ("assistant", sentence(i))] for i in range(30)]
    talks = [{"messages": [{"role": role, "content": said} for role, said in talk]} for talk in turns]
    (tmp_path / "talks.jsonl").write_text("\n".join(json.dumps(talk) for talk in talks))
    settings = dataclasses.replace(
        SETTINGS,
        student=str(_student_of_ones_own(tmp_path / "own", assets)),
        student_layers=None,
        teacher=str(source),
        data=str(tmp_path / "talks.jsonl"),
        steps=20,
    )
    run = CausalLMRun(settings, tmp_path / "run", Console(file=io.StringIO()))
    run.prepare()
    assert run.vocabulary == 301
    assert all(row["labels"] == [-100] * 3 + row["input_ids"][3:] and row["input_ids"][-1] == PAD for row in run.train)
    results, _ = _run(tmp_path / "run", settings)
    assert results["student"]["kl_to_teacher"] < results["start"]["kl_to_teacher"]
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert student.config.hidden_size == 16
    assert student.config.vocab_size == 304


def test_students_that_do_not_fit(assets: dict[str, Path], tmp_path: Path) -> None:
    own, other = _student_of_ones_own(tmp_path / "own", assets), tmp_path / "other"
    with pytest.raises(ValueError, match=r"student_layers: expected none beside student, got \[0, 2\]"):
        dataclasses.replace(SETTINGS, student=str(own))
    tokenizer = AutoTokenizer.from_pretrained(assets[demo.SMOLLM2.folder])
    bert(0, kind=BertForMaskedLM).save_pretrained(other)
    tokenizer.save_pretrained(other)
    expected = f"student {other}: expected a causal language model, got one whose prediction of a token depends"
    _refused(tmp_path / "run", expected, student=str(other), student_layers=None)
    state = json.loads((other / "tokenizer.json").read_text())
    words = state["model"]["vocab"]
    words["w1"], words["w2"] = words["w2"], words["w1"]
    (own / "tokenizer.json").write_text(json.dumps(state))
    expected = f"student {own}: expected the teacher's tokenizer, in which 'w1' is token 4, got one in which it is 5"
    _refused(tmp_path / "run", expected, student=str(own), student_layers=None)


@LIBRARIES
def test_quantised_teachers(library: str, assets: dict[str, Path], tmp_path: Path) -> None:
    recipe = dataclasses.replace(SETTINGS, teacher=str(assets[demo.SMOLLM2.folder]), student_layers=None)
    check_run(library, AutoModelForCausalLM, recipe, _student_of_ones_own(tmp_path / "own", assets), tmp_path)


@LIBRARIES
def test_quantised_teachers_need_their_library(
    library: str, assets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(assets[demo.SMOLLM2.folder], tmp_path / "teacher")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": library, **HOW[library]}
    (source / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    expected = f"teacher {source}: expected {library}, which quantised it, to be installed, got none"
    _refused(tmp_path / "run", expected, teacher=str(source), student=str(tmp_path / "own"), student_layers=None)
