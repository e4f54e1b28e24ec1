"""Optimizers of smaller models: the state of the parameters that are left, cut like them; and of masked ones."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from transformers.pytorch_utils import Conv1D

from kdfast.ops import _checks
from kdfast.prune.cuts import Cut, Cuts, taken
from kdfast.prune.layers import layers_of, parts
from kdfast.prune.masks import Masks

_SIDES = ("row", "col")  # of a matrix, as optimizers name what they keep of one of them


def optimizer_of(
    op: str, optimizer: Any, smaller: nn.Module, copies: Mapping[Tensor, Tensor | None], cuts: Cuts
) -> Any:
    """`compact`'s optimizer of `smaller`. Parameters that are not the model's stay in it.

    Args:
        copies: of all of the model's parameters; those that are None, or none of `smaller`, are gone.
        cuts: which of the model's parameters are cut.

    Raises:
        TypeError: no optimizer of torch, a wrapped one, or LBFGS, whose state is of all parameters together.
        ValueError: state whose shape is not the parameter's, its rows, its columns or one number.
    """
    wrapped = isinstance(getattr(optimizer, "optimizer", None), Optimizer)
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, LBFGS) or wrapped:
        expected = "an optimizer of torch with state by parameter, not wrapped"
        _checks.wrong_type(op, "optimizer", expected, type(optimizer).__name__)
    if not any(parameter in copies for group in optimizer.param_groups for parameter in group["params"]):
        _checks.wrong_value(op, "optimizer", "one that trains model", "one that has none of its parameters")
    names: dict[Tensor, str] = {parameter: name for name, parameter in smaller.named_parameters()}
    new = {old: mine for old, mine in copies.items() if mine is not None and mine in names}
    made: Any = copy.copy(optimizer)  # without what a scheduler or its maker put on it
    own = {name: value for name, value in vars(optimizer).items() if name not in vars(made) and not callable(value)}
    vars(made).update(own)
    made.defaults = copy.copy(optimizer.defaults)
    made.param_groups = [_group(group, copies, new, names) for group in optimizer.param_groups]
    made.state = defaultdict(dict)
    for parameter, state in optimizer.state.items():
        if parameter not in copies or parameter in new:
            what = names.get(new.get(parameter, parameter), "")
            cut = cuts.get(parameter, {})
            made.state[new.get(parameter, parameter)] = {
                name: _of_state(op, f"{name} of {what}", name, value, parameter, cut) for name, value in state.items()
            }
    return made


def forget(optimizer: Any, model: nn.Module, masks: Masks) -> None:
    """Sets an optimizer's state of what masks hold dead to zero, where it has the parameter's shape: what is dead then
    stays where it is, but for weight decay, and would begin anew."""
    states = getattr(optimizer, "optimizer", optimizer).state
    for i, layer in enumerate(layers_of(model)):
        if not bool(masks.layers[i]):
            for parameter in layer.module.parameters():
                for value in _of_shape(states, parameter):
                    value.zero_()
            continue
        for name, part in parts(layer, *masks.kept(i)).items():
            linear: Any = layer.module.get_submodule(name)
            for value in _of_shape(states, linear.weight):
                of = value.mT if isinstance(linear, Conv1D) else value
                _zero_others(of, part.rows)
                _zero_others(of.mT, part.columns)
            for value in _of_shape(states, linear.bias):
                _zero_others(value, part.rows)


def _of_shape(states: Mapping[Any, Mapping[str, Any]], parameter: Tensor | None) -> list[Tensor]:
    found = states.get(parameter, {}).values() if parameter is not None else ()
    return [x for x in found if isinstance(x, Tensor) and parameter is not None and x.shape == parameter.shape]


def _zero_others(of: Tensor, kept: Tensor | None) -> None:
    if kept is not None:
        dead = torch.ones(len(of), dtype=torch.bool, device=of.device)
        dead[kept.to(of.device)] = False
        of[dead] = 0


def _group(
    group: dict[str, Any],
    copies: Mapping[Tensor, Tensor | None],
    new: Mapping[Tensor, Tensor],
    names: Mapping[Tensor, str],
) -> dict[str, Any]:
    left = [i for i, parameter in enumerate(group["params"]) if parameter not in copies or parameter in new]
    parameters = [new.get(group["params"][i], group["params"][i]) for i in left]
    made = {name: copy.deepcopy(value) for name, value in group.items() if name not in ("params", "param_names")}
    if "param_names" in group:  # layers may have other numbers now
        made["param_names"] = [
            names.get(parameter, group["param_names"][i]) for i, parameter in zip(left, parameters, strict=True)
        ]
    return {"params": parameters, **made}


def _of_state(op: str, what: str, name: str, value: Any, parameter: Tensor, cut: Cut) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_of_state(op, what, name, x, parameter, cut) for x in value)
    if not isinstance(value, Tensor) or not cut or (value.numel() == 1 and value.shape != parameter.shape):
        return copy.deepcopy(value)
    if value.shape == parameter.shape:
        return taken(value, cut)
    size = parameter.shape
    sides = [
        i for i in range(len(size)) if value.shape in ((size[i],), (*(1,) * i, size[i], *(1,) * (len(size) - i - 1)))
    ]
    if len(sides) == 2:
        sides = [i for i in sides if _SIDES[i] in name]
    if len(size) != 2 or len(sides) != 1:
        expected = f"the parameter's shape {list(size)}, its rows, its columns or one number"
        _checks.wrong_value(op, f"optimizer: {what}", expected, f"shape {list(value.shape)}")
    side = sides[0]
    return taken(value, {value.dim() - 2 + side if value.dim() == 2 else 0: cut[side]} if side in cut else {})
