"""What criteria read of a model, a layer or a batch at a time: weights, their gradients, activations, and gates.

A gate ξ = 1 multiplies what a unit gives, so that ∂L/∂ξ = Σ x · ∂L/∂x is what the loss loses, to first order, without
it. Nothing here is kept beyond what is yielded, and the model stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdfast.models.cost import evaluating
from kdfast.models.inputs import unwrapped
from kdfast.ops import _checks
from kdfast.prune.geometry import OfParameter, blocks, matrix_of, vectors
from kdfast.prune.layers import Layer, layers_of, matrix
from kdfast.prune.masked import live_part
from kdfast.prune.passes import Loss, Sums, backward, inputs_of, loss_of
from kdfast.prune.ranks import add_up
from kdfast.prune.rewire import linear_maps
from kdfast.prune.scores import Kind


class Place(NamedTuple):
    """Where a vector of scores belongs: a layer, or of blocks one linear map of it."""

    name: str
    layer: Layer
    linear: nn.Module | None = None


class Moments(NamedTuple):
    """Of what an output map reads: the mean of x xᵀ over tokens, [features, features], and that of x, [features]."""

    second: Tensor
    first: Tensor


class Streams:
    """A model, which of its units are asked for, and batches.

    batches: iterated once by each stream. loss: of the model and a batch, the mean over its rows; None: the model's own.
    block: rows and columns of the blocks of weights that are asked for, where `of` is "blocks".

    Raises:
        TypeError, ValueError: a model as in `layers_of`, or with linear maps that are more than that; blocks that do not
            divide one.
    """

    def __init__(
        self,
        model: nn.Module,
        of: Kind,
        batches: Iterable[Any] = (),
        loss: Loss | None = None,
        block: tuple[int, int] = (32, 32),
        op: str = "kdfast.prune.criteria.score",
    ) -> None:
        self.model, self.of, self.op, self.block = unwrapped(model), of, op, block
        self.layers = layers_of(model, op)
        self.maps = [linear_maps(op, layer) for layer in self.layers]
        self.wide = torch.promote_types(self.model.dtype, torch.float32)
        self._batches, self._loss = batches, loss
        for place in self.places if of == "blocks" else ():
            shape = list(matrix(place.linear).shape)  # type: ignore[arg-type]
            if any(size % step for size, step in zip(shape, block, strict=True)):
                _checks.wrong_value(op, "block", f"one that divides {place.name}, {shape}", list(block))

    @property
    def places(self) -> list[Place]:
        if self.of != "blocks":
            return [Place(layer.name, layer) for layer in self.layers]
        pairs = zip(self.layers, self.maps, strict=True)
        return [Place(f"{layer.name}.{name}", layer, one) for layer, maps in pairs for name, one in maps.items()]

    def batches(self) -> Iterator[Any]:
        """Those that this rank was given; all ranks together have at least one."""
        seen = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for batch in self._batches:
            yield batch
            seen += 1
        add_up([seen])  # no rank raises alone, for which the others would wait
        if not seen:
            _checks.wrong_value(self.op, "batches", "at least one", "none")

    def keep_batches(self) -> int:
        """For a criterion that reads them twice; returns how many this rank has."""
        self._batches = list(self.batches())
        return len(self._batches)

    def over_ranks(self, totals: Sequence[Tensor], count: int) -> float:
        """The totals become their sums over all ranks' batches, in place; returns that of the count, at least 1."""
        counted = torch.tensor(float(count), dtype=torch.float64, device=self.model.device)
        for each in (counted, *totals):  # one at a time, as it is copied
            add_up([each])
        return max(float(counted), 1.0)

    # ---- weights ----
    def weights(self, value: OfParameter = lambda parameter: parameter) -> Iterator[Tensor]:
        """Of every place [units, numbers of a unit], a copy: its weights, or what `value` makes of a parameter."""
        for place in self.places:
            if place.linear is None:
                yield vectors(place.layer, self.of, value).to(self.wide)
            else:
                yield blocks(place.linear, self.block, value).detach().flatten(0, 1).flatten(1).to(self.wide)

    def zeros(self) -> list[Tensor]:
        """Of every place [units]."""
        return [weights.new_zeros(len(weights)) for weights in self.weights()]

    def mean(self, parts: Iterable[Iterable[Tensor]]) -> list[Tensor]:
        """Of every place [units]: the mean of the rows of all parts, which have [rows, units] of every place, and of all
        ranks."""
        totals, rows = self.zeros(), 0
        for part in parts:
            found = list(part)
            rows += max(map(len, found))
            for total, x in zip(totals, found, strict=True):
                total += x.sum(0, dtype=total.dtype)
        counted = self.over_ranks(totals, rows)
        return [total / counted for total in totals]

    # ---- weights and gradients ----
    def gradients(self, by_row: bool = False) -> Iterator[OfParameter]:
        """Of every batch, or every row of one, what gives a parameter's gradient."""
        parameters = list(
            {p for maps in self.maps for linear in maps.values() for p in linear.parameters(recurse=False)}
        )
        for batch in self.batches():
            for part in _rows(batch, self.op) if by_row else [batch]:
                with evaluating(self.model), _trainable(parameters), torch.enable_grad():
                    loss = loss_of(self.model, part, self._loss, self.op)
                    found = torch.autograd.grad(loss, parameters, allow_unused=True)
                given = dict(zip(parameters, found, strict=True))
                yield lambda parameter, given=given: _or_zeros(given[parameter], parameter)  # type: ignore[misc]

    def products(self, by_row: bool = False) -> Iterator[Iterator[Tensor]]:
        """Of every batch, or every row of one, by place [units, numbers of a unit]: weights times gradients."""
        for gradient in self.gradients(by_row):
            yield self.weights(lambda parameter, of=gradient: parameter * of(parameter))  # type: ignore[misc]

    # ---- gates ----
    def gates(self) -> Iterator[list[Tensor]]:
        """Of every batch, by place, [rows, units]: ∂L_x/∂ξ of the loss of each row x."""
        sums = [Sums(layer, True, self.wide, self.model.device, self.op) for layer in self.layers]
        for batch in self.batches():
            backward(self.model, sums, batch, self._loss, self.op)
            shown = [each.value for one in sums for each in (one.context, one.activated) if each.value is not None]
            rows = max(map(len, shown), default=0)  # none where no layer lives
            found = []
            for one in sums:
                heads, neurons = (
                    torch.zeros(rows, each.units, dtype=self.wide, device=self.model.device)
                    if each.value is None
                    else rows * each.value  # the loss is a mean over rows
                    for each in (one.context, one.activated)
                )
                one.context.value = one.activated.value = None
                found.append(self._of_units(one.layer, heads, neurons))
            yield found

    def _of_units(self, layer: Layer, heads: Tensor, neurons: Tensor) -> Tensor:
        """Gates of what is asked for, by those of heads and neurons: one gate on several is the sum of theirs."""
        if self.of == "groups":
            groups = layer.group_of.to(heads.device)
            return heads.new_zeros(len(heads), layer.groups).index_add_(1, groups, heads)
        if self.of == "layers":
            return heads.sum(1, keepdim=True) + neurons.sum(1, keepdim=True)
        return heads if self.of == "heads" else neurons

    # ---- activations ----
    def activations(self) -> Iterator[list[Tensor]]:
        """Of every batch, by layer, what each head or neuron gives: [tokens, units, numbers of a unit]. Padding, by
        `attention_mask`, is left out."""
        for batch in self.batches():
            seen: list[list[Tensor]] = [[] for _ in self.layers]
            if not isinstance(batch, Mapping):
                _checks.wrong_value(self.op, "batches", "columns", _checks.kind(batch))
            counted = batch.get("attention_mask")
            with evaluating(self.model), torch.no_grad(), _watched(self, seen, counted):
                self.model(**inputs_of(self.model, batch))
            yield [
                torch.cat(parts)
                if parts
                else torch.zeros(0, self.units(layer), self.size(layer), dtype=self.wide, device=self.model.device)
                for parts, layer in zip(seen, self.layers, strict=True)
            ]

    def output_map(self, layer: Layer) -> nn.Module:
        """The map that reads what the heads or neurons give."""
        adapter = layer.adapter
        return layer.module.get_submodule(adapter.contract if self.of == "neurons" else adapter.output)

    def output_weight(self, layer: Layer, value: OfParameter = lambda parameter: parameter) -> Tensor:
        """The matrix of that map, [out, features], or what `value` makes of it; [0, 0] where nothing is left."""
        if not self.units(layer):
            return torch.zeros(0, 0, dtype=self.wide, device=self.model.device)
        return matrix_of(self.output_map(layer), value).detach().to(self.wide)

    def units(self, layer: Layer) -> int:
        """How many heads or neurons."""
        return layer.neurons if self.of == "neurons" else layer.heads

    def size(self, layer: Layer) -> int:
        """How many numbers one gives."""
        return 1 if self.of == "neurons" else layer.head_size

    def full(self, layer: Layer, x: Tensor) -> Tensor:
        """What an output map gets, [tokens, features], as [tokens, units, numbers], zero where it is masked."""
        units, size = self.units(layer), self.size(layer)
        live = live_part(self.output_map(layer), of_input=True)
        x = x.to(self.wide)
        if live is not None:
            x = x.new_zeros(len(x), units * size).index_copy_(-1, live.to(x.device), x)
        return x.view(len(x), units, size)

    def moments(self) -> list[Moments]:
        """By layer, over all tokens of all batches and ranks. All of one pass, so that as many matrices live as there are
        layers."""
        widths, tokens = [self.units(layer) * self.size(layer) for layer in self.layers], 0
        new = partial(torch.zeros, dtype=self.wide, device=self.model.device)
        found = [Moments(new(width, width), new(width)) for width in widths]
        for seen in self.activations():
            flat = [x.flatten(1) for x in seen]
            tokens += max(map(len, flat))
            for total, x in zip(found, flat, strict=True):
                total.second.addmm_(x.mT, x)
                total.first.add_(x.sum(0))
        counted = self.over_ranks([each for total in found for each in total], tokens)
        for total in found:
            total.second.div_(counted)
            total.first.div_(counted)
        return found


