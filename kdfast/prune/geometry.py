"""The weights of each unit, as views: whatever is done to them is done to the model.

    for view in views(layer, "neurons"):        # [neurons, ...]: rows of the maps that expand, their biases, columns
        view[3] = 0

The vector of a unit is all that goes with it. Of a head the rows of queries, of keys and values too where no other
head reads them, with biases, and the columns of the output; of a group all its heads with its keys and values; of a
neuron its rows, biases and column; of a layer all these together; a block is a tile of one linear map.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kdfast.prune.layers import Layer
from kdfast.prune.scores import Kind

OfParameter = Callable[[Tensor], Tensor]  # a parameter, or something else of its shape


def views(layer: Layer, of: Kind, value: OfParameter = lambda parameter: parameter) -> list[Tensor]:
    """Views of `value(parameter)`, [units, ...] each; `of` is "heads", "groups" or "neurons". Of groups that different
    numbers of heads read, copies of the heads' that end in zeros."""
    if of == "neurons":
        return _of_neurons(layer, value) if layer.neurons else []
    return _of_heads(layer, of == "groups", value) if layer.heads else []


def vectors(layer: Layer, of: Kind, value: OfParameter = lambda parameter: parameter) -> Tensor:
    """[units, numbers of a unit], a copy; of "layers" [1, numbers]."""
    if of == "layers":
        return torch.cat([vectors(layer, each, value).flatten() for each in ("groups", "neurons")])[None]
    flat = [view.detach().flatten(1) for view in views(layer, of, value)]
    return torch.cat(flat, 1) if flat else torch.empty(0, 0, device=next(layer.module.parameters()).device)


def output_columns(layer: Layer, of: Kind, value: OfParameter = lambda parameter: parameter) -> Tensor:
    """[units, out] of neurons, [units, head size, out] of heads: the columns by which what they give is read, a view."""
    if of == "neurons":
        return _columns(layer.module.get_submodule(layer.adapter.contract), layer.neurons, value)
    return _columns(layer.module.get_submodule(layer.adapter.output), layer.heads, value)


def blocks(linear: nn.Module, block: tuple[int, int], value: OfParameter = lambda parameter: parameter) -> Tensor:
    """[rows of blocks, columns of blocks, rows, columns] of the matrix [out, in], a view."""
    tiles: Tensor = matrix_of(linear, value).unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1]))
    return tiles.transpose(1, 2)


def _of_neurons(layer: Layer, value: OfParameter) -> list[Tensor]:
    adapter, count = layer.adapter, layer.neurons
    found, start = [], dict.fromkeys(adapter.expand, 0)
    for name in adapter.expand:
        found += _rows(layer.module.get_submodule(name), start[name], count, 1, value)
        start[name] += count
    return [*found, output_columns(layer, "neurons", value)]


def _of_heads(layer: Layer, by_group: bool, value: OfParameter) -> list[Tensor]:
    adapter, size, start = layer.adapter, layer.head_size, dict.fromkeys(layer.adapter.qkv, 0)
    of_heads, of_groups = list[Tensor](), list[Tensor]()
    for i, name in enumerate(adapter.qkv):
        count, where = (layer.groups, of_groups) if i else (layer.heads, of_heads)
        where += _rows(layer.module.get_submodule(name), start[name], count, size, value)
        start[name] += count * size
    of_heads.append(output_columns(layer, "heads", value))
    if layer.groups == layer.heads:
        return of_heads + of_groups
    return [_grouped(layer, view) for view in of_heads] + of_groups if by_group else of_heads


def _grouped(layer: Layer, view: Tensor) -> Tensor:
    """[heads, ...] as [groups, heads · ...]; heads of a group are neighbours."""
    counts = layer.group_of.bincount().tolist()
    if len({*counts}) == 1:
        return view.view(layer.groups, counts[0], *view.shape[1:])
    return nn.utils.rnn.pad_sequence([part.flatten() for part in view.split(counts)], batch_first=True)


def _rows(linear: nn.Module, start: int, units: int, size: int, value: OfParameter) -> list[Tensor]:
    parts = [matrix_of(linear, value)] + ([value(linear.bias)] if isinstance(linear.bias, Tensor) else [])
    return [part[start : start + units * size].unflatten(0, (units, size)) for part in parts]


def _columns(linear: nn.Module, units: int, value: OfParameter) -> Tensor:
    columns: Tensor = matrix_of(linear, value).unflatten(1, (units, -1))
    return columns.movedim(1, 0)


def matrix_of(linear: nn.Module, value: OfParameter) -> Tensor:
    """`value` of a linear map's weight as [out, in], which GPT-2 stores transposed."""
    of: Tensor = value(linear.weight)  # type: ignore[arg-type]
    return of.mT if isinstance(linear, Conv1D) else of
