"""Heads and neurons in the order of their importance, the function unchanged: after it, the first ones are the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.models.inputs import unwrapped
from kdfast.prune.layers import Layer, layers_of, matrix, parts

__all__ = ["rewire"]

OP = "kdfast.prune.rewire"
Scores = Tensor | Sequence[Tensor]


@torch.no_grad()
def rewire(model: nn.Module, heads: Scores, neurons: Scores) -> None:
    """Sorts the heads and neurons of every layer by descending importance, of equal ones the lower number first, in
    place: rows and biases of the maps that make them, columns of those that take them. The model computes what it did.

    Groups of keys and values are sorted by the sum over the heads that read them, these inside their group. MPNet's
    layers share biases of attention by head, so their heads take one order, by the sum over layers.

    The parameters stay the same objects. Moments of an optimizer are not sorted along: rewire before the first step.

    Args:
        heads, neurons: [layers, heads or neurons], of `kdfast.prune.importance` or your own, or a list of rows.

    Raises:
        TypeError, ValueError: model as in `importance`; scores of another shape, or NaN.
    """
    inner = unwrapped(model)
    layers = layers_of(inner, OP)
    of_heads = _checked("heads", heads, [layer.heads for layer in layers])
    of_neurons = _checked("neurons", neurons, [layer.neurons for layer in layers])
    shared = getattr(getattr(inner.base_model, "encoder", None), "relative_attention_bias", None)
    if shared is not None:
        together = torch.stack(of_heads).sum(0)
        of_heads = [together] * len(layers)
        shared.weight.copy_(shared.weight[:, _descending(together).to(shared.weight.device)])
    for layer, mine, its in zip(layers, of_heads, of_neurons, strict=True):
        _sort(layer, _by_group(layer, mine), _descending(its))


def _checked(name: str, scores: Scores, counts: list[int]) -> list[Tensor]:
    """A row of scores for each layer; ends of rows that `importance` filled with NaN are left out."""
    if len(scores) != len(counts):
        raise ValueError(f"{OP}: {name}: expected scores of {len(counts)} layers, got {len(scores)}")
    found = [torch.as_tensor(row).detach().cpu() for row in scores]
    for i, (row, count) in enumerate(zip(found, counts, strict=True)):
        if row.dim() != 1 or len(row) < count or not row[count:].isnan().all():
            raise ValueError(f"{OP}: {name}[{i}]: expected [{count}], got {list(row.shape)}")
        if row[:count].isnan().any():
            raise ValueError(f"{OP}: {name}[{i}]: expected numbers, got NaN")
    return [row[:count] for row, count in zip(found, counts, strict=True)]


def _descending(scores: Tensor) -> Tensor:
    return scores.argsort(descending=True, stable=True)


def _by_group(layer: Layer, scores: Tensor) -> Tensor:
    """The order of the heads: the best group first, and in it its best head."""
    of_groups = scores.new_zeros(layer.groups).index_add_(0, layer.group_of, scores)
    place = _descending(of_groups).argsort()
    order = _descending(scores)
    return order[place[layer.group_of[order]].argsort(stable=True)]


def _sort(layer: Layer, heads: Tensor, neurons: Tensor) -> None:
    for name, part in parts(layer, heads, neurons).items():
        linear: Any = layer.module.get_submodule(name)
        weight = matrix(linear)
        if part.rows is not None:
            rows = part.rows.to(weight.device)
            weight.copy_(weight.index_select(0, rows))
            if linear.bias is not None:
                linear.bias.copy_(linear.bias.index_select(0, rows))
        if part.columns is not None:
            weight.copy_(weight.index_select(1, part.columns.to(weight.device)))
        if part.repeat is not None:
            linear.repeat.copy_(part.repeat)
