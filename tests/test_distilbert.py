"""The recipe of DistilBERT: against a plain torch loop, and from end to end, on a tiny random BERT and made-up glosses."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_texts
import torch
import torch.nn.functional as F
import yaml
from rich.console import Console
from tiny_texts import SMALL, gloss
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    RobertaConfig,
    RobertaForMaskedLM,
    TrainerCallback,
)

from kdfast import runs
from kdfast.cli import main
from kdfast.data import demo
from kdfast.recipes import distilbert
from kdfast.runs import stages
from kdfast.runs.distilbert import DistilBERTRun, MaskedTokens

SHORT = distilbert.Recipe(
    teacher_steps=120, steps=60, batch_size=8, max_length=24, test_rows=40, learning_rate=5e-3, dropout=0.0
)


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An encoder of four layers with its tokenizer, the same as a masked language model, and WordNet's files."""
    return tiny_texts.masked(tmp_path_factory.mktemp("assets"))


pytestmark = pytest.mark.usefixtures("no_download")


def _run(folder: Path, recipe: distilbert.Recipe = SHORT, fresh: bool = False) -> tuple[dict[str, Any], str]:
    shown = io.StringIO()
    return runs.run(recipe, folder, Console(file=shown, width=80), fresh), shown.getvalue()


def _prepared(folder: Path, recipe: distilbert.Recipe) -> DistilBERTRun:
    run = DistilBERTRun(recipe, folder, Console(file=io.StringIO()))
    run.prepare()
    return run


@pytest.fixture(scope="module")
def finished(assets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "fetch", lambda package: assets[package.requirement])
        return folder, *_run(folder)


Finished = tuple[Path, dict[str, Any], str]


