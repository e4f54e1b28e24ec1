"""What models do to the logits of their output embeddings is seen, and seen anew when it changes: the loss and its gradients
are those of plain torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from language_models import PAD, llama
from test_language_heads import IDS, adapted, agree
from torch import nn

from kdfast.models import last_hidden as module
from kdfast.models.finish import Finish, probes, seen
from kdfast.models.last_hidden import last_hidden

SMALL: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": PAD,
}


FINISHES: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.3},
    "gemma2": {"final_logit_softcapping": 0.7},
}


def of(name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    more = {"query_pre_attn_scalar": 8, "layer_types": ["full_attention"] * 2} if name == "gemma2" else {}
    config = transformers.AutoConfig.for_model(name, **SMALL | FINISHES[name] | more)
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("name", FINISHES)
def test_what_models_do_to_their_logits(name: str, lora: bool) -> None:
    student, teacher = of(name, 0), of(name, 1)
    agree(adapted(student) if lora else student, teacher)


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("name", FINISHES)
def test_numbers_that_change_are_seen(name: str, lora: bool) -> None:
    """Those of the model, of its config, and one that goes."""
    model, teacher = of(name, 0), of(name, 1)
    student = adapted(model) if lora else model
    agree(student, teacher)
    before = student(input_ids=IDS).logits
    if name == "cohere":
        model.logit_scale = 0.5
    elif name == "granite":
        model.config.logits_scaling = 1.5
    else:
        model.config.final_logit_softcapping = None
    after = student(input_ids=IDS).logits
    assert (after - before).abs().max() > 0.1
    agree(student, teacher)
    torch.testing.assert_close(last_hidden(student, input_ids=IDS).make_logits(), after, rtol=1e-4, atol=1e-5)


def test_a_model_that_stays_the_same_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking waits for the device."""
    looks = []
    monkeypatch.setattr(module, "seen", lambda *a, seen=module.seen: looks.append(1) or seen(*a))
    student = of("cohere", 0)
    for _ in range(3):
        last_hidden(student, input_ids=IDS).make_logits().sum().backward()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.sub_(parameter.grad, alpha=1e-3)
    assert len(looks) == 1
    student.config.logit_scale = 0.2  # nothing but the config's
    last_hidden(student, input_ids=IDS)
    assert len(looks) == 2


