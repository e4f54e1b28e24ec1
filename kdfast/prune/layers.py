"""Where heads and neurons are in a transformer's layers: which rows and columns of which of its linear maps.

    for layer in layers_of(model):
        print(layer.name, layer.heads, layer.groups, layer.neurons)
        for name, part in parts(layer, heads=torch.tensor([0, 3]), neurons=torch.arange(100)).items():
            print(name, part.rows, part.columns)

`ADAPTERS` says where they are in each architecture; `register` adds one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kdfast.models.inputs import unwrapped
from kdfast.models.student_parts import layers_path
from kdfast.nn.block_sparse import BlockSparseLinear
from kdfast.ops import _checks
from kdfast.prune.modules import Nothing, RepeatedHeads, WithoutHeads

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Layer",
    "Part",
    "layers_of",
    "matrix",
    "parts",
    "parts_of_heads",
    "parts_of_neurons",
    "register",
    "sharing",
]


@dataclass(frozen=True)
class Adapter:
    """Where the parts of an architecture's layers are: names of modules below a layer, linear maps all but `attention`.

    attention: the module that makes the heads' outputs of hidden states, with head_dim or attention_head_size.
    qkv: queries, keys, values; the same name three times where one map makes them side by side. output: what takes the
    heads' outputs. expand, contract: of the feed-forward network; two of expand in a gated one, the same name twice
    where one map makes both. without_heads: what `attention` returns where no head is left, of the module, the hidden
    states and heads' outputs of width 0. width: attributes of `attention` that hold heads · head size. per_head:
    arguments of its forward that have all heads in dimension 1. returns_tuple: whether layers return a tuple. norms:
    what the attention and what the feed-forward network reads, and nothing else: without these it goes too. made_later: of modules
    that the first layer is made without, which others they are like.
    """

    attention: str
    qkv: tuple[str, str, str]
    output: str
    expand: tuple[str, ...]
    contract: str
    without_heads: Callable[[Any, Tensor, Tensor], Any] = lambda attention, hidden, context: (context, None)
    width: tuple[str, ...] = ()
    per_head: tuple[str, ...] = ()
    returns_tuple: bool = False
    norms: tuple[str, ...] = ()
    made_later: tuple[tuple[str, str], ...] = ()


_BERT = Adapter(
    "attention.self",
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense",
    ("intermediate.dense",),
    "output.dense",
)
_LLAMA = Adapter(
    "self_attn",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj",
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
    without_heads=lambda attention, hidden, context: (attention.o_proj(context), None),
    norms=("input_layernorm", "post_attention_layernorm"),
)

ADAPTERS: dict[str, Adapter] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "smollm3", "gemma"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), replace(_LLAMA, norms=("input_layernorm", "pre_feedforward_layernorm"))),
    "distilbert": Adapter(
        "attention",
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "attention.out_lin",
        ("ffn.lin1",),
        "ffn.lin2",
        without_heads=lambda attention, hidden, context: (attention.out_lin(context), None),
    ),
    "albert": Adapter(
        "attention",
        ("attention.query", "attention.key", "attention.value"),
        "attention.dense",
        ("ffn",),
        "ffn_output",
        without_heads=lambda attention, hidden, context: (
            attention.LayerNorm(hidden + attention.output_dropout(attention.dense(context))),
            None,
        ),
    ),
    "mpnet": Adapter(
        "attention.attn",
        ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        "attention.attn.o",
        ("intermediate.dense",),
        "output.dense",
        without_heads=lambda attention, hidden, context: (attention.o(context), None),
        width=("all_head_size",),
        per_head=("position_bias",),
        returns_tuple=True,
    ),
    "modernbert": Adapter(
        "attn",
        ("attn.Wqkv",) * 3,
        "attn.Wo",
        ("mlp.Wi",) * 2,
        "mlp.Wo",
        without_heads=lambda attention, hidden, context: (attention.out_drop(attention.Wo(context)), None),
        norms=("attn_norm", "mlp_norm"),
        made_later=(("attn_norm", "mlp_norm"),),
    ),
    "gpt2": Adapter(
        "attn",
        ("attn.c_attn",) * 3,
        "attn.c_proj",
        ("mlp.c_fc",),
        "mlp.c_proj",
        without_heads=lambda attention, hidden, context: (attention.resid_dropout(attention.c_proj(context)), None),
        width=("split_size",),
        norms=("ln_1", "ln_2"),
    ),
    "phi": Adapter(
        "self_attn",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.dense",
        ("mlp.fc1",),
        "mlp.fc2",
        norms=("input_layernorm", "input_layernorm"),
        without_heads=lambda attention, hidden, context: (attention.dense(context), None),
    ),
}


def register(model_type: str, adapter: Adapter) -> None:
    """Says where the parts of models whose `config.model_type` is `model_type` are."""
    ADAPTERS[model_type] = adapter


@dataclass(frozen=True)
class Layer:
    """A layer of a model. name: of its module there. group_of: [heads], which group of keys and values each head reads;
    neurons: of the feed-forward network."""

    name: str
    module: nn.Module
    adapter: Adapter
    head_size: int
    group_of: Tensor
    neurons: int

    @property
    def heads(self) -> int:
        return len(self.group_of)

    @property
    def groups(self) -> int:
        return int(self.group_of.max()) + 1 if self.heads else 0

    @property
    def attention(self) -> nn.Module:
        return self.module.get_submodule(self.adapter.attention)

    @property
    def maps(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of its linear maps, each once: of the heads and of the neurons, none where none is left."""
        of_heads, of_neurons = (*self.adapter.qkv, self.adapter.output), (*self.adapter.expand, self.adapter.contract)
        return tuple(dict.fromkeys(of_heads if self.heads else ())), tuple(
            dict.fromkeys(of_neurons if self.neurons else ())
        )


