"""Masked and smaller models by hand: the whole model with zeros for what is dead, and which of its numbers are left."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kdfast.prune.layers import Layer, layers_of
from kdfast.prune.masks import Masks


def random_masks(model: nn.Module, seed: int = 0) -> Masks:
    """In each layer half of the heads and neurons: of two groups of three heads two read one and one the other."""
    generator = torch.Generator().manual_seed(seed)
    masks = Masks.full(model)
    for heads, neurons in zip(masks.heads, masks.neurons, strict=True):
        order = torch.randperm(len(heads) // 2, generator=generator)
        heads[order[1:]] = False
        heads[len(heads) // 2 + order[:1]] = False
        neurons[torch.randperm(len(neurons), generator=generator)[: len(neurons) // 2]] = False
    return masks


def masked(model: nn.Module, masks: Masks) -> Any:
    """A copy whose dead heads and neurons are multiplied by zero where they are taken, and whose dead layers pass on
    what they get."""
    whole: Any = copy.deepcopy(model)
    for i, layer in enumerate(layers_of(whole)):
        heads = masks.heads[i].repeat_interleave(layer.head_size)
        for name, live in ((layer.adapter.output, heads), (layer.adapter.contract, masks.neurons[i])):
            linear: Any = layer.module.get_submodule(name)
            with torch.no_grad():
                linear.weight.mul_(live[:, None] if isinstance(linear, Conv1D) else live)
        if not masks.layers[i]:
            layer.module.forward = _pass_on(layer.adapter.returns_tuple)
    return whole


def _pass_on(returns_tuple: bool) -> Any:
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden,) if returns_tuple else hidden

    return forward


def left(model: nn.Module, masks: Masks) -> dict[str, dict[int, list[int]]]:
    """By a parameter's name in the whole model, which indices of which of its dimensions a smaller one has."""
    found: dict[str, dict[int, list[int]]] = {}
    for i, layer in enumerate(layers_of(model)):
        for name, (dimension, indices) in _left_of(layer, *(x.tolist() for x in masks.kept(i))).items():
            transposed = isinstance(layer.module.get_submodule(name), Conv1D)
            found[f"{layer.name}.{name}.weight"] = {1 - dimension if transposed else dimension: indices}
            if dimension == 0:
                found[f"{layer.name}.{name}.bias"] = {0: indices}
    return found


def _left_of(layer: Layer, heads: list[int], neurons: list[int]) -> dict[str, tuple[int, list[int]]]:
    adapter, size = layer.adapter, layer.head_size
    groups = sorted({int(layer.group_of[head]) for head in heads})

    def of(numbers: list[int], start: int) -> list[int]:
        return [start + number * size + j for number in numbers for j in range(size)]

    if len({*adapter.qkv}) == 1:
        width = layer.heads * size
        qkv = {adapter.qkv[0]: (0, [x for part in range(3) for x in of(heads, part * width)])}
    else:
        qkv = {adapter.qkv[0]: (0, of(heads, 0)), **{name: (0, of(groups, 0)) for name in adapter.qkv[1:]}}
    fused = len(adapter.expand) > len({*adapter.expand})
    expand = [*neurons, *(layer.neurons + n for n in neurons)] if fused else neurons
    return {
        **qkv,
        adapter.output: (1, of(heads, 0)),
        **dict.fromkeys(adapter.expand, (0, expand)),
        adapter.contract: (1, neurons),
    }


def taken(tensor: Tensor, indices: dict[int, list[int]]) -> Tensor:
    for dimension, index in indices.items():
        tensor = tensor.index_select(dimension, torch.tensor(index, dtype=torch.int64))
    return tensor