def test_student_comes_closer_to_the_teacher(finished: Finished) -> None:
    _, results, _ = finished
    assert list(results) == ["teacher", "start", "student"]
    assert results["teacher"]["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert results["teacher"]["perplexity"] < 20  # of 45 words
    assert results["student"]["kl_to_teacher"] < results["start"]["kl_to_teacher"] / 2
    assert results["student"]["perplexity"] < results["start"]["perplexity"] / 2
    assert results["student"]["accuracy"] > results["start"]["accuracy"]


def test_what_is_left_behind(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, results, shown = finished
    names = {"teacher", "student", "config.yaml", "metrics.json", "learning_curve.png"}
    assert {path.name for path in folder.iterdir()} == names
    stored = json.loads((folder / "metrics.json").read_text())
    assert stored["models"] == results
    assert stored["settings"] == yaml.safe_load((folder / "config.yaml").read_text()) == SHORT.as_dict()
    assert distilbert.Recipe(**distilbert.Recipe.read_yaml(folder / "config.yaml")) == SHORT
    assert stored["training"]["tokens_per_second"] > 0
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    student = results["student"]
    for cell in (f"{student['perplexity']:.2f}", f"{100 * student['accuracy']:.1f}", f"{student['kl_to_teacher']:.4f}"):
        assert f" {cell} " in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    monkeypatch.setattr(stages, "train_stage", None)  # which would be repeating
    assert _run(folder) == (results, shown)


def test_saved_student_is_the_measured_one(finished: Finished) -> None:
    folder, results, _ = finished
    teacher, student = (AutoModelForMaskedLM.from_pretrained(folder / name).eval() for name in ("teacher", "student"))
    assert type(student).__name__ == "DistilBertForMaskedLM"
    assert student.config.num_hidden_layers == 2
    a, b = student.get_position_embeddings().weight, teacher.bert.embeddings.position_embeddings.weight
    assert torch.equal(a, b)
    assert not torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    run = _prepared(folder, SHORT)
    assert AutoTokenizer.from_pretrained(folder / "student").get_vocab() == run.tokenizer.get_vocab()
    masked, right, loss, kl, tokens = 0, 0, 0.0, 0.0, 0
    for start in range(0, len(run.test), 16):
        batch = run.evenly(run.test[start : start + 16])
        own = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            s, t = student(**own).logits.log_softmax(-1), teacher(**own).logits.log_softmax(-1)
        on, real = batch["labels"] != -100, batch["attention_mask"].bool()
        masked, tokens = masked + int(on.sum()), tokens + int(real.sum())
        right += int((s[on].argmax(-1) == batch["labels"][on]).sum())
        loss += F.nll_loss(s[on], batch["labels"][on], reduction="sum").item()
        kl += (t.exp() * (t - s)).sum(-1)[real].sum().item()
    measured = results["student"]
    assert masked > 50
    assert measured["accuracy"] == pytest.approx(right / masked)
    assert measured["perplexity"] == pytest.approx(torch.tensor(loss / masked).exp().item(), rel=1e-4)
    assert measured["kl_to_teacher"] == pytest.approx(kl / tokens, rel=1e-4)
    assert measured["parameters"] == sum(p.numel() for p in student.parameters())
    assert measured["megabytes"] == pytest.approx((folder / "student/model.safetensors").stat().st_size / 1e6)


# ---- the losses, written out ----
def _plain_loss(student: Any, teacher: Any, batch: dict[str, Tensor], r: distilbert.Recipe) -> list[tuple[Tensor, int]]:
    """Each term's weighted sum, and the number that it is to be divided by."""
    own = {name: batch[name] for name in ("input_ids", "attention_mask")}
    s = student(**own, output_hidden_states=True)
    with torch.no_grad():
        t = teacher(**own, output_hidden_states=True)
    real, on = batch["attention_mask"].bool(), batch["labels"] != -100
    of = on if r.restrict_ce_to_mask else real
    p, log_p = (t.logits[of] / r.temperature).softmax(-1), (t.logits[of] / r.temperature).log_softmax(-1)
    kl = (p * (log_p - (s.logits[of] / r.temperature).log_softmax(-1))).sum()
    masked = -s.logits[on].log_softmax(-1)[torch.arange(int(on.sum())), batch["labels"][on]].sum()
    a, b = s.hidden_states[-1][real], t.hidden_states[-1][real]
    distance = (1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).sum()
    squares = ((s.logits[of] - t.logits[of]) ** 2).sum()
    return [
        (r.ce_weight * r.temperature**2 * kl, int(of.sum())),
        (r.mlm_weight * masked, int(on.sum())),
        (r.cosine_weight * distance, int(real.sum())),
        (r.mse_weight * squares, int(of.sum())),
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"restrict_ce_to_mask": True, "mse_weight": 0.01, "temperature": 3.0, "mask_smoothing": 0.0},
        # Micro-batches with unequal numbers of tokens count as one batch; a term that is off is not logged.
        {"ce_weight": 0.33, "mlm_weight": 0.33, "cosine_weight": 0.0, "accumulation": 2, "weight_decay": 0.01},
        {"freeze_positions": False, "vocab_transform": True, "student_layers": (3, 0), "max_grad_norm": 0.1},
    ],
    ids=["5-2-1", "restricted", "accumulated", "layers"],
)
def test_as_a_plain_torch_loop(changes: dict[str, Any], assets: dict[str, Path], tmp_path: Path) -> None:
    r = dataclasses.replace(
        SHORT,
        teacher=str(assets["masked-lm"]),
        steps=20,
        batch_size=6,
        learning_rate=1e-3,
        precision="float32",
        **changes,
    )
    run = _prepared(tmp_path, r)
    trainer = run.trainer(tmp_path / "student")
    batches = list(trainer.get_train_dataloader())
    trainer.train()
    history = [event for event in trainer.state.log_history if "loss" in event]
    weights = {"ce": r.ce_weight, "mlm": r.mlm_weight, "cos": r.cosine_weight, "mse": r.mse_weight}
    assert {name for name in weights if name in history[0]} == {name for name, weight in weights.items() if weight}

    student, teacher = run.start.train(), AutoModelForMaskedLM.from_pretrained(assets["masked-lm"]).eval()
    trained = [p for p in student.parameters() if p.requires_grad]
    assert len(trained) == len(list(student.parameters())) - r.freeze_positions
    groups = [  # LayerNorms and biases do not decay
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": r.weight_decay},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)
    expected = []
    for step in range(20):
        for group in optimizer.param_groups:  # one step of warm-up, then down to 0
            group["lr"] = r.learning_rate * (step if step < 1 else (20 - step) / 19)
        parts = [
            _plain_loss(student, teacher, batch, r)
            for batch in batches[step * r.accumulation : (step + 1) * r.accumulation]
        ]
        loss = sum(sum(value for value, _ in term) / sum(n for _, n in term) for term in zip(*parts, strict=True))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, r.max_grad_norm)
        optimizer.step()
        expected.append(loss.item())
    assert [event["loss"] for event in history] == pytest.approx(expected, rel=1e-5)
    for (name, a), b in zip(trainer.model.named_parameters(), student.parameters(), strict=True):
        if not name.endswith("k_lin.bias"):  # whose gradient is zero but for rounding
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_teacher_is_trained_on_the_masked_tokens(assets: dict[str, Path], tmp_path: Path) -> None:
    run = _prepared(tmp_path, SHORT)
    model = AutoModelForMaskedLM.from_pretrained(assets["masked-lm"]).eval()
    batch = run.evenly([run.train[i] for i in range(7)])
    objective = MaskedTokens()
    loss = objective(objective.run(model, batch), None, batch)["mlm"]
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = model(**batch).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for gradient, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-6)
    assert objective.num_items(batch) == (batch["labels"] != -100).sum()


