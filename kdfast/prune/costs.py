"""What a model costs with masks, by arithmetic alone: parameters, and floating-point operations for a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kdfast.models import cost
from kdfast.models.inputs import model_inputs, unwrapped
from kdfast.prune.layers import Layer, layers_of, matrix
from kdfast.prune.masks import Masks

__all__ = ["Costs", "Flops", "Parameters"]


class Costs:
    """What a model costs: what its layers do, and the rest that pruning leaves as it is.

    A subclass says what one layer costs; `kdfast.prune.select` and `kdfast.prune.genetic_search` ask only that.
    """

    unit = ""
    rest: float

    def layer(self, i: int, heads: Tensor, neurons: Tensor) -> float:
        """What layer i costs with these heads and neurons, two masks."""
        raise NotImplementedError

    def of_layer(self, i: int, masks: Masks) -> float:
        """What layer i costs with masks: nothing where it does not live."""
        return self.layer(i, masks.heads[i], masks.neurons[i]) if bool(masks.layers[i]) else 0.0

    def of(self, masks: Masks) -> float:
        """What the model costs with masks."""
        return self.rest + sum(self.of_layer(i, masks) for i in range(len(masks.heads)))


@dataclass(frozen=True)
class _Sizes:
    """Numbers of a layer's parameters that go with each head, each group of keys and values, each neuron."""

    head: int
    group: int
    neuron: int


class Parameters(Costs):
    """The number of parameters of `kdfast.prune.compact(model, masks)`; with layers, heads and neurons that all live in
    some part: a sublayer that is gone altogether takes its norm along, which is not counted here."""

    unit = "parameters"

    def __init__(self, model: nn.Module) -> None:
        self.layers = layers_of(model, "kdfast.prune.Parameters")
        self.sizes = [_sizes(layer, biases=True) for layer in self.layers]
        self.fixed = [
            _all(layer.module) - _counted(layer, of) for layer, of in zip(self.layers, self.sizes, strict=True)
        ]
        self.rest = cost.parameters(unwrapped(model)) - sum(map(_all, {layer.module for layer in self.layers}))

    def layer(self, i: int, heads: Tensor, neurons: Tensor) -> float:
        of, groups = self.sizes[i], len(self.layers[i].group_of[heads].unique())
        return self.fixed[i] + int(heads.sum()) * of.head + groups * of.group + int(neurons.sum()) * of.neuron


class Flops(Costs):
    """The floating-point operations of a forward pass, as `kdfast.models.cost.flops` counts them, for a batch of the shape
    of `batch`, which is run through the model once."""

    unit = "FLOP"

    def __init__(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        self.layers = layers_of(model, "kdfast.prune.Flops")
        self.sizes = [_sizes(layer, biases=False) for layer in self.layers]
        self.rows, self.tokens = batch["input_ids"].shape
        self.calls = calls(unwrapped(model), self.layers)
        whole = Masks.full(model)
        self.rest = cost.flops(model, model_inputs(model, batch)) - sum(
            self.of_layer(i, whole) for i in range(len(self.layers))
        )

    def layer(self, i: int, heads: Tensor, neurons: Tensor) -> float:
        of, layer, count = self.sizes[i], self.layers[i], int(heads.sum())
        weights = count * of.head + len(layer.group_of[heads].unique()) * of.group + int(neurons.sum()) * of.neuron
        attention = 2 * self.tokens * count * layer.head_size  # scores, and their products with values
        return float(2 * self.rows * self.tokens * self.calls[i] * (weights + attention))


def calls(model: Any, layers: Sequence[Layer]) -> list[int]:
    """How often a forward pass calls each layer: once, but in ALBERT, whose layers share weights."""
    if model.config.model_type != "albert":
        return [1] * len(layers)
    count, groups = model.config.num_hidden_layers, model.config.num_hidden_groups
    of_groups = Counter(int(i / (count / groups)) for i in range(count))
    return [of_groups[i // model.config.inner_group_num] for i in range(len(layers))]


def _all(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _counted(layer: Layer, of: _Sizes) -> int:
    return layer.heads * of.head + layer.groups * of.group + layer.neurons * of.neuron


def _sizes(layer: Layer, biases: bool) -> _Sizes:
    adapter, size = layer.adapter, layer.head_size

    def of_rows(name: str) -> int:
        linear: Any = layer.module.get_submodule(name)
        return matrix(linear).shape[1] + int(biases and linear.bias is not None)

    def of_columns(name: str) -> int:
        return len(matrix(layer.module.get_submodule(name)))

    query, key, value = (size * of_rows(name) if layer.heads else 0 for name in adapter.qkv)
    head = query + (size * of_columns(adapter.output) if layer.heads else 0)
    neuron = sum(map(of_rows, adapter.expand)) + of_columns(adapter.contract) if layer.neurons else 0
    return _Sizes(head, key + value, neuron)
