"""A tiny random model of every architecture that `kdfast.prune` knows, and a batch with padding for it."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor

VOCABULARY, LAYERS, HEADS, GROUPS, NEURONS = 100, 3, 6, 2, 37
WIDTH = 48
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": NEURONS,
    "max_position_embeddings": 64,
}
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED: dict[str, Any] = {**_SIZES, **_TOKENS, "num_key_value_heads": GROUPS}
_OWN_SIZE: dict[str, Any] = {**_GROUPED, "head_dim": 16}  # heads together wider than the hidden states
_DROPOUT = {
    "distilbert": ("dropout", "attention_dropout"),
    "modernbert": ("embedding_dropout", "attention_dropout", "mlp_dropout"),
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "phi": ("resid_pdrop", "embd_pdrop", "attention_dropout"),
    **dict.fromkeys(
        ("bert", "roberta", "electra", "albert", "mpnet"), ("hidden_dropout_prob", "attention_probs_dropout_prob")
    ),
}
_CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (hf.BertConfig, _SIZES),
    "roberta": (hf.RobertaConfig, _SIZES),
    "distilbert": (
        hf.DistilBertConfig,
        {"vocab_size": VOCABULARY, "dim": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "hidden_dim": NEURONS},
    ),
    "electra": (hf.ElectraConfig, {**_SIZES, "embedding_size": 20}),
    "albert": (hf.AlbertConfig, {**_SIZES, "embedding_size": 20, "num_hidden_layers": 4, "num_hidden_groups": 2}),
    "mpnet": (hf.MPNetConfig, _SIZES),
    "modernbert": (
        hf.ModernBertConfig,
        {
            **_SIZES,
            **_TOKENS,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "global_attn_every_n_layers": 2,
            "local_attention": 4,
        },
    ),
    "gpt2": (
        hf.GPT2Config,
        {**_TOKENS, "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "n_inner": NEURONS},
    ),
    "llama": (hf.LlamaConfig, {**_GROUPED, "attention_bias": True}),
    "qwen2": (hf.Qwen2Config, _GROUPED),
    "qwen3": (hf.Qwen3Config, _OWN_SIZE),
    "mistral": (hf.MistralConfig, {**_GROUPED, "sliding_window": 4}),
    "gemma": (hf.GemmaConfig, _OWN_SIZE),
    "gemma2": (
        hf.Gemma2Config,
        {**_OWN_SIZE, "sliding_window": 4, "attn_logit_softcapping": 2.0, "attn_implementation": "eager"},
    ),
    "gemma3": (hf.Gemma3TextConfig, {**_OWN_SIZE, "sliding_window": 4}),
    "phi": (hf.PhiConfig, {**_GROUPED, "partial_rotary_factor": 0.5}),
}
CAUSAL = ("gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi")
ENCODERS = tuple(name for name in _CONFIGS if name not in CAUSAL)
NAMES = (*ENCODERS, *CAUSAL)


def make(name: str, *, seed: int = 0, dropout: float = 0.0, kind: Any = None, **changes: Any) -> Any:
    """A model in float64 and evaluation mode: a classifier, or a causal language model; `kind`: another Auto class.

    Biases and norms are random too, so that leaving one out shows. changes: of the config, attn_implementation among them.
    """
    torch.manual_seed(seed)
    make_config, settings = _CONFIGS[name]
    rates = dict.fromkeys(_DROPOUT.get(name, ("attention_dropout",)), dropout)
    config = make_config(**{**settings, **rates, **changes})
    kind = kind or (hf.AutoModelForCausalLM if name in CAUSAL else hf.AutoModelForSequenceClassification)
    model = kind.from_config(config, attn_implementation=config._attn_implementation).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch(model: Any, *, seed: int = 1, rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Tokens and a mask: the second row ends with one token of padding, every later one with two.

    Not with more, as every padded token then sees one that counts within the models' windows of 4: else the rows of
    padding are NaN in some attention.
    """
    torch.manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length))
    mask = torch.arange(length) < length - torch.arange(rows).clamp(max=2)[:, None]
    pad = model.config.pad_token_id
    return {"input_ids": ids.masked_fill(~mask, 0 if pad is None else pad), "attention_mask": mask.long()}
