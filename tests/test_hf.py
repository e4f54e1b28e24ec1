"""Readers of transformers models: what they read is what the models computed, and the models stay what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import kdfast
from kdfast import hf

SMALL: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
BERT: dict[str, Any] = SMALL | {"intermediate_size": 48}
LLAMA = BERT | {"num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": BERT | {"pad_token_id": 1},
    "electra": BERT | {"embedding_size": 32},
    "albert": BERT | {"embedding_size": 16},
    "modernbert": BERT
    | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "distilbert": {"vocab_size": 60, "dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 48},
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mpnet": BERT | {"pad_token_id": 1},
    "xlnet": {"vocab_size": 60, "d_model": 32, "n_head": 4, "n_layer": 2, "d_inner": 48},
}
EVERY = pytest.mark.parametrize("name", CONFIGS)
ENCODERS = ("bert", "roberta", "electra", "distilbert", "mpnet", "xlnet")


def model_of(name: str, attention: str | None = "sdpa") -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **CONFIGS[name])
    own = {} if name in ("mpnet", "xlnet") or attention is None else {"attn_implementation": attention}
    model = transformers.AutoModel.from_config(config, **own).eval()
    if name == "xlnet":
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)  # its biases begin as zeros
    return model


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@EVERY
def test_outputs_stay_bit_equal(name: str) -> None:
    model, inputs = model_of(name), batch()
    before = model(**inputs, output_hidden_states=True)
    with hf.Reader(model) as reader:
        features = reader(**inputs)
    after = model(**inputs)
    for other in (features.outputs.last_hidden_state, after.last_hidden_state):
        assert torch.equal(before.last_hidden_state, other)
    assert len(features.hidden) == 3
    for a, b in zip(features.hidden, before.hidden_states, strict=True):
        assert torch.equal(a, b)
    shape = (3, 4, 9, 8)
    heads = 2 if name in ("llama", "qwen2", "qwen3") else 4
    assert [tuple(q.shape) for q in features.q] == [shape] * 2
    assert [tuple(k.shape) for k in features.k + features.v] == [(3, heads, 9, 8)] * 4
    assert torch.equal(features.mask, inputs["attention_mask"].bool())  # type: ignore[arg-type]
    assert features.causal == (heads == 2)


@EVERY
def test_softmax_of_the_scores_is_the_attention(name: str) -> None:
    """Eager attention returns probabilities: those of the scores that queries, keys, scale and bias make."""
    model, inputs = model_of(name), batch()
    with torch.no_grad():
        with hf.Reader(model, bias=True) as reader:
            features = reader(**inputs)
        if name not in ("mpnet", "xlnet"):
            model.set_attn_implementation("eager")
        expected = model(**inputs, output_attentions=True).attentions
    for scores, probabilities in zip(features.scores, expected, strict=True):
        shown = inputs["attention_mask"].bool()[:, None, None].expand(-1, -1, 9, -1)
        if features.causal:
            shown = shown.tril()
        got = scores.masked_fill(~shown, -torch.inf).softmax(-1)
        rows = inputs["attention_mask"].bool()[:, None].expand(-1, 4, -1)
        if name == "xlnet":
            probabilities = probabilities.reshape(got.shape)
        torch.testing.assert_close(got[rows], probabilities[rows], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("how", "name"),
    [("checkpointed", "bert"), ("checkpointed", "llama")]  # transformers' MPNet has no checkpoints
    + [(how, name) for how in ("compiled", "ddp") for name in ("bert", "llama", "mpnet")],
)
def test_wrapped_models(name: str, how: str, tmp_path: Path) -> None:
    """Same losses and gradients of the parameters, one entry per layer."""

    def gradients(wrap: Any) -> tuple[Tensor, list[Tensor]]:
        model = model_of(name).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if how == "checkpointed" and wrap is not None:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        reader = hf.Reader(model if wrap is None else wrap(model))
        s = reader(**batch())
        assert len(s.q) == len(s.k) == len(s.v) == 2
        loss = kdfast.qk_attention_mse(s.q, s.k, [q + 1 for q in s.q], s.k, key_mask=s.mask, is_causal=s.causal)
        loss = loss + s.outputs.last_hidden_state.square().mean()
        loss.backward()
        assert len(s.q) == 2
        # A graph that was compiled as a whole gives zeros to what the loss does not need.
        return loss.detach(), [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]

    wraps = {
        "checkpointed": lambda model: model,
        "compiled": lambda model: torch.compile(model, backend="aot_eager"),
        "ddp": nn.parallel.DistributedDataParallel,
    }
    if how == "ddp":
        store = f"file://{tmp_path}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        got, expected = gradients(wraps[how]), gradients(None)
    finally:
        if how == "ddp":
            torch.distributed.destroy_process_group()
    torch.testing.assert_close(got[0], expected[0])
    for a, b in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(a, b)
    assert any(gradient.any() for gradient in got[1])


def test_reentrant_checkpoints_are_refused() -> None:
    model = model_of("bert").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="expected use_reentrant=False"):
        hf.Reader(model)(**batch())


def test_a_second_reader_takes_the_place_of_the_first() -> None:
    model = model_of("bert")
    first = hf.Reader(model)
    second = hf.Reader(model)
    assert len(second(**batch()).q) == 2
    with pytest.raises(RuntimeError, match="this one was closed"):
        first(**batch())
    first.close()
    assert len(second(**batch()).q) == 2
    second.close()
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="output_attentions: expected none"):
        hf.Reader(model)(**batch(), output_attentions=True)


def test_cls_index() -> None:
    assert hf.Reader(model_of("bert"))(**batch()).cls_index == 0
    assert hf.Reader(model_of("xlnet"))(**batch()).cls_index == -1
    last = hf.Reader(model_of("llama"))(**batch()).cls_index
    assert isinstance(last, Tensor)
    assert last.tolist() == [8, 5, 8]


def test_unknown_models_are_told_what_to_implement() -> None:
    config = transformers.AutoConfig.for_model("bloom", vocab_size=60, hidden_size=32, n_head=4, n_layer=2)
    model = transformers.AutoModel.from_config(config)
    with pytest.raises(ValueError, match=r"got 'bloom'; to read it: kdfast.hf.register\('bloom', kdfast.hf.Adapter"):
        hf.Reader(model)
    with pytest.raises(TypeError, match="expected a transformers model, got Linear"):
        hf.Reader(nn.Linear(2, 2))


def test_an_architecture_of_ones_own() -> None:
    """MegatronBERT, as if nothing were known of it."""
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model("megatron-bert", **BERT))
    known = hf.ADAPTERS.pop("megatron-bert")
    try:
        with pytest.raises(ValueError, match="got 'megatron-bert'; to read it"):
            hf.Reader(model)
        hf.register("megatron-bert", hf.Adapter(hf.through_projections("query", "key", "value"), cls_index=-1))
        features = hf.Reader(model)(**batch())
        assert len(features.q) == 2
        assert features.cls_index == -1
    finally:
        hf.ADAPTERS["megatron-bert"] = known


def test_features_feed_the_losses() -> None:
    """A step of TinyBERT and MiniLM between models of different depth, width and head size."""
    teacher, student = model_of("bert"), model_of("distilbert")
    s, t = hf.Reader(student)(**batch()), hf.Reader(teacher)(**batch())
    masks = {"key_mask": s.mask, "query_mask": s.mask}
    loss = (
        kdfast.qk_attention_mse(s.q, s.k, t.q, t.k, **masks)
        + kdfast.hidden_mse(s.hidden, t.hidden, mask=s.mask)
        + kdfast.cls_distance(s.hidden[1:], t.hidden[1:], token_index=s.cls_index)
        + kdfast.qk_relation_kl(s.v[-1], s.v[-1], t.v[-1], t.v[-1], relation_heads=8, **masks)
        + kdfast.attention_mse(s.scores, t.scores, **masks)
    )
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in student.named_parameters() if "q_lin.weight" in n)
    assert all(p.grad is None for p in teacher.parameters())
