"""Folders that hold another kind of model than a recipe's, or no tokenizer, told in one line for all recipes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_pairs import bart, t5
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    BartTokenizer,
    BertConfig,
    BertForSequenceClassification,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    T5Tokenizer,
)

from kdfast.models.loading import load_tokenizer, pretrained

TINY = {"vocab_size": 64, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def model_of(kind: str) -> Any:
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **TINY))
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(intermediate_size=8, **TINY))
    return {"t5": t5, "bart": bart}[kind](0, 1)


@pytest.mark.parametrize(
    ("auto", "kind", "expected"),
    [
        (
            AutoModelForSeq2SeqLM,
            "gpt2",
            "an encoder-decoder (AutoModelForSeq2SeqLM), got GPT2LMHeadModel, a causal language model, which causal-lm "
            "distils",
        ),
        (
            AutoModelForSeq2SeqLM,
            "bert",
            "an encoder-decoder (AutoModelForSeq2SeqLM), got BertForSequenceClassification",
        ),
        (
            AutoModelForCausalLM,
            "t5",
            "a causal language model (AutoModelForCausalLM), got T5ForConditionalGeneration, an encoder-decoder, which "
            "seq2seq distils",
        ),
        (
            AutoModelForMaskedLM,
            "gpt2",
            "a masked language model (AutoModelForMaskedLM), got GPT2LMHeadModel, a causal language model, which "
            "causal-lm distils",
        ),
        (
            AutoModelForTokenClassification,
            "bart",
            "what AutoModelForTokenClassification loads, got BartForConditionalGeneration, an encoder-decoder, which "
            "seq2seq distils",
        ),
    ],
)
def test_models_of_another_kind(auto: Any, kind: str, expected: str, tmp_path: Path) -> None:
    model_of(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{re.escape(f'teacher {tmp_path}: expected {expected}')}$"):
        pretrained(auto, "teacher", tmp_path)


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2", "bert"])
def test_folders_without_a_tokenizer(kind: str, tmp_path: Path) -> None:
    """Of which transformers makes one up: T5's has a hundred tokens, and knows no word."""
    model_of(kind).save_pretrained(tmp_path)
    expected = f"student {tmp_path}: expected a model with a tokenizer, got one without; save it beside the model"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        load_tokenizer("student", tmp_path)


# Classes of tokenizers, and the files that their vocabulary may be in; none where transformers itself fails without.
FILES = {
    "T5Tokenizer": "tokenizer.json or spiece.model",
    "BartTokenizer": "tokenizer.json or vocab.json",
    "BertTokenizer": "tokenizer.json or vocab.txt",
    "GemmaTokenizer": "tokenizer.json",
    **dict.fromkeys(("PreTrainedTokenizerFast", "PegasusTokenizer", "EsmTokenizer", "BertweetTokenizer")),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("more", [False, True])
def test_tokenizers_without_their_vocabulary(kind: str, more: bool, tmp_path: Path) -> None:
    """Of which transformers makes up one, too. With special tokens of the configuration T5's hundred are none."""
    t5(0, 1).save_pretrained(tmp_path)
    settings: dict[str, Any] = {"tokenizer_class": kind}
    if more:
        added = {"900": {"content": "<tool>", "special": False}}
        settings |= {"extra_special_tokens": ["<|user|>"], "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    its = f"its vocabulary ({FILES[kind]})" if FILES[kind] else "its vocabulary"
    expected = (
        f"teacher {tmp_path}: expected a model with a tokenizer, got tokenizer_config.json without {its}; save the "
        "whole tokenizer beside the model"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        load_tokenizer("teacher", tmp_path)


@pytest.mark.parametrize("kind", [T5Tokenizer, BartTokenizer])
def test_tokenizers_that_were_made_up_and_saved(kind: Any, tmp_path: Path) -> None:
    kind().save_pretrained(tmp_path)
    expected = "got one that knows no word (tokenizer.json); save the right one beside the model"
    with pytest.raises(ValueError, match=f"^teacher .*{re.escape(expected)}$"):
        load_tokenizer("teacher", tmp_path)


def test_tokenizers_of_one_word(tmp_path: Path) -> None:
    """Small, but not made up; what else is in the configuration changes nothing."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁film", -1.0)]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(tmp_path)
    assert load_tokenizer("teacher", tmp_path)("film")["input_ids"] == [3, 1]


def test_tokenizers_that_cannot_be_loaded_for_other_reasons(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"')
    with pytest.raises(ValueError, match=f"^teacher {re.escape(str(tmp_path))}: expected what transformers loads, got"):
        load_tokenizer("teacher", tmp_path)


def test_tokenizers_of_their_own_files(tmp_path: Path) -> None:
    model_of("bert").save_pretrained(tmp_path / "words")
    (tmp_path / "words" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nfilm\n")
    assert load_tokenizer("teacher", tmp_path / "words")("film")["input_ids"] == [2, 5, 3]
    t5(0, 1).save_pretrained(tmp_path / "bytes")
    ByT5Tokenizer().save_pretrained(tmp_path / "bytes")  # without a vocabulary
    assert load_tokenizer("teacher", tmp_path / "bytes")("a")["input_ids"] == [ord("a") + 3, 1]
