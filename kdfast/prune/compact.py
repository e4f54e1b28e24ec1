"""Models that are smaller: copies of what masks leave of another."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar, overload

from torch import Tensor, nn
from torch.optim import Optimizer

from kdfast.models.inputs import unwrapped
from kdfast.models.student_parts import PER_LAYER, layers_path
from kdfast.ops import _checks
from kdfast.prune import blocks, cuts, disk
from kdfast.prune.apply import remove
from kdfast.prune.layers import Layer, layers_of, parts, sharing
from kdfast.prune.masks import Masks, check
from kdfast.prune.optimizer import optimizer_of
from kdfast.prune.shapes import reshape, shape_of
from kdfast.prune.width import cut_width, narrow

__all__ = ["compact"]

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)
OP = "kdfast.prune.compact"


@overload
def compact(model: nn.Module, masks: Masks, optimizer: None = None) -> Any: ...
@overload
def compact(model: nn.Module, masks: Masks, optimizer: AnyOptimizer) -> tuple[Any, AnyOptimizer]: ...
def compact(model: nn.Module, masks: Masks, optimizer: Optimizer | None = None) -> Any:
    """A new, smaller model that computes what `kdfast.prune.apply(model, masks)` does, to rounding.

        smaller = kdfast.prune.compact(model, masks)
        smaller, optimizer = kdfast.prune.compact(model, masks, optimizer)      # in the midst of training
        smaller.save_pretrained("pruned")       # AutoModel.from_pretrained("pruned") loads it, after `import kdfast`

    Its weights are copies of the rows and columns that live; the model stays as it is, masked by `apply` or not. Where
    groups of keys and values are left with different numbers of heads, groups are repeated so that all are read by the
    same number. A sublayer of which nothing is left is skipped, but for the bias that it adds, and a layer that does not
    live is gone. Tied weights stay tied; dtype, device, hooks, requires_grad and training mode are the model's.

    A BlockSparseLinear (`kdfast.prune.keep_blocks`) stays one where what is left is whole blocks; a block then lives where
    any weight of it did. Elsewhere it becomes a dense map, with zeros.

    With `masks.hidden`, every parameter is cut along the hidden states too: embeddings, norms, pooler and heads. Norms
    then normalise over what is left, so that the result is not what zeros in the model would give: train it again.

    What the class can express by its config needs kdfast no more: neurons that are as many in every layer, dropped
    layers, and in the family of Llama heads that are as many in every layer. Else the config keeps a record of the shapes
    (`quantization_config`, by which transformers lets others prepare a model), and loading needs `import kdfast`.

    Args:
        model: of transformers, of an architecture in `kdfast.prune.ADAPTERS`, which may be a result of this function;
            what is inside where it is wrapped (DDP, `torch.compile`). Close a `kdfast.hf.Reader` of it first.
        masks: what lives. The result does not know which heads and neurons of the original it has: keep
            `masks.to_json()` beside it; after `kdfast.prune.rewire` it is of the rewired weights. Of an open
            `kdfast.elastic.Elastic` the whole counts, whatever it is set to.
        optimizer: one that trains `model`.

    Returns:
        The model; with `optimizer`, the model and a new optimizer of the same class for it: the same groups and settings
        without the parameters that are gone, and their state, cut as they are. A scheduler of learning rates goes on
        once its `optimizer` is set to the new one.

    Raises:
        TypeError: no model of transformers, or one with linear maps that are quantised, sharded or have adapters.
        ValueError: an unknown architecture; masks of another model; no layer lives, or one of ALBERT does not; a linear
            map whose forward was replaced; a width that the class does not take, or Gemma's embeddings scale by; state of
            the optimizer that is not of a parameter's shape, of its rows, of its columns or one number; an optimizer with
            none of the model's parameters, or of a model with maps of blocks; `masks.hidden` of such a model.
    """
    inner, made_of_blocks = unwrapped(model), blocks.live_weights(layers_of(model, OP, of_blocks=True))
    if made_of_blocks:
        blocks.refuse_more(optimizer, masks)
        inner = blocks.with_linear_maps(inner)
    layers = layers_of(inner, OP)
    check(OP, masks, layers, inner.config)
    kept, path = masks.layers.nonzero().flatten().tolist(), layers_path(OP, inner)
    if not kept:
        _checks.wrong_value(OP, "masks.layers", "at least one that is True", "none")
    cut = cuts.of_layers(OP, layers, kept, masks)
    width = {} if masks.hidden is None else cut_width(OP, inner, layers, masks.hidden, cut)
    smaller, copies = _copied(inner, cut, [layer.module for i, layer in enumerate(layers) if i not in kept])
    _remove_layers(smaller, path, kept)
    for place, i in enumerate(kept):
        name = layers[i].name if path is None else f"{path}{place}"
        _reshape(layers[i], smaller.get_submodule(name), *masks.kept(i))
        blocks.cut(smaller.get_submodule(name), layers[i], parts(layers[i], *masks.kept(i)), made_of_blocks)
    if width:
        narrow(smaller, inner.config.hidden_size, width)
    disk.settle(OP, smaller)
    if optimizer is None:
        return smaller
    return smaller, optimizer_of(OP, optimizer, smaller, copies, cut)


def _copied(inner: Any, cut: cuts.Cuts, gone: Sequence[nn.Module]) -> tuple[Any, dict[Tensor, Tensor | None]]:
    """A copy of a model with parameters that are cut and without some modules, and the copies of its parameters, None of
    those that are gone. Nothing that is cut is copied as a whole."""
    memo: dict[int, Any] = {id(module): nn.Identity() for module in gone}
    for parameter, left in cut.items():
        memo[id(parameter)] = nn.Parameter(cuts.taken(parameter.detach(), left), parameter.requires_grad)
    packed = [vars(module).get("_kdfast_masked") for module in inner.modules()]
    memo |= {id(kept): kept for kept in packed if kept is not None}  # what `apply` keeps, weights among it
    smaller = copy.deepcopy(inner, memo)
    remove(smaller)
    return smaller, {x: memo.get(id(x)) for x in inner.parameters()}


def _remove_layers(smaller: Any, path: str | None, kept: Sequence[int]) -> None:
    if path is None:
        return
    config, layers = smaller.config, smaller.get_submodule(path.removesuffix("."))
    for i in reversed(range(len(layers))):
        if i not in kept:
            del layers[i]
    config.num_hidden_layers = len(kept)
    for name in PER_LAYER:
        if values := getattr(config, name, None):
            setattr(config, name, [values[i] for i in kept])
    for i, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(vars(module).get("layer_idx"), int):  # of its keys and values in a cache
                module.layer_idx = i


def _reshape(layer: Layer, smaller: nn.Module, heads: Tensor, neurons: Tensor) -> None:
    """Gives a layer's copy, whose weights are cut, the modules that fit."""
    groups, _, repeat = sharing(layer, heads)
    before = shape_of(layer)
    shape = replace(
        before,
        heads=len(heads),
        groups=len(groups),
        neurons=len(neurons),
        repeat=None if repeat is None else tuple(repeat.tolist()),
    )
    if layer.adapter.per_head and len(heads) < layer.heads:
        numbers = before.own_heads or range(layer.heads)
        shape = replace(shape, own_heads=tuple(numbers[i] for i in heads.tolist()) or None)
    reshape(replace(layer, module=smaller), shape)
