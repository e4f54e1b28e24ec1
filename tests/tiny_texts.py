"""Tiny models with tokenizers and texts, in place of the demonstration's: what `kdfast.data.demo.fetch` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from language_models import PAD, VOCABULARY, llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from kdfast.data import demo

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GLOSSED = [f"w{chr(97 + i // 5)}{chr(97 + i % 5)}" for i in range(45)]
SMALL: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(GLOSSED),
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,  # logits far enough apart for the terms to matter
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
WORDS = [f"w{i}" for i in range(40)]


def gloss(i: int) -> str:
    """Words of one of 15 topics: the others tell which three a masked one may be."""
    return " ".join(GLOSSED[3 * (i % 15) + (i // 15 + k * k) % 3] for k in range(11 + i % 8))


def masked(folder: Path) -> dict[str, Path]:
    """An encoder of four layers with its tokenizer, the same as a masked language model, and WordNet's files; by requirement."""
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(num_hidden_layers=4, **SMALL))
    for name, part in (("encoder", model.bert), ("masked-lm", model)):
        part.save_pretrained(folder / name)
        (folder / name / "vocab.txt").write_text("\n".join([*SPECIAL, *GLOSSED]))
        (folder / name / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "BertTokenizer", "do_lower_case": true}'
        )
    (folder / "wordnet").mkdir()
    lines = [f"{i:08} 03 n 01 entity | {gloss(i)}  " for i in range(600)]
    for name, part in zip(demo.WORDNET_FILES, (lines[:300], lines[300:400], lines[400:500], lines[500:]), strict=True):
        (folder / "wordnet" / name).write_text("\n".join(["  1 This software and database", *part]))
    return {
        demo.MINILM.requirement: folder / "encoder",
        demo.WORDNET.requirement: folder / "wordnet",
        "masked-lm": folder / "masked-lm",
    }


def sentence(i: int) -> str:
    return " ".join(WORDS[(i * k + k) % 40] for k in range(1, 8))


def causal(folder: Path) -> dict[str, Path]:
    """A Llama of four layers with its tokenizer, and texts; by folder."""
    model, texts = folder / "model", folder / "texts"
    texts.mkdir()
    llama(0, 4).save_pretrained(model)
    known = {"<unk>": 0, "<pad>": 1, "<end>": PAD} | {word: 3 + i for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(known | {f"x{i}": i for i in range(len(known), VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>").save_pretrained(model)
    lines = [f"{i // 2}_{i % 2}\t0.5\t{sentence(i)}" for i in range(240)]  # 120 texts of two sentences
    (texts / "news.tsv").write_text("\r\n".join(lines[:120]) + "\r\n")
    (texts / "products.tsv").write_text("\n".join(lines[120:]))
    return {demo.SMOLLM2.folder: model, demo.ARTICLES.folder: texts}
