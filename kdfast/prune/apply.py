"""A model that computes only what lives, in place and with the same parameters."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kdfast.models.inputs import unwrapped
from kdfast.nn.block_sparse import BlockSparseLinear
from kdfast.ops import _checks
from kdfast.ops._packed import Packed
from kdfast.prune.layers import Adapter, Layer, Part, layers_of, matrix, parts_of_heads, parts_of_neurons, sharing
from kdfast.prune.masked import (
    DroppedLayer,
    KeptHeads,
    KeptPart,
    MaskedAttention,
    MaskedMap,
    Passing,
    mask,
    restore,
)
from kdfast.prune.masks import Masks, check
from kdfast.prune.modules import RepeatedHeads

__all__ = ["apply", "remove"]

_OP = "kdfast.prune.apply"
ELASTIC = "_kdfast_elastic"  # the attribute of a layer that an Elastic is open on
_APPLIED = "_kdfast_applied"  # the attribute of a layer that says what it is masked by
Maps = dict[str, tuple[nn.Module, ...]]  # by name below the layer


def apply(model: nn.Module, masks: Masks) -> None:
    """Makes a model compute only what lives, in place: its outputs are those that it has with the outputs of dead heads
    and neurons set to zero, but nothing dead is computed (Michel et al., 2019; Hou et al., 2020).

        masks = kdfast.prune.Masks.full(model)
        masks.heads[0][[2, 5]] = False
        masks.neurons[0][1000:] = False
        kdfast.prune.apply(model, masks)        # train, evaluate, generate as before
        masks.heads[1][3] = False
        kdfast.prune.apply(model, masks)        # other masks: the same again, as often as in every step
        kdfast.prune.remove(model)              # the model as it was

    Projections, attention and feed-forward networks are of the size of what lives; attention modules and their
    implementation (SDPA, flash attention, eager) stay. The parameters are the same objects, whole, and so is the state:
    optimizers, `state_dict`, `save_pretrained` and copies of the model see nothing of the masks. Keep those by
    `Masks.to_json`. What is dead has a gradient of exactly zero, or none where a whole layer or all heads of one are dead,
    and whatever is in dead weights, NaN too, reaches nothing. DDP needs no `find_unused_parameters`.

    A call costs microseconds per layer whose masks stay, and making indices for the others. A layer with all its heads
    keeps its own attention, one with all neurons its own feed-forward network. `output_attentions` gives the live heads
    of layers that have any. Keys and values of groups that are read by different numbers of heads are made once and then
    repeated, in the cache too. Compiled models compile again when sizes change.

    A BlockSparseLinear is masked by its dense weight, made anew in every call: exact, but slower than either. Compact the
    model to have blocks again.

    LoRA of peft is masked as what it adapts; apply again after adding an adapter. `fully_shard` and DDP may come before
    or after.

    Args:
        model: a model of transformers, wrapped or not, of an architecture in `kdfast.prune.layers.ADAPTERS`.
        masks: what lives of it.

    Raises:
        TypeError, ValueError: model as in `layers_of`; masks as in `Masks.check`; a linear map that is neither
            `nn.Linear`, `Conv1D` nor LoRA of these (quantised ones), or whose forward was replaced. Nothing has changed
            then.
    """
    if not isinstance(model, nn.Module):
        _checks.wrong_type(_OP, "model", "a model of transformers", _checks.kind(model))
    inner = unwrapped(model)
    if any(ELASTIC in vars(module) for module in inner.modules()):
        expected = "one on which no kdfast.elastic.Elastic is open"
        _checks.wrong_value(_OP, "model", expected, "one that has it; close() it first (a copy: kdfast.prune.remove)")
    places = _places(inner)
    kind = inner.config.model_type
    check(_OP, masks, [place.layer for place in places], inner.config)
    if masks.hidden is not None and not bool(masks.hidden.all()):
        _checks.wrong_value(_OP, "masks.hidden", "None or all True (kdfast.prune.compact takes others)", "some False")
    maps = [place.maps() for place in places]  # which refuses before anything changes
    with torch.inference_mode(False):  # indices made in it could not be saved for a backward
        for i, (place, lives) in enumerate(zip(places, masks.layers.tolist(), strict=True)):
            _apply_to(place.layer, kind, maps[i], masks.heads[i], masks.neurons[i], lives)


def remove(model: nn.Module) -> None:
    """Makes a model what it was before `apply`: classes, attributes and results, bit for bit; weights that were trained
    stay so. A model without masks stays as it is."""
    for module in unwrapped(model).modules():
        restore(module)
        module.__dict__.pop(_APPLIED, None)
        module.__dict__.pop(ELASTIC, None)


# ---- a layer ----
@dataclass
class _Applied:
    """What a layer is masked by, and the linear maps that it masks."""

    heads: Tensor | None = None
    neurons: Tensor | None = None
    lives: bool = True
    of_heads: tuple[nn.Module, ...] = ()
    of_neurons: tuple[nn.Module, ...] = ()


def _apply_to(layer: Layer, kind: str, maps: tuple[Maps, Maps], heads: Tensor, neurons: Tensor, lives: bool) -> None:
    of_heads, of_neurons = (tuple(module for found in of.values() for module in found) for of in maps)
    applied: _Applied = layer.module.__dict__.setdefault(_APPLIED, _Applied())
    if applied.heads is None or applied.of_heads != of_heads or not torch.equal(applied.heads, heads):
        for module in (layer.attention, *of_heads):
            restore(module)
        if not bool(heads.all()):
            _mask_heads(layer, kind, maps[0], heads.nonzero().flatten())
        applied.heads, applied.of_heads = heads.clone(), of_heads
    if applied.neurons is None or applied.of_neurons != of_neurons or not torch.equal(applied.neurons, neurons):
        for module in of_neurons:
            restore(module)
        if not bool(neurons.all()):
            _mask_maps(maps[1], parts_of_neurons(layer, neurons.nonzero().flatten()), layer.head_size)
        applied.neurons, applied.of_neurons = neurons.clone(), of_neurons
    if applied.lives != lives:
        restore(layer.module)
        if not lives:
            number = getattr(layer.attention, "layer_idx", None)
            mask(layer.module, DroppedLayer, Passing(layer.adapter.returns_tuple, number))
        applied.lives = lives


def _mask_heads(layer: Layer, kind: str, maps: Maps, heads: Tensor) -> None:
    _mask_maps(maps, parts_of_heads(layer, heads), layer.head_size)
    attention, adapter = layer.attention, layer.adapter
    sizes = {"num_key_value_groups": sharing(layer, heads)[1]}
    sizes |= dict.fromkeys(adapter.width, len(heads) * layer.head_size)
    before = {name: attention.__dict__[name] for name in sizes if name in attention.__dict__}
    mask(attention, MaskedAttention, KeptHeads(kind, tuple(heads.tolist()), _places_of(adapter, attention), before))
    attention.__dict__.update({name: sizes[name] for name in before})


def _places_of(adapter: Adapter, attention: nn.Module) -> dict[str, int]:
    if not adapter.per_head:
        return {}
    arguments = [*inspect.signature(type(attention).forward).parameters][1:]  # without self
    return {name: arguments.index(name) for name in adapter.per_head}


def _mask_maps(maps: Maps, parts: dict[str, Part], head_size: int) -> None:
    for name, part in parts.items():
        repeat = None if part.repeat is None else tuple(part.repeat.tolist())
        for module in maps[name]:
            weight = matrix(module)
            packed = Packed((weight.shape[0], weight.shape[1]), part.rows, part.columns, op=_OP)
            mask(module, MaskedMap, KeptPart(packed, repeat, head_size))


def masks_of(layer: Layer) -> tuple[Tensor, Tensor, bool]:
    """Which of a layer's heads and neurons live, and whether it does; all where it is not masked."""
    module = getattr(layer.module, "_orig_mod", layer.module)
    applied: _Applied = module.__dict__.get(_APPLIED, _Applied())
    heads, neurons = (
        torch.ones(count, dtype=torch.bool) if mask is None else mask.clone()
        for mask, count in ((applied.heads, layer.heads), (applied.neurons, layer.neurons))
    )
    return heads, neurons, applied.lives


