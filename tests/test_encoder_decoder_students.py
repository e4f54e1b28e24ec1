"""Students of some of an encoder's and some of a decoder's layers compute what these do, and are saved as such."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_pairs import bart, initialised, t5
from torch import Tensor, nn

from kdfast import hf, students

LAYERS = 4
SIZES: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "decoder_start_token_id": 2, "pad_token_id": 1}
SIDES: dict[str, Any] = {
    f"{side}_{what}": n
    for side in ("encoder", "decoder")
    for what, n in (("layers", LAYERS), ("ffn_dim", 48), ("attention_heads", 4))
}
T5_SIZES: dict[str, Any] = {"d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": LAYERS}
OTHERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("mbart", "m2m_100", "pegasus", "blenderbot"), SIZES | SIDES | {"forced_eos_token_id": None}),
    "marian": SIZES | SIDES | {"decoder_start_token_id": 1, "forced_eos_token_id": None},
    "led": SIZES | SIDES | {"attention_window": [4, 8, 4, 8], "max_encoder_position_embeddings": 64},
    **dict.fromkeys(("mt5", "umt5", "longt5"), SIZES | T5_SIZES),
}
KINDS = ("t5", "t5, untied", "bart", *OTHERS)


def model_of(kind: str) -> Any:
    if kind == "bart":
        return bart(0, LAYERS)
    if kind.startswith("t5"):
        return t5(0, LAYERS, tie_word_embeddings=kind == "t5")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **OTHERS[kind])
    return initialised(transformers.AutoModelForSeq2SeqLM.from_config(config), 0.2)


@torch.no_grad()
def output(model: Any) -> Tensor:
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    logits: Tensor = model.eval()(ids, mask, decoder_input_ids=ids[:, :5], use_cache=False).logits
    return logits


def layers_of(model: Any, side: str) -> tuple[str, Any]:
    name = "block" if hasattr(model.base_model.encoder, "block") else "layers"
    return name, getattr(getattr(model.base_model, side), name)


def with_layers(teacher: Any, chosen: dict[str, list[int]]) -> Any:
    """A copy with all but these layers taken out by hand; T5's biases of distances stay with each side's first."""
    model = copy.deepcopy(teacher)
    for side, numbers in chosen.items():
        name, every = layers_of(model, side)
        kept = [copy.deepcopy(every[i]) for i in numbers]
        first = every[0]
        setattr(getattr(model.base_model, side), name, nn.ModuleList(kept))
        if name == "block" and model.config.model_type != "umt5":  # whose layers have one each
            attention = next(m for m in first.modules() if hasattr(m, "relative_attention_bias"))
            for place, layer in enumerate(kept):
                its = next(m for m in layer.modules() if hasattr(m, "has_relative_attention_bias"))
                its.has_relative_attention_bias = place == 0
                if place == 0:
                    its.relative_attention_bias = attention.relative_attention_bias
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_layers_compute_what_they_did(kind: str, tmp_path: Path) -> None:
    teacher = model_of(kind)
    before = output(teacher)
    assert torch.equal(output(students.from_layers(teacher, range(LAYERS))), before)
    chosen = {"encoder": [2, 0, 3], "decoder": [3, 1]}
    student = students.from_layers(teacher, chosen["encoder"], decoder_layers=chosen["decoder"])
    assert [len(layers_of(student, side)[1]) for side in chosen] == [3, 2]
    torch.testing.assert_close(output(student), output(with_layers(teacher, chosen)), rtol=0, atol=0)
    assert not torch.equal(output(student), before)
    assert torch.equal(output(teacher), before)
    student.save_pretrained(tmp_path)
    assert torch.equal(output(type(student).from_pretrained(tmp_path)), output(student))
    words = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert words == (teacher.get_output_embeddings().weight is teacher.get_input_embeddings().weight)


def test_both_sides_have_the_same_layers_by_default() -> None:
    teacher = model_of("bart")
    once, twice = (students.from_layers(teacher, [0, 3], decoder_layers=of) for of in (None, [0, 3]))
    assert torch.equal(output(once), output(twice))
    assert (once.config.encoder_layers, once.config.decoder_layers) == (2, 2)
    student = students.from_layers(t5(0, 2, num_decoder_layers=4), [1], decoder_layers=[3])
    assert (student.config.num_layers, student.config.num_decoder_layers) == (1, 1)


def test_encoder_of_t5_alone() -> None:
    """Its later layers know distances by what the first has."""
    teacher = initialised(transformers.T5EncoderModel(model_of("t5").config), 0.2)
    student = students.from_layers(teacher, [3])
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(student.state_dict()[bias], teacher.state_dict()[bias])
    query = "encoder.block.{}.layer.0.SelfAttention.q.weight"
    assert torch.equal(student.state_dict()[query.format(0)], teacher.state_dict()[query.format(3)])


def test_teacher_in_use_stays_as_it_is() -> None:
    teacher = model_of("bart").requires_grad_(False)
    with hf.Reader(teacher):
        student = students.from_layers(teacher, [1], dropout=0)
    assert all(p.requires_grad for p in student.parameters())
    assert "kdfast" not in student.config._attn_implementation
    assert torch.equal(output(student.train()), output(student))


def test_wrong_layers() -> None:
    teacher = model_of("t5")
    for wrong in ((), (0, 4)):
        with pytest.raises(ValueError, match=r"from_layers: decoder_layers: expected numbers from 0 to 3, got \["):
            students.from_layers(teacher, [0], decoder_layers=wrong)
        with pytest.raises(ValueError, match=r"from_layers: layers: expected numbers from 0 to 3, got \["):
            students.from_layers(teacher, wrong, decoder_layers=[0])
    bert = transformers.BertModel(
        transformers.BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=60)
    )
    with pytest.raises(ValueError, match=r"decoder_layers: expected none but of an encoder-decoder, got \[0\] beside"):
        students.from_layers(bert, [0], decoder_layers=[0])
    two = transformers.EncoderDecoderModel(encoder=bert, decoder=transformers.BertLMHeadModel(bert.config))
    with pytest.raises(ValueError, match=r"teacher: expected one list of its 0 layers, got .* in EncoderDecoderModel"):
        students.from_layers(two, [0])


def test_layers_that_are_not_alike() -> None:
    """Every second one has experts: no dense one of the teacher's is copied into such a place."""
    config = transformers.SwitchTransformersConfig(
        **SIZES, **T5_SIZES, num_experts=2, expert_capacity=8, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2
    )
    teacher = transformers.SwitchTransformersForConditionalGeneration(config)
    with pytest.raises(ValueError, match="expected the parameters that SwitchTransformersForConditionalGeneration"):
        students.from_layers(teacher, [0, 2])
