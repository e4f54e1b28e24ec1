"""Small encoder-decoders with tokenizers, pairs of texts, their recipe, and the same in plain torch to compare with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kdfast.objective import LanguageModel
from kdfast.recipes import seq2seq

T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
BART = {"d_model": 32, "decoder_start_token_id": 2, "forced_eos_token_id": None, "max_position_embeddings": 64}
BART |= {
    f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("ffn_dim", 48), ("attention_heads", 4))
}
# Special tokens by their numbers, and what stands around a text.
SPECIAL = {"t5": (["<pad>", "</s>", "<unk>"], "$A </s>"), "bart": (["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>")}
WORDS = [f"w{i}" for i in range(56)]


def initialised(model: Any, std: float) -> Any:
    for parameter in model.parameters():
        if parameter.requires_grad:  # not Marian's positions, which are no part of what is saved
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def t5(seed: int, layers: int, std: float | None = 0.2, **options: Any) -> Any:
    """std: None: as the class initialises it, with logits farther apart."""
    torch.manual_seed(seed)
    config = transformers.T5Config(num_layers=layers, **T5 | options)
    model = transformers.T5ForConditionalGeneration(config)
    return model.eval() if std is None else initialised(model, std)


def bart(seed: int, layers: int, std: float | None = 0.2) -> Any:
    """std: as of `t5`."""
    torch.manual_seed(seed)
    config = transformers.BartConfig(vocab_size=64, encoder_layers=layers, decoder_layers=layers, init_std=0.3, **BART)
    model = transformers.BartForConditionalGeneration(config)
    model = model.eval() if std is None else initialised(model, std)
    model.final_logits_bias.normal_()
    return model


def plain_pairs(student: Any, teacher: Any, batch: dict[str, Tensor], objective: LanguageModel) -> Tensor:
    """Nothing is shifted: each logit is of its own label."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    z = [
        m(**inputs, decoder_input_ids=m.prepare_decoder_input_ids_from_labels(batch["labels"])).logits
        for m in (student, teacher)
    ]
    on, T = batch["labels"] != -100, objective.temperature
    log_s, log_t = (F.log_softmax(x[on] / T, -1) for x in (z[0], z[1].detach()))
    soft = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
    return objective.alpha * T**2 * soft + (1 - objective.alpha) * F.cross_entropy(z[0][on], batch["labels"][on])


def saved(folder: Path, kind: str, layers: int, seed: int) -> Path:
    """A model of 64 tokens with its tokenizer of a few less."""
    {"t5": t5, "bart": bart}[kind](seed, layers, std=None).save_pretrained(folder)
    special, around = SPECIAL[kind]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[(token, special.index(token)) for token in special[:-1] if token in around]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def pair(i: int) -> tuple[str, str]:
    """A text of 3 to 8 words, and some of them."""
    words = [WORDS[(i * k + k) % 50] for k in range(1, 4 + i % 6)]
    return " ".join(words), " ".join(words[: 2 + i % 3])


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> seq2seq.Recipe:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    lines = [json.dumps(dict(zip(("source", "target"), pair(i), strict=True))) for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return seq2seq.Recipe(
        data=str(tmp_path / "pairs.jsonl"),
        teacher=str(saved(tmp_path / "teacher", "t5", layers=3, seed=0)),
        epochs=3,
        batch_size=6,
        learning_rate=5e-3,
        max_length=16,
        max_target_length=8,
        precision="float32",
    )


def of(kind: str, recipe: seq2seq.Recipe, folder: Path) -> seq2seq.Recipe:
    """The same with a teacher of this kind."""
    return dataclasses.replace(recipe, teacher=str(saved(folder / f"{kind}-teacher", kind, layers=3, seed=0)))
