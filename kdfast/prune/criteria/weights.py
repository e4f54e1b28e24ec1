"""Criteria that read nothing but weights: norms, the distance to the others (FPGM), importance handed back (NISP), chance."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.prune.criteria.registry import criterion
from kdfast.prune.criteria.streams import Streams
from kdfast.prune.layers import Layer, matrix


@criterion("nothing")
def magnitude(streams: Streams) -> list[Tensor]:
    """The mean of |w| over a unit's weights (Han et al., 2015): norms of units of different sizes, compared."""
    return [w.abs().mean(1) for w in streams.weights()]


@criterion("nothing")
def l1(streams: Streams) -> list[Tensor]:
    """Σ |w| over a unit's weights (Li et al., 2017)."""
    return [w.abs().sum(1) for w in streams.weights()]


@criterion("nothing")
def l2(streams: Streams) -> list[Tensor]:
    """√Σ w² over a unit's weights (Li et al., 2017)."""
    return [w.norm(dim=1) for w in streams.weights()]


@criterion("nothing", of=("heads", "groups", "neurons"))
def fpgm(streams: Streams) -> list[Tensor]:
    """Σ_j ‖v_i − v_j‖₂ over the units of a layer, v their weights: what is near the geometric median, the others can
    stand for (He et al., 2019)."""
    return [torch.cdist(v.double(), v.double()).fill_diagonal_(0).sum(1).to(v.dtype) for v in streams.weights()]


@criterion("nothing")
def random(streams: Streams, *, seed: int = 0) -> list[Tensor]:
    """Uniform numbers, the control that every other has to beat."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(x.shape, generator=generator, dtype=streams.wide).to(x.device) for x in streams.zeros()]


@criterion("nothing", of=("heads", "neurons"))
def nisp(streams: Streams) -> list[Tensor]:
    """Importance handed back from what the last layer gives, through |weights| (Yu et al., 2018).

    With s the importance of hidden states, 1 each behind the last layer: neurons get |W₂|ᵀ s, heads Σ over their slots
    of |W_O|ᵀ s, and s itself, which goes on beside them, s + |W₁|ᵀ s_neurons, then s + |W_V|ᵀ s_slots. Norms are left
    out, and what heads look at: queries and keys move what they give, but give none of it.
    """
    found: list[Tensor] = []
    hidden = None
    for layer in reversed(streams.layers):
        if hidden is None:
            hidden = torch.ones(streams.model.config.hidden_size, dtype=streams.wide, device=streams.model.device)
        neurons, hidden = _through_neurons(streams, layer, hidden)
        heads, hidden = _through_heads(streams, layer, hidden)
        found.append(heads if streams.of == "heads" else neurons)
    return found[::-1]


def _magnitudes(streams: Streams, layer: Layer, name: str) -> Tensor:
    return matrix(layer.module.get_submodule(name)).abs().to(streams.wide)


def _through_neurons(streams: Streams, layer: Layer, hidden: Tensor) -> tuple[Tensor, Tensor]:
    if not layer.neurons:
        return hidden.new_zeros(0), hidden
    neurons = hidden @ _magnitudes(streams, layer, layer.adapter.contract)
    for name in dict.fromkeys(layer.adapter.expand):
        expand = _magnitudes(streams, layer, name)
        hidden = hidden + neurons.repeat(len(expand) // layer.neurons) @ expand
    return neurons, hidden


def _through_heads(streams: Streams, layer: Layer, hidden: Tensor) -> tuple[Tensor, Tensor]:
    if not layer.heads:
        return hidden.new_zeros(0), hidden
    slots = (hidden @ _magnitudes(streams, layer, layer.adapter.output)).view(layer.heads, layer.head_size)
    groups = slots.new_zeros(layer.groups, layer.head_size)
    groups.index_add_(0, layer.group_of.to(slots.device), slots)
    value = _magnitudes(streams, layer, layer.adapter.qkv[2])[-groups.numel() :]  # the last of maps that make several
    return slots.sum(1), hidden + groups.flatten() @ value
