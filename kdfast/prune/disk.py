"""Smaller models in folders: a config of which their class makes them, or a record of their shapes in it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.initialization import no_init_weights

from kdfast._from_pretrained import METHOD
from kdfast.data.hub import first_line
from kdfast.nn.block_sparse import BlockSparseLinear
from kdfast.ops import _checks
from kdfast.prune.layers import layers_of
from kdfast.prune.modules import Nothing, OnlyBias
from kdfast.prune.shapes import Shape, reshape, shape_of

VERSION = 1  # of records
_NEURONS = ("intermediate_size", "n_inner", "hidden_dim")  # as configs call their number


def settle(op: str, model: Any) -> None:
    """Writes into the config of a model whose layers were made smaller what `from_pretrained` makes it of again: the
    class's own numbers where these express the shapes, else as many of them as do, and a record.

    Raises:
        ValueError: a width that the class takes with no config.
    """
    config, base = model.config, model.base_model
    vars(config).pop("quantization_config", None)
    shapes = [shape_of(layer) for layer in layers_of(base, op, of_blocks=True)]
    size, known = shapes[0].head_size, _of_neurons(config, shapes)
    changes = _with_size(config, known | _of_heads(config, shapes[0]), size)
    if not _makes(op, base, changes, shapes):
        known = _with_size(config, known, size)
        changes = known | _to_fail_alone(op, base, known, shapes)
        config.quantization_config = {"quant_method": METHOD, "version": VERSION, "layers": [*map(_listed, shapes)]}
    for name, value in changes.items():
        setattr(config, name, value)


def rebuild(model: Any, record: dict[str, Any]) -> None:
    """Gives a model, as its class makes it of a config with a record, the shapes of that, with empty weights.

    Raises:
        ValueError: an unknown architecture, a record of a later kdfast, or of another number of layers.
    """
    op = "kdfast: config.json"
    if record["version"] != VERSION:
        _checks.wrong_value(
            op, "version", f"{VERSION}, as this kdfast writes it (a later one may read it)", record["version"]
        )
    layers = layers_of(model, op)
    if len(layers) != len(record["layers"]):
        _checks.wrong_value(op, "layers", f"shapes of {len(layers)} layers", len(record["layers"]))
    for layer, listed in zip(layers, record["layers"], strict=True):
        given: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in listed.items()}
        reshape(layer, Shape(**given))
        module: Any
        for module in layer.module.modules():
            if any(isinstance(part, (Nothing, OnlyBias, BlockSparseLinear)) for part in module.children()):
                module._is_hf_initialized = True  # some classes initialise the weights of their parts, which are gone


def follow_masks(model: Any) -> None:
    """After the weights are read: maps of blocks have those that their mask says."""
    for module in model.modules():
        if isinstance(module, BlockSparseLinear):
            module.follow_mask()


def _listed(shape: Shape) -> dict[str, Any]:
    """As JSON has it, with lists, so that a record reads the same before and after."""
    given = {name: value for name, value in asdict(shape).items() if value not in (None, ())}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


# ---- what a config can say ----
def _of_neurons(config: Any, shapes: Sequence[Shape]) -> dict[str, Any]:
    counts = {shape.neurons for shape in shapes}
    return {_neurons_name(config): max(counts)} if len(counts) == 1 and counts != {0} else {}


def _of_heads(config: Any, first: Shape) -> dict[str, Any]:
    """Those of the first layer, for `_makes` to see whether they are all that there is to say."""
    if not first.heads or first.heads == config.num_attention_heads:
        return {}
    groups = {"num_key_value_heads": first.groups} if hasattr(config, "num_key_value_heads") else {}
    return {"num_attention_heads": first.heads, **groups}


def _with_size(config: Any, changes: dict[str, Any], size: int) -> dict[str, Any]:
    """With the size of heads, where it is not the width by their number. The family of Llama reads it, and rotary
    embeddings do in other models too."""
    heads = changes.get("num_attention_heads", config.num_attention_heads)
    derived = getattr(config, "head_dim", None) or config.hidden_size // heads
    return changes if size == derived else {**changes, "head_dim": size}


def _neurons_name(config: Any) -> str:
    return next(name for name in _NEURONS if hasattr(config, name))


def _to_fail_alone(op: str, base: Any, known: dict[str, Any], shapes: Sequence[Shape]) -> dict[str, Any]:
    """What makes transformers without kdfast fail where it would load the rest and make up what is gone: a number of
    neurons that no layer has."""
    try:
        theirs = _state(_made(base, known))
    except (ValueError, StrictDataclassError) as error:
        expected = f"a width that {type(base).__name__} takes ({first_line(error)})"
        _checks.wrong_value(op, "masks.hidden", expected, base.config.hidden_size)
    if any(theirs.get(name, shape) != shape for name, shape in _state(base).items()):
        return {}
    return {_neurons_name(base.config): 1 + max(shape.neurons for shape in shapes)}


def _made(base: Any, changes: dict[str, Any]) -> Any:
    """A model as its class makes it of a changed config, without memory."""
    config = copy.deepcopy(base.config)
    for name, value in changes.items():
        setattr(config, name, value)
    config.validate()  # as from_pretrained does
    with torch.device("meta"), no_init_weights():
        return type(base)(config)


def _makes(op: str, base: Any, changes: dict[str, Any], shapes: Sequence[Shape]) -> bool:
    """Whether the class makes layers of these shapes, and nothing else with another, of a changed config."""
    try:
        made = _made(base, changes)
    except (ValueError, StrictDataclassError):  # heads that do not divide the width: some classes refuse them
        return False
    layers, mine, theirs = layers_of(made, op), _state(base), _state(made)
    inside = tuple(f"{layer.name}." for layer in layers)
    same = all(theirs.get(name, shape) == shape for name, shape in mine.items())
    names = {name for name in mine if name.startswith(inside)} == {name for name in theirs if name.startswith(inside)}
    return same and names and [shape_of(layer) for layer in layers] == shapes


def _state(model: Any) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
