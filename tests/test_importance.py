"""Importance of heads and neurons: DynaBERT's numbers, the definitions by weights and gates, and a model left as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pruning_oracle as zero
import pytest
import tiny_models
import torch
import torch.distributed as dist
import transformers
from dynabert_oracles import agree, bert_of, inputs_of, oracle
from ranks import spawn
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kdfast import prune
from kdfast.elastic import Elastic
from kdfast.prune.layers import layers_of

EVERY = pytest.mark.parametrize("name", tiny_models.NAMES)


def labelled(model: Any, seed: int, rows: int = 3) -> dict[str, Tensor]:
    batch = tiny_models.batch(model, seed=seed, rows=rows)
    if model.config.model_type in ("gpt2", *tiny_models.CAUSAL, "gemma3_text"):
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    return batch | {"labels": torch.arange(rows) % 2}


# ---- DynaBERT's numbers ----
@pytest.mark.parametrize("kind", ["clean", "code"])
def test_dynabert(kind: str) -> None:
    o, hyper = oracle("dynabert_importance_rewiring")
    model, size = bert_of(o, hyper, "model."), hyper["batch_size"]
    rows = inputs_of(o) | {"labels": o["labels"]}
    batches = [{name: x[start : start + size] for name, x in rows.items()} for start in range(0, 10, size)]
    heads, neurons = prune.importance(model, batches, accumulate=kind == "code")
    agree(heads, o[f"head_importance_{kind}"], 1e-6)  # stored in float32
    agree(neurons, o[f"neuron_importance_{kind}"], 1e-6)
    assert heads.dtype == torch.float64
    assert torch.equal(heads.argsort(descending=True), o[f"head_order_{kind}"])
    assert torch.equal(neurons.argsort(descending=True), o[f"neuron_order_{kind}"])
    with torch.no_grad():
        agree(model(**inputs_of(o)).logits, o["logits_original"], 1e-12)


# ---- the definitions ----
def by_weights(model: Any, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Gates on heads, and gradients of whole weights."""
    layers = layers_of(model)
    heads = [torch.zeros(layer.heads, dtype=torch.float64) for layer in layers]
    neurons = [torch.zeros(layer.neurons, dtype=torch.float64) for layer in layers]
    for batch in batches:
        gates = [torch.ones(layer.heads, dtype=torch.float64, requires_grad=True) for layer in layers]
        hooks = []
        for layer, gate in zip(layers, gates, strict=True):
            output = layer.module.get_submodule(layer.adapter.output)
            wide = gate.repeat_interleave(layer.head_size)
            hooks.append(output.register_forward_pre_hook(lambda _, x, wide=wide: (x[0] * wide,)))
        model.zero_grad()
        model(**batch).loss.backward()
        for i, (layer, gate) in enumerate(zip(layers, gates, strict=True)):
            hooks[i].remove()
            heads[i] += gate.grad.abs()
            inward = torch.zeros(layer.neurons, dtype=torch.float64)
            for name in set(layer.adapter.expand):
                linear = layer.module.get_submodule(name)
                inward += (by_unit(linear, of_rows=True) + linear_bias(linear)).view(-1, layer.neurons).sum(0)
            outward = by_unit(layer.module.get_submodule(layer.adapter.contract), of_rows=False)
            neurons[i] += inward.abs() + outward.abs()
    model.zero_grad()
    return torch.stack(heads), torch.stack(neurons)


def by_unit(linear: Any, *, of_rows: bool) -> Tensor:
    """Σ w · ∂L/∂w over each row, or column, of the matrix [out, in]."""
    products = (linear.weight * linear.weight.grad).detach()
    return products.sum(0 if of_rows == isinstance(linear, Conv1D) else 1)


def linear_bias(linear: Any) -> Tensor | float:
    return 0.0 if linear.bias is None else (linear.bias * linear.bias.grad).detach()


@EVERY
def test_every_architecture(name: str) -> None:
    model = tiny_models.make(name)
    batches = [labelled(model, seed) for seed in (1, 2)]
    heads, neurons = by_weights(model, batches)
    got = prune.importance(model, batches)
    agree(got.heads, heads)
    agree(got.neurons, neurons)
    assert torch.equal(prune.importance(model, batches, of="heads"), got.heads)
    assert torch.equal(prune.importance(model, batches, "neurons"), got.neurons)


