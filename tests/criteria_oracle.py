"""What criteria are by their definitions: units' weights by index, gradients of whole weights, gates by hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tiny_models
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from kdfast.prune.layers import Layer, layers_of, parts

Array = Any
UNITS = ("heads", "groups", "neurons", "layers")


def labelled(model: Any, seed: int, rows: int = 3) -> dict[str, Tensor]:
    """A batch with labels; of language models without padding, so that a loss is a mean over rows."""
    batch = tiny_models.batch(model, seed=seed, rows=rows)
    if "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__:
        batch["attention_mask"][:] = 1
        return batch | {"labels": batch["input_ids"]}
    return batch | {"labels": torch.arange(rows) % 2}


def count(layer: Layer, of: str) -> int:
    return {"heads": layer.heads, "groups": layer.groups, "neurons": layer.neurons, "layers": 1}[of]


def vectors(layer: Layer, of: str, value: Callable[[Tensor], Tensor] = lambda p: p) -> list[Array]:
    """The numbers of every unit, in no order."""
    return [vector(layer, of, unit, value) for unit in range(count(layer, of))]


def vector(layer: Layer, of: str, unit: int, value: Callable[[Tensor], Tensor]) -> Array:
    heads = neurons = torch.arange(0)
    if of == "layers":
        heads, neurons = torch.arange(layer.heads), torch.arange(layer.neurons)
    elif of == "neurons":
        neurons = torch.tensor([unit])
    else:
        heads = torch.tensor([unit]) if of == "heads" else (layer.group_of == unit).nonzero().flatten()
    found, shared = [], of == "heads" and layer.groups < layer.heads
    for name, part in parts(layer, heads, neurons).items():
        linear: Any = layer.module.get_submodule(name)
        if shared and name in layer.adapter.qkv[1:]:
            continue
        weight = value(linear.weight).detach().double().numpy()
        weight = weight.T if isinstance(linear, Conv1D) else weight
        if part.rows is not None:
            found.append(weight[part.rows.numpy()].ravel())
            if linear.bias is not None:
                found.append(value(linear.bias).detach().double().numpy()[part.rows.numpy()])
        else:
            assert part.columns is not None
            found.append(weight[:, part.columns.numpy()].ravel())
    return np.concatenate(found)


def gradients(model: Any, batch: dict[str, Tensor]) -> None:
    """In `.grad`."""
    model.zero_grad()
    model(**batch).loss.backward()


def products(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter * parameter.grad


def rows_of(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{k: x[i : i + 1] for k, x in batch.items()} for batch in batches for i in range(len(batch["input_ids"]))]


@contextlib.contextmanager
def seen(model: Any) -> Iterator[dict[tuple[int, str], list[Tensor]]]:
    """What output maps read, by layer and kind; values require gradients, and keep them."""
    found: dict[tuple[int, str], list[Tensor]] = {}
    hooks = []
    for i, layer in enumerate(layers_of(model)):
        for kind, name in (("heads", layer.adapter.output), ("neurons", layer.adapter.contract)):

            def see(_: Any, inputs: Any, at: tuple[int, str] = (i, kind)) -> None:
                if inputs[0].requires_grad:
                    inputs[0].retain_grad()
                found.setdefault(at, []).append(inputs[0])

            hooks.append(layer.module.get_submodule(name).register_forward_pre_hook(see))
    yield found
    for hook in hooks:
        hook.remove()


def gates(model: Any, batches: list[dict[str, Tensor]], of: str) -> list[Array]:
    """By layer [rows of all batches, units]: ∂L_x/∂ξ of every row alone."""
    layers, rows = layers_of(model), list[list[Array]]()
    for row in rows_of(batches):
        with seen(model) as found:
            model(**row).loss.backward()
        one = []
        for i, layer in enumerate(layers):
            heads, neurons = (
                sum((x * x.grad).detach().double().reshape(-1, n, size).sum((0, 2)) for x in found[i, kind]).numpy()  # type: ignore[union-attr, operator]
                for kind, n, size in (("heads", layer.heads, layer.head_size), ("neurons", layer.neurons, 1))
            )
            groups = np.array([heads[layer.group_of.numpy() == g].sum() for g in range(layer.groups)])
            whole = np.array([heads.sum() + neurons.sum()])
            one.append({"heads": heads, "neurons": neurons, "groups": groups, "layers": whole}[of])
        rows.append(one)
    return [np.stack([row[i] for row in rows]) for i in range(len(layers))]


def activations(model: Any, batches: list[dict[str, Tensor]], of: str) -> list[Array]:
    """By layer [tokens that count, units, numbers]."""
    layers, found = layers_of(model), list[list[Array]]()
    for batch in batches:
        with seen(model) as inputs, torch.no_grad():
            model(**batch)
        counted = batch["attention_mask"].bool()
        found.append([])
        for i, layer in enumerate(layers):
            x = torch.cat([each[counted] for each in inputs[i, of]])
            shape = (layer.neurons, 1) if of == "neurons" else (layer.heads, layer.head_size)
            found[-1].append(x.double().numpy().reshape(-1, *shape))
    return [np.concatenate([one[i] for one in found]) for i in range(len(layers))]
