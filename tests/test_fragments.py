"""Code of the documentation that is of a reader's own models, tokenizers and files: here of tiny ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import language_models
import pytest
import tiny_berts
import tiny_models
import tiny_texts
import torch
import word_classifiers
from command_line import call
from documents import FRAGMENTS
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from kdfast import prune
from kdfast.data import demo
from kdfast.objective import Logits, Terms

HAVING = (
    "TeacherCache(",
    "TeacherCollator(",
    "TorchAoConfig(",
    "criteria.track(",
    "onnx.export(",
    "EncoderDecoderCache(",
)


@pytest.fixture(autouse=True)
def _folder_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(having: str, **names: Any) -> dict[str, Any]:
    """The names after the fragment that has this text."""
    (fragment,) = (one for one in FRAGMENTS if having in one)
    assert having in HAVING
    exec(compile(fragment, "fragment", "exec"), names)
    return names


def arguments(steps: int) -> TrainingArguments:
    return TrainingArguments("run", **{**language_models.ARGUMENTS, "max_steps": steps})


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """data.txt, and a language model of four layers with its tokenizer."""
    (tmp_path / "data.txt").write_text("\n\n".join(map(tiny_texts.sentence, range(24))))
    model = tiny_texts.causal(tmp_path)[demo.SMOLLM2.folder]
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(
        config.replace('"max_position_embeddings": 64', '"max_position_embeddings": 256')
    )
    return model


def test_all_are_here() -> None:
    assert [[having in one for having in HAVING].count(True) for one in FRAGMENTS] == [1] * len(HAVING)


def test_a_teacher_that_is_run_once(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "cache-teacher", texts, "data.txt", "cache", "--k", 64, "--temperature", 2, "--max-length", 256
    assert call(monkeypatch, *command) == 0
    tokenizer, student = AutoTokenizer.from_pretrained(texts), language_models.llama(1, 2)
    made = run("TeacherCache(", tokenizer=tokenizer, student=student, args=arguments(12))
    losses = tiny_berts.logged(made["trainer"], "kd")
    assert 0.01 < losses[-1] < losses[0]


def test_a_teacher_with_another_tokenizer(tmp_path: Path) -> None:
    words = word_classifiers.WORDS
    tokenizers = [word_classifiers.tokenizer(order) for order in (words, [*words[:3], *reversed(words[3:])])]
    made = run("TeacherCollator(", tokenizer=tokenizers[0], teacher_tokenizer=tokenizers[1])
    texts = ("good film", "bad the plot", "fine the film", "poor film")
    rows = [made["both"]({"text": text}) | {"labels": i % 2} for i, text in enumerate(texts)]
    assert rows[0]["input_ids"] != rows[0]["teacher_input_ids"]
    student, teacher = word_classifiers.bert(0), word_classifiers.bert(1)
    trainer = tiny_berts.trainer(
        tmp_path, student, rows, made["objective"], teacher=teacher, data_collator=made["collate"]
    )
    trainer.train()
    assert all(min(tiny_berts.logged(trainer, term)) > 1e-4 for term in ("kl", "cls", "ce"))


def test_a_quantised_teacher(texts: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "model").symlink_to(texts)
    run("TorchAoConfig(")
    whole, quantised = (AutoModelForCausalLM.from_pretrained(folder) for folder in (texts, "my/int8"))
    ids = torch.arange(3, 20)[None]
    expected, found = (model(ids).logits for model in (whole, quantised))
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()


def test_pruning_while_a_model_is_trained() -> None:
    student, teacher, rows = tiny_berts.bert(0), tiny_berts.bert(1), tiny_berts.rows(8)
    rows = [{**row, "input_ids": row["input_ids"][:3]} for row in rows]
    given = {"args": arguments(300), "objective": Terms(kl=Logits()), "rows": rows}
    made = run("criteria.track(", student=student, teacher=teacher, **given)
    alive = [int(sum(x.sum() for x in masks)) for masks in (made["pruning"].masks.heads, made["pruning"].masks.neurons)]
    assert alive == [3, 55]  # of 4 heads and 64 neurons: since step 200, 0.5 (1 - (1 - 200 / 2000)³) are gone
    assert made["smaller"].num_parameters() < student.num_parameters()


def test_into_onnx() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = tiny_models.make("bert").float()
    masks = prune.Masks.full(model)
    masks.heads[0][1:] = False
    smaller, batch = prune.compact(model, masks), tiny_models.batch(model)
    run("onnx.export(", torch=torch, smaller=smaller, batch=batch)
    session = onnxruntime.InferenceSession("smaller.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {of.name: batch[of.name].numpy() for of in session.get_inputs()})
    expected = smaller(**batch).logits.detach()
    assert expected.std() > 0.01
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)


def test_decoders_of_more_layers() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 3}
    student = T5ForConditionalGeneration(T5Config(vocab_size=20, decoder_start_token_id=0, **sizes)).eval()
    written: list[Any] = []
    write = student.generate
    student.generate = lambda **given: written.append(write(**given, max_new_tokens=6))
    run("EncoderDecoderCache(", student=student, inputs={"input_ids": torch.randint(2, 20, (2, 5))})
    assert written[0].shape[1] > 2
    assert torch.equal(*written)