@dataclass(frozen=True)
class Part:
    """What a linear map keeps: rows and columns of its matrix [out, in], None: all. repeat: which of the heads that it
    then makes follow one another, None: each once."""

    rows: Tensor | None = None
    columns: Tensor | None = None
    repeat: Tensor | None = None


def matrix(linear: nn.Module) -> Tensor:
    """The weight as [out, in], which GPT-2 stores transposed; below an adapter of peft that of the layer it adapts; of a
    map of blocks a dense one, through which gradients go."""
    linear = getattr(linear, "base_layer", linear)
    if isinstance(linear, BlockSparseLinear):
        return linear.layout.dense(linear.values)
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.mT if isinstance(linear, Conv1D) else weight


def layers_of(model: nn.Module, op: str = "kdfast.prune", *, of_blocks: bool = False) -> list[Layer]:
    """The layers of a model of transformers, wrapped or not, in order; of ALBERT, whose layers share weights, the
    distinct ones. of_blocks: whether linear maps may be of blocks.

    Raises:
        TypeError: no model of transformers, or one with a BlockSparseLinear where none may be.
        ValueError: an unknown architecture; the message says what to register.
    """
    inner: Any = unwrapped(model)
    path = layers_path(op, inner, "model")
    adapter = ADAPTERS.get(inner.config.model_type)
    if adapter is None:
        raise ValueError(
            f"{op}: model: expected one of {', '.join(sorted(ADAPTERS))}, got {inner.config.model_type!r}; to prune it: "
            f"kdfast.prune.register({inner.config.model_type!r}, kdfast.prune.Adapter(...)) with the names of its parts"
        )
    if path is None:
        prefix = "" if inner.base_model is inner else f"{inner.base_model_prefix}."
        groups = inner.base_model.encoder.albert_layer_groups
        names = [
            f"{prefix}encoder.albert_layer_groups.{i}.albert_layers.{j}"
            for i, group in enumerate(groups)
            for j in range(len(group.albert_layers))
        ]
    else:
        names = [f"{path}{i}" for i in range(len(inner.get_submodule(path.removesuffix("."))))]
    layers = [_layer(name, inner.get_submodule(name), adapter) for name in names]
    for layer in () if of_blocks else layers:
        _refuse_blocks(op, layer)
    return layers


def _refuse_blocks(op: str, layer: Layer) -> None:
    """Heads and neurons are whole rows and columns, which a map of blocks has not."""
    for name in maps_of_blocks(layer):
        expected = "linear maps with all their weights (BlockSparseLinear.to_linear makes one)"
        _checks.wrong_type(op, "model", expected, f"BlockSparseLinear at {layer.name}.{name}")


