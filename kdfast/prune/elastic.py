"""Sub-networks of one set of weights, by width and depth: DynaBERT (Hou et al., 2020).

    heads, neurons = kdfast.prune.importance(model, batches)
    kdfast.prune.rewire(model, heads, neurons)                    # the best first, once
    elastic = kdfast.elastic.Elastic(model, widths=(0.25, 0.5, 0.75, 1.0), depths=(0.5, 0.75, 1.0))
    for batch in data:
        for width, depth in elastic.subnetworks:                  # their gradients add up
            elastic.set(width, depth)
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)                    # the next gradients are added where these were
    small = elastic.export(0.5, 0.75)

What `kdfast.prune.apply` does with masks that may be any, this does with first heads and neurons, which need no packing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.models.inputs import unwrapped
from kdfast.ops import _checks
from kdfast.ops._packed import Packed
from kdfast.ops.prefix import prefix_linear
from kdfast.prune.apply import ELASTIC
from kdfast.prune.compact import compact
from kdfast.prune.layers import Layer, layers_of, matrix, parts
from kdfast.prune.masked import (
    DroppedLayer,
    KeptHeads,
    KeptPart,
    Masked,
    MaskedAttention,
    MaskedMap,
    Passing,
    mask,
    restore,
)
from kdfast.prune.masks import Masks
from kdfast.prune.rewire import linear_maps

__all__ = ["Elastic", "kept_layers", "kept_width"]

_OP = "kdfast.elastic.Elastic"
_KEPT = "_kdfast_masked"
_Change = tuple[nn.Module, dict[str, Any]]  # attributes of a module


# ---- which part ----
def kept_width(heads: int, groups: int, neurons: int, width: float) -> tuple[int, int]:
    """How many heads and neurons a layer keeps, the first ones: round(width · H), at least one, and
    ⌊round(width · H) / H · F⌋, at least one, of H heads and F neurons; halves to the even number, as in DynaBERT's code.
    Of grouped heads whole groups stay, round(width · G) of G, at least one.

    Raises:
        ValueError, TypeError: width is no number above 0 and up to 1.
    """
    _check_share("kdfast.elastic.kept_width", "width", width)
    return max(1, round(width * groups)) * (heads // groups), max(1, int(round(width * heads) / heads * neurons))


def kept_layers(layers: int, depth: float, keep_last: bool = False) -> list[int]:
    """The numbers, from 0, of the n = round(depth · N) of N layers that stay: ⌊i / depth⌋ for i from 0 to n - 1, as in
    DynaBERT's code: of 12 to 0.75 without 3, 7 and 11. `keep_last`: ⌊(i + 1) · N / n⌋ - 1, as a reading of the paper has
    it: without 2, 6 and 10.

    Raises:
        ValueError, TypeError: depth is no number above 0 and up to 1.
    """
    _check_share("kdfast.elastic.kept_layers", "depth", depth)
    count = round(depth * layers)
    return [(i + 1) * layers // count - 1 if keep_last else int(i / depth) for i in range(count)]


def _check_share(op: str, argument: str, share: float) -> None:
    if isinstance(share, bool) or not isinstance(share, int | float):
        _checks.wrong_type(op, argument, "a number above 0 and up to 1", _checks.kind(share))
    if not 0 < share <= 1:
        _checks.wrong_value(op, argument, "a number above 0 and up to 1", share)


# ---- modules ----
class PrefixMap(Masked):
    """A linear map of which the first outputs and inputs are in use."""

    def forward(self, x: Tensor) -> Tensor:
        kept: tuple[int, int] | None = self._kdfast_masked
        if kept is None:
            return super().forward(x)  # type: ignore[misc, no-any-return]
        weight, bias = matrix(self), self.bias
        return prefix_linear(x, weight, bias, out_features=kept[0], in_features=kept[1])  # type: ignore[arg-type]


# ---- the sub-networks ----
class Elastic:
    """Lets a model be one of its sub-networks, of some widths and depths, at a time, in place and with its own
    parameters: the first heads and neurons of every layer (`kept_width`) of some of its layers (`kept_layers`). It begins
    as the whole model, and `close`, or the end of `with`, makes it one for good.

    Every sub-network computes what its export does, by `kdfast.prefix_linear`: slices are read where they lie, and
    gradients are added into those that are there, of the slice alone. Where one map makes queries, keys and values, or
    both halves of a gated network, its slices are packed. `set` costs microseconds. Optimizers, `state_dict`,
    `save_pretrained`, autocast and gradient checkpointing see the whole model. Layers that a depth leaves out get no
    gradient, and DDP needs no `find_unused_parameters`. `torch.compile` compiles each sub-network once, of which its
    limit, `torch._dynamo.config.recompile_limit`, has to allow as many as there are.

    Args:
        model: of transformers, wrapped or not, of an architecture in `kdfast.prune.layers.ADAPTERS`, without masks.
        widths: shares of heads and neurons, above 0 and up to 1.
        depths: shares of layers. Only 1 for ALBERT, whose layers share their weights.
        keep_last: see `kept_layers`.

    Raises:
        TypeError, ValueError: model as in `layers_of`, with masks, elastic already, with linear maps that are more than
            that (an adapter of peft, quantised), or with groups that are read by different numbers of heads; shares out
            of range, or a depth that leaves no layer.
    """

    def __init__(
        self, model: nn.Module, widths: Sequence[float], depths: Sequence[float] = (1.0,), *, keep_last: bool = False
    ) -> None:
        inner = unwrapped(model)
        self.model, self.widths, self.depths = model, _shares("widths", widths), _shares("depths", depths)
        self._layers = [  # where one is compiled by itself, what it was made of
            replace(layer, module=getattr(layer.module, "_orig_mod", layer.module)) for layer in layers_of(inner, _OP)
        ]
        self._kept = {depth: kept_layers(len(self._layers), depth, keep_last) for depth in (*self.depths, 1.0)}
        self._check(inner)
        self.width = self.depth = 1.0
        self._of_width: dict[float, list[_Change]] = {}
        self._of_depth: dict[float, list[_Change]] = {}
        with torch.inference_mode(False):  # indices made in it could not be saved for a backward
            self._open(inner.config.model_type)

    @property
    def subnetworks(self) -> list[tuple[float, float]]:
        """All pairs of width and depth, the largest first, in the order in which DynaBERT trains them."""
        return [(width, depth) for depth in sorted(self.depths)[::-1] for width in sorted(self.widths)[::-1]]

    def set(self, width: float = 1.0, depth: float = 1.0) -> None:
        """Makes the model a sub-network, from its next call on. Those before keep their gradients.

        Raises:
            ValueError: a width or depth that is neither the whole nor among those it was made for.
        """
        self._check_known(width, depth)
        for _, attributes in self._of_width[self.width] if width != self.width else ():
            if isinstance(kept := attributes[_KEPT], KeptPart):
                kept.packed.forget()  # or every width would hold its slices
        for module, attributes in self._of_width[width]:
            module.__dict__.update(attributes)
        for module, attributes in self._of_depth[depth]:
            module.__dict__.update(attributes)
        self.width, self.depth = width, depth

    def masks(self, width: float = 1.0, depth: float = 1.0) -> Masks:
        """What of the model lives in a sub-network.

        Raises:
            ValueError: as in `set`.
        """
        self._check_known(width, depth)
        masks = Masks.full(self.model)
        for layer, heads, neurons in zip(self._layers, masks.heads, masks.neurons, strict=True):
            of_heads, of_neurons = kept_width(layer.heads, layer.groups, layer.neurons, width)
            heads[of_heads:], neurons[of_neurons:] = False, False
        masks.layers[:] = torch.isin(torch.arange(len(self._layers)), torch.tensor(self._kept[depth]))
        return masks

    def export(self, width: float = 1.0, depth: float = 1.0) -> Any:
        """A sub-network as a model of its own, by `kdfast.prune.compact`.

        Raises:
            ValueError: as in `set`.
        """
        return compact(self.model, self.masks(width, depth))

    def close(self) -> None:
        """Makes the model what it was, with the weights that it has now."""
        if self._of_width:
            self.set()
        for changes in (*self._of_width.values(), *self._of_depth.values()):
            for module, _ in changes:
                restore(module)
        for layer in self._layers:
            layer.module.__dict__.pop(ELASTIC, None)
        self._of_width, self._of_depth = {}, {}

    def __enter__(self) -> Elastic:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, inner: Any) -> None:
        if any(isinstance(module, Masked) for module in inner.modules()):
            _checks.wrong_value(
                _OP,
                "model",
                "one without masks",
                "one that has some, or an open Elastic; kdfast.prune.remove(model) first",
            )
        for depth, kept in self._kept.items():
            if not kept:
                _checks.wrong_value(_OP, "depths", f"shares that leave one of {len(self._layers)} layers", depth)
            if depth != 1 and inner.config.model_type == "albert":
                _checks.wrong_value(_OP, "depths", "1 for ALBERT, whose layers share their weights", depth)
        for layer in self._layers:
            if not layer.heads or not layer.neurons or len(set(layer.group_of.bincount().tolist())) > 1:
                _checks.wrong_value(
                    _OP, f"model: {layer.name}", "heads, as many for each group of keys and values, and neurons",
                    f"groups {layer.group_of.tolist()} and {layer.neurons} neurons",
                )  # fmt: skip
            own = {"": layer.module, f".{layer.adapter.attention}": layer.attention}
            own |= {f".{name}": linear for name, linear in linear_maps(_OP, layer).items()}
            for name, module in own.items():
                if "forward" in module.__dict__:
                    got = "one that was set on it (accelerate does, for a device_map)"
                    _checks.wrong_value(_OP, f"model: {layer.name}{name}", "the forward of its class", got)

    def _check_known(self, width: float, depth: float) -> None:
        for argument, share, known in (("width", width, self._of_width), ("depth", depth, self._of_depth)):
            if share not in known:
                expected = f"one of {', '.join(map(str, known))}" if known else "an Elastic that is not closed"
                _checks.wrong_value(_OP, argument, expected, share)

    def _open(self, model_type: str) -> None:
        for depth, kept in self._kept.items():
            self._of_depth[depth] = [
                (layer.module, {_KEPT: None if i in kept else _passing(layer)}) for i, layer in enumerate(self._layers)
            ]
        for width in (*self.widths, 1.0):
            self._of_width[width] = [change for layer in self._layers for change in _changes(layer, width, model_type)]
        for layer in self._layers:
            mask(layer.module, DroppedLayer, None)
            layer.module.__dict__[ELASTIC] = True
            mask(layer.attention, MaskedAttention, None)
            for name, linear in linear_maps(_OP, layer).items():
                mask(linear, MaskedMap if _is_fused(layer, name) else PrefixMap, None)


def _shares(argument: str, shares: Sequence[float]) -> tuple[float, ...]:
    if not len(shares):
        _checks.wrong_value(_OP, argument, "at least one", "none")
    for share in shares:
        _check_share(_OP, argument, share)
    return tuple(map(float, shares))


def _passing(layer: Layer) -> Passing:
    return Passing(layer.adapter.returns_tuple, getattr(layer.attention, "layer_idx", None))


def _is_fused(layer: Layer, name: str) -> bool:
    """Whether a map makes several parts side by side, so that what lives is not its first rows."""
    return layer.adapter.qkv.count(name) > 1 or layer.adapter.expand.count(name) > 1


def _changes(layer: Layer, width: float, model_type: str) -> Iterable[_Change]:
    """What is to be set in a layer's modules for a width."""
    adapter, attention = layer.adapter, layer.attention
    heads, neurons = kept_width(layer.heads, layer.groups, layer.neurons, width)
    for name, part in parts(layer, *(torch.arange(count, device="cpu") for count in (heads, neurons))).items():
        module = layer.module.get_submodule(name)
        shape = matrix(module).shape
        rows, columns = (
            full if of is None else len(of) for full, of in zip(shape, (part.rows, part.columns), strict=True)
        )
        kept: object = (rows, columns)
        if kept == shape:
            kept = None
        elif _is_fused(layer, name):
            kept = KeptPart(Packed((shape[0], shape[1]), part.rows, part.columns, op=_OP), None, layer.head_size)
        yield module, {_KEPT: kept}
    before = {name: attention.__dict__[name] for name in adapter.width}
    arguments = [*inspect.signature(type(attention).forward).parameters][1:]
    of = KeptHeads(model_type, tuple(range(heads)), {name: arguments.index(name) for name in adapter.per_head}, before)
    yield attention, {_KEPT: None if heads == layer.heads else of, **dict.fromkeys(before, heads * layer.head_size)}
