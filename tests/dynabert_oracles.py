"""DynaBERT's numbers (`oracles/dynabert_*`), and the tiny BERT that they are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

ORACLES = Path(__file__).parent / "oracles"


def oracle(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its tensors, float32 inputs in float64, and its settings."""
    with np.load(ORACLES / f"{name}.npz") as data:
        tensors = {key: torch.from_numpy(np.atleast_1d(data[key])).reshape(data[key].shape) for key in data.files}
    hyper: dict[str, Any] = json.loads((ORACLES / f"{name}.json").read_text())["hyper"]
    return {key: x.double() if x.dtype == torch.float32 else x for key, x in tensors.items()}, hyper


def bert_of(tensors: dict[str, Tensor], hyper: dict[str, Any], prefix: str) -> Any:
    """The classifier whose parameters begin with this in the oracle."""
    config = transformers.BertConfig(
        vocab_size=hyper["vocab"],
        hidden_size=hyper["hidden"],
        num_attention_heads=hyper["heads"],
        num_hidden_layers=hyper["layers"],
        intermediate_size=hyper["ffn"],
        num_labels=hyper["num_labels"],
        layer_norm_eps=hyper["layer_norm_eps"],
        max_position_embeddings=len(tensors[f"{prefix}bert.embeddings.position_embeddings.weight"]),
    )
    model = transformers.BertForSequenceClassification(config).double().eval()
    state = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if not name.endswith("position_ids")]
    return model


def inputs_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


def agree(got: Tensor | None, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert got is not None
    assert got.shape == expected.shape
    assert expected.any(), "zeros would pass"
    assert float((got.detach().double() - expected.double()).norm()) <= tolerance * float(expected.double().norm())
