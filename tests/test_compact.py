"""Smaller models compute what masked ones do, with the same gradients, of every architecture."""

from __future__ import annotations

import copy
import math
from typing import Any

import peft
import pruned_oracle as oracle
import pytest
import tiny_models
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import kdfast
from kdfast.prune import Masks, compact
from kdfast.prune.layers import layers_of
from kdfast.prune.modules import RepeatedHeads, WithoutHeads


def halves(model: nn.Module) -> Masks:
    """Of groups that are left one is read by two heads, the other by one."""
    return oracle.random_masks(model)


def nothing(model: nn.Module) -> Masks:
    """A layer without heads, one without neurons, one without both and one as it was."""
    masks = oracle.random_masks(model)
    masks.heads[0][:] = False
    masks.neurons[1][:] = False
    if len(masks.heads) > 2:
        masks.heads[2][:] = False
        masks.neurons[2][:] = False
    return masks


def layers(model: nn.Module) -> Masks:
    """The first layer is gone."""
    masks = oracle.random_masks(model)
    masks.layers[0] = model.config.model_type == "albert"  # whose layers share their weights
    return masks


CASES = (halves, nothing, layers)
EXACT = ("bert", "roberta", "distilbert", "electra", "albert", "mpnet", "gpt2")  # in float64; others round to float32


def old_name(name: str, smaller: nn.Module, masks: Masks) -> str:
    """A parameter's name in the whole model, where layers have other numbers."""
    kept = masks.layers.nonzero().flatten().tolist()
    for mine, (layer, i) in enumerate(zip(layers_of(smaller), kept, strict=True)):
        if name.startswith(f"{layer.name}."):
            return f"{layer.name.removesuffix(str(mine))}{i}{name.removeprefix(layer.name)}" if mine != i else name
    return name


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(**batch).logits
    if logits.dim() == 3:
        logits = logits * batch["attention_mask"][..., None]
    return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).reshape(logits.shape)).sum()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_computes_what_the_masked_model_does(name: str, case: Any) -> None:
    model = tiny_models.make(name)
    batch, masks, before = tiny_models.batch(model), case(model), copy.deepcopy(model.state_dict())
    whole, smaller = oracle.masked(model, masks), compact(model, masks)
    close = dict.fromkeys(("rtol", "atol"), 1e-10 if name in EXACT else 1e-5)
    expected, got = loss_of(whole, batch), loss_of(smaller, batch)
    torch.testing.assert_close(got, expected, **close)
    expected.backward()
    got.backward()
    theirs, left = dict(whole.named_parameters()), oracle.left(model, masks)
    for mine, parameter in smaller.named_parameters():
        full = old_name(mine, smaller, masks)
        wanted = oracle.taken(theirs[full].grad, left.get(full, {}))
        assert parameter.grad is not None, mine
        assert (parameter.grad - wanted).abs().max() <= close["atol"] * (1 + wanted.abs().max()), mine
        assert parameter.numel()
    assert expected.abs() > 1e-3
    assert sum(x.numel() for x in smaller.parameters()) < 0.9 * sum(x.numel() for x in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)  # the original is what it was
    torch.testing.assert_close(model(**batch).logits, tiny_models.make(name)(**batch).logits, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("name", tiny_models.CAUSAL)
def test_generates_what_the_masked_model_does(name: str, case: Any) -> None:
    """With a cache of keys and values, of which the first layer may have none; the masked model without."""
    model = tiny_models.make(name)
    masks = case(model)
    whole, smaller = oracle.masked(model, masks), compact(model, masks)
    ids = tiny_models.batch(model, rows=2)["input_ids"].clamp(min=3)
    drawn = []  # not the likeliest, which are all the same where embeddings are tied
    for made, cache in ((whole, {"use_cache": False}), (smaller, {}), (smaller, {"cache_implementation": "static"})):
        torch.manual_seed(0)
        options = {"do_sample": True, "top_k": 0, "temperature": 3.0, "max_new_tokens": 9, "eos_token_id": None}
        drawn.append(made.generate(ids, attention_mask=torch.ones_like(ids), **options, **cache))
    assert torch.equal(drawn[1], drawn[0])
    assert torch.equal(drawn[2], drawn[0])
    assert len({*drawn[0][:, ids.shape[1] :].flatten().tolist()}) > 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "mpnet", "modernbert", "gpt2", "llama"])
def test_other_dtypes_to_rounding(name: str, dtype: torch.dtype) -> None:
    """As near to float64 as the masked model of the same dtype."""
    model = tiny_models.make(name)
    masks, batch = nothing(model), tiny_models.batch(model)
    exact = oracle.masked(model, masks)(**batch).logits
    model = model.to(dtype)
    smaller = compact(model, masks)(**batch).logits
    assert smaller.dtype == dtype
    errors = [
        (logits - exact).norm() / exact.norm() for logits in (smaller, oracle.masked(model, masks)(**batch).logits)
    ]
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps


