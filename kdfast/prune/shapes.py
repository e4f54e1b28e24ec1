"""What a layer of a smaller model is made of: how many heads, groups and neurons, and the modules that hold so many."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kdfast.nn.block_sparse import BlockSparseLinear
from kdfast.ops._block_layout import BlockLayout
from kdfast.prune.layers import Layer, maps_of_blocks, matrix
from kdfast.prune.modules import Nothing, OnlyBias, RepeatedHeads, WithoutHeads, of_own_heads, repeat_heads

_SIZE_NAMES = ("head_dim", "attention_head_size")


@dataclass(frozen=True)
class Shape:
    """Of a layer: its counts, and what its class derives of a config that counts otherwise.

    groups: of keys and values. repeat: which group stands where, so that the same number of heads reads each; None
    where each stands once. own_heads: the heads' numbers in the full model, for `Adapter.per_head`; None where these are
    all. scaling: of the scores, None where the class does not keep it. later: modules that the class makes in later
    layers only (`Adapter.made_later`). blocks: of linear maps of blocks, a block's rows and columns and how many live.
    """

    heads: int
    groups: int
    neurons: int
    head_size: int
    repeat: tuple[int, ...] | None = None
    own_heads: tuple[int, ...] | None = None
    scaling: float | None = None
    later: tuple[str, ...] = ()
    blocks: dict[str, list[int]] | None = None


def shape_of(layer: Layer) -> Shape:
    """The shape of a layer as it is."""
    module, adapter = layer.module, layer.adapter
    key = module.get_submodule(adapter.qkv[1]) if layer.heads else None
    blocks = {name: [*x.layout.block, x.layout.count] for name, x in maps_of_blocks(layer).items()}
    made = [name for name, _ in adapter.made_later if not isinstance(module.get_submodule(name), nn.Identity)]
    return Shape(
        layer.heads,
        layer.groups,
        layer.neurons,
        layer.head_size,
        repeat=key.repeat if isinstance(key, RepeatedHeads) else None,
        own_heads=getattr(layer.attention, "own_heads", None),
        scaling=getattr(layer.attention, "scaling", None),
        later=tuple(made),
        blocks=blocks or None,
    )


def reshape(layer: Layer, shape: Shape) -> None:
    """Gives a layer, with at least as many heads and neurons, the modules of a shape. Weights that do not have it yet
    become empty ones that do."""
    for name, like in layer.adapter.made_later:
        if name in shape.later and isinstance(layer.module.get_submodule(name), nn.Identity):
            layer.module.set_submodule(name, copy.deepcopy(layer.module.get_submodule(like)))
    if layer.heads:
        _reshape_heads(layer, shape)
        if shape.own_heads is not None:
            of_own_heads(layer.attention, layer.adapter.per_head, shape.own_heads)
    if layer.neurons:
        _reshape_neurons(layer, shape)
    norms = [*zip(layer.adapter.norms, (shape.heads, shape.neurons), strict=False)]
    for name in layer.adapter.norms:  # whose weights would get no gradient, for which DistributedDataParallel waits
        if not any(left for other, left in norms if other == name):
            layer.module.set_submodule(name, nn.Identity())
    for name, (rows, columns, live) in (shape.blocks or {}).items():
        layer.module.set_submodule(name, _of_blocks(layer.module.get_submodule(name), (rows, columns), live))


def _reshape_heads(layer: Layer, shape: Shape) -> None:
    module, adapter, attention = layer.module, layer.adapter, layer.attention
    output = module.get_submodule(adapter.output)
    if not shape.heads:
        width = len(matrix(output))
        module.set_submodule(adapter.output, OnlyBias(output, width))
        module.set_submodule(adapter.attention, WithoutHeads(attention, adapter, shape.head_size, width))
        return
    _resize(output, columns=shape.heads * shape.head_size)
    counts = (shape.heads, shape.groups, shape.groups)
    for name in dict.fromkeys(adapter.qkv):
        rows = sum(count for other, count in zip(adapter.qkv, counts, strict=True) if other == name)
        _resize(module.get_submodule(name), rows=rows * shape.head_size)
    for name in dict.fromkeys(adapter.qkv[1:]):
        repeat_heads(module.get_submodule(name), shape.repeat, shape.head_size)
    changed: dict[str, Any] = dict.fromkeys(adapter.width, shape.heads * shape.head_size)
    changed |= {name: shape.head_size for name in _SIZE_NAMES if hasattr(attention, name)}
    changed |= {"scaling": shape.scaling} if shape.scaling is not None else {}
    if hasattr(attention, "num_key_value_groups"):
        changed["num_key_value_groups"] = shape.heads // len(shape.repeat or range(shape.groups))
    for name, value in changed.items():
        setattr(attention, name, value)


def _reshape_neurons(layer: Layer, shape: Shape) -> None:
    module, adapter = layer.module, layer.adapter
    contract = module.get_submodule(adapter.contract)
    for name in dict.fromkeys(adapter.expand):
        if shape.neurons:
            _resize(module.get_submodule(name), rows=adapter.expand.count(name) * shape.neurons)
        else:
            module.set_submodule(name, Nothing())
    if shape.neurons:
        _resize(contract, columns=shape.neurons)
    else:
        module.set_submodule(adapter.contract, OnlyBias(contract, len(matrix(contract))))


def _resize(linear: nn.Module, rows: int | None = None, columns: int | None = None) -> None:
    weight, bias, transposed = matrix(linear), linear.bias, isinstance(linear, Conv1D)
    shape = (len(weight) if rows is None else rows, weight.shape[1] if columns is None else columns)
    if tuple(weight.shape) != shape:
        linear.weight = nn.Parameter(weight.new_empty(shape[::-1] if transposed else shape))
        if isinstance(bias, Tensor) and len(bias) != shape[0]:
            linear.bias = nn.Parameter(bias.new_empty(shape[0]))
    for name, size in zip(("nf", "nx") if transposed else ("out_features", "in_features"), shape, strict=True):
        setattr(linear, name, size)


def _of_blocks(linear: Any, block: tuple[int, int], live: int) -> BlockSparseLinear:
    """An empty map of so many blocks; which they are comes with the weights (`BlockSparseLinear.follow_mask`)."""
    rows, columns = (size // side for size, side in zip(linear.weight.shape, block, strict=True))
    layout = BlockLayout((torch.arange(rows * columns, device="cpu") < live).view(rows, columns), block)
    weight = linear.weight
    with warnings.catch_warnings():  # it was said when they were made
        warnings.simplefilter("ignore")
        return BlockSparseLinear(layout, linear.bias is not None, device=weight.device, dtype=weight.dtype)
