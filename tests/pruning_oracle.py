"""Pruned models by hooks on the whole ones: what is dead is computed and then multiplied by zero."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from kdfast.prune import Masks
from kdfast.prune.layers import layers_of, matrix, parts

# Their norms of heads compute in float32 whatever the model's dtype: a sum in another order may round to its neighbour.
IN_FLOAT32 = ("qwen3", "gemma3")


@contextlib.contextmanager
def zeroed(model: Any, masks: Masks) -> Iterator[None]:
    """The whole model with the outputs of dead heads and neurons zero, and dead layers' outputs their inputs."""
    handles = []
    for i, layer in enumerate(layers_of(model)):
        heads = masks.heads[i].repeat_interleave(layer.head_size)
        for name, live in ((layer.adapter.output, heads), (layer.adapter.contract, masks.neurons[i])):
            part = layer.module.get_submodule(name)
            handles.append(part.register_forward_pre_hook(lambda _, args, live=live: (args[0] * live,)))
        if not masks.layers[i]:
            handles.append(layer.module.register_forward_hook(_pass_on))
    yield
    for handle in handles:
        handle.remove()


def _pass_on(_: Any, args: Any, output: Any) -> Any:
    return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]


def patterns(model: Any) -> dict[str, Masks]:
    """Masks of the models of `tiny_models`: the shapes that a layer may come to."""
    made = {name: Masks.full(model) for name in ("some", "empty", "first")}
    generator = torch.Generator().manual_seed(5)
    for masks in made.values():
        for neurons in masks.neurons:
            neurons[torch.randperm(len(neurons), generator=generator)[:11]] = False
    some, empty, first = made.values()
    some.heads[0][[3, 5]] = False  # three and one of two groups are left: the first is repeated three times
    some.heads[1][:3] = False  # a whole group, where there are any
    for heads in some.heads[2:]:
        heads[[0, 1, 4]] = False  # one and two
    empty.heads[0][:] = False
    empty.neurons[1][:] = False
    empty.heads[1][[0, 3]] = False  # two and two
    first.heads[1][:] = False
    first.neurons[1][:] = False
    first.heads[0][1:] = False
    if model.config.model_type != "albert":
        empty.layers[2] = False
        first.layers[0] = False
    return made


def results(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs, and gradients of all parameters from a fixed one of the outputs; zero where there is none."""
    model.zero_grad(set_to_none=True)
    logits = model(**batch).logits
    generator = torch.Generator().manual_seed(3)
    (logits * torch.randn(logits.shape, generator=generator).to(logits)).sum().backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return {"logits": logits.detach(), **gradients}


def same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """To the tolerance, relative to the largest output or gradient of all: that of a key's bias is rounding alone."""
    assert got.keys() == expected.keys()
    largest = max(float(want.abs().max()) for name, want in expected.items() if name != "logits")
    for name, want in expected.items():
        scale = float(want.abs().max()) if name == "logits" else largest
        torch.testing.assert_close(
            got[name], want, rtol=0, atol=tolerance * scale, msg=lambda text, n=name: f"{n}: {text}"
        )


def dead(model: Any, masks: Masks) -> dict[str, Tensor]:
    """By name of those parameters of linear maps of which something is dead: True where they are. Dropped layers are dead as a
    whole."""
    made = {}
    for i, layer in enumerate(layers_of(model)):
        if not masks.layers[i]:
            made |= {
                f"{layer.name}.{n}": torch.ones_like(p, dtype=torch.bool) for n, p in layer.module.named_parameters()
            }
            continue
        for name, part in parts(layer, *masks.kept(i)).items():
            linear: Any = layer.module.get_submodule(name)
            of_weight = torch.ones_like(matrix(linear), dtype=torch.bool)
            rows = torch.arange(of_weight.shape[0]) if part.rows is None else part.rows
            columns = torch.arange(of_weight.shape[1]) if part.columns is None else part.columns
            of_weight[rows[:, None], columns] = False
            made[f"{layer.name}.{name}.weight"] = of_weight.mT if isinstance(linear, Conv1D) else of_weight
            if linear.bias is not None and part.rows is not None:
                made[f"{layer.name}.{name}.bias"] = torch.ones_like(linear.bias, dtype=torch.bool).index_fill_(
                    0, rows, False
                )
    return {name: where for name, where in made.items() if where.any()}