@pytest.mark.parametrize(("heads", "groups"), [(14, 2), (28, 4), (24, 8)])
def test_every_ratio_of_heads_to_groups(heads: int, groups: int) -> None:
    """What is left is read by 1 to all heads of a group, by attention of every implementation."""
    size = {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": 4, "num_hidden_layers": 3}
    model = tiny_models.make("qwen2", **size)
    masks = Masks.full(model)
    each = heads // groups
    for group in range(groups):
        masks.heads[0][group * each + 1 + group % (each - 1) : (group + 1) * each] = False
    masks.heads[1][1] = False
    masks.drop_group(2, 0)
    batch = tiny_models.batch(model)
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        smaller = compact(model, masks)
        torch.testing.assert_close(loss_of(smaller, batch), loss_of(oracle.masked(model, masks), batch))
    found = [layer.module.self_attn for layer in layers_of(smaller)]
    counts = [1 + group % (each - 1) for group in range(groups)]
    assert [attention.num_key_value_groups for attention in found] == [math.gcd(*counts), 1, each]
    assert [len(attention.k_proj.weight) // 4 for attention in found] == [groups, groups, groups - 1]
    assert [type(attention.k_proj) for attention in found[1:]] == [RepeatedHeads, nn.Linear]
    assert found[1].k_proj.repeat == tuple(h // each for h in range(heads) if h != 1)


def test_nothing_is_left_of_what_is_gone() -> None:
    model = tiny_models.make("bert")
    smaller = compact(model, nothing(model))
    gone, _, both = (layer.module for layer in layers_of(smaller))
    assert [name for name, _ in gone.attention.self.named_parameters()] == []
    assert [name for name, _ in both.output.named_parameters()] == ["dense.bias", "LayerNorm.weight", "LayerNorm.bias"]
    assert torch.equal(both.output.dense.bias, layers_of(model)[2].module.output.dense.bias)
    assert isinstance(gone.attention.self, WithoutHeads)
    llama = tiny_models.make("llama", attention_bias=False)
    both = layers_of(compact(llama, nothing(llama)))[2].module
    assert [*both.parameters()] == []


def test_keeps_flags_hooks_dtypes_and_random_numbers() -> None:
    model = tiny_models.make("llama", dropout=0.1).to(torch.bfloat16).train()
    layers = layers_of(model)
    layers[1].module.self_attn.q_proj.weight.requires_grad_(False)
    layers[0].module.mlp.eval()
    model.model.embed_tokens.requires_grad_(False)
    seen: list[int] = []
    layers[2].module.mlp.down_proj.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[-1]))
    masks, state = oracle.random_masks(model), torch.get_rng_state()
    masks.layers[0] = False
    smaller = compact(model, masks)
    assert torch.equal(torch.get_rng_state(), state)
    mine = dict(smaller.named_parameters())
    frozen = {name for name, x in mine.items() if not x.requires_grad}
    assert frozen == {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"}
    assert {x.dtype for x in mine.values()} == {torch.bfloat16}
    assert smaller.training
    assert smaller.model.layers[0].mlp.training
    compacted_first = compact(model, oracle.random_masks(model))
    assert not compacted_first.model.layers[0].mlp.training
    smaller(**tiny_models.batch(model))
    assert seen == [int(masks.neurons[2].sum())]
    buffers = dict(smaller.named_buffers())
    assert {name: x.dtype for name, x in model.named_buffers()} == {name: x.dtype for name, x in buffers.items()}
    assert [layer.module.self_attn.layer_idx for layer in layers_of(smaller)] == [0, 1]


@pytest.mark.parametrize("name", ["mpnet", "albert", "gpt2", "qwen3"])
def test_of_a_masked_model_and_again(name: str) -> None:
    """compact after apply, and apply and compact of what compact made, which then equals compact in one step."""
    model = tiny_models.make(name)
    batch, masks = tiny_models.batch(model), nothing(model)
    whole = model(**batch).logits
    kdfast.prune.apply(model, masks)
    expected = model(**batch).logits
    smaller = compact(model, masks)
    assert torch.equal(model(**batch).logits, expected)
    torch.testing.assert_close(smaller(**batch).logits, expected)
    assert {type(x).__name__ for x in smaller.modules()} <= {
        type(x).__name__ for x in tiny_models.make(name).modules()
    } | {"Identity", "Nothing", "OnlyBias", "WithoutHeads", "RepeatedHeads"}
    kdfast.prune.remove(model)
    assert torch.equal(model(**batch).logits, whole)

    again, both = Masks.full(smaller), masks.copy()
    assert again.heads[0].shape == (0,)
    again.heads[1][1:] = False
    again.neurons[0][:9] = False
    both.heads[1][both.heads[1].nonzero().flatten()[1:]] = False
    both.neurons[0][both.neurons[0].nonzero().flatten()[:9]] = False
    expected = oracle.masked(model, both)(**batch).logits
    smallest = compact(smaller, again)
    torch.testing.assert_close(smallest(**batch).logits, expected)
    kdfast.prune.apply(smaller, again)
    torch.testing.assert_close(smaller(**batch).logits, expected)
    once = compact(model, both)
    assert {n: x.shape for n, x in once.state_dict().items()} == {n: x.shape for n, x in smallest.state_dict().items()}
    assert once.config.quantization_config == smallest.config.quantization_config


@pytest.mark.parametrize("name", ["mpnet", "modernbert", "llama"])
def test_compiles_as_one_graph(name: str) -> None:
    model = tiny_models.make(name)
    smaller, batch = compact(model, nothing(model)).train(), tiny_models.batch(model)
    expected = loss_of(smaller, batch)
    expected.backward()
    gradients = {name: x.grad for name, x in smaller.named_parameters()}
    smaller.zero_grad()
    options = {"use_cache": False} if name in tiny_models.CAUSAL else {}
    loss = loss_of(torch.compile(smaller, backend="aot_eager", fullgraph=True), batch | options)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    torch.testing.assert_close({name: x.grad for name, x in smaller.named_parameters()}, gradients)


def test_copies_nothing_that_is_cut() -> None:
    class Copied(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            if function in (torch.ops.aten.clone.default, torch.ops.aten.index_select.default):
                Copied.numbers += made.numel() if made.device.type == "cpu" else 0
            return made

    model = tiny_models.make("bert", intermediate_size=5000)
    masks = Masks.full(model)
    for neurons in masks.neurons:
        neurons[100:] = False
    kdfast.prune.apply(model, masks)
    model(**tiny_models.batch(model))
    with Copied():
        smaller = compact(model, masks)
    there = sum(x.numel() for x in (*smaller.parameters(), *smaller.buffers()))
    assert 0.9 * there < Copied.numbers < 1.1 * there


def test_wrapped_models_and_what_cannot_be_made_smaller() -> None:
    model = tiny_models.make("bert")
    masks, batch = oracle.random_masks(model), tiny_models.batch(model)
    smaller = compact(nn.DataParallel(torch.compile(model)), masks)
    torch.testing.assert_close(smaller(**batch).logits, compact(model, masks)(**batch).logits, rtol=0, atol=0)
    masks.layers[:] = False
    with pytest.raises(ValueError, match=r"kdfast.prune.compact: masks.layers: expected at least one that is True"):
        compact(model, masks)
    with pytest.raises(ValueError, match=r"kdfast.prune.compact: masks: expected those of a model of type 'bert'"):
        compact(model, Masks.full(tiny_models.make("electra")))
    with pytest.raises(TypeError, match=r"kdfast.prune.compact: model: expected a transformers model"):
        compact(nn.Linear(2, 2), masks)
    albert = tiny_models.make("albert")
    masks = Masks.full(albert)
    masks.layers[0] = False
    with pytest.raises(ValueError, match=r"kdfast.prune.compact: masks.layers: expected all True for ALBERT"):
        compact(albert, masks)
    replaced = copy.deepcopy(model)
    linear = replaced.bert.encoder.layer[0].output.dense
    linear.forward = linear.forward
    with pytest.raises(
        ValueError, match=r"kdfast.prune.compact: model: expected .*layer.0.output.dense with the forward"
    ):
        compact(replaced, Masks.full(replaced))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(TypeError, match=r"kdfast.prune.compact: model: expected linear maps.*merge.*at .*self.query"):
        compact(adapted, Masks.full(adapted))
    layers_of(albert)[1].module.ffn_output.weight = layers_of(albert)[0].module.ffn_output.weight
    masks = Masks.full(albert)
    masks.neurons[0][3] = False
    masks.neurons[1][4] = False
    with pytest.raises(ValueError, match=r"kdfast.prune.compact: masks: expected the same of parameters that are tied"):
        compact(albert, masks)


@pytest.mark.parametrize("name", ["mpnet", "llama"])
def test_readers_see_the_heads_that_are_left(name: str) -> None:
    """Of layers that have any, in masked and in smaller models."""
    model = tiny_models.make(name)
    masks, batch = nothing(model), tiny_models.batch(model)
    smaller = compact(model, masks)
    kdfast.prune.apply(model, masks)
    read = []
    for made in (model, smaller):
        with kdfast.hf.Reader(made, bias=True) as reader:
            read.append(reader(**batch))
    assert len(read[1].q) == 1
    for kind in ("q", "k", "v") + (("bias",) if name == "mpnet" else ()):
        torch.testing.assert_close(getattr(read[1], kind), getattr(read[0], kind))