@pytest.mark.parametrize("name", ["bert", "albert", "llama"])
def test_michel_is_that_of_single_rows(name: str) -> None:
    """Batches of any size give what rows one by one do; a row alone is DynaBERT's, without the first term of neurons."""
    model = tiny_models.make(name)
    whole = labelled(model, 3, rows=5)
    whole["attention_mask"][:] = 1  # rows that have as many labels, of which the loss is a mean
    if name == "llama":
        whole["labels"] = whole["input_ids"]
    rows = [{name: x[i : i + 1] for name, x in whole.items()} for i in range(5)]
    pieces = [{name: x[part] for name, x in whole.items()} for part in (slice(0, 2), slice(2, 5))]
    heads, neurons = prune.importance(model, rows, criterion="michel")
    assert not prune.importance(model, [whole]).heads.allclose(prune.importance(model, rows).heads)
    precision = 1e-6 if name == "llama" else 1e-9  # it makes its loss in float32
    agree(prune.importance(model, rows).heads / 5, heads, precision)
    agree(torch.stack([outward_of(model, row) for row in rows]).mean(0), neurons, precision)
    for got, expected in zip(prune.importance(model, pieces, criterion="michel"), (heads, neurons), strict=True):
        agree(got, expected, precision)


def outward_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """|Σ w · ∂L/∂w| over each neuron's column."""
    model.zero_grad()
    model(**batch).loss.backward()
    maps = [layer.module.get_submodule(layer.adapter.contract) for layer in layers_of(model)]
    found = torch.stack([by_unit(one, of_rows=False).abs() for one in maps])
    model.zero_grad()
    return found


def test_a_loss_of_ones_own() -> None:
    model = tiny_models.make("bert", kind=transformers.AutoModel)
    batches = [tiny_models.batch(model, seed=seed) for seed in (1, 2)]
    with pytest.raises(
        ValueError, match=r"model: expected one that makes a loss of labels, got BertModel; or give loss="
    ):
        prune.importance(model, batches)

    def loss(given: Any, batch: Any) -> Tensor:
        assert given is model
        return (given(**batch).last_hidden_state * batch["attention_mask"][..., None]).square().mean()

    heads, neurons = prune.importance(model, iter(batches), loss=loss)
    assert heads.all()
    assert neurons.all()
    one = prune.importance(model, batches[:1], loss=lambda *given: 3 * loss(*given))
    agree(one.heads, 3 * (heads - prune.importance(model, batches[1:], "heads", loss=loss)))


# ---- a model left as it was ----
def test_the_model_stays_as_it_was() -> None:
    model = tiny_models.make("bert", dropout=0.5)
    batches = [labelled(model, seed) for seed in (1, 2)]
    expected = prune.importance(model, batches)
    model.train()
    model.bert.encoder.layer[1].eval()
    frozen = model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    model(**batches[0]).loss.backward()
    modes = [module.training for module in model.modules()]
    gradients = {name: copy.deepcopy(x.grad) for name, x in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda _: pytest.fail("a weight got a gradient"))
    with torch.no_grad():
        got = prune.importance(model, batches)
    agree(got.heads, expected.heads)
    agree(got.neurons, expected.neurons)
    with pytest.raises(ZeroDivisionError):
        prune.importance(model, (1 / 0 for _ in batches))
    assert [module.training for module in model.modules()] == modes
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert not frozen.requires_grad
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])
        assert torch.equal(parameter, state[name])


def test_compiled_models() -> None:
    """A compiled model calls no hooks that came later: it is not called."""
    torch._dynamo.reset()
    model = tiny_models.make("bert")
    batches = [labelled(model, 1)]
    expected = prune.importance(model, batches)
    wrapped: Any = torch.compile(model, backend="eager")
    model.compile(backend="eager")
    for net in (model, wrapped):
        net(**batches[0])
        got = prune.importance(net, batches)
        agree(got.heads, expected.heads)
        agree(got.neurons, expected.neurons)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_frozen_models_and_gradient_checkpointing(name: str) -> None:
    model = tiny_models.make(name)
    batches = [labelled(model, 1)]
    expected = prune.importance(model, batches)
    model.requires_grad_(False)
    agree(prune.importance(model, batches).neurons, expected.neurons)
    model.requires_grad_(True).train()
    model.gradient_checkpointing_enable()
    agree(prune.importance(model, batches).heads, expected.heads)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_sums_are_of_float32(how: str) -> None:
    """What a batch adds is not lost in those that came before."""
    model = tiny_models.make("bert").float()
    batch = labelled(model, 1, rows=1)
    expected = prune.importance(model, [batch])
    assert expected.heads.dtype == torch.float32
    if how == "bfloat16":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        one, many = (prune.importance(model, [batch] * times) for times in (1, 40))
    for got, single, exact in zip(many, one, expected, strict=True):
        assert got.dtype == torch.float32
        agree(got, 40 * single, 1e-4)
        agree(single, exact, 0.1)