class Scaled(transformers.LlamaForCausalLM):
    """With a scale that is trained."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * self.scale
        return outputs


def test_what_is_neither_scale_nor_bias_nor_cap_is_refused() -> None:
    class Squared(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits**3
            return outputs

    for kind in (Squared, Scaled):
        model = kind(llama(0, 2).config).eval()
        with pytest.raises(
            ValueError, match=f"{kind.__name__}: expected logits that are those of its output embeddings"
        ):
            last_hidden(model, input_ids=IDS)
        assert model(input_ids=IDS).logits.shape == (*IDS.shape, 301)


def test_a_model_that_writes_to_its_logits() -> None:
    class Doubled(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits.mul_(2)
            return outputs

    model = Doubled(llama(0, 2).config).eval()
    for _ in range(2):
        logits = model(input_ids=IDS).logits
        torch.testing.assert_close(last_hidden(model, input_ids=IDS).make_logits(), logits, rtol=1e-4, atol=1e-5)
        agree(model, llama(0, 3))
    agree(adapted(model), llama(0, 3))


class Clamped(transformers.LlamaForCausalLM):
    bounds: tuple[float | None, float | None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits.clamp(*self.bounds)
        return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bounds", [(-0.3, 0.3), (-30, 30), (-100, 100), (-3000, 3000), (None, 100), (-100, None)])
def test_a_clamp_is_no_soft_cap(bounds: tuple[float | None, float | None], dtype: torch.dtype) -> None:
    """Though it ends where one would end."""
    model = Clamped(llama(0, 2).config).to(dtype).eval()
    model.bounds = bounds
    with torch.no_grad():
        model.lm_head.weight.mul_(0.01)  # logits that are far from the ends
    with pytest.raises(ValueError, match="Clamped: expected logits that are those of its output embeddings"):
        last_hidden(model, input_ids=IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [0.5, 2.0, 30.0, 50.0, 512.0])
def test_soft_caps_of_all_sizes(cap: float, dtype: torch.dtype) -> None:
    of_row, bias = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    rows = probes(of_row.view(1, 1, -1).to(dtype))
    scale, added = (0.5, bias) if dtype == torch.float32 else (1.0, None)
    given = Finish(scale, added, cap)
    found = seen(rows, given(rows).to(dtype))
    assert found is not None
    assert (found.scale, found.softcap) == (pytest.approx(scale, rel=1e-4), cap)
    assert (found.added is None) == (added is None)
    if added is not None:
        torch.testing.assert_close(found.added, added, rtol=1e-3, atol=1e-4)


def test_a_bias_that_changes_is_seen() -> None:
    """As load_state_dict changes buffers."""

    class Biased(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_buffer("logits_bias", torch.zeros(1, config.vocab_size))

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits + self.logits_bias
            return outputs

    student = Biased(llama(0, 2).config).eval()
    agree(student, llama(0, 3))
    state = copy.deepcopy(student.state_dict())
    state["logits_bias"].normal_()
    student.load_state_dict(state)
    agree(student, llama(0, 3))
    agree(adapted(student), llama(0, 3))


@torch.no_grad()
def test_a_parameter_of_the_model_that_changes_is_seen() -> None:
    """Where no gradient is wanted it is a scale like any other."""
    model = Scaled(llama(0, 2).config).eval()
    for scale in (1.0, 2.5):
        model.scale.fill_(scale)
        logits = model(input_ids=IDS).logits
        assert logits.abs().max() > 0.1
        torch.testing.assert_close(last_hidden(model, input_ids=IDS).make_logits(), logits, rtol=1e-4, atol=1e-5)


def times_three(_: nn.Module, arguments: tuple[Any, ...], *made: Any) -> None:
    """As a hook before the head or after it."""
    (made or arguments)[0].mul_(3)


def times_three_unseen(_: nn.Module, arguments: tuple[Any, ...], *made: Any) -> None:
    (made or arguments)[0].data.mul_(3)


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("hook", [times_three, times_three_unseen])
def test_hooks_that_write_in_place(hook: Any, place: str, lora: bool) -> None:
    student, teacher = llama(0, 2, tied=False), llama(0, 3)
    student = adapted(student) if lora else student
    head = student.get_output_embeddings()

    def check() -> torch.Tensor:
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                logits = student(input_ids=IDS).logits
                got = last_hidden(student, input_ids=IDS)
                torch.testing.assert_close(got.make_logits(), logits, rtol=1e-4, atol=1e-5)
        return logits

    plain = check()
    register = head.register_forward_pre_hook if place == "before" else head.register_forward_hook
    handle = register(hook)
    torch.testing.assert_close(check(), 3 * plain)
    if hook is times_three and place == "after":
        agree(student, teacher)
    handle.remove()
    torch.testing.assert_close(check(), plain)
    agree(student, teacher)
    assert (last_hidden(student, input_ids=IDS).head is None) != lora


def test_a_weight_of_one_product() -> None:
    """Hooks put it in and take it out."""
    student = llama(0, 2, tied=False)
    weight = student.lm_head.weight

    def put(*_: Any) -> None:
        weight.data.mul_(3)

    def take(*_: Any) -> None:
        weight.data.div_(3)

    student.lm_head.register_forward_pre_hook(put)
    student.lm_head.register_forward_hook(take)
    with torch.no_grad():
        logits = student(input_ids=IDS).logits
        torch.testing.assert_close(last_hidden(student, input_ids=IDS).make_logits(), logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_compiled_models(way: str) -> None:
    """The numbers are those of the model inside."""
    model = of("cohere", 0)
    if way == "in place":
        model.compile(backend="eager")
    compiled = model if way == "in place" else torch.compile(model, backend="eager")

    def check() -> torch.Tensor:
        logits = model(input_ids=IDS).logits
        for _ in range(2):
            torch.testing.assert_close(last_hidden(compiled, input_ids=IDS).make_logits(), logits, rtol=1e-4, atol=1e-5)
        return logits

    first = check()
    model.logit_scale = 0.5
    torch.testing.assert_close(check(), first * (0.5 / 0.3))