@contextmanager
def _watched(streams: Streams, seen: list[list[Tensor]], counted: Tensor | None) -> Iterator[None]:
    def hook(layer: Layer, to: list[Tensor]) -> Callable[[nn.Module, Any], None]:
        def see(_: nn.Module, inputs: Any) -> None:
            x: Tensor = inputs[0]
            by_token = counted is not None and counted.shape == x.shape[:-1]
            x = x[counted.bool().to(x.device)] if by_token and counted is not None else x.flatten(0, -2)
            to.append(streams.full(layer, x))

        return see

    handles = [
        streams.output_map(layer).register_forward_pre_hook(hook(layer, to))
        for layer, to in zip(streams.layers, seen, strict=True)
        if streams.units(layer)
    ]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _trainable(parameters: list[nn.Parameter]) -> Iterator[None]:
    before = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, was in zip(parameters, before, strict=True):
            p.requires_grad_(was)


def _rows(batch: Any, op: str) -> Iterator[dict[str, Any]]:
    """The rows of a batch, as batches of one."""
    if not isinstance(batch, Mapping):
        _checks.wrong_value(op, "batches", "columns", _checks.kind(batch))
    rows = max(len(x) for x in batch.values() if isinstance(x, Tensor) and x.dim())
    for i in range(rows):
        yield {name: x[i : i + 1] if isinstance(x, Tensor) and x.dim() else x for name, x in batch.items()}


def _or_zeros(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient
