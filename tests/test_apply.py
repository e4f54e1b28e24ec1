"""`kdfast.prune.apply`: masked models compute what whole ones do with what is dead set to zero, and only that."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pruning_oracle as oracle
import pytest
import tiny_models
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import kdfast.hf
from kdfast.elastic import Elastic
from kdfast.prune import Adapter, Masks, apply, compact, register, remove
from kdfast.prune.layers import ADAPTERS
from kdfast.prune.masked import MaskedMap


def tolerance(name: str) -> float:
    return 1e-6 if name in oracle.IN_FLOAT32 else 1e-13


def seen(model: nn.Module) -> list[Any]:
    """All of a model's modules that masks might change: classes, and attributes but for tensors and modules."""
    plain = (int, float, str, tuple, type(None))
    return [
        (type(module), {name: x for name, x in vars(module).items() if isinstance(x, plain)}, [*vars(module)])
        for module in model.modules()
    ]


# ---- results ----
@pytest.mark.parametrize("pattern", ["some", "empty", "first"])
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_outputs_and_gradients_are_those_with_dead_parts_set_to_zero(name: str, pattern: str) -> None:
    model = tiny_models.make(name)
    batch, masks = tiny_models.batch(model), oracle.patterns(model)[pattern]
    whole = oracle.results(model, batch)
    with oracle.zeroed(model, masks):
        expected = oracle.results(model, batch)
    assert (expected["logits"] - whole["logits"]).abs().max() > 1e-2
    apply(model, masks)
    got = oracle.results(model, batch)
    oracle.same(got, expected, tolerance(name))
    for parameter, where in oracle.dead(model, masks).items():
        assert not got[parameter][where].any(), parameter


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_other_masks_replace_those_before_and_remove_gives_the_model_back(name: str) -> None:
    model = tiny_models.make(name)
    batch, patterns = tiny_models.batch(model), oracle.patterns(model)
    before, parameters, whole = seen(model), [*model.parameters()], oracle.results(model, batch)
    for pattern in ("some", "empty", "some", "first", "first"):
        apply(model, patterns[pattern])
        fresh = tiny_models.make(name)
        apply(fresh, patterns[pattern])
        got, expected = oracle.results(model, batch), oracle.results(fresh, batch)
        assert all(torch.equal(got[key], expected[key]) for key in expected), pattern
    apply(model, Masks.full(model))
    assert [of for of, *_ in seen(model)] == [of for of, *_ in before]
    apply(model, patterns["empty"])
    remove(model)
    remove(model)
    assert seen(model) == before
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    again = oracle.results(model, batch)
    assert all(torch.equal(again[key], whole[key]) for key in whole)


@pytest.mark.parametrize("name", ["bert", "mpnet", "gpt2", "llama"])
def test_what_is_in_dead_weights_reaches_nothing(name: str) -> None:
    model = tiny_models.make(name)
    batch, masks = tiny_models.batch(model), oracle.patterns(model)["empty"]
    apply(model, masks)
    expected = oracle.results(model, batch)
    with torch.no_grad():
        for parameter, where in oracle.dead(model, masks).items():
            model.get_parameter(parameter)[where] = torch.nan
    got = oracle.results(model, batch)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "gpt2", "qwen2"])
def test_bfloat16_and_autocast(name: str) -> None:
    model = tiny_models.make(name).float()
    batch, masks = tiny_models.batch(model), oracle.patterns(model)["some"]
    half = copy.deepcopy(model).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), oracle.zeroed(model, masks):
        expected = oracle.results(model, batch)
    apply(model, masks)
    apply(half, masks)
    with torch.autocast("cpu", torch.bfloat16):
        got = oracle.results(model, batch)
    of_half = oracle.results(half, batch)
    for name, want in expected.items():
        assert got[name].dtype is want.dtype
        for x in (got[name], of_half[name].float()):
            error = (x - want).norm() / want.norm()
            assert error < 0.1 or want.norm() < 1e-2 * expected["logits"].norm(), f"{name}: {error}"


# ---- what is computed ----
def test_computes_only_what_lives() -> None:
    model = tiny_models.make("bert", kind=transformers.AutoModel, intermediate_size=36)
    batch, masks = tiny_models.batch(model), Masks.full(model)
    for heads, neurons in zip(masks.heads, masks.neurons, strict=True):
        heads[::2] = False
        neurons[::2] = False

    def flops() -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**batch)
        return sum(counter.get_flop_counts()["BertModel.encoder"].values())

    before = flops()
    apply(model, masks)
    assert before > 10**5
    assert 2 * flops() == before


def test_groups_are_made_once_and_then_repeated() -> None:
    model = tiny_models.make("llama", attn_implementation="eager")
    batch, masks = tiny_models.batch(model), oracle.patterns(model)["some"]
    apply(model, masks)
    attention = model.model.layers[0].self_attn
    widths = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        attention.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: widths.update({name: output.shape[-1] // 8})
        )
    attentions = model(**batch, output_attentions=True).attentions
    assert widths == {"q_proj": 4, "k_proj": 4, "v_proj": 4}  # groups 0, 0, 0, 1
    assert attention.num_key_value_groups == 1
    assert len(attention.k_proj._kdfast_masked.packed.rows) == 2 * 8
    assert [x.shape[1] for x in attentions] == [4, 3, 3]
    assert "rows=16" in repr(attention.k_proj)


def test_only_what_changes_is_packed_anew() -> None:
    model = tiny_models.make("bert")
    masks = oracle.patterns(model)["some"]

    def kept() -> dict[str, Any]:
        return {name: m._kdfast_masked for name, m in model.named_modules() if isinstance(m, MaskedMap)}

    apply(model, masks)
    before = kept()
    assert len(before) == 18
    apply(model, masks.copy())
    masks.heads[1][4] = False
    masks.neurons[2][3] ^= True
    apply(model, masks)
    changed = {name for name, now in kept().items() if now is not before[name]}
    of_heads = ("self.query", "self.key", "self.value", "output.dense")
    expected = {f"bert.encoder.layer.1.attention.{name}" for name in of_heads}
    assert changed == expected | {f"bert.encoder.layer.2.{name}.dense" for name in ("intermediate", "output")}


@pytest.mark.parametrize("pattern", ["some", "empty", "first"])
@pytest.mark.parametrize("name", tiny_models.CAUSAL)
def test_generates_with_a_cache(name: str, pattern: str) -> None:
    model = tiny_models.make(name)
    ids, masks = tiny_models.batch(model, rows=2, length=6)["input_ids"], oracle.patterns(model)[pattern]
    ids[1, 5] = 7  # no padding
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options |= {"eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    more = [{}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}]
    with oracle.zeroed(model, masks):
        expected = [model.generate(ids, **options, **other) for other in more]
    apply(model, masks)
    for other, want in zip(more, expected, strict=True):
        got = model.generate(ids, **options, **other)
        assert got.sequences.shape == (2, 11)
        assert torch.equal(got.sequences, want.sequences), other
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-5, atol=1e-5)


# ---- the same model to others ----
@pytest.mark.parametrize("name", ["bert", "albert", "mpnet", "gpt2", "gemma"])
def test_copies_compute_with_their_own_weights(name: str) -> None:
    model = tiny_models.make(name)
    batch, masks = tiny_models.batch(model), oracle.patterns(model)["empty"]
    apply(model, masks)
    expected = model(**batch).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**batch).logits, expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        assert torch.equal(model(**batch).logits, expected)
        changed = other(**batch).logits
        assert (changed - expected).abs().max() > 1e-2
        apply(other, Masks.full(other))
        apply(other, masks)
        assert torch.equal(other(**batch).logits, changed)
        remove(other)
        remove(reference := copy.deepcopy(model))
        assert [of for of, *_ in seen(other)] == [of for of, *_ in seen(reference)]


def test_replicas_of_data_parallel_compute_with_their_own_weights() -> None:
    model = tiny_models.make("bert")
    apply(model, oracle.patterns(model)["some"])
    linear = model.bert.encoder.layer[0].attention.self.query
    replica, x = linear._replicate_for_data_parallel(), torch.randn(2, 48, dtype=torch.float64)
    replica.weight, replica.bias = 2 * linear.weight, 2 * linear.bias
    torch.testing.assert_close(replica(x), 2 * linear(x))
    assert linear(x).shape == (2, 4 * 8)


def test_the_state_is_that_of_the_whole_model(tmp_path: Path) -> None:
    model = tiny_models.make("qwen2").float()
    batch, masks = tiny_models.batch(model), oracle.patterns(model)["empty"]
    state = {name: x.clone() for name, x in model.state_dict().items()}
    apply(model, masks)
    assert model.state_dict().keys() == state.keys()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert all(torch.equal(x, state[name]) for name, x in again.state_dict().items())
    apply(again, masks)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    model.load_state_dict({name: 1.5 * x for name, x in state.items()})  # what is packed is packed anew
    again.load_state_dict({name: 1.5 * x for name, x in state.items()})
    assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["bert", "mpnet", "gpt2", "llama"])
def test_indices_follow_the_model_to_its_device(name: str) -> None:
    model = tiny_models.make(name).float()
    batch = tiny_models.batch(model)
    for masks in oracle.patterns(model).values():
        apply(model.cpu(), masks)
        expected = oracle.results(model, batch)
        got = oracle.results(model.cuda(), {key: x.cuda() for key, x in batch.items()})
        oracle.same({key: x.cpu() for key, x in got.items()}, expected, 1e-4)


def test_masks_of_the_model_below_a_head_are_those_of_the_model() -> None:
    model = tiny_models.make("bert")
    batch, masks = tiny_models.batch(model), oracle.patterns(model)["some"]
    whole = model(**batch).logits
    apply(model, masks)
    masked = model(**batch).logits
    remove(model.bert)
    assert torch.equal(model(**batch).logits, whole)
    apply(model, masks)
    assert torch.equal(model(**batch).logits, masked)
    apply(model.bert, Masks.full(model.bert))
    assert torch.equal(model(**batch).logits, whole)


