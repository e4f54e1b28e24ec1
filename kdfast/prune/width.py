"""Hidden states that are narrower: what of which parameter lies along them, and modules that are told their new width."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from kdfast.ops import _checks
from kdfast.prune.cuts import Cuts, add
from kdfast.prune.layers import Layer
from kdfast.prune.modules import OnlyBias

SCALED = ("gemma", "gemma2", "gemma3_text")  # embeddings times √(hidden size), which would be another factor


def cut_width(op: str, model: Any, layers: Sequence[Layer], hidden: Tensor, cuts: Cuts) -> dict[str, int]:
    """Adds what is left of every parameter of a model along its hidden states, for those numbers of them that live.

    Which of a parameter's dimensions that is shows in what the class makes of a config with another width; of layers'
    linear maps it is the side that faces the hidden states.

    Returns:
        What of the config is the new width.

    Raises:
        ValueError: nothing lives; embeddings that are scaled by the width; parameters that are not those that the
            model's class makes of its config.
    """
    index, config = hidden.nonzero().flatten(), model.config
    if not len(index):
        _checks.wrong_value(op, "masks.hidden", "at least one that is True", "none")
    if config.model_type in SCALED:
        _checks.wrong_value(op, "masks.hidden", "None for Gemma, whose embeddings are scaled by the width", "a mask")
    names, wider = _wider(op, model)
    sides = _sides(layers)
    for name, parameter in model.named_parameters():
        if name not in sides and (name not in wider or len(wider[name]) != parameter.dim()):
            expected = f"the parameters that {type(model).__name__} makes of its config"
            _checks.wrong_value(op, "model", expected, f"{name} of shape {list(parameter.shape)}")
        shape = parameter.shape
        known = sides.get(name)
        for i in (
            [i for i in range(len(shape)) if shape[i] == len(hidden) != wider[name][i]] if known is None else known
        ):
            add(op, cuts, name, parameter, i, index)
    return dict.fromkeys(names, len(index))


def narrow(model: Any, before: int, sizes: dict[str, int]) -> None:
    """Tells a model whose parameters are cut already, and its modules, that its width is another one: `cut_width`'s."""
    width = sizes["hidden_size"]
    for name in sizes:
        setattr(model.config, name, width)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, Conv1D):
            module.nx, module.nf = module.weight.shape
        elif isinstance(module, nn.Embedding):
            module.embedding_dim = module.weight.shape[1]
        elif isinstance(module, nn.LayerNorm) and module.normalized_shape == (before,):
            module.normalized_shape = (width,)
        elif isinstance(module, OnlyBias):
            module.out_features = width


def _wider(op: str, model: Any) -> tuple[Sequence[str], dict[str, torch.Size]]:
    """Parameters of a model of twice the width, and what of the config is that: the size of ELECTRA's embeddings too,
    which become hidden states without another map where both are the same."""
    same = _parameters(model, {})
    names: tuple[str, ...] = ("hidden_size",)
    wider = _parameters(model, dict.fromkeys(names, 2 * model.config.hidden_size))
    if wider.keys() != same.keys():
        names = (*names, "embedding_size")
        wider = _parameters(model, dict.fromkeys(names, 2 * model.config.hidden_size))
    if wider.keys() != same.keys():
        _checks.wrong_value(op, "model", "one with the same parameters at every width", type(model).__name__)
    return names, wider


def _parameters(model: Any, changes: dict[str, int]) -> dict[str, torch.Size]:
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"), no_init_weights():
        made = type(model)(config)
    return {name: parameter.shape for name, parameter in made.named_parameters(remove_duplicate=False)}


def _sides(layers: Sequence[Layer]) -> dict[str, list[int]]:
    """Of the parameters of layers' linear maps, by name, the dimensions that face hidden states."""
    found: dict[str, list[int]] = {}
    for layer in layers:
        adapter, there = layer.adapter, dict(layer.module.named_modules())
        for names, takes in (((*adapter.qkv, *adapter.expand), True), ((adapter.output, adapter.contract), False)):
            for name in names:
                rows = 1 if isinstance(there.get(name), Conv1D) else 0
                found[f"{layer.name}.{name}.weight"] = [1 - rows if takes else rows]
                found[f"{layer.name}.{name}.bias"] = [] if takes else [0]
    return found
