"""Scores of what a criterion found, by the name of its place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.prune.apply import masks_of
from kdfast.prune.criteria.streams import Streams
from kdfast.prune.layers import Layer, matrix
from kdfast.prune.scores import Kind, Scores


def scores_of(streams: Streams, of: Kind, values: Sequence[Tensor]) -> Scores:
    """Scores of the values by place, blocks on their grid, and -inf for what is dead."""
    made = {}
    for place, x in zip(streams.places, values, strict=True):
        if place.linear is None:
            made[place.name] = x.masked_fill(_dead(place.layer, of).to(x.device), -torch.inf)
        else:
            made[place.name] = x.view(len(matrix(place.linear)) // streams.block[0], -1)
    return Scores(of, made, streams.block if of == "blocks" else None)


def by_group(layer: Layer, heads: Tensor) -> Tensor:
    """The sum over the heads of each group."""
    return heads.new_zeros(layer.groups).index_add_(0, layer.group_of.to(heads.device), heads)


def _dead(layer: Layer, of: Kind) -> Tensor:
    """What `apply` holds dead of a layer's units."""
    heads, neurons, lives = masks_of(layer)
    if of == "layers":
        return torch.tensor([not lives])
    living = by_group(layer, heads.double()) > 0 if of == "groups" else heads if of == "heads" else neurons
    return ~(living & lives)