@pytest.mark.parametrize("name", ["bert", "mpnet", "llama"])
def test_a_reader_reads_the_heads_that_live(name: str) -> None:
    model = tiny_models.make(name, kind=transformers.AutoModel)
    batch, masks = tiny_models.batch(model), oracle.patterns(model)["some"]
    with kdfast.hf.Reader(model, bias=True) as reader:
        whole = reader(**batch)
        apply(model, masks)
        got = reader(**batch)
    kept = masks.kept(0)[0]
    torch.testing.assert_close(got.q[0], whole.q[0][:, kept])
    assert [q.shape[1] for q in got.q] == [4, 3, 3]
    assert [scores.shape[1] for scores in got.scores] == [4, 3, 3]
    torch.testing.assert_close(got.scores[0], whole.scores[0][:, kept])


@pytest.mark.parametrize("name", ["bert", "mpnet", "gpt2", "llama"])
def test_smaller_models_are_masked_again(name: str) -> None:
    model = tiny_models.make(name)
    batch = tiny_models.batch(model)
    smaller = compact(model, oracle.patterns(model)["some"])
    masks = Masks.full(smaller)
    for heads, neurons in zip(masks.heads, masks.neurons, strict=True):
        heads[1] = neurons[5] = False
    with oracle.zeroed(smaller, masks):
        expected = oracle.results(smaller, batch)
    apply(smaller, masks)
    oracle.same(oracle.results(smaller, batch), expected, 1e-13)
    assert torch.equal(compact(smaller, masks)(**batch).logits, smaller(**batch).logits) or name == "gpt2"


# ---- other architectures, and what is refused ----
def test_an_adapter_of_a_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.OlmoConfig(
        **{**tiny_models._OWN_SIZE, "head_dim": 8, "num_hidden_layers": 3, "attn_implementation": "sdpa"}
    )
    model = transformers.OlmoForCausalLM(config).double().eval()
    monkeypatch.delitem(ADAPTERS, "olmo", raising=False)
    with pytest.raises(ValueError, match=r"kdfast.prune.Masks: model: expected one of albert.*got 'olmo'; to prune it"):
        Masks.full(model)
    monkeypatch.setitem(ADAPTERS, "olmo", ADAPTERS["llama"])  # so that what is registered goes with the test
    register(
        "olmo",
        Adapter(
            attention="self_attn",
            qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            output="self_attn.o_proj",
            expand=("mlp.gate_proj", "mlp.up_proj"),
            contract="mlp.down_proj",
            without_heads=lambda attention, hidden, context: (attention.o_proj(context), None),
        ),
    )
    batch = tiny_models.batch(model)
    for masks in oracle.patterns(model).values():
        with oracle.zeroed(model, masks):
            expected = oracle.results(model, batch)
        apply(model, masks)
        oracle.same(oracle.results(model, batch), expected, 1e-13)
        remove(model)


class Quantised(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).round()


@pytest.mark.parametrize("how", ["class", "forward", "masks", "model"])
def test_what_cannot_be_masked_is_refused_before_anything_changes(how: str) -> None:
    model: Any = tiny_models.make("bert")
    masks, last = oracle.patterns(model)["some"], model.bert.encoder.layer[2].output
    before = seen(model)
    if how == "class":
        last.dense.__class__ = Quantised
        kind, message = TypeError, r"expected nn.Linear.*as bert.encoder.layer.2.output.dense, got Quantised"
    elif how == "forward":
        last.dense.forward = last.dense.forward
        kind, message = (
            ValueError,
            r"bert.encoder.layer.2.output.dense with the forward of its class, got one that was set",
        )
    elif how == "masks":
        masks.heads[2] = masks.heads[2].long()
        kind, message = (
            TypeError,
            r"masks.heads\[2\]: expected a bool tensor of shape \[6\] on the CPU, got torch.int64",
        )
    else:
        kind, message = TypeError, "expected a transformers model, got Linear"
    with pytest.raises(kind, match=rf"^kdfast.prune.apply: .*{message}"):
        apply(nn.Linear(2, 2) if how == "model" else model, masks)
    if how == "class":
        last.dense.__class__ = nn.Linear
    vars(last.dense).pop("forward", None)
    assert seen(model) == before


def test_an_open_elastic_and_swapped_arguments_are_told() -> None:
    model = tiny_models.make("bert")
    masks = Masks.full(model)
    with pytest.raises(TypeError, match=r"kdfast.prune.apply: model: expected a model of transformers, got .*Masks"):
        apply(masks, model)
    with (
        Elastic(model, (0.5,)),
        pytest.raises(ValueError, match=r"expected one on which no kdfast.elastic.Elastic is open, .* close\(\) it"),
    ):
        apply(model, masks)
    apply(model, masks)