# ---- pruned models ----
@pytest.mark.parametrize("pattern", ["some", "empty", "first"])
@pytest.mark.parametrize("name", ["bert", "albert", "modernbert", "gpt2", "llama"])
def test_masked_and_smaller_models(name: str, pattern: str) -> None:
    """What is dead does not matter: its scores are zeros, and NaN at the ends of rows where it is gone."""
    model = tiny_models.make(name)
    batches, masks = [labelled(model, 1)], zero.patterns(model)[pattern]
    with zero.zeroed(model, masks):
        expected = prune.importance(model, batches)
    smaller = prune.compact(model, masks)
    prune.apply(model, masks)
    got = prune.importance(model, batches)
    agree(got.heads, expected.heads)
    agree(got.neurons, expected.neurons)
    for scores, live in ((got.heads, masks.heads), (got.neurons, masks.neurons)):
        for row, mask, lives in zip(scores, live, masks.layers, strict=True):
            assert not row[~mask].any()
            assert bool(row[mask].all()) == bool(lives)
    rows = [i for i, lives in enumerate(masks.layers) if lives]
    for small, whole, live in zip(prune.importance(smaller, batches), got, (masks.heads, masks.neurons), strict=True):
        assert small.shape == (len(rows), max(int(live[i].sum()) for i in rows))
        for row, i in zip(small, rows, strict=True):
            kept = whole[i][live[i]]
            torch.testing.assert_close(row[: len(kept)], kept, rtol=1e-9, atol=0)
            assert row[len(kept) :].isnan().all()


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_subnetworks(name: str) -> None:
    model = tiny_models.make(name)
    batches = [labelled(model, 1)]
    with Elastic(model, (0.5,), (2 / 3,)) as elastic:
        elastic.set(0.5, 2 / 3)
        got, masks = prune.importance(model, batches), elastic.masks(0.5, 2 / 3)
    with zero.zeroed(model, masks):
        expected = prune.importance(model, batches)
    agree(got.heads, expected.heads)
    agree(got.neurons, expected.neurons)


def test_adapters_of_peft() -> None:
    model = tiny_models.make("bert")
    batches = [labelled(model, 1)]
    expected = prune.importance(model, batches)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value", "dense"]))
    got = prune.importance(adapted, batches)  # adapters begin as nothing
    agree(got.heads, expected.heads)
    agree(got.neurons, expected.neurons)


# ---- ranks ----
def check_ranks(rank: int, path: str) -> None:
    model = tiny_models.make("bert")
    batches = [labelled(model, seed, rows=rows) for seed, rows in ((1, 3), (2, 5), (3, 2))]
    expected = torch.load(path)
    mine = {"uneven": [batches[:1], batches[1:]], "none": [[], batches]}
    ddp = nn.parallel.DistributedDataParallel(model)
    for split in mine.values():
        for criterion in ("dynabert", "michel"):
            got = prune.importance(ddp, split[rank], criterion=criterion)
            for one, its in zip(got, expected[criterion], strict=True):
                agree(one, its)
                every = [torch.empty_like(one) for _ in range(2)]
                dist.all_gather(every, one)
                assert torch.equal(*every)
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        prune.importance(ddp, [])
    ddp.train()
    ddp(**batches[0]).loss.backward()  # no backward that DDP waits for


def test_ranks(tmp_path: Path) -> None:
    model = tiny_models.make("bert")
    batches = [labelled(model, seed, rows=rows) for seed, rows in ((1, 3), (2, 5), (3, 2))]
    path = tmp_path / "expected.pt"
    kinds: tuple[Any, ...] = ("dynabert", "michel")
    torch.save({kind: tuple(prune.importance(model, batches, criterion=kind)) for kind in kinds}, path)
    spawn(check_ranks, 2, tmp_path, str(path))


# ---- errors ----
def test_errors() -> None:
    model: Any = tiny_models.make("bert")
    batch: Any = labelled(model, 1)
    given: Any
    for given, message in [
        ({"of": "layers"}, r"of: expected 'heads', 'neurons' or 'both', got 'layers'"),
        ({"criterion": "magnitude"}, r"criterion: expected 'dynabert' or 'michel', got 'magnitude'"),
        ({"criterion": "michel", "accumulate": True}, r"accumulate: expected False with criterion 'michel'"),
        ({"batches": []}, r"batches: expected at least one, got none"),
        (
            {"batches": [tiny_models.batch(model)]},
            r"batches: expected columns, among them labels, got columns input_ids, attention_mask; or give loss=, a function of both",
        ),
        ({"batches": [torch.ones(2)]}, r"batches: expected columns, among them labels, got torch.float32"),
        (
            {"loss": lambda model, batch: model(**batch).logits},
            r"loss: expected a scalar .*, got \[3, 2\], requires_grad=True",
        ),
        ({"loss": lambda model, batch: model(**batch).loss.item()}, r"loss: expected a scalar .*, got [0-9.]+"),
        ({"loss": lambda model, batch: torch.zeros(())}, r"loss: expected a scalar .*, got \[\], requires_grad=False"),
    ]:
        with pytest.raises(ValueError, match=rf"^kdfast\.prune\.importance: {message}"):
            prune.importance(model, **{"batches": [batch], **given})
    with pytest.raises(TypeError, match=r"^kdfast\.prune\.importance: "):
        prune.importance(nn.Linear(2, 2), [batch])
