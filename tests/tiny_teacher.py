"""A tokenizer of words, language models, rows and caches of them that are there in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from kdfast import teacher_cache

VOCABULARY = 50
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokenizer(**special: str) -> Any:
    words = {"<unk>": 0, "<pad>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    rules = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=rules, **{"unk_token": "<unk>", "pad_token": "<pad>", **special})


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        initializer_range=0.5,  # logits that differ enough for their order to be sure
        **SIZES,
    )
    return LlamaForCausalLM(config).eval()


def texts(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(2, VOCABULARY, (n,), generator=generator)) for n in lengths]


def rows(count: int) -> list[dict[str, Any]]:
    return [{"input_ids": [int(word[1:]) for word in text.split()]} for text in texts(count)]


TOKENIZER, LLAMA, ROWS = tokenizer(), llama(), rows(20)
SHARD = 2000  # bytes: a few rows
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # a batch and a row alone differ by the rounding of a matrix product


def write(folder: Path, model: Any = LLAMA, rows: Any = ROWS, **options: Any) -> teacher_cache.TeacherCache:
    """A cache of six entries per token, in several shards."""
    return teacher_cache.write(
        model, rows, folder, **{"tokenizer": TOKENIZER, "k": 6, "batch_size": 3, "shard_bytes": SHARD, **options}
    )


def bert(kind: Any, **options: Any) -> Any:
    torch.manual_seed(2)
    config = BertConfig(vocab_size=VOCABULARY, initializer_range=0.5, **SIZES, **options)
    return kind(config).eval()


def gemma() -> Any:
    torch.manual_seed(3)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        head_dim=8,
        num_key_value_heads=2,
        initializer_range=0.5,
        final_logit_softcapping=2.0,
        **SIZES,
    )
    return Gemma2ForCausalLM(config).eval()


@torch.no_grad()
def alone(model: Any, row: dict[str, Any], **options: Any) -> Any:
    """What a model answers to one row, without padding."""
    return model(input_ids=torch.tensor([row["input_ids"]]), **options)


def topk(model: Any, row: dict[str, Any], k: int, temperature: float) -> Any:
    """Values and indices [L, k], in float64."""
    return (alone(model, row).logits[0].double() / temperature).log_softmax(-1).topk(k)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
