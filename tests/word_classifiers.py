"""Small classifiers with a tokenizer of whole words, and reviews whose first word tells the label."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

WORDS = ["[PAD]", "[UNK]", "[EOS]", "good", "fine", "bad", "poor", "film", "plot", "the"]
SIZES: dict[str, Any] = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {"intermediate_size": 32}
LIMIT = 24


def tokenizer(order: list[str] = WORDS, pad: str | None = "[PAD]", **options: Any) -> Any:
    rules = Tokenizer(models.WordLevel({word: i for i, word in enumerate(order)}, unk_token="[UNK]"))
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    padding = {} if pad is None else {"pad_token": pad}
    return PreTrainedTokenizerFast(tokenizer_object=rules, unk_token="[UNK]", eos_token="[EOS]", **padding, **options)


def bert(seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = {**SIZES, **WIDE, "max_position_embeddings": LIMIT, "initializer_range": 0.5, **options}
    return BertForSequenceClassification(BertConfig(**config)).eval()


def save(folder: Path, model: Any, words: Any = None) -> str:
    model.save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    return str(folder)


def write_reviews(path: Path, labels: tuple[Any, Any] = (0, 1), rows: int = 60) -> str:
    lines = [f"{['bad', 'poor'][i % 2]} the film{' plot' * (i % 5)},{labels[0]}" for i in range(0, rows, 2)]
    lines += [f"{['good', 'fine'][i % 2]} the film{' plot' * (i % 5)},{labels[1]}" for i in range(0, rows, 2)]
    path.write_text("text,label\n" + "\n".join(lines))
    return str(path)


def run(folder: Path, recipe: Any) -> tuple[dict[str, Any], str]:
    shown = io.StringIO()
    return recipe.run(folder, Console(file=shown, width=200)), shown.getvalue()
