"""Heads and neurons in the order of their importance, the function unchanged: after it, the first ones are the best."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kdfast.models.inputs import unwrapped
from kdfast.ops import _checks
from kdfast.prune import disk
from kdfast.prune.layers import Layer, layers_of, matrix, parts
from kdfast.prune.masked import Masked
from kdfast.prune.modules import RepeatedHeads, of_own_heads

__all__ = ["rewire"]

_OP = "kdfast.prune.rewire"
Scores = Tensor | Sequence[Tensor]


@torch.no_grad()
def rewire(model: nn.Module, heads: Scores, neurons: Scores) -> None:
    """Sorts the heads and neurons of every layer by descending importance, of equal ones the lower number first, in
    place: rows and biases of the maps that make them, columns of those that take them (Hou et al., 2020). The model
    computes what it did.

    Groups of keys and values are sorted by the sum over the heads that read them, these inside their group. MPNet's
    layers share a bias of attention by head, so their heads take one order, by the sum over layers.

    The parameters stay the same objects. Moments of an optimizer are not sorted along: rewire before its first step.

    Args:
        model: of transformers, wrapped or not, without masks.
        heads, neurons: [layers, heads or neurons], of `kdfast.prune.importance` or your own, or a list of rows.

    Raises:
        TypeError, ValueError: model as in `layers_of`, with masks, or with linear maps that are more than that (an
            adapter of peft, quantised); scores of another shape, or NaN. Nothing has changed then.
    """
    inner = unwrapped(model)
    layers = layers_of(inner, _OP)
    of_heads = _checked("heads", heads, [layer.heads for layer in layers])
    of_neurons = _checked("neurons", neurons, [layer.neurons for layer in layers])
    if any(module.__dict__.get("_kdfast_masked") is not None for module in inner.modules()):
        _checks.wrong_value(_OP, "model", "one without masks", "one that has some; kdfast.prune.remove(model) first")
    maps = [linear_maps(_OP, layer) for layer in layers]
    shared = _shared_bias(inner, layers)
    of_heads = of_heads if shared is None else [torch.stack(of_heads).sum(0)] * len(layers)
    by_group = [_by_group(layer, row) for layer, row in zip(layers, of_heads, strict=True)]
    for layer, linears, order, its in zip(layers, maps, by_group, of_neurons, strict=True):
        for name, part in parts(layer, order, _descending(its)).items():
            _sort(linears[name], part.rows, part.columns)
            if part.repeat is not None:
                linears[name].repeat = tuple(part.repeat.tolist())
        if shared is None and layer.adapter.per_head and layer.heads:
            own = getattr(layer.attention, "own_heads", range(layer.heads))
            of_own_heads(layer.attention, layer.adapter.per_head, tuple(own[i] for i in order.tolist()))
    if shared is not None:
        _sort(shared, None, by_group[0])
    if getattr(inner.config, "quantization_config", None):  # the record of a smaller model has orders too
        disk.settle(_OP, inner)


def _checked(name: str, scores: Scores, counts: list[int]) -> list[Tensor]:
    """A row of scores for each layer, without the NaN that `importance` lets shorter ones end in."""
    if len(scores) != len(counts):
        _checks.wrong_value(_OP, name, f"scores of {len(counts)} layers", len(scores))
    found = [torch.as_tensor(row).detach().cpu() for row in scores]
    for i, (row, count) in enumerate(zip(found, counts, strict=True)):
        if row.dim() != 1 or len(row) < count or not bool(row[count:].isnan().all()):
            _checks.wrong_value(_OP, f"{name}[{i}]", f"[{count}]", list(row.shape))
        if bool(row[:count].isnan().any()):
            _checks.wrong_value(_OP, f"{name}[{i}]", "numbers", "NaN")
    return [row[:count] for row, count in zip(found, counts, strict=True)]


def _shared_bias(model: Any, layers: list[Layer]) -> nn.Module | None:
    """What makes MPNet's bias of positions, [buckets, heads] for all layers; None where there is no such bias, or where
    layers of a smaller model know which of its heads are theirs."""
    if not layers[0].adapter.per_head:
        return None
    made: nn.Module = model.base_model.encoder.relative_attention_bias
    smaller = any(layer.heads != matrix(made).shape[1] or hasattr(layer.attention, "own_heads") for layer in layers)
    return None if smaller else made


def linear_maps(op: str, layer: Layer) -> dict[str, Any]:
    """The linear maps of a layer, by name below it.

    Raises:
        TypeError: one is more than weight and bias.
    """
    found = dict[str, Any]()
    for name in itertools.chain(*layer.maps):
        found[name] = layer.module.get_submodule(name)
        of = type(found[name])
        if of.forward not in (nn.Linear.forward, Conv1D.forward) and not issubclass(of, RepeatedHeads | Masked):
            expected = "nn.Linear or Conv1D, neither quantised nor with an adapter"
            _checks.wrong_type(op, f"model: {layer.name}.{name}", expected, of.__name__)
    return found


def _descending(scores: Tensor) -> Tensor:
    return scores.argsort(descending=True, stable=True)


def _by_group(layer: Layer, scores: Tensor) -> Tensor:
    """The order of the heads: the best group first, and in it its best head."""
    of_groups = scores.new_zeros(layer.groups).index_add_(0, layer.group_of, scores)
    place = _descending(of_groups).argsort()
    order = _descending(scores)
    return order[place[layer.group_of[order]].argsort(stable=True)]


def _sort(linear: Any, rows: Tensor | None, columns: Tensor | None) -> None:
    weight = matrix(linear)
    if rows is not None:
        rows = rows.to(weight.device)
        weight.copy_(weight.index_select(0, rows))
        if linear.bias is not None:
            linear.bias.copy_(linear.bias.index_select(0, rows))
    if columns is not None:
        weight.copy_(weight.index_select(1, columns.to(weight.device)))
