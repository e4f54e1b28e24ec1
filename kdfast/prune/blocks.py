"""Models whose linear maps have only some blocks of their weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kdfast.models.inputs import unwrapped
from kdfast.nn.block_sparse import BlockSparseLinear
from kdfast.ops import _checks
from kdfast.prune import disk
from kdfast.prune.layers import Layer, Part, layers_of, maps_of_blocks
from kdfast.prune.masked import Masked
from kdfast.prune.masks import Masks

__all__ = ["keep_blocks"]

OP = "kdfast.prune.keep_blocks"
Live = dict[str, tuple[Tensor, tuple[int, int]]]  # by name in the model: which weights [out, in] live; the block


def keep_blocks(model: nn.Module, live: Mapping[str, Tensor]) -> None:
    """Leaves linear maps of a model only the blocks that live, in place: each becomes a `kdfast.nn.BlockSparseLinear`
    with copies of these.

        scores = kdfast.prune.criteria.score(model, "magnitude", of="blocks", block=(64, 64))
        kdfast.prune.keep_blocks(model, kdfast.prune.select_blocks(scores, keep=0.25))
        ...                                     # train: optimizers that were made before do not know the new parameters
        model.save_pretrained("pruned")         # AutoModel.from_pretrained("pruned") loads it, after `import kdfast`

    Heads, neurons and layers go first (`kdfast.prune.compact`). Which blocks live is in the weights, as `mask`; how large
    they are, and how many, in the config's record.

    Args:
        model: of transformers, of an architecture in `kdfast.prune.ADAPTERS`; what is inside where it is wrapped.
        live: by the name of a linear map in the model's layers a bool mask [rows of blocks, columns of blocks], as of
            `select_blocks`; of the weight's shape by the mask's, each side of a block is 32, 64, 96 or 128.

    Raises:
        TypeError: a model as in `layers_of`, or masked by `apply`; a map that is no plain `nn.Linear`.
        ValueError: a name that is none of a linear map; a mask that is not as above. Nothing has changed then.
    """
    inner: Any = unwrapped(model)
    layers = layers_of(inner, OP, of_blocks=True)
    if any(isinstance(module, Masked) for module in inner.modules()):
        _checks.wrong_type(OP, "model", "one without masks (kdfast.prune.compact first, or remove)", "a masked one")
    names = [f"{layer.name}.{name}" for layer in layers for of in layer.maps for name in of]
    made = {}
    for name, mask in live.items():
        if name not in names:
            _checks.wrong_value(OP, "live", f"names of linear maps, as {next(iter(names), 'none is left')}", repr(name))
        made[name] = _of_blocks(name, inner.get_submodule(name), mask)
    for name, linear in made.items():
        inner.set_submodule(name, linear)
    disk.settle(OP, inner)


def _of_blocks(name: str, linear: nn.Module, mask: Tensor) -> BlockSparseLinear:
    if type(linear) is not nn.Linear or "forward" in vars(linear):
        _checks.wrong_type(OP, "live", f"names of modules that are nn.Linear, as {name}", type(linear).__name__)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or 0 in mask.shape:
        got = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else _checks.kind(mask)
        _checks.wrong_value(OP, "live", f"[rows of blocks, columns of blocks] of {name}", got)
    shape = tuple(linear.weight.shape)
    if any(size % count for size, count in zip(shape, mask.shape, strict=True)):
        expected = f"[rows of blocks, columns of blocks] that divide {name}, {list(shape)}"
        _checks.wrong_value(OP, "live", expected, f"shape {list(mask.shape)}")
    return BlockSparseLinear.from_linear(linear, mask, (shape[0] // mask.shape[0], shape[1] // mask.shape[1]))


# ---- for `compact` ----
def live_weights(layers: Sequence[Layer]) -> Live:
    """Of the maps of blocks in a model's layers."""
    return {
        f"{layer.name}.{name}": (linear.layout.dense(torch.ones_like(linear.values)) > 0, linear.layout.block)
        for layer in layers
        for name, linear in maps_of_blocks(layer).items()
    }


def refuse_more(optimizer: Optimizer | None, masks: Masks) -> None:
    """What `compact` does not do with maps of blocks."""
    op = "kdfast.prune.compact"
    if optimizer is not None:
        _checks.wrong_value(op, "optimizer", "None for a model with maps of blocks", type(optimizer).__name__)
    if masks.hidden is not None:
        _checks.wrong_value(op, "masks.hidden", "None for a model with maps of blocks", "a mask")


def with_linear_maps(model: nn.Module) -> nn.Module:
    """A copy of a model, with dense maps in place of those of blocks."""
    model = copy.deepcopy(model)
    for name, module in [*model.named_modules()]:
        if isinstance(module, BlockSparseLinear):
            model.set_submodule(name, module.to_linear())
    return model


def cut(smaller: nn.Module, layer: Layer, parts: Mapping[str, Part], live: Live) -> None:
    """Makes maps of a layer's copy, cut to these parts, maps of blocks again, where they have whole ones."""
    left = dict(smaller.named_modules())  # a part of which nothing is left is gone
    for name, part in parts.items():
        linear = left.get(name)
        if f"{layer.name}.{name}" not in live or type(linear) is not nn.Linear:
            continue
        lives, block = live[f"{layer.name}.{name}"]
        for dimension, index in enumerate((part.rows, part.columns)):
            lives = lives if index is None else lives.index_select(dimension, index.to(lives.device))
        if not any(size % side for size, side in zip(lives.shape, block, strict=True)):
            tiles = lives.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
            smaller.set_submodule(name, BlockSparseLinear.from_linear(linear, tiles.any(-1).any(1), block))
