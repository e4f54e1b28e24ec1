"""`kdfast.elastic`: DynaBERT's sub-networks and gradients, and for every architecture those of whole models with what a
width and depth leave out set to zero."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pruning_oracle as zero
import pytest
import tiny_models
import torch
import transformers
from dynabert_oracles import ORACLES, agree, bert_of, inputs_of, oracle
from torch import nn

import kdfast
from kdfast.elastic import Elastic, kept_layers, kept_width
from kdfast.prune import Masks, apply

WIDTHS, DEPTHS = (0.25, 0.5, 0.75, 1.0), (0.5, 0.75, 1.0)


def tolerance(name: str) -> float:
    return 1e-6 if name in zero.IN_FLOAT32 else 1e-13


def depths_of(name: str) -> tuple[float, ...]:
    return (1.0,) if name == "albert" else (1 / 3, 2 / 3, 1.0)


# ---- DynaBERT's numbers ----
def test_tables() -> None:
    tables = json.loads((ORACLES / "dynabert_tables.json").read_text())
    for layers, of in tables["depth"].items():
        for depth, kept in of.items():
            assert kept_layers(int(layers), float(depth)) == kept
    for sizes, of in tables["width"].items():
        heads, neurons = map(int, sizes.split("x"))
        for width, (of_heads, of_neurons) in of.items():
            assert kept_width(heads, heads, neurons, float(width)) == (max(1, of_heads), of_neurons)


def test_the_last_layer() -> None:
    assert kept_layers(12, 0.75, keep_last=True) == [0, 1, 3, 4, 5, 7, 8, 9, 11]
    assert kept_layers(12, 0.5, keep_last=True) == [1, 3, 5, 7, 9, 11]
    for layers in range(1, 30):
        for depth in (0.25, 1 / 3, 0.5, 2 / 3, 0.75, 0.9, 1.0):
            kept = kept_layers(layers, depth, keep_last=True)
            assert len(kept) == len(kept_layers(layers, depth))
            assert kept == sorted({*kept})
            assert not kept or (kept[0] >= 0 and kept[-1] == layers - 1)


def test_grouped_heads_stay_in_whole_groups() -> None:
    """Of Qwen2 0.5B: 14 heads in 2 groups."""
    assert kept_width(14, 2, 4864, 0.25) == (7, 1389)
    assert kept_width(14, 2, 4864, 0.75) == (14, 3474)  # 1.5 groups and 10.5 heads round to the even number
    assert kept_width(28, 4, 18944, 0.5) == (14, 9472)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_subnetworks(attention: str) -> None:
    o, hyper = oracle("dynabert_subnets")
    model = bert_of(o, hyper, "student.")
    model.set_attn_implementation(attention)
    elastic = Elastic(model, hyper["width_mult_list"], hyper["depth_mult_list"])
    assert len(elastic.subnetworks) == 12
    compared = 0
    for width, depth in elastic.subnetworks:
        elastic.set(width, depth)
        masks, case = elastic.masks(width, depth), f".d{depth}.w{width}"
        kept = masks.layers.nonzero().flatten()
        assert torch.equal(kept, o[f"kept_layers.d{depth}"])
        assert len(masks.kept(0)[0]) == o[f"heads_kept.w{width}"]
        assert len(masks.kept(0)[1]) == o[f"ffn_kept.w{width}"]
        for net in (model, elastic.export(width, depth)):
            output = net(**inputs_of(o), output_hidden_states=True)
            states = output.hidden_states
            if net is model:  # a layer that is left out passes on what it gets
                states = [*(states[i] for i in kept), states[-1]]
            agree(output.logits, o[f"logits{case}"], 1e-10)
            assert len(states) == o[f"n_states{case}"]
            agree(states[-1], o[f"last_hidden{case}"], 1e-10)
            for i, state in enumerate(states):
                if f"hidden{case}.{i}" in o:
                    agree(state, o[f"hidden{case}.{i}"], 1e-10)
                    compared += 1
    assert compared == 2 * 7


def test_rewired_subnetworks() -> None:
    o, hyper = oracle("dynabert_importance_rewiring")
    model = bert_of(o, hyper, "model.")
    kdfast.prune.rewire(model, o["head_importance_code"], o["neuron_importance_code"])
    elastic = Elastic(model, WIDTHS)
    for width in WIDTHS:
        elastic.set(width)
        agree(model(**inputs_of(o)).logits, o[f"logits_reordered_width.{width}"], 1e-10)


@pytest.mark.parametrize("stage", ["width_stage", "depth_stage_teacher_full", "depth_stage_teacher_match"])
def test_stages(stage: str) -> None:
    """Losses of the sub-networks in their order, and their gradients, which add up."""
    o, hyper = oracle(f"dynabert_{stage}")
    student, teacher = bert_of(o, hyper, "student."), bert_of(o, hyper, "teacher.")
    elastic = Elastic(student, hyper["width_mult_list"], hyper["depth_mult_list"])
    of_teacher = Elastic(teacher, hyper["width_mult_list"])
    assert [(depth, width) for width, depth in elastic.subnetworks] == [
        tuple(x) for x in o["subnet_table"][:, 3:].tolist()
    ]
    for (width, depth), row in zip(elastic.subnetworks, o["subnet_table"], strict=True):
        elastic.set(width, depth)
        of_teacher.set(width if stage.endswith("match") else 1.0)
        with torch.no_grad():
            target = teacher(**inputs_of(o), output_hidden_states=True)
        output = student(**inputs_of(o), output_hidden_states=True)
        kept = elastic.masks(width, depth).layers.nonzero().flatten().tolist()
        pairs = [(i, int(j / depth)) for j, i in enumerate(kept)] + [(-1, -1)]
        of_logits = -(target.logits.softmax(-1) * output.logits.log_softmax(-1)).sum(-1).mean()
        of_states = sum(nn.functional.mse_loss(output.hidden_states[i], target.hidden_states[j]) for i, j in pairs)
        loss = hyper["lambda1"] * of_logits + hyper["lambda2"] * of_states
        agree(torch.stack((loss, of_logits, torch.as_tensor(of_states))), row[:3], 1e-10)
        loss.backward()
    gradients = {name.removeprefix("grad."): x for name, x in o.items() if name.startswith("grad.")}
    assert len(gradients) == 12
    for name, gradient in gradients.items():
        agree(student.get_parameter(name).grad, gradient, 1e-9)


# ---- every architecture ----
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_outputs_and_gradients_are_those_with_dead_parts_set_to_zero(name: str) -> None:
    model = tiny_models.make(name)
    whole = tiny_models.make(name)
    batch, precision = tiny_models.batch(model), tolerance(name)
    with Elastic(model, WIDTHS, depths_of(name)) as elastic:
        for width, depth in elastic.subnetworks:
            elastic.set(width, depth)
            masks = elastic.masks(width, depth)
            with zero.zeroed(whole, masks):
                expected = zero.results(whole, batch)
            got = zero.results(model, batch)
            zero.same(got, expected, precision)
            for parameter, where in zero.dead(model, masks).items():
                assert not got[parameter][where].any(), parameter
            with torch.no_grad():
                exported = elastic.export(width, depth)(**batch).logits
            torch.testing.assert_close(exported, got["logits"], rtol=0, atol=10 * precision)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, whole(**batch).logits)


@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2", "llama", "mpnet"])
def test_gradients_of_subnetworks_add_up(name: str) -> None:
    """Into gradients that are there, and NaN of what is left out reaches none."""
    model = tiny_models.make(name)
    batch = tiny_models.batch(model)
    elastic = Elastic(model, (0.25, 0.5), (2 / 3,))
    of_one = []
    for width, depth in elastic.subnetworks:
        elastic.set(width, depth)
        of_one.append(zero.results(model, batch))
    dead = zero.dead(model, elastic.masks(0.5, 2 / 3))
    with torch.no_grad():
        for parameter, where in dead.items():
            model.get_parameter(parameter)[where] = torch.nan
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: x.grad for name, x in model.named_parameters()}
    for width, depth in elastic.subnetworks:
        elastic.set(width, depth)
        logits = model(**batch).logits
        generator = torch.Generator().manual_seed(3)
        (logits * torch.randn(logits.shape, generator=generator).to(logits)).sum().backward()
    after = {name: x.grad for name, x in model.named_parameters()}
    assert all(after[name] is before[name] for name in before)
    zero.same(
        {"logits": of_one[0]["logits"]} | after,
        {"logits": of_one[0]["logits"]} | {name: of_one[0][name] + of_one[1][name] for name in after},
        1e-13,
    )
    for parameter, where in dead.items():
        assert not after[parameter][where].any(), parameter


def test_layers_that_are_left_out_get_no_gradient() -> None:
    model = tiny_models.make("bert", kind=transformers.AutoModel)
    elastic = Elastic(model, (0.5,), (2 / 3,))
    elastic.set(0.5, 2 / 3)
    model(**tiny_models.batch(model)).last_hidden_state.square().sum().backward()
    assert all(x.grad is None for x in model.encoder.layer[2].parameters())
    assert all(x.grad is not None for x in model.encoder.layer[1].parameters())
    model.requires_grad_(False)
    assert not model(**tiny_models.batch(model)).last_hidden_state.requires_grad


def test_generation_with_a_cache_and_without_the_first_layer() -> None:
    model = tiny_models.make("qwen2", num_hidden_layers=4)
    elastic = Elastic(model, (0.5,), (0.5,), keep_last=True)
    elastic.set(0.5, 0.5)
    assert elastic.masks(0.5, 0.5).layers.tolist() == [False, True, False, True]
    batch = {name: x[:1] for name, x in tiny_models.batch(model).items()}
    with_cache, without = (
        model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=use, eos_token_id=None)
        for use in (True, False)
    )
    assert torch.equal(with_cache, without)
    exported = elastic.export(0.5, 0.5)
    assert torch.equal(exported.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None), without)


# ---- in training ----
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_bfloat16_and_autocast(name: str) -> None:
    model = tiny_models.make(name).float()
    batch, half = tiny_models.batch(model), copy.deepcopy(model).bfloat16()
    for net, dtype in ((model, torch.float32), (half, torch.bfloat16)):
        elastic = Elastic(net, (0.5,), (2 / 3,))
        elastic.set(0.5, 2 / 3)
        with torch.autocast("cpu", torch.bfloat16, enabled=net is model):
            got = zero.results(net, batch)
            with torch.no_grad():
                exported = elastic.export(0.5, 2 / 3)(**batch).logits
        elastic.close()
        torch.testing.assert_close(got["logits"], exported, rtol=0.05, atol=0.05)
        assert all(x.dtype is dtype for n, x in got.items() if n != "logits")
        assert any(x.any() for n, x in got.items() if n != "logits")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model = tiny_models.make(name)
    batch = tiny_models.batch(model)
    elastic = Elastic(model, (0.5,), (2 / 3,))
    elastic.set(0.5, 2 / 3)
    expected = zero.results(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    zero.same(zero.results(model, batch), expected, 1e-13)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_compiled_models(name: str) -> None:
    """`set` after the compilation is seen."""
    torch._dynamo.reset()
    model = tiny_models.make(name, num_hidden_layers=2)
    batch = tiny_models.batch(model)
    elastic = Elastic(model, (0.5,), (0.5,))
    compiled: Any = torch.compile(model, backend="aot_eager" if name == "bert" else "eager", fullgraph=name == "bert")
    for width, depth in [(0.5, 0.5), (1.0, 1.0)]:
        elastic.set(width, depth)
        expected = zero.results(model, batch)
        got = zero.results(compiled, batch)
        zero.same({n.removeprefix("_orig_mod."): x for n, x in got.items()}, expected, 1e-12)


def test_models_that_were_compiled_before() -> None:
    torch._dynamo.reset()
    expected = tiny_models.make("bert", num_hidden_layers=2)
    batch = tiny_models.batch(expected)
    of_expected = Elastic(expected, (0.5,), (0.5,))
    for how in ("in place", "layers", "wrapped layers"):
        model = tiny_models.make("bert", num_hidden_layers=2)
        layers = model.bert.encoder.layer
        if how == "in place":
            model.compile(backend="eager")
        for i, layer in enumerate(layers):
            if how == "layers":
                layer.compile(backend="eager")
            elif how == "wrapped layers":
                layers[i] = torch.compile(layer, backend="eager")
        with torch.no_grad():
            whole = model(**batch).logits
            with Elastic(model, (0.5,), (0.5,)) as elastic:
                elastic.set(0.5, 0.5)
                of_expected.set(0.5, 0.5)
                torch.testing.assert_close(model(**batch).logits, expected(**batch).logits, rtol=0, atol=1e-13)
            assert torch.equal(model(**batch).logits, whole)


# ---- the model itself ----
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_close_gives_the_model_back(name: str) -> None:
    model = tiny_models.make(name)
    names, parameters, before = [*model.state_dict()], [*model.parameters()], seen(model)
    elastic = Elastic(model, WIDTHS, depths_of(name))
    elastic.set(0.25)
    assert [*model.state_dict()] == names
    elastic.close()
    elastic.close()
    assert seen(model) == before
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    with pytest.raises(ValueError, match=r"width: expected an Elastic that is not closed, got 0\.25"):
        elastic.set(0.25)


def seen(model: nn.Module) -> list[Any]:
    plain = (int, float, str, tuple, type(None))
    return [
        (type(module), {name: x for name, x in vars(module).items() if isinstance(x, plain)})
        for module in model.modules()
    ]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_copies_and_files(name: str, tmp_path: Path) -> None:
    """A copy stays the sub-network that the model was; a file has all weights; an export is a plain model."""
    model = tiny_models.make(name)
    batch = tiny_models.batch(model)
    with torch.no_grad():
        whole = model(**batch).logits
        elastic = Elastic(model, (0.5,), (2 / 3,))
        elastic.set(0.5, 2 / 3)
        half = model(**batch).logits
        other = copy.deepcopy(model)
        elastic.set()
        assert torch.equal(model(**batch).logits, whole)
        assert torch.equal(other(**batch).logits, half)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(other(**batch).logits, half)  # weights of its own
        other.save_pretrained(tmp_path / "whole")
        loaded = type(other).from_pretrained(tmp_path / "whole").double()
        assert torch.equal(loaded(**batch).logits, whole)
        Elastic(loaded, (0.5,), (2 / 3,)).export(0.5, 2 / 3).save_pretrained(tmp_path / "half")
        small = type(other).from_pretrained(tmp_path / "half").double()
        torch.testing.assert_close(small(**batch).logits, half, rtol=0, atol=1e-13)


# ---- errors ----
def test_errors() -> None:
    model: Any = tiny_models.make("bert")
    albert: Any = tiny_models.make("albert")
    given: Any
    for net, given, message in [
        (model, {"widths": (0.5, 1.5)}, r"widths: expected a number above 0 and up to 1, got 1\.5"),
        (model, {"widths": ()}, r"widths: expected at least one, got none"),
        (model, {"depths": (0.1,)}, r"depths: expected shares that leave one of 3 layers, got 0\.1"),
        (albert, {"depths": (0.5,)}, r"depths: expected 1 for ALBERT, whose layers share their weights, got 0\.5"),
    ]:
        with pytest.raises(ValueError, match=rf"^kdfast\.elastic\.Elastic: {message}$"):
            Elastic(net, **{"widths": (0.5,), **given})
    with pytest.raises(TypeError, match=r"^kdfast\.elastic\.Elastic: widths: expected a number .*, got str"):
        Elastic(model, ("half",))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^kdfast\.elastic\.Elastic: "):
        Elastic(nn.Linear(2, 2), (0.5,))
    elastic = Elastic(model, (0.5,))
    for net in (model, masked()):
        with pytest.raises(
            ValueError, match=r"model: expected one without masks, got one that has some, or an open Elastic; .*"
        ):
            Elastic(net, (0.5,))
    for argument, call in [("width: expected one of 0.5, 1.0", (0.75,)), ("depth: expected one of 1.0", (0.5, 0.5))]:
        for method in (elastic.set, elastic.masks, elastic.export):
            with pytest.raises(ValueError, match=rf"^kdfast\.elastic\.Elastic: {argument}, got {call[-1]}"):
                method(*call)
    uneven = tiny_models.make("llama")
    masks = Masks.full(uneven)
    masks.heads[1][0] = False
    with pytest.raises(ValueError, match=r"model: model\.layers\.1: expected heads, as many for each group"):
        Elastic(kdfast.prune.compact(uneven, masks), (0.5,))
    replaced = tiny_models.make("bert")
    replaced.bert.encoder.layer[1].output.dense = nn.Sequential(replaced.bert.encoder.layer[1].output.dense)
    message = r"model: bert\.encoder\.layer\.1\.output\.dense: expected nn\.Linear or Conv1D, .*, got Sequential"
    with pytest.raises(TypeError, match=message):
        Elastic(replaced, (0.5,))
    hooked = tiny_models.make("bert")
    linear = hooked.bert.encoder.layer[1].output.dense
    linear.forward = linear.forward
    with pytest.raises(
        ValueError, match=r"output\.dense: expected the forward of its class, got one that was set on it"
    ):
        Elastic(hooked, (0.5,))


def masked() -> Any:
    model = tiny_models.make("bert")
    masks = Masks.full(model)
    masks.heads[0][0] = False
    apply(model, masks)
    return model
