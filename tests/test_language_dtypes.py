"""Language models in bfloat16, float16 and mixed, inside and outside autocast: near a float32 run, and no logit rounded to 16
bits. Everything here runs the same whether the processor multiplies bfloat16 itself or not."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from language_models import ARGUMENTS, PAD, completion_rows, llama, losses
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import TrainingArguments

import kdfast
from kdfast.data import text
from kdfast.models.head import product
from kdfast.models.last_hidden import LastHidden
from kdfast.objective import LanguageModel
from kdfast.runs.distilbert import MaskedTokens

BATCH = text.Collator(PAD)(completion_rows(6))
OBJECTIVE = LanguageModel(alpha=0.6, temperature=2.0)
SMALL: dict[str, Any] = {"vocab_size": 301, "hidden_size": 32, "num_attention_heads": 4, "pad_token_id": PAD}
# Tolerances of the loss, and of a gradient's norm: some roundings of each number, through two or three layers.
NEAR = {torch.bfloat16: (0.02, 0.08), torch.float16: (0.003, 0.01), torch.float32: (1e-5, 1e-4)}


def opt(seed: int, layers: int) -> Any:
    """Its last hidden state leaves a Linear, in autocast's dtype."""
    torch.manual_seed(seed)
    more = {"word_embed_proj_dim": 16, "ffn_dim": 48, "max_position_embeddings": 64, "dropout": 0.0}
    config = transformers.OPTConfig(num_hidden_layers=layers, do_layer_norm_before=False, **SMALL | more)
    return initialised(transformers.OPTForCausalLM(config))


def bert(seed: int, layers: int) -> Any:
    """A bias, and a layer norm before the head."""
    torch.manual_seed(seed)
    more = {"intermediate_size": 48, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0}
    more |= {"attention_probs_dropout_prob": 0.0, "is_decoder": True}
    config = transformers.BertConfig(num_hidden_layers=layers, **SMALL | more)
    return initialised(transformers.BertLMHeadModel(config))


