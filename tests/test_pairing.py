"""Models, tokenizers and rows that do not belong together are refused before anything is trained; classifiers of decoders."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_berts
import torch
from command_line import call, refused
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BloomConfig,
    BloomForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PhiConfig,
    PhiForSequenceClassification,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5EncoderModel,
    XLNetConfig,
    XLNetForSequenceClassification,
)
from word_classifiers import LIMIT, SIZES, WIDE, WORDS, bert, run, save, tokenizer, write_reviews

from kdfast.data import tasks
from kdfast.models import pairing
from kdfast.recipes import hinton, minilm
from kdfast.results import measure
from kdfast.runs import stages


@pytest.fixture
def reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return write_reviews(tmp_path / "reviews.csv")


# ---- tokenizers
def test_tokens_have_the_teachers_numbers() -> None:
    teachers = tokenizer()
    for own in (tokenizer(), tokenizer(model_max_length=8, padding_side="left"), tokenizer([*WORDS, "more"])):
        own("good film", truncation=True, max_length=4)  # which a tokenizer remembers
        pairing.check_tokens("student s", own, teachers)
    expected = "student s: expected the teacher's tokenizer,"
    for order, message in (
        ([*WORDS[:3], *WORDS[:2:-1]], "in which 'good' is token 3, got one in which it is 9 (6 tokens differ)"),
        (WORDS[:-1], "in which 'the' is token 9, got one in which it is none (1 tokens differ)"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(f'{expected} {message}; this')}$"):
            pairing.check_tokens("student s", tokenizer(order), teachers, "; this")


@pytest.mark.parametrize("argument", ["student", "base"])
def test_another_tokenizer_of_equal_size_is_refused(
    argument: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "train_stage", lambda *a: pytest.fail("trained"))
    teacher = save(tmp_path / "teacher", bert(0))
    other = save(tmp_path / "other", bert(1), tokenizer([*WORDS[:3], *WORDS[:2:-1]]))
    command = ["distill", "minilm", "--data", reviews, "--teacher", teacher, f"--{argument}", other]

    def message(*arguments: object) -> str:
        assert call(monkeypatch, *arguments, "--max-length", 16, "--output", tmp_path / "run") == 2
        told: str = capsys.readouterr().err
        assert told.splitlines()[-1].startswith("kdfast: ")
        return told.splitlines()[-1]

    expected = (
        f"{argument} {other}: expected the teacher's tokenizer, in which 'good' is token 3, got one in which it is 9"
    )
    assert expected in (found := message(*command))
    assert "(6 tokens differ); multi-teacher, of one teacher or more, compares whole sequences of other tokens" in found
    bare = tmp_path / "bare"
    bert(1).save_pretrained(bare)
    assert (
        f"{argument} {bare}: expected a model with a tokenizer, got one without; save it beside the model"
        in message(*command[:-1], bare)
    )
    assert not (tmp_path / "run").exists()


def test_student_with_the_teachers_tokenizer_and_more_rows(reviews: str, tmp_path: Path) -> None:
    """Embeddings may be padded to another number of rows; what counts are the tokens."""
    teacher = save(tmp_path / "teacher", bert(0))
    student = save(tmp_path / "student", bert(1, vocab_size=16, num_hidden_layers=1))
    recipe = hinton.Recipe(data=reviews, teacher=teacher, student=student, max_length=16, epochs=1, baseline=False)
    run(tmp_path / "run", recipe)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student")
    assert saved.get_input_embeddings().num_embeddings == 16
    start = AutoModelForSequenceClassification.from_pretrained(student)
    assert torch.equal(saved.get_input_embeddings().weight, start.get_input_embeddings().weight)  # frozen
    few = save(tmp_path / "few", bert(1, vocab_size=8))
    with pytest.raises(
        ValueError, match="few: expected a tokenizer of the 8 tokens that it knows, got one that made 9"
    ):
        run(tmp_path / "again", dataclasses.replace(recipe, student=few))


# ---- positions
def deberta(**options: Any) -> Any:
    return DebertaV2ForSequenceClassification(
        DebertaV2Config(**SIZES, **WIDE, max_position_embeddings=LIMIT, **options)
    )


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (bert(0), LIMIT),
        (RobertaForSequenceClassification(RobertaConfig(**SIZES, max_position_embeddings=LIMIT, pad_token_id=1)), LIMIT - 2),
        (GPT2ForSequenceClassification(GPT2Config(vocab_size=10, n_embd=16, n_layer=1, n_head=2, n_positions=LIMIT)), LIMIT),
        (LlamaForSequenceClassification(LlamaConfig(**SIZES, **WIDE, max_position_embeddings=LIMIT)), LIMIT),
        (BloomForSequenceClassification(BloomConfig(vocab_size=10, hidden_size=16, n_layer=1, n_head=2)), None),
        (T5EncoderModel(T5Config(vocab_size=10, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)), None),
        (XLNetForSequenceClassification(XLNetConfig(vocab_size=10, d_model=16, n_layer=1, n_head=2, d_inner=16)), None),
        (deberta(position_biased_input=False, relative_attention=True), None),
        (deberta(position_biased_input=True), LIMIT),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
@torch.no_grad()
def test_positions_are_what_a_model_takes(model: Any, expected: int | None) -> None:
    assert pairing.positions(model) == expected
    longest = 3 * LIMIT if expected is None else expected
    model.eval()(input_ids=torch.full((1, longest), 5))
    if expected is not None and not isinstance(model, LlamaForSequenceClassification):  # whose positions are computed
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, longest + 1), 5))
        with pytest.raises(
            ValueError, match=f"^max_length: expected at most {expected}, the positions of it, got {expected + 1}$"
        ):
            pairing.check_length("it", model, expected + 1)
    pairing.check_length("it", model, longest)


@pytest.mark.parametrize("limit", [{}, {"max_position_embeddings": None}, {"max_position_embeddings": -1}])
def test_no_positions_in_the_config(limit: dict[str, Any]) -> None:
    model = SimpleNamespace(config=PreTrainedConfig(**limit), base_model=torch.nn.Linear(1, 1))
    assert pairing.positions(model) is None
    pairing.check_length("it", model, 10**6)


@pytest.mark.parametrize("short", ["teacher", "base", "student"])
def test_rows_longer_than_positions_are_refused_up_front(
    short: str, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "train_stage", lambda *a: pytest.fail("trained"))
    given = {
        name: save(tmp_path / name, bert(i, max_position_embeddings=12 if name == short else LIMIT))
        for i, name in enumerate(("teacher", "base", "student"))
    }
    recipe = minilm.Recipe(data=reviews, **given, max_length=13)
    expected = f"^max_length: expected at most 12, the positions of {short} {re.escape(given[short])}, got 13$"
    with pytest.raises(ValueError, match=expected):
        run(tmp_path / "run", recipe)
    if short == "student":
        narrow = dataclasses.replace(recipe, student=None, student_config="max_position_embeddings=12")
        with pytest.raises(ValueError, match=r"^max_length: expected at most 12, the positions of student, got 13$"):
            run(tmp_path / "run", narrow)
    assert not (tmp_path / "run").exists()


def test_cached_rows_are_as_long_as_the_model_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    model = save(
        tmp_path / "model", RobertaForSequenceClassification(RobertaConfig(**SIZES, max_position_embeddings=LIMIT))
    )
    (tmp_path / "rows.txt").write_text("\n".join(["good film " * 30, "bad film"]))
    command = ["cache-teacher", model, tmp_path / "rows.txt", tmp_path / "cache", "--outputs", "logits"]
    message = refused(monkeypatch, capsys, *command, "--max-length", LIMIT - 1)
    assert f"max_length: expected at most {LIMIT - 2}, the positions of {model}, got {LIMIT - 1}" in message
    assert call(monkeypatch, *command) == 0
    assert json.loads((tmp_path / "cache" / "manifest.json").read_text())["tokens"] == LIMIT - 2 + 2


# ---- padding
NONE = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": 2, "max_position_embeddings": LIMIT}
DECODERS = {
    "gpt2": lambda: GPT2ForSequenceClassification(GPT2Config(**SIZES, **NONE)),
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES, **WIDE, **NONE)),
    "qwen3": lambda: Qwen3ForSequenceClassification(Qwen3Config(**SIZES, **WIDE, **NONE, head_dim=8, num_key_value_heads=2)),
    "phi": lambda: PhiForSequenceClassification(PhiConfig(**SIZES, **WIDE, **NONE)),
    "neox": lambda: GPTNeoXForSequenceClassification(GPTNeoXConfig(**SIZES, **WIDE, **NONE)),
}  # fmt: skip


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("configured", [None, 3])
def test_classifiers_of_decoders(kind: str, configured: int | None, reviews: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DECODERS[kind]().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.config.pad_token_id = configured  # 3 is a word: rows that end in it would lose it
    teacher = save(tmp_path / "teacher", model)
    recipe = hinton.Recipe(
        data=reviews, teacher=teacher, student_layers=(0,), max_length=16, batch_size=8, learning_rate=1e-3, baseline=False
    )  # fmt: skip
    results, _ = run(tmp_path / "run", recipe)
    assert AutoConfig.from_pretrained(tmp_path / "run" / "student").pad_token_id == 0
    test = tasks.load(reviews).test
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student").eval()
    logits = []
    with torch.no_grad():
        for it in (model, student):
            it.config.pad_token_id = None  # rows on their own have none
            logits.append(torch.cat([it(**tokenizer()(text, return_tensors="pt")).logits for text in test["text"]]))
    right = [(of.argmax(-1) == torch.tensor(test["labels"])).float().mean().item() for of in logits]
    assert [results[name]["accuracy"] for name in ("teacher", "student")] == pytest.approx(right)
    apart = torch.nn.functional.kl_div(
        logits[1].log_softmax(-1), logits[0].log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert apart > 1e-4
    assert results["student"]["kl_to_teacher"] == pytest.approx(apart.item(), rel=1e-3)
    measured = measure.evaluate({"teacher": teacher}, tasks.load(reviews), max_length=16)
    assert measured["teacher"]["accuracy"] == pytest.approx(right[0])


def test_tokenizers_without_a_pad_token_that_the_model_knows(reviews: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = tasks.load(reviews)
    for name, words, expected in (
        ("without", tokenizer(pad=None), "without: expected a tokenizer with a pad token, got one without; set its pad_token"),
        ("new", tokenizer(pad="<new>"), "new: expected a tokenizer of the 10 tokens that it knows, got one that made 10"),
    ):  # fmt: skip
        source = save(tmp_path / name, DECODERS["gpt2"](), words)
        with pytest.raises(ValueError, match=expected) as refusal:
            measure.evaluate({"it": source}, task, max_length=16)
        assert "\n" not in str(refusal.value)
        with pytest.raises(ValueError, match=f"teacher {tmp_path}/{expected}"):
            run(tmp_path / "run", hinton.Recipe(data=reviews, teacher=source, max_length=16))
    assert not (tmp_path / "run").exists()


def test_positions_that_are_counted_from_the_padding_keep_theirs(tmp_path: Path) -> None:
    sizes = {**SIZES, "max_position_embeddings": LIMIT}
    model = RobertaForSequenceClassification(RobertaConfig(**sizes, pad_token_id=1))
    pairing.pad_alike("it", model, tokenizer())
    assert model.config.pad_token_id == 1
    model = bert(0, pad_token_id=None)
    pairing.pad_alike("it", model, tokenizer(pad="film"))
    assert model.config.pad_token_id == WORDS.index("film")


def test_bert_of_the_tests_has_positions() -> None:
    assert pairing.positions(tiny_berts.bert(0)) == 16