# ---- runs that are stopped ----
class _Signal(TrainerCallback):
    """Sends Ctrl-C to this process in the middle of a step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)


def test_stopped_run_continues_to_the_same_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(SHORT, teacher_steps=10, steps=12, dropout=0.1, train_rows=60)  # 8 steps an epoch
    expected, _ = _run(tmp_path / "through", recipe)
    train_stage, begun = stages.train_stage, []

    def stopped_once(trainer: Any, folder: Path, title: str, dtype: str = "float32") -> Any:
        if folder.name not in begun:
            trainer.add_callback(_Signal())
        begun.append(folder.name)
        return train_stage(trainer, folder, title, dtype)

    monkeypatch.setattr(stages, "train_stage", stopped_once)
    for _ in range(2):
        with pytest.raises(stages.StageInterrupted):
            _run(tmp_path / "run", recipe)
    results, _ = _run(tmp_path / "run", recipe)
    assert begun == ["teacher", "teacher", "student", "student"]
    for name in expected:
        assert results[name]["kl_to_teacher"] == expected[name]["kl_to_teacher"]
    for stage in ("teacher", "student"):
        a, b = (AutoModelForMaskedLM.from_pretrained(tmp_path / of / stage) for of in ("through", "run"))
        for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
            assert torch.equal(x, y), f"{stage}: {name}"


# ---- data, other teachers, mistakes ----
def test_rows_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n\n".join([gloss(i).replace(" ", "\n", 1) for i in range(100)] + ["wa"]))
    run = _prepared(tmp_path / "run", dataclasses.replace(SHORT, data=str(tmp_path / "texts.txt"), steps=None))
    assert len(run.test) == 10  # a tenth
    assert len(run.train) == 90
    known = run.tokenizer.get_vocab()
    rows = [row["input_ids"] for row in [*run.train, *run.test]]
    wanted = [[known[word] for word in f"[CLS] {gloss(i)} [SEP]".split()] for i in range(100)]
    assert sorted(rows) == sorted(wanted)
    (note,) = run.notes  # of the one short text
    assert note.endswith("texts: 1 of 91 rows have fewer than 12 tokens, or mostly unknown ones, and are left out")
    assert run.trainer(tmp_path / "student").args.max_steps == 3 * 12  # passes of 90 rows
    fewer = _prepared(tmp_path / "run", dataclasses.replace(SHORT, data=str(tmp_path / "texts.txt"), train_rows=20))
    assert len(fewer.train) == 20
    assert fewer.test == run.test


def test_teacher_of_another_architecture(assets: dict[str, Path], tmp_path: Path) -> None:
    sizes = {**SMALL, "pad_token_id": 0}
    RobertaForMaskedLM(RobertaConfig(num_hidden_layers=4, **sizes)).save_pretrained(tmp_path / "roberta")
    AutoTokenizer.from_pretrained(assets["masked-lm"]).save_pretrained(tmp_path / "roberta")
    recipe = dataclasses.replace(SHORT, teacher=str(tmp_path / "roberta"), steps=4, train_rows=40, max_length=20)
    results, _ = _run(tmp_path / "run", recipe)
    student = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "student")
    teacher = AutoModelForMaskedLM.from_pretrained(tmp_path / "roberta")
    assert type(student) is RobertaForMaskedLM
    assert student.config.num_hidden_layers == 2
    assert results["student"]["kl_to_teacher"] < results["start"]["kl_to_teacher"]
    a, b = (m.roberta.embeddings.position_embeddings.weight for m in (student, teacher))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"learning_rate": 2.0}, "learning_rate: expected above 0 and below 1, got 2.0"),
        ({"dropout": 1.0}, "dropout: expected 0 or more and less than 1"),
        ({"temperature": 0.0}, "temperature: expected a positive number"),
        ({"mask_probability": 1.5}, "mask_probability: expected 0 to 1"),
        ({"mlm_weight": -1.0}, "mlm_weight: expected at least 0"),
        (
            {"ce_weight": 0.0, "mlm_weight": 0.0, "cosine_weight": 0.0},
            "^ce_weight, mlm_weight, .*: expected a positive one",
        ),
        ({"student_layers": (7,)}, "layers: expected numbers from 0 to 3, got"),
        ({"data": "no-such.txt"}, "data no-such.txt: expected a text file .*, got no file"),
        ({"teacher": "/no/such/model"}, "teacher /no/such/model: "),
        ({"max_length": 500}, "max_length: expected at most 32, the positions of teacher .*, got 500"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes(wrong: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        _run(tmp_path, dataclasses.replace(SHORT, **wrong))
    assert not any(tmp_path.iterdir())


def test_teacher_without_a_head_and_short_texts(assets: dict[str, Path], tmp_path: Path) -> None:
    encoder = dataclasses.replace(SHORT, teacher=str(assets[demo.MINILM.requirement]))
    with pytest.raises(
        ValueError, match=r"expected a masked language model, got a model without cls\.predictions\.bias"
    ):
        _prepared(tmp_path / "run", encoder)
    maskless = tmp_path / "maskless"
    AutoModelForMaskedLM.from_pretrained(assets["masked-lm"]).save_pretrained(maskless)
    tokenizer = AutoTokenizer.from_pretrained(assets["masked-lm"])
    tokenizer.mask_token = None
    tokenizer.save_pretrained(maskless)
    with pytest.raises(ValueError, match="maskless: expected a tokenizer with a mask_token, got one without"):
        _prepared(tmp_path / "run", dataclasses.replace(SHORT, teacher=str(maskless)))
    for name, content, expected in (
        ("short.txt", b"wa wb\n\n" * 50, "expected texts of at least 12 tokens that the teacher knows, to train on"),
        (
            "lines.txt",
            gloss(1).encode() + b"\n" * 50,
            "expected at least 10 texts with empty lines between them, a te",
        ),
        (
            "rows.tsv",
            b"wa\twb",
            "expected a text file with empty lines between the texts, got a file that ends in .tsv",
        ),
        (
            "rows.jsonl",
            b"{}",
            "expected a text file with empty lines between the texts, got a file that ends in .jsonl",
        ),
        ("image.png", b"\x89PNG", "expected text in UTF-8, got other bytes, the first at 0"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"data {tmp_path / name}: {expected}")):
            _prepared(tmp_path / "run", dataclasses.replace(SHORT, data=str(tmp_path / name)))
    assert not (tmp_path / "run").exists()


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kdfast", "distill", "distilbert", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main.main()
        return exit_.value.code or 0, *capsys.readouterr()

    monkeypatch.setenv("COLUMNS", "120")
    status, shown, _ = run("--help")
    assert status == 0
    for option in ("--ce-weight", "--restrict-ce-to-mask", "--vocab-transform", "--quick", "--resume"):
        assert option in shown
    status, shown, _ = run("--print-config", "--ce-weight", ".33", "--student-layers", "0,3")
    assert (status, yaml.safe_load(shown)["ce_weight"], yaml.safe_load(shown)["student_layers"]) == (0, 0.33, [0, 3])
    for wrong in (["--temperature", "0"], ["--data", "no-such.txt", "--output", str(tmp_path / "run")]):
        status, shown, told = run(*wrong)
        assert (status, shown, told.count("\n")) == (2, "", 1)
