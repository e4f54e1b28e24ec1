"""Which rows and columns of which parameters masks leave."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kdfast.ops import _checks
from kdfast.prune.layers import Layer, parts
from kdfast.prune.masks import Masks

Cut = dict[int, Tensor]  # by dimension, the indices that are left
Cuts = dict[Tensor, Cut]  # by parameter


def of_layers(op: str, layers: Sequence[Layer], kept: Sequence[int], masks: Masks) -> Cuts:
    """Those of the linear maps in layers that live."""
    cuts: Cuts = {}
    for i in kept:
        for name, part in parts(layers[i], *masks.kept(i)).items():
            where = f"{layers[i].name}.{name}"
            linear = layers[i].module.get_submodule(name)
            _check(op, where, linear)
            rows = 1 if isinstance(linear, Conv1D) else 0
            add(op, cuts, where, linear.weight, rows, part.rows)
            add(op, cuts, where, linear.weight, 1 - rows, part.columns)
            add(op, cuts, where, linear.bias, 0, part.rows)
    return cuts


def add(op: str, cuts: Cuts, where: str, parameter: object, dimension: int, index: Tensor | None) -> None:
    """Adds what is left of a parameter's dimension, if not all is."""
    if not isinstance(parameter, Tensor) or index is None or len(index) == parameter.shape[dimension]:
        return
    cut = cuts.setdefault(parameter, {})
    if dimension in cut and not torch.equal(cut[dimension], index):
        _checks.wrong_value(op, "masks", "the same of parameters that are tied", f"others at {where}")
    cut[dimension] = index


def taken(tensor: Tensor, cut: Cut) -> Tensor:
    """A copy of what is left of a tensor."""
    if not cut:
        return tensor.clone()
    for dimension, index in sorted(cut.items(), key=lambda item: len(item[1]) / tensor.shape[item[0]]):
        tensor = tensor.index_select(dimension, index.to(tensor.device))
    return tensor


def _check(op: str, where: str, linear: nn.Module) -> None:
    weight = getattr(linear, "weight", None)
    if not isinstance(linear, (nn.Linear, Conv1D)) or type(getattr(weight, "data", None)) is not Tensor:
        got = f"{type(linear).__name__} at {where}"
        expected = "linear maps that are neither quantised nor sharded, without adapters (merge those first)"
        _checks.wrong_type(op, "model", expected, got)
    if "forward" in vars(linear):
        expected = f"{where} with the forward of its class"
        _checks.wrong_value(op, "model", expected, "one that was set on it (accelerate does, for a device_map)")