# ---- where the maps are ----
class _Place:
    """A layer, and how its linear maps are found, in whose place others may have come since (an adapter's)."""

    def __init__(self, layer: Layer) -> None:
        adapter, self._found = layer.adapter, layer.module
        # a layer may be compiled by itself, and its wrapper's forward is no method that another class would replace
        self.layer = replace(layer, module=getattr(layer.module, "_orig_mod", layer.module))
        takes = (adapter.output, adapter.contract)
        self._maps = [[(name, attrgetter(name), name in takes) for name in names] for names in layer.maps]
        self._find = attrgetter(layer.name)

    def is_in(self, model: nn.Module) -> bool:
        try:
            return self._find(model) is self._found  # type: ignore[no-any-return]
        except AttributeError:
            return False

    def maps(self) -> tuple[Maps, Maps]:
        """The linear maps by name, of the heads and of the neurons."""
        place, layer = self.layer.name, self.layer.module
        if "forward" in layer.__dict__:
            _wrong_forward(place)
        of_heads, of_neurons = (
            {name: _linear_maps(place, name, find(layer), takes) for name, find, takes in maps} for maps in self._maps
        )
        return of_heads, of_neurons


# To see that a model's layers are still there takes a tenth of the time of finding them.
_known: WeakKeyDictionary[nn.Module, list[_Place]] = WeakKeyDictionary()


def _places(model: nn.Module) -> list[_Place]:
    places = _known.get(model)
    if places is None or not all(place.is_in(model) for place in places):
        places = _known[model] = [_Place(layer) for layer in layers_of(model, _OP, of_blocks=True)]
    return places


def _linear_maps(place: str, name: str, module: Any, takes: bool) -> tuple[nn.Module, ...]:
    """What a module is as linear maps: itself; with LoRA the map below it and those of its adapters that take its
    inputs, or make its outputs."""
    if _is_map(type(module)) and "forward" not in module.__dict__:
        return (module,)
    found = (module,)
    if hasattr(module, "lora_A") and not getattr(module, "lora_variant", None):
        found = (module.base_layer, *(module.lora_A if takes else module.lora_B).values())
    for one in found:
        if not _is_map(type(one)):
            expected = f"nn.Linear, Conv1D, or LoRA of peft on one, as {place}.{name}"
            _checks.wrong_type(_OP, "model", expected, type(one).__name__)
        if "forward" in one.__dict__:
            _wrong_forward(f"{place}.{name}")
    return found


def _wrong_forward(name: str) -> NoReturn:
    expected = f"{name} with the forward of its class"
    _checks.wrong_value(_OP, "model", expected, "one that was set on it (accelerate does, for a device_map)")


_FORWARDS = (nn.Linear.forward, Conv1D.forward, BlockSparseLinear.forward, MaskedMap.forward)


def _is_map(of: type[nn.Module]) -> bool:
    """Whether modules of this class are weight, bias and nothing else; what repeats heads is masked with them."""
    return issubclass(of, RepeatedHeads) or of.forward in _FORWARDS