def initialised(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower():
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def lora(seed: int, layers: int) -> Any:
    options = {"r": 4, "target_modules": ["lm_head"], "init_lora_weights": False}
    # Adapters of the dtype that the model gets: peft makes float32 ones of 16 bits by itself.
    return get_peft_model(llama(seed, layers), LoraConfig(**options), autocast_adapter_dtype=False).eval()


class _Doubled(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * (hidden @ self.weight.T)


def doubled(seed: int, layers: int) -> Any:
    """A head with a forward of its own."""
    model = llama(seed, layers)
    model.lm_head.__class__ = _Doubled
    return model


MODELS: dict[str, Any] = {"llama": llama, "opt": opt, "bert": bert, "lora": lora, "doubled": doubled}


def run(student: Any, teacher: Any, forward: Any, loss: Any) -> tuple[Tensor, dict[str, Tensor]]:
    with forward:
        with torch.no_grad():
            of_teacher = OBJECTIVE.run(teacher, BATCH)
        of_student = OBJECTIVE.run(student, BATCH)
    with loss:
        total = torch.stack([*OBJECTIVE(of_student, of_teacher, BATCH).values()]).sum()
    assert total.dtype == torch.float32
    total.backward()
    return total.detach(), {name: p.grad.float() for name, p in student.named_parameters() if p.grad is not None}


def autocast(dtype: torch.dtype) -> Any:
    return torch.autocast("cpu", dtype)


def here() -> Any:
    return contextlib.nullcontext()


# Dtypes of student and teacher; autocast around the forward and around the loss; what the result is near in.
WAYS: dict[str, tuple[torch.dtype, torch.dtype, Any, Any, torch.dtype]] = {
    "float32": (torch.float32, torch.float32, here, here, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16, here, here, torch.bfloat16),
    "float16": (torch.float16, torch.float16, here, here, torch.float16),
    "teacher in bfloat16": (torch.float32, torch.bfloat16, here, here, torch.bfloat16),
    "student in bfloat16": (torch.bfloat16, torch.float32, here, here, torch.bfloat16),
    "teacher in float16": (torch.float32, torch.float16, here, here, torch.float16),
    # The trainer's: the model's forward alone is under autocast.
    "autocast of the models": (torch.float32, torch.float32, lambda: autocast(torch.bfloat16), here, torch.bfloat16),
    "autocast of all": (torch.float32, torch.float32, *[lambda: autocast(torch.bfloat16)] * 2, torch.bfloat16),
    "autocast of the loss": (torch.float32, torch.float32, here, lambda: autocast(torch.bfloat16), torch.bfloat16),
    "float16 autocast": (torch.float32, torch.float32, lambda: autocast(torch.float16), here, torch.float16),
    "autocast, teacher in bfloat16": (
        *(torch.float32, torch.bfloat16),
        *(lambda: autocast(torch.bfloat16), here, torch.bfloat16),
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", MODELS)
def test_near_a_float32_run(model: str, way: str) -> None:
    student, teacher = MODELS[model](1, 1), MODELS[model](0, 2)
    expected, gradients = run(copy.deepcopy(student), teacher, here(), here())
    of_student, of_teacher, forward, loss, near = WAYS[way]
    got, ours = run(student.to(of_student), teacher.to(of_teacher), forward(), loss())
    of_loss, of_gradient = NEAR[near]
    torch.testing.assert_close(got, expected, rtol=of_loss, atol=0)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # The norm of what is exactly zero in float32 too (keys' biases) says nothing.
        if gradient.norm() > 1e-3:
            assert (ours[name] - gradient).norm() < of_gradient * gradient.norm(), name


@torch.no_grad()
def exact(outputs: LastHidden) -> Tensor:
    """The logits of these very numbers, in float64."""
    hidden = outputs.hidden[:, :-1]

    def wide(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())

    if outputs.head is None:
        assert outputs.weight is not None
        return wide(hidden, outputs.weight, outputs.bias)
    head: Any = outputs.head.head
    if isinstance(head, _Doubled):
        dtype = torch.get_autocast_dtype("cpu") if outputs.head.autocast["enabled"] else hidden.dtype
        return 2 * wide(hidden.to(dtype), head.weight.to(dtype))
    with torch.autocast(**outputs.head.autocast):
        thin = head.lora_A["default"](hidden)  # no logit: as the model makes it
    base, of_thin = (module.weight.to(thin.dtype) for module in (head.base_layer, head.lora_B["default"]))
    return wide(hidden.to(thin.dtype), base) + head.scaling["default"] * wide(thin, of_thin)


@pytest.mark.parametrize("way", ["bfloat16", "float16", "autocast of the models"])
@pytest.mark.parametrize("model", MODELS)
def test_no_logit_is_rounded(model: str, way: str) -> None:
    """A student near its teacher: rounded logits would make another loss."""
    of_student, of_teacher, forward, _, _ = WAYS[way]
    teacher = MODELS[model](0, 2).to(of_teacher)
    student = copy.deepcopy(teacher).to(of_student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1 + 0.002 * torch.randn(parameter.shape, dtype=parameter.dtype))
    with torch.no_grad(), forward():
        outputs = OBJECTIVE.run(student, BATCH), OBJECTIVE.run(teacher, BATCH)
    terms = OBJECTIVE(*outputs, BATCH)
    z, counted = [exact(side) for side in outputs], BATCH["labels"][:, 1:] != -100
    parts = kdfast.kd_loss(z[0][counted], z[1][counted], BATCH["labels"][:, 1:][counted], alpha=0.6, temperature=2.0)
    ours = torch.stack([*terms.values()]).sum()
    torch.testing.assert_close(ours.double(), parts, rtol=1e-5, atol=0)
    rounded = [x.to(torch.bfloat16).double()[counted] for x in z]
    soft, of_rounded = (0.6 * 4 * kdfast.kl_div(*x, temperature=2.0) for x in ([y[counted] for y in z], rounded))
    allowed = 6e-7  # roundings of float32 logits
    assert (of_rounded - soft).abs() > 2 * allowed  # what this test would see
    torch.testing.assert_close(terms["kd"].double(), soft, rtol=0, atol=allowed)
    torch.testing.assert_close(OBJECTIVE.logits(outputs[0])[:, :-1].double(), z[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [5, 0])
def test_products_of_16_bits(dtype: torch.dtype, rows: int) -> None:
    """As exact as float32, the gradients to one rounding."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, rows, 16), (40, 16), (40,)))
    inputs = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    made, expected = product(*inputs), nn.functional.linear(*wide)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), expected, rtol=1e-5, atol=1e-5)
    factor = torch.randn(made.shape, generator=generator)
    gradients = torch.autograd.grad((made * factor).sum(), inputs)
    exact_ones = torch.autograd.grad((expected * factor.double()).sum(), wide)
    for gradient, one, of in zip(gradients, exact_ones, inputs, strict=True):
        assert gradient.dtype == of.dtype
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(gradient.double(), one, rtol=rounding, atol=1e-5)
    with autocast(dtype):
        again = product(*(t.float() for t in inputs))
    torch.testing.assert_close(again, made, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", ["llama", "lora"])
def test_no_double_backward(model: str) -> None:
    """Nor a gradient that silently lacks one."""
    student = MODELS[model](1, 1).to(torch.bfloat16).requires_grad_()
    logits = OBJECTIVE.logits(OBJECTIVE.run(student, BATCH))
    weight = student.get_input_embeddings().weight
    with pytest.raises(
        RuntimeError, match=r"^LastHidden.make_logits: double backward is not available: expected a first"
    ):
        torch.autograd.grad(logits.square().sum(), weight, create_graph=True, retain_graph=True)
    (once,) = torch.autograd.grad(logits.square().sum(), weight)
    assert once.abs().max() > 1e-3


def test_masked_tokens() -> None:
    """As in the recipe of DistilBERT: the model is under autocast, its hidden states are in 16 bits, and the head is not."""
    config = transformers.BertConfig(num_hidden_layers=1, intermediate_size=48, max_position_embeddings=64, **SMALL)
    torch.manual_seed(0)
    model = initialised(transformers.BertForMaskedLM(config))
    objective, found = MaskedTokens(), []
    for forward in (here(), autocast(torch.bfloat16)):
        with forward:
            outputs = objective.run(model, BATCH)
        loss = objective(outputs, None, BATCH)["mlm"]
        gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        assert loss.dtype == torch.float32
        found.append((loss.item(), [g for g in gradients if g is not None]))
    (loss, gradients), (ours, of_ours) = found
    assert ours == pytest.approx(loss, rel=NEAR[torch.bfloat16][0])
    for a, b in zip(of_ours, gradients, strict=True):
        if b.norm() > 1e-3:
            assert (a - b).norm() < NEAR[torch.bfloat16][1] * b.norm()


@pytest.mark.parametrize("model", ["opt", "bert", "lora"])
def test_trains_and_evaluates(tmp_path: Path, model: str) -> None:
    """The trainer trains the model and evaluates it under autocast, and the loss stands outside of it."""
    rows, found = completion_rows(24), {}
    for bf16 in (False, True):
        trainer = kdfast.DistillationTrainer(
            MODELS[model](1, 1),
            TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=6,
                bf16=bf16,
                prediction_loss_only=True,
                **ARGUMENTS,
            ),
            teacher=MODELS[model](0, 2),
            objective=OBJECTIVE,
            train_dataset=rows,
            data_collator=text.Collator(PAD),
        )
        before = trainer.evaluate(rows[:6])["eval_loss"]
        trainer.train()
        found[bf16] = [before, *losses(trainer), trainer.evaluate(rows[:6])["eval_loss"]]
        assert found[bf16][-1] < before
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert found[True] == pytest.approx(found[False], rel=0.02)
    assert found[True] != found[False]  # it was on
