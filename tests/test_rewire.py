"""Rewired models: DynaBERT's weights and logits, every architecture's function unchanged, the same parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_models
import torch
from dynabert_oracles import bert_of, inputs_of, oracle
from torch import Tensor

from kdfast import prune
from kdfast.prune.layers import layers_of, matrix


def random_scores(model: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    layers = layers_of(model)
    return torch.rand(len(layers), layers[0].heads), torch.rand(len(layers), layers[0].neurons)


def test_dynabert() -> None:
    o, hyper = oracle("dynabert_importance_rewiring")
    model = bert_of(o, hyper, "model.")
    prune.rewire(model, o["head_importance_code"], o["neuron_importance_code"])
    state = model.state_dict()
    rewired = {name.removeprefix("reordered."): x for name, x in o.items() if name.startswith("reordered.")}
    assert len(rewired) == 24
    for name, x in rewired.items():
        assert torch.equal(state[name], x), name
        assert not torch.equal(state[name], o[f"model.{name}"]) or name.endswith("output.dense.bias"), name
    logits = model(**inputs_of(o)).logits.detach()
    assert float((logits - o["logits_reordered"]).abs().max()) <= 1e-10
    assert float((logits - o["logits_original"]).abs().max()) <= 1e-10


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_every_architecture(name: str) -> None:
    model = tiny_models.make(name)
    inputs, before, objects = tiny_models.batch(model), copy.deepcopy(model), dict(model.named_parameters())
    heads, neurons = random_scores(model)
    prune.rewire(model, heads, neurons)
    assert {name: id(x) for name, x in model.named_parameters()} == {name: id(x) for name, x in objects.items()}
    torch.testing.assert_close(model(**inputs).logits, before(**inputs).logits, rtol=0, atol=1e-10)
    for i, (layer, old) in enumerate(zip(layers_of(model), layers_of(before), strict=True)):
        order = neurons[i].argsort(descending=True)
        contract = matrix(layer.module.get_submodule(layer.adapter.contract))
        assert torch.equal(contract, matrix(old.module.get_submodule(layer.adapter.contract))[:, order])
        of_heads = heads[i] if name != "mpnet" else heads.sum(0)
        by_group = of_heads.view(layer.groups, -1)
        best = by_group.sum(1).argsort(descending=True)
        order = torch.cat([g * by_group.shape[1] + by_group[g].argsort(descending=True) for g in best])
        columns = (order[:, None] * layer.head_size + torch.arange(layer.head_size)).flatten()
        output = matrix(layer.module.get_submodule(layer.adapter.output))
        assert torch.equal(output, matrix(old.module.get_submodule(layer.adapter.output))[:, columns])


def test_of_equal_scores_the_lower_number_is_first() -> None:
    model = tiny_models.make("llama")
    state = copy.deepcopy(model.state_dict())
    heads, neurons = torch.zeros(3, 6), torch.zeros(3, 37)
    prune.rewire(model, heads, neurons)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    neurons[:, 36] = 1.0
    prune.rewire(model, list(heads), list(neurons))
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(model.state_dict()[down], state[down].roll(1, 1))


def test_errors() -> None:
    model = tiny_models.make("bert")
    heads, neurons = random_scores(model)
    state = copy.deepcopy(model.state_dict())
    given: Any
    for given, message in [
        ((heads[:2], neurons), r"heads: expected scores of 3 layers, got 2"),
        ((heads, neurons[:, 1:]), r"neurons\[0\]: expected \[37\], got \[36\]"),
        ((heads[..., None], neurons), r"heads\[0\]: expected \[6\], got \[6, 1\]"),
        ((heads, [*neurons[:2], neurons[2] * torch.nan]), r"neurons\[2\]: expected numbers, got NaN"),
    ]:
        with pytest.raises(ValueError, match=rf"^kdfast\.prune\.rewire: {message}"):
            prune.rewire(model, *given)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
