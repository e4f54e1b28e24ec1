"""Random encoders with branches, some of whose rows leave at every layer, and the original's tiny networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from test_students import model_of
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from kdfast.early_exit import Branch, EarlyExit, uncertainty

ORACLES = Path(__file__).parent / "oracles"
CLASSES, ROWS, LENGTH = 3, 9, 9


def early_exit(name: str = "bert", head: str = "classes", **options: Any) -> EarlyExit:
    """head: "" for an encoder, whose last classifier is a branch; "classes" for one with its own."""
    pooling = {"classifier_pooling": "mean"} if name == "modernbert" else {}  # reads the batch's mask after the layers
    model = model_of(name, head, num_labels=CLASSES, **pooling)
    made = EarlyExit(model, **{"width": 8, "heads": 2, **options}).eval()
    for parameter_name, parameter in made.named_parameters():  # rows far apart, and branches that are sure of some
        norm = parameter.dim() == 1 and parameter_name.endswith("weight")
        width = 1.0 if "embeddings" in parameter_name or parameter.dim() == 1 else parameter.shape[-1] ** 0.5 / 2
        nn.init.normal_(parameter, mean=float(norm), std=0.2 if parameter.dim() == 1 else 1 / width)
    return made


def batch() -> dict[str, Tensor]:
    """Rows of 2 to 9 tokens."""
    ids = torch.randint(3, 56, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([9, 5, 9, 2, 9, 8, 3, 9, 6])
    return {"input_ids": ids, "attention_mask": (torch.arange(LENGTH) < lengths[:, None]).long()}


def every_uncertainty(model: EarlyExit, inputs: dict[str, Tensor]) -> Tensor:
    """[layers, rows]"""
    with torch.no_grad():
        outputs = model(**inputs, branches=True)
    return torch.stack([uncertainty(logits) for logits in (*outputs.branch_logits, outputs.logits)])


# ---- the originals ----
class UERLayerNorm(nn.Module):
    """γ(x - μ) / (σ_unbiased + 1e-6) + β"""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return self.weight * (x - mean) / (std + 1e-6) + self.bias


def oracle(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    arrays = np.load(ORACLES / f"fastbert_{name}.npz")
    return {key: torch.tensor(arrays[key]) for key in arrays.files}, json.loads(
        (ORACLES / f"fastbert_{name}.json").read_text()
    )["hyper"]


PARTS = {
    "reduce": "output_layer_0",
    "query": "self_atten.linear_layers.0",
    "key": "self_atten.linear_layers.1",
    "value": "self_atten.linear_layers.2",
    "output": "self_atten.final_linear",
    "dense": "output_layer_1",
    "classifier": "output_layer_2",
}
OF_LAYER = {
    "attention.self.query": "self_attn.linear_layers.0",
    "attention.self.key": "self_attn.linear_layers.1",
    "attention.self.value": "self_attn.linear_layers.2",
    "attention.output.dense": "self_attn.final_linear",
    "intermediate.dense": "feed_forward.linear_1",
    "output.dense": "feed_forward.linear_2",
}


def _fill(module: nn.Module, values: dict[str, Tensor], name: str) -> None:
    module.weight.data, module.bias.data = (values[f"model.{name}.{kind}"].double() for kind in ("weight", "bias"))


def fill_branch(branch: Branch, values: dict[str, Tensor], number: int) -> None:
    for ours, theirs in PARTS.items():
        _fill(branch.get_submodule(ours), values, f"classifiers.{number}.{theirs}")


def original(values: dict[str, Tensor], hyper: dict[str, Any]) -> EarlyExit:
    """The original's network in float64, as an `EarlyExit` of a BERT with the other LayerNorm."""
    config = BertConfig(
        vocab_size=hyper["vocab"], hidden_size=hyper["hidden"], num_hidden_layers=hyper["layers"],
        num_attention_heads=hyper["heads"], intermediate_size=hyper["ffn"], max_position_embeddings=16, type_vocab_size=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=hyper["num_labels"],
    )  # fmt: skip
    encoder: Any = BertModel(config).double()
    model = EarlyExit(encoder, width=hyper["cla_hidden_size"], heads=hyper["cla_heads_num"])

    def norm(name: str) -> UERLayerNorm:
        return UERLayerNorm(*(values[f"model.{name}.{kind}"].double() for kind in ("gamma", "beta")))

    for ours, theirs in (
        ("word_embeddings", "word"),
        ("position_embeddings", "position"),
        ("token_type_embeddings", "segment"),
    ):
        getattr(encoder.embeddings, ours).weight.data = values[f"model.embedding.{theirs}_embedding.weight"].double()
    encoder.embeddings.LayerNorm = norm("embedding.layer_norm")
    for i, layer in enumerate(encoder.encoder.layer):
        name = f"encoder.transformer.{i}"
        for ours, theirs in OF_LAYER.items():
            _fill(layer.get_submodule(ours), values, f"{name}.{theirs}")
        layer.attention.output.LayerNorm, layer.output.LayerNorm = (
            norm(f"{name}.layer_norm_1"),
            norm(f"{name}.layer_norm_2"),
        )
        fill_branch(model.branches[i], values, i)
    return model.double()


def original_batch(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Its mask has the numbers of segments, 1 and 2, and 0 for padding."""
    mask = values["mask"]
    return {"input_ids": values["input_ids"], "token_type_ids": mask, "attention_mask": (mask > 0).long()}


# ---- in plain torch ----
def plain_branch(branch: Branch, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """With keys and values of all tokens, and attention of all of them."""
    x = torch.tanh(branch.reduce(hidden))
    q, k, v = (
        part(x).unflatten(-1, (branch.heads, -1)).transpose(1, 2) for part in (branch.query, branch.key, branch.value)
    )
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + (1.0 - mask[:, None, None].to(scores.dtype)) * -10000.0
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    first: Tensor = branch.output(mixed)[:, 0]
    made: Tensor = branch.classifier(torch.tanh(branch.dense(first)))
    return made
