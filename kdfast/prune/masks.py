"""What of a model lives: its heads, neurons and layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdfast.prune.layers import layers_of

__all__ = ["Masks"]


@dataclass(eq=False)
class Masks:
    """What lives: bool tensors on the CPU, True where something does, set in place.

    heads: of every layer, [query heads]. neurons: of every layer, [neurons of the feed-forward network]. layers:
    [layers]; a layer that is False passes on what it gets, where one without heads and neurons still adds its biases.
    groups: of every layer, which group of keys and values each head reads; a group lives where one of its heads does.
    ALBERT, whose layers share weights, has masks for each distinct layer.

        masks = Masks.full(model)
        masks.heads[3][[1, 5]] = False      # two heads
        masks.heads[0][:] = False           # a layer's attention: what its output adds is its bias
        masks.drop_group(2, 1)              # a group of keys and values, with all heads that read it
        masks.layers[7] = False
        kdfast.prune.apply(model, masks)
    """

    heads: list[Tensor]
    neurons: list[Tensor]
    layers: Tensor
    groups: list[Tensor]

    @classmethod
    def full(cls, model: nn.Module) -> Masks:
        """Everything lives.

        Raises:
            TypeError, ValueError: model as in `layers_of`.
        """
        layers = layers_of(model, "kdfast.prune.Masks")
        return cls(
            heads=[torch.ones(layer.heads, dtype=torch.bool) for layer in layers],
            neurons=[torch.ones(layer.neurons, dtype=torch.bool) for layer in layers],
            layers=torch.ones(len(layers), dtype=torch.bool),
            groups=[layer.group_of for layer in layers],
        )

    def drop_group(self, layer: int, group: int) -> None:
        """No head that reads this group of keys and values lives."""
        self.heads[layer] &= self.groups[layer] != group

    def kept(self, layer: int) -> tuple[Tensor, Tensor]:
        """The numbers of a layer's heads and neurons that live, in order."""
        return self.heads[layer].nonzero().flatten(), self.neurons[layer].nonzero().flatten()
