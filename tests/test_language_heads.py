"""Output embeddings of every kind, of student and teacher: the loss and the gradient of all that they are made of are those
of plain torch, which makes all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from language_models import PAD, completion_rows, llama, plain_loss
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from kdfast.data import text
from kdfast.models.last_hidden import last_hidden
from kdfast.objective import LanguageModel
from kdfast.runs.distilbert import MaskedTokens

BATCH = text.Collator(PAD)(completion_rows(4))
IDS = BATCH["input_ids"]
OBJECTIVE = LanguageModel(alpha=0.6, temperature=2.0)


def adapted(model: Any, **options: Any) -> Any:
    options = {"r": 4, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False} | options
    return get_peft_model(model, LoraConfig(**options)).eval()


def merged(model: Any) -> Any:
    model = adapted(model)
    model.merge_adapter()
    return model.requires_grad_(True)  # of which peft's own have none


def switched_off(model: Any) -> Any:
    model = adapted(model)
    model.base_model.disable_adapter_layers()
    return model.requires_grad_(True)


def two_adapters(model: Any) -> Any:
    model = adapted(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    return model


def saved_head(model: Any) -> Any:
    model = adapted(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)
    return model


class _Normed(nn.Linear):
    """With a forward of its own."""

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(F.normalize(hidden, dim=-1), F.normalize(self.weight, dim=-1)) * 7


def normed(model: Any) -> Any:
    head = _Normed(32, model.config.vocab_size, bias=False)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
    model.lm_head = head
    return model


class _Doubled(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * (hidden @ self.weight.T)


def doubled(model: Any) -> Any:
    model.lm_head.__class__ = _Doubled
    return model


def hooked(model: Any) -> Any:
    model.lm_head.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 1.5,))
    model.lm_head.register_forward_hook(lambda module, arguments, made: made.sin() * 3)
    return model


def patched(model: Any) -> Any:
    """As accelerate puts its hooks around a module."""
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: forward(hidden) * 0.5
    return model


def parametrized(model: Any) -> Any:
    with torch.no_grad():
        model.lm_head.weight[PAD] = 0.1  # a row of zeros has no direction
    nn.utils.parametrizations.weight_norm(model.lm_head)
    return model


def with_bias(model: Any) -> Any:
    return adapted(model, lora_bias=True)


HEADS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda model: model,
    "lora": adapted,
    "dora": lambda model: adapted(model, use_dora=True),
    "lora with a bias": with_bias,
    "two adapters": two_adapters,
    "merged": merged,
    "switched off": switched_off,
    "saved by peft": saved_head,
    "own forward": normed,
    "own product": doubled,
    "hooked": hooked,
    "patched": patched,
    "parametrized": parametrized,
}
PLAIN = ("plain", "merged", "switched off", "saved by peft", "parametrized")


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def agree(student: Any, teacher: Any, objective: LanguageModel = OBJECTIVE, batch: Any = None) -> dict[str, Tensor]:
    batch = BATCH if batch is None else batch
    expected = plain_loss(student, teacher, batch, objective)
    wanted = gradients(student, expected)
    with torch.no_grad():
        of_teacher = objective.run(teacher, batch)
    loss = torch.stack([*objective(objective.run(student, batch), of_teacher, batch).values()]).sum()
    got = gradients(student, loss)
    torch.testing.assert_close(loss, expected)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    return got


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", HEADS)
def test_students(kind: str, tied: bool) -> None:
    student = HEADS[kind](llama(1, 2, tied))
    got = agree(student, llama(0, 3))
    assert all(gradient.abs().max() > 1e-5 for gradient in got.values())
    of_head = {name for name in got if "lm_head" in name}
    assert {"lora": 2, "dora": 3, "lora with a bias": 3, "two adapters": 4}.get(kind, len(of_head)) == len(of_head)
    outputs = last_hidden(student, input_ids=IDS)
    assert (outputs.head is None) == (kind in PLAIN)
    torch.testing.assert_close(OBJECTIVE.logits(outputs), student(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_teachers(kind: str) -> None:
    agree(llama(1, 2), HEADS[kind](llama(0, 3, tied=False)))


@pytest.mark.parametrize(
    "objective",
    [LanguageModel(alpha=1.0), LanguageModel(alpha=0.0), LanguageModel(alpha=0.5, divergence="js_div", beta=0.3)],
    ids=["kl", "labels", "js"],
)
def test_both(objective: LanguageModel) -> None:
    """Some rows at a time, and all at once."""
    for budget in (16 * 301 * 3, "auto"):
        some = LanguageModel(objective.alpha, 1.0, objective.divergence, objective.beta, memory_budget=budget)
        agree(adapted(llama(1, 2)), normed(llama(0, 3)), some)
    with pytest.raises(ValueError, match="LanguageModel: memory_budget: expected 4816 bytes or more, for a row"):
        agree(adapted(llama(1, 2)), llama(0, 3), LanguageModel(memory_budget=4815))


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
def test_a_stored_teacher(labelled: bool) -> None:
    """Its top-k, here all of it, is the teacher."""
    student, teacher = adapted(llama(1, 2)), llama(0, 3)
    objective = LanguageModel(alpha=0.6 if labelled else 1.0, temperature=2.0)
    expected = plain_loss(student, teacher, BATCH, objective)
    wanted = gradients(student, expected)
    with torch.no_grad():
        top = (teacher(**{n: BATCH[n] for n in ("input_ids", "attention_mask")}).logits / 2.0).log_softmax(-1).topk(301)
    stored = {"teacher_topk_logprobs": top.values, "teacher_topk_indices": top.indices}
    for items, factor in ((None, 1.0), (3 * objective.num_items(BATCH).float(), 3.0)):
        counted = {} if items is None else {"num_items": items}
        terms = objective(objective.run(student, BATCH), None, BATCH | stored | counted)
        loss = torch.stack([*terms.values()]).sum()
        torch.testing.assert_close(loss * factor, expected, rtol=1e-4, atol=0)
        for name, gradient in gradients(student, loss).items():
            torch.testing.assert_close(gradient * factor, wanted[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_the_labels_alone_need_no_teacher(kind: str) -> None:
    student, objective = HEADS[kind](llama(1, 2)), LanguageModel(alpha=0.0)
    expected = plain_loss(student, llama(0, 3), BATCH, objective)
    wanted = gradients(student, expected)
    loss = torch.stack([*objective(objective.run(student, BATCH), None, BATCH).values()]).sum()
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients(student, loss).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stored", [False, True], ids=["live", "stored"])
def test_where_nothing_counts(stored: bool) -> None:
    """The loss is 0, not NaN, and so are the gradients."""
    student, teacher = adapted(llama(1, 2)), llama(0, 3)
    batch = BATCH | {"labels": torch.full_like(IDS, -100)}
    top = {
        "teacher_topk_logprobs": torch.zeros(*IDS.shape, 1),
        "teacher_topk_indices": torch.zeros(*IDS.shape, 1).long(),
    }
    for counted in ({}, {"num_items": torch.tensor(0.0)}):
        given = batch | counted | (top if stored else {})
        of_teacher = None if stored else OBJECTIVE.run(teacher, batch)
        terms = OBJECTIVE(OBJECTIVE.run(student, batch), of_teacher, given)
        assert all(value == 0 for value in terms.values())
        assert all((gradient == 0).all() for gradient in gradients(student, terms["kd"]).values())


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_less_than_one_token(kind: str) -> None:
    """Items of a process, on average: the sum is divided by that all the same, of masked tokens too."""
    student, teacher = HEADS[kind](llama(1, 2)), llama(0, 3)
    for objective in (OBJECTIVE, MaskedTokens()):
        outputs, of_teacher = objective.run(student, BATCH), OBJECTIVE.run(teacher, BATCH)
        count = objective.num_items(BATCH)
        mean = objective(outputs, of_teacher, BATCH)
        quarter = objective(outputs, of_teacher, BATCH | {"num_items": torch.tensor(0.25)})
        for name, value in mean.items():
            assert value > 0.1
            torch.testing.assert_close(quarter[name], 4 * count * value)
        none = BATCH | {"labels": torch.full_like(IDS, -100), "num_items": torch.tensor(0.0)}
        assert all(value == 0 for value in objective(outputs, of_teacher, none).values())


def test_adapters_that_are_switched_later() -> None:
    """Nothing is remembered of an earlier state."""
    student, teacher = adapted(llama(1, 2)).requires_grad_(True), llama(0, 3)
    agree(student, teacher)
    with student.disable_adapter():
        off = OBJECTIVE(OBJECTIVE.run(student, BATCH), OBJECTIVE.run(teacher, BATCH), BATCH)["kd"]
        plain = OBJECTIVE(OBJECTIVE.run(llama(1, 2), BATCH), OBJECTIVE.run(teacher, BATCH), BATCH)["kd"]
    torch.testing.assert_close(off, plain)
    agree(student, teacher)
    student.merge_adapter()
    agree(student, teacher)
    student.unmerge_adapter()
    agree(student, teacher)
    later = llama(1, 2)
    agree(later, teacher)
    handle = later.lm_head.register_forward_hook(lambda module, arguments, made: made * 2)
    agree(later, teacher)
    handle.remove()
    agree(later, teacher)
    agree(adapted(later), teacher)


def test_dropout_of_an_adapter() -> None:
    """The rows that are made twice drop the same: the gradient is that of the loss."""
    student, teacher = adapted(llama(1, 2), lora_dropout=0.5, target_modules=["lm_head"]), llama(0, 3)
    student.train()
    weight = student.get_output_embeddings().lora_B["default"].weight

    def loss() -> Tensor:
        torch.manual_seed(4)
        terms = OBJECTIVE(OBJECTIVE.run(student, BATCH), OBJECTIVE.run(teacher, BATCH), BATCH)
        return torch.stack([*terms.values()]).sum()

    first = loss()
    first.backward()
    gradient = weight.grad.clone()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight.add_(direction, alpha=1e-3)
        ahead = loss()
        weight.sub_(direction, alpha=2e-3)
        behind = loss()
    expected = (gradient * direction).sum()
    assert expected.abs() > 0.01
    torch.testing.assert_close((ahead - behind) / 2e-3, expected, rtol=0.02, atol=1e-3)


class _Int8(nn.Module):
    """A quantised weight: no parameter at all."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight * self.scale)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_quantised(side: str) -> None:
    """Weights that are no numbers to widen: the head is called as it is."""
    models = {"student": llama(1, 2, tied=False), "teacher": llama(0, 3, tied=False)}
    models[side].lm_head = _Int8(models[side].lm_head)
    agree(models["student"], models["teacher"])
