"""Readers of architectures that no table names, and of those read by hooks: what is read is what the models computed."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from test_architectures import WITHOUT_IDS, inputs_of, model_of
from torch import Tensor

from kdfast import hf
from kdfast.objective import Attention, Relations, Terms

CAUSAL = ("gpt2", "gptj", "phi", "gpt_neox", "opt", "gemma2", "gemma3_text", "cohere", "granite")
OTHERS = (
    "ernie",
    "esm",
    "megatron-bert",
    "rembert",
    "deberta-v2",
    "t5",
    "bart",
    "beit",
    "siglip_vision_model",
    "whisper",
)
assert not {*CAUSAL, *OTHERS} & hf.ADAPTERS.keys() - {"megatron-bert", "rembert", "deberta-v2"}


def shown(features: hf.Features, length: int) -> Tensor:
    """[B, 1, L, L]: which keys a query sees."""
    rows = len(features.hidden[-1])
    mask = torch.ones(rows, length, dtype=torch.bool) if features.mask is None else features.mask
    seen = mask[:, None, None].expand(-1, -1, length, -1)
    return seen.tril() if features.causal else seen


@pytest.mark.parametrize("name", [*CAUSAL, *OTHERS])
@torch.no_grad()
def test_softmax_of_the_scores_is_the_attention(name: str) -> None:
    model = model_of(name)
    inputs = inputs_of(model)
    before, implementation = model(**inputs)[0], model.config._attn_implementation
    with hf.Reader(model, bias=True) as reader:
        features = reader(**inputs)
    assert torch.equal(features.outputs[0], before)
    assert torch.equal(model(**inputs)[0], before)
    assert model.config._attn_implementation == implementation
    assert features.causal == (name in CAUSAL)
    assert features.softcap == (2.0 if name == "gemma2" else None)
    assert len(features.bias) == (2 if name in ("deberta-v2", "t5") else 0)
    model.set_attn_implementation("eager")
    outputs = model(**inputs, output_attentions=True, output_hidden_states=True)
    of_encoder = "encoder_attentions" in outputs
    expected = outputs.encoder_attentions if of_encoder else outputs.attentions
    states = outputs.encoder_hidden_states if of_encoder else outputs.hidden_states
    assert len(features.hidden) == len(states)
    for a, b in zip(features.hidden, states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for scores, probabilities in zip(features.scores, expected, strict=True):
        seen = shown(features, scores.shape[-1])
        got = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        counts = seen[:, :, -1].expand(-1, scores.shape[1], -1)  # of queries that are no padding
        torch.testing.assert_close(got[counts], probabilities[counts], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", [name for name in (*CAUSAL, *OTHERS, "gpt_oss", "mixtral", "mpnet") if name not in WITHOUT_IDS]
)
@torch.no_grad()
def test_causal_models_are_known_as_such(name: str) -> None:
    """Whether the first states depend on the last token, which the attention modules' `is_causal` is believed about."""
    model = model_of(name)
    inputs = inputs_of(model)
    other = inputs | {"input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, -1] = 30
    with hf.Reader(model) as reader:
        features, changed = reader(**inputs), reader(**other).hidden[-1]
    same = torch.allclose(changed[0, :-1], features.hidden[-1][0, :-1], atol=1e-5)
    assert features.causal == same
    assert Terms(a=Attention()).for_student(model).terms["a"].causal == same
    if same:
        assert features.cls_index.tolist() == [8, 5, 8]
    else:
        assert features.cls_index == 0


def test_first_tokens_of_unknown_causal_models_are_not_their_sequences() -> None:
    model = model_of("gpt2")
    assert hf.read_hidden(model, **inputs_of(model)).cls_index.tolist() == [8, 5, 8]


def test_scales_of_layers_differ() -> None:
    """GPT-2 that divides by the number of a layer: the second's queries are halved."""
    model = model_of("gpt2")
    inputs = inputs_of(model)
    qs: list[Tensor] = []
    handle = model.h[1].attn.c_attn.register_forward_hook(lambda _, args, output: qs.append(output[..., :32]))
    with torch.no_grad(), hf.Reader(model) as reader:
        features = reader(**inputs)
    handle.remove()
    torch.testing.assert_close(features.q[1], qs[0].view(3, 9, 4, 8).transpose(1, 2) / 2)


@pytest.mark.parametrize("name", ["bert", "gpt2", "deberta-v2", "t5"])
def test_adapters_of_peft(name: str) -> None:
    """A student with LoRA has the value of the merged model, and gradients in its adapters alone."""
    student, teacher = model_of(name), model_of(name, seed=1)
    targets = {
        "bert": ["query", "value"],
        "gpt2": ["c_attn"],
        "deberta-v2": ["query_proj", "value_proj"],
        "t5": ["q", "v"],
    }
    config = peft.LoraConfig(r=2, target_modules=targets[name], lora_dropout=0.0, init_lora_weights=False)
    adapted = peft.get_peft_model(student, config)
    inputs = inputs_of(teacher)
    terms = Terms(attention=Attention({-1: -1, 1: 1}), relations=Relations(relations=("qq", "vv"))).for_student(adapted)
    with torch.no_grad():
        of_teacher = terms.run(teacher, inputs)
    values = terms(terms.run(adapted, inputs), of_teacher, inputs)
    sum(values.values()).backward()
    trained = {key for key, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained
    assert all("lora_" in key for key in trained)
    merged = adapted.merge_and_unload()
    for key, value in terms(terms.run(merged, inputs), of_teacher, inputs).items():
        torch.testing.assert_close(value, values[key], rtol=1e-3, atol=1e-5)


def test_what_is_read_of_encoder_decoders_is_the_encoder() -> None:
    model = model_of("bart", decoder_layers=3)
    with torch.no_grad(), hf.Reader(model) as reader:
        features = reader(**inputs_of(model))
    assert len(features.q) == len(features.hidden) - 1 == 2
    assert {q.shape for q in features.q} == {(3, 4, 9, 8)}
    assert torch.equal(features.hidden[-1], features.outputs.encoder_last_hidden_state)


@pytest.mark.parametrize(
    ("name", "got"),
    [
        ("bloom", "got 'bloom'; to read it: kdfast.hf.register"),
        ("mamba", "got 0 calls for 2 layers of 'mamba'; to read it"),
        ("swin", "got queries or keys of other tokens of 'swin'; to read it"),
    ],
)
def test_what_does_not_go_through_the_interface_is_refused(name: str, got: str) -> None:
    model = model_of(name)
    implementation = model.config._attn_implementation
    with pytest.raises(
        ValueError, match=r"expected one that calls its attention through .* in each of its layers, " + got
    ):
        hf.Reader(model)(**inputs_of(model))
    assert model.config._attn_implementation.removeprefix("kdfast_") == implementation


def test_eager_attention_of_a_class_of_ones_own() -> None:
    """It is looked for beside the class that it was derived from."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention

    class Own(Gemma2Attention):  # type: ignore[misc]
        pass

    model: Any = model_of("gemma2")
    inputs = inputs_of(model)
    expected = model(**inputs)[0]
    for layer in model.layers:
        layer.self_attn.__class__ = Own
    assert model.config._attn_implementation == "eager"
    with hf.Reader(model) as reader:
        assert torch.equal(reader(**inputs).outputs[0], expected)
