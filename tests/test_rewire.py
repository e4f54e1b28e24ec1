"""Rewired models: DynaBERT's weights and logits, every architecture's function unchanged, the same parameters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pruning_oracle as zero
import pytest
import tiny_models
import torch
from dynabert_oracles import bert_of, inputs_of, oracle
from torch import Tensor, nn

from kdfast import prune
from kdfast.elastic import Elastic
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


@pytest.mark.parametrize("name", ["bert", "mpnet", "modernbert", "gpt2", "llama"])
def test_smaller_models(name: str, tmp_path: Path) -> None:
    """Layers of different sizes: repeated groups, no heads, no neurons."""
    whole = tiny_models.make(name)
    for masks in zero.patterns(whole).values():
        model = prune.compact(whole, masks)
        inputs = tiny_models.batch(model)
        expected = model(**inputs).logits.detach()
        state = copy.deepcopy(model.state_dict())
        heads, neurons = ([torch.rand(n) for n in counts] for counts in zip(*sizes(model), strict=True))
        prune.rewire(model, nn.utils.rnn.pad_sequence(heads, True, torch.nan), neurons)
        assert not all(torch.equal(x, state[key]) for key, x in model.state_dict().items())
        model.save_pretrained(tmp_path)
        for net in (model, type(model).from_pretrained(tmp_path, dtype=torch.float64)):
            torch.testing.assert_close(net(**inputs).logits.detach(), expected, rtol=0, atol=1e-10)


def sizes(model: Any) -> list[tuple[int, int]]:
    return [(layer.heads, layer.neurons) for layer in layers_of(model)]


def test_models_that_cannot_be_sorted() -> None:
    masked, elastic, adapted = (tiny_models.make("bert") for _ in range(3))
    masks = prune.Masks.full(masked)
    masks.neurons[0][3] = False
    prune.apply(masked, masks)
    scores = random_scores(masked)
    Elastic(elastic, (0.5,)).set(0.5)
    for model in (masked, elastic):
        with pytest.raises(ValueError, match=r"rewire: model: expected one without masks"):
            prune.rewire(model, *scores)
    Elastic(elastic_again := tiny_models.make("bert"), (0.5,))
    prune.rewire(elastic_again, *scores)  # as the whole model that it is
    peft.get_peft_model(adapted, peft.LoraConfig(target_modules=["value"]))
    message = r"rewire: model: bert\.encoder\.layer\.0\.attention\.self\.value: expected nn\.Linear or Conv1D, .*"
    with pytest.raises(TypeError, match=message):
        prune.rewire(adapted, *scores)


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
