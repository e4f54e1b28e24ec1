"""Criteria that read what heads and neurons give, without labels: how often nothing (APoZ), and how much."""

from __future__ import annotations

from torch import Tensor

from kdfast.prune.criteria.registry import criterion
from kdfast.prune.criteria.streams import Streams


@criterion("batches", of=("heads", "neurons"))
def apoz(streams: Streams, *, threshold: float = 0.0) -> list[Tensor]:
    """The share of tokens for which a unit gives something: 1 − APoZ, the average percentage of zeros (Hu et al., 2016).

    A neuron gives nothing where its activation is ≤ threshold, as after a ReLU; GELU makes no exact zeros, and the
    default asks for the sign. A head gives nothing where ‖c_h‖₂ ≤ threshold.
    """

    def given(x: Tensor) -> Tensor:
        return (x.squeeze(-1) if streams.of == "neurons" else x.norm(dim=-1)) > threshold

    return streams.mean([given(x) for x in seen] for seen in streams.activations())


@criterion("batches", of=("heads", "neurons"))
def activation_norm(streams: Streams) -> list[Tensor]:
    """The mean over tokens of ‖c_h‖₂, of what a head gives, or |g_i| of a neuron."""
    return streams.mean([x.norm(dim=-1) for x in seen] for seen in streams.activations())
