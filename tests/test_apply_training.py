"""Masked models in training: optimizers, checkpoints, dropout, checkpointed layers, adapters, `torch.compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pruning_oracle as oracle
import pytest
import tiny_models
import torch
import transformers
from torch import Tensor, nn

from kdfast.prune import Masks, apply, remove


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    batch = tiny_models.batch(model, seed=seed)
    logits = model(**batch).logits
    target = torch.randint(logits.shape[-1], logits.shape[:-1], generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten()).backward()
    optimizer.step()


# ---- optimizers and checkpoints ----
@pytest.mark.parametrize(("name", "set_to_none"), [("bert", True), ("bert", False), ("gpt2", True), ("llama", False)])
def test_a_hundred_steps_leave_dead_weights_as_they_are(name: str, set_to_none: bool) -> None:
    """Zeros stay zero with weight decay, others what they were without; with `.grad` kept, its live part is added to."""
    model = tiny_models.make(name, dropout=0.1).float().train()
    masks = oracle.patterns(model)["some"]
    dead = oracle.dead(model, masks)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for i, (parameter, where) in enumerate(dead.items()):
            if i % 2:
                parameters[parameter][where] = 0
    before = {parameter: x.detach().clone() for parameter, x in parameters.items()}
    groups = [
        {"params": [parameters[parameter] for parameter in [*dead][1::2]], "weight_decay": 0.1},
        {"params": [parameters[parameter] for parameter in [*dead][::2]], "weight_decay": 0.0},
        {"params": [x for parameter, x in parameters.items() if parameter not in dead]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    if not set_to_none:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.zero_grad = lambda: torch.optim.AdamW.zero_grad(optimizer, set_to_none=False)  # type: ignore[method-assign, misc]
    apply(model, masks)
    for i in range(100):
        step(model, optimizer, i)
    assert len(dead) > 10
    for parameter, x in parameters.items():
        where = dead.get(parameter, torch.zeros_like(x, dtype=torch.bool))
        assert torch.equal(x[where], before[parameter][where]), parameter
        assert (x[~where] != before[parameter][~where]).float().mean() > 0.5, parameter


@pytest.mark.parametrize("name", ["albert", "mpnet", "qwen3"])
def test_a_run_that_is_resumed_is_the_one_that_was_not_interrupted(name: str, tmp_path: Path) -> None:
    """Masks change at steps 2 and 7, the run stops after step 4; weights, optimizer, masks and random state are kept."""
    patterns = {2: "some", 7: "empty"}

    def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
        model.train()
        for i in steps:
            if i in patterns:
                apply(model, oracle.patterns(model)[patterns[i]])
            step(model, optimizer, i)

    def start(model: Any) -> tuple[Any, torch.optim.Optimizer]:
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    model, optimizer = start(tiny_models.make(name, dropout=0.1).float())
    torch.manual_seed(4)
    train(model, optimizer, range(5))
    model.save_pretrained(tmp_path)
    (tmp_path / "masks.json").write_text(oracle.patterns(model)["some"].to_json())
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    state = torch.get_rng_state()
    train(model, optimizer, range(5, 10))

    again, optimizer = start(type(model).from_pretrained(tmp_path))
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    apply(again, Masks.from_json((tmp_path / "masks.json").read_text()))
    torch.set_rng_state(state)
    train(again, optimizer, range(5, 10))
    for (parameter, x), y in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(x, y), parameter


# ---- what changes a forward pass ----
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2", "llama"])
def test_checkpointed_layers(name: str, reentrant: bool) -> None:
    model = tiny_models.make(name)
    batch, patterns = tiny_models.batch(model), oracle.patterns(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    for masks in patterns.values():
        remove(model)
        with oracle.zeroed(model, masks):
            expected = oracle.results(model, batch)
        apply(model, masks)
        oracle.same(oracle.results(model, batch), expected, 1e-13)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_dropout_of_hidden_states_is_that_of_the_whole_model(name: str) -> None:
    attention = {"bert": "attention_probs_dropout_prob", "gpt2": "attn_pdrop"}[name]
    model = tiny_models.make(name, dropout=0.3, **{attention: 0.0}).train()
    batch, masks = tiny_models.batch(model), oracle.patterns(model)["some"]
    torch.manual_seed(6)
    with oracle.zeroed(model, masks):
        expected = oracle.results(model, batch)
    apply(model, masks)
    torch.manual_seed(6)
    oracle.same(oracle.results(model, batch), expected, 1e-13)


def test_masks_that_are_applied_in_inference_mode_train() -> None:
    model = tiny_models.make("llama")
    batch, masks = tiny_models.batch(model), oracle.patterns(model)["some"]
    with torch.inference_mode():
        apply(model, masks.copy())
        model(**batch)
    got = oracle.results(model, batch)
    remove(model)
    with oracle.zeroed(model, masks):
        oracle.same(got, oracle.results(model, batch), 1e-13)


def test_a_decoder_with_cross_attention_and_a_cache() -> None:
    """Masks are of the heads that look at the model's own tokens; those that look at an encoder's stay."""
    model = tiny_models.make("bert", kind=transformers.AutoModelForCausalLM, is_decoder=True, add_cross_attention=True)
    ids = tiny_models.batch(model, rows=1)["input_ids"]
    encoded = torch.randn(1, 5, 48, dtype=torch.float64)

    def logits() -> Tensor:
        first = model(ids[:, :4], encoder_hidden_states=encoded, use_cache=True)
        then = model(ids[:, 4:], encoder_hidden_states=encoded, past_key_values=first.past_key_values)
        return torch.cat([first.logits, then.logits], 1)

    for masks in oracle.patterns(model).values():
        remove(model)
        with oracle.zeroed(model, masks):
            expected = logits()
        apply(model, masks)
        torch.testing.assert_close(logits(), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model(ids, encoder_hidden_states=encoded).logits, expected, rtol=1e-12, atol=1e-12)


# ---- adapters ----
def adapted(name: str, model: Any) -> Any:
    targets = {
        "bert": ["query", "key", "value", "dense"],
        "gpt2": ["c_attn", "c_proj", "c_fc"],
        "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    }[name]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=name == "gpt2")
    torch.manual_seed(2)
    return peft.get_peft_model(model, config).double().eval()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_adapters_of_peft_are_masked_with_what_they_adapt(name: str) -> None:
    batch, masks = tiny_models.batch(model := tiny_models.make(name)), oracle.patterns(model)["some"]
    model = adapted(name, model)
    whole = oracle.results(model, batch)
    with oracle.zeroed(model, masks):
        expected = oracle.results(model, batch)
    assert any("lora_B" in parameter and x.any() for parameter, x in expected.items())
    apply(model, masks)
    oracle.same(oracle.results(model, batch), expected, 1e-13)
    model.add_adapter("other", model.peft_config["default"])
    model.double().set_adapter("other")
    apply(model, masks)
    assert (model(**batch).logits - expected["logits"]).abs().max() > 1e-3
    model.set_adapter("default")

    later = tiny_models.make(name)
    apply(later, masks)
    later = adapted(name, later)
    apply(later, masks)
    oracle.same(oracle.results(later, batch), expected, 1e-13)
    merged = later.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, expected["logits"], rtol=1e-12, atol=1e-12)
    remove(merged)
    torch.testing.assert_close(merged(**batch).logits, whole["logits"], rtol=1e-12, atol=1e-12)


def test_an_adapter_that_computes_otherwise_is_refused() -> None:
    model = tiny_models.make("bert")
    config = peft.LoraConfig(r=2, target_modules=["query"], use_dora=True)
    model = peft.get_peft_model(model.float(), config)
    with pytest.raises(TypeError, match=r"LoRA of peft on one, as bert.*layer.0.attention.self.query, got Linear"):
        apply(model, oracle.patterns(model.get_base_model())["some"])


# ---- compiled ----
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_compiled_models(name: str) -> None:
    """Before masks and after, with other masks, and as they were."""
    model = tiny_models.make(name)
    batch, patterns = tiny_models.batch(model), oracle.patterns(model)
    whole = oracle.results(model, batch)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=name == "bert")
    names = {f"_orig_mod.{key}" if key != "logits" else key: key for key in whole}

    def results() -> dict[str, Tensor]:
        return {names[key]: x for key, x in oracle.results(compiled, batch).items()}

    oracle.same(results(), whole, 1e-13)
    for pattern in ("some", "empty"):
        apply(compiled, patterns[pattern])
        oracle.same(results(), oracle.results(model, batch), 1e-13)
        assert (compiled(**batch).logits - whole["logits"]).abs().max() > 1e-2
    remove(compiled)
    oracle.same(results(), whole, 1e-13)


def test_layers_that_were_compiled_by_themselves() -> None:
    model = tiny_models.make("bert")
    batch, masks = tiny_models.batch(model), oracle.patterns(model)["empty"]
    with oracle.zeroed(model, masks):
        expected = oracle.results(model, batch)
    layers = model.bert.encoder.layer
    layers[0].compile(backend="aot_eager")
    layers[2] = torch.compile(layers[2], backend="aot_eager")
    apply(model, masks)
    got = oracle.results(model, batch)
    oracle.same({name.replace("_orig_mod.", ""): x for name, x in got.items()}, expected, 1e-13)