def maps_of_blocks(layer: Layer) -> dict[str, BlockSparseLinear]:
    """A layer's linear maps of blocks, by name below it."""
    found = ((name, layer.module.get_submodule(name)) for names in layer.maps for name in names)
    return {name: part for name, part in found if isinstance(part, BlockSparseLinear)}


def _layer(name: str, module: nn.Module, adapter: Adapter) -> Layer:
    attention: Any = module.get_submodule(adapter.attention)
    size = getattr(attention, "head_dim", None) or attention.attention_head_size
    expand = module.get_submodule(adapter.expand[0])
    neurons = 0 if isinstance(expand, Nothing) else len(matrix(expand)) // adapter.expand.count(adapter.expand[0])
    if isinstance(attention, WithoutHeads):
        return Layer(name, module, adapter, size, torch.empty(0, dtype=torch.int64, device="cpu"), neurons)
    query, key = (module.get_submodule(part) for part in adapter.qkv[:2])
    heads = len(matrix(query)) // adapter.qkv.count(adapter.qkv[0]) // size
    groups = heads if query is key else len(matrix(key)) // size
    repeat = torch.tensor(key.repeat if isinstance(key, RepeatedHeads) else range(groups), device="cpu")
    return Layer(name, module, adapter, size, repeat.repeat_interleave(heads // len(repeat)), neurons)


def sharing(layer: Layer, heads: Tensor) -> tuple[Tensor, int, Tensor | None]:
    """The groups of keys and values that these heads read, in order; how many heads, side by side, read one; and, where
    the groups are read by different numbers of heads, how groups are repeated so that the same number reads each:
    of heads 0, 1, 2, 3 | 4, 5 (two groups) two read one of groups 0, 0, 1."""
    groups, counts = torch.unique_consecutive(layer.group_of[heads], return_counts=True)
    if not len(groups):
        return groups, 1, None
    together = math.gcd(*counts.tolist())
    times = counts // together
    repeat = (
        None if bool((times == 1).all()) else torch.arange(len(groups), device=groups.device).repeat_interleave(times)
    )
    return groups, together, repeat


def parts(layer: Layer, heads: Tensor, neurons: Tensor) -> dict[str, Part]:
    """What each linear map of the layer keeps, by name below the layer, for these heads and neurons in this order. A
    part of the layer that is gone altogether, in a model made smaller before, has none."""
    return parts_of_heads(layer, heads) | parts_of_neurons(layer, neurons)


def parts_of_heads(layer: Layer, heads: Tensor) -> dict[str, Part]:
    """Those of `parts` that depend on the heads."""
    if not layer.heads:
        return {}
    adapter, size = layer.adapter, layer.head_size
    groups, _, repeat = sharing(layer, heads)

    def of_heads(chosen: Tensor) -> Tensor:
        return (chosen[:, None] * size + torch.arange(size, device=chosen.device)).flatten()

    lengths = [layer.heads * size, layer.groups * size, layer.groups * size]
    qkv = _stacked(adapter.qkv, [of_heads(heads), of_heads(groups), of_heads(groups)], lengths)
    query = adapter.qkv[0]
    made = {name: Part(rows=rows, repeat=None if name == query else repeat) for name, rows in qkv.items()}
    return made | {adapter.output: Part(columns=of_heads(heads))}


def parts_of_neurons(layer: Layer, neurons: Tensor) -> dict[str, Part]:
    """Those of `parts` that depend on the neurons."""
    if not layer.neurons:
        return {}
    adapter, count = layer.adapter, len(layer.adapter.expand)
    expand = _stacked(adapter.expand, [neurons] * count, [layer.neurons] * count)
    return {name: Part(rows=rows) for name, rows in expand.items()} | {adapter.contract: Part(columns=neurons)}


def _stacked(names: tuple[str, ...], rows: list[Tensor], lengths: list[int]) -> dict[str, Tensor]:
    """The rows of each map; where one makes several parts side by side, each part's after those before it."""
    found: dict[str, list[Tensor]] = {}
    before: dict[str, int] = {}
    for name, mine, length in zip(names, rows, lengths, strict=True):
        found.setdefault(name, []).append(mine + before.get(name, 0))
        before[name] = before.get(name, 0) + length
    return {name: torch.cat(all_rows) for name, all_rows in found.items()}
