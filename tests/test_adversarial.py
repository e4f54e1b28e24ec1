"""Perturbed inputs: gradients by hand, teachers that can and cannot read them, and the recipe step by step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_berts
import torch
import torch.nn.functional as F
from test_recipes_by_hand import SETTINGS, Loss, follow, inputs
from torch import Tensor
from transformers import XLNetConfig, XLNetForSequenceClassification

from kdfast.models.inputs import model_inputs
from kdfast.objective import Adversarial, Labels, Logits, Missing, Perturbed, Terms
from kdfast.recipes import adversarial

EPSILON = 0.05


def batch() -> dict[str, Any]:
    return tiny_berts.collate(tiny_berts.rows(6))


def with_embeddings(model: Any, columns: dict[str, Any], delta: Tensor) -> Tensor:
    """Logits, by the model's own argument for embeddings."""
    embeddings = model.get_input_embeddings()(columns["input_ids"]) + delta
    return model(inputs_embeds=embeddings, attention_mask=columns["attention_mask"]).logits


def by_hand(model: Any, columns: dict[str, Any], epsilon: float, steps: int, norm: str, step: float) -> Tensor:
    """δ row by row."""
    on = columns["attention_mask"][..., None].float()
    delta = torch.zeros(*columns["input_ids"].shape, model.get_input_embeddings().weight.shape[1])
    for _ in range(steps):
        at = delta.clone().requires_grad_()
        loss = F.cross_entropy(with_embeddings(model, columns, at), columns["labels"], reduction="sum")
        gradient = torch.autograd.grad(loss, at)[0] * on
        for i, g in enumerate(gradient):
            if norm == "sign":
                delta[i] = (delta[i] + step * g.sign()).clamp(-epsilon, epsilon)
            else:
                delta[i] += step * g / g.norm()
                if delta[i].norm() > epsilon:
                    delta[i] *= epsilon / delta[i].norm()
    return delta


@pytest.mark.parametrize("norm", ["sign", "l2"])
@pytest.mark.parametrize(("steps", "step"), [(1, None), (3, None), (2, 0.01)])
def test_perturbation_by_hand(norm: str, steps: int, step: float | None) -> None:
    model, columns = tiny_berts.bert(0), batch()
    objective = Adversarial(it=Perturbed(epsilon=EPSILON, steps=steps, norm=norm, step=step))
    with torch.no_grad():  # as in evaluations
        delta = objective.terms["it"].perturbation(objective.run(model, columns), columns)
    size = step or (EPSILON if steps == 1 else 2.5 * EPSILON / steps)
    expected = by_hand(model, columns, EPSILON, steps, norm, size)
    assert not delta.requires_grad
    assert not delta[columns["attention_mask"] == 0].any()
    torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-6)
    longest = delta.abs().amax((1, 2)) if norm == "sign" else delta.flatten(1).norm(dim=1)
    torch.testing.assert_close(longest, torch.full_like(longest, min(EPSILON, size * steps)))
    before, after = (
        F.cross_entropy(with_embeddings(model, columns, at), columns["labels"])
        for at in (torch.zeros_like(delta), delta)
    )
    assert after > before + 1e-4
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("clean", [False, True])
def test_loss_and_gradient_by_hand(clean: bool) -> None:
    columns = batch()
    columns["sample_weight"] = torch.tensor([0.5, 2.0, 0.0, 1.0, 1.0, 3.0])
    teacher, student = tiny_berts.bert(0, layers=3).requires_grad_(False), tiny_berts.bert(1)
    student.get_input_embeddings().requires_grad_(False)
    objective = Adversarial(
        kl=Logits(temperature=2.0, weight=0.5), ce=Labels(), adversarial=Perturbed(temperature=2.0, epsilon=EPSILON, clean_teacher=clean)
    )  # fmt: skip
    with torch.no_grad():
        of_teacher = objective.run(teacher, columns)
    values = objective(objective.run(student, columns), of_teacher, columns)
    sum(values.values()).backward()
    found = [p.grad for p in student.parameters() if p.requires_grad]
    student.zero_grad()
    zero = torch.zeros(*columns["input_ids"].shape, 16)
    delta = by_hand(student, columns, EPSILON, 1, "sign", EPSILON)
    weight, total = columns["sample_weight"], torch.zeros(())
    for factor, at, its in ((0.5, zero, zero), (1.0, delta, zero if clean else delta)):
        with torch.no_grad():
            p = (with_embeddings(teacher, columns, its) / 2).softmax(-1)
        kl = F.kl_div((with_embeddings(student, columns, at) / 2).log_softmax(-1), p, reduction="none").sum(-1)
        value = 4 * (weight * kl).mean()
        torch.testing.assert_close(
            values["kl" if factor == 0.5 else "adversarial"], factor * value, rtol=1e-4, atol=1e-6
        )
        total = total + factor * value
    ce = F.cross_entropy(with_embeddings(student, columns, zero), columns["labels"], reduction="none")
    (total + (weight * ce).mean()).backward()
    for a, p in zip(found, [p for p in student.parameters() if p.requires_grad], strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-5)
    assert values["adversarial"] > 1e-3


def test_xlnet_is_moved_where_it_is_meant() -> None:
    """It embeds [L, B]; here L = B."""
    torch.manual_seed(0)
    config = XLNetConfig(
        vocab_size=20, d_model=16, n_layer=2, n_head=2, d_inner=16, num_labels=3, initializer_range=0.4
    )
    model = XLNetForSequenceClassification(config).eval()
    columns = {"input_ids": torch.randint(20, (4, 4)), "attention_mask": torch.ones(4, 4)}
    ran = Adversarial(it=Perturbed()).run(model, columns)
    delta = torch.zeros(4, 4, 16)
    delta[1] = 0.5
    with torch.no_grad():
        moved = (ran.again(delta).logits - ran.logits).abs().amax(-1)
    assert moved[1] > 1e-2
    assert moved[[0, 2, 3]].max() < 1e-6


def test_bfloat16_as_the_model_ran() -> None:
    columns, model = batch(), tiny_berts.bert(0)
    objective = Adversarial(it=Perturbed(epsilon=EPSILON))
    with torch.autocast("cpu", torch.bfloat16):
        ran = objective.run(model, columns)
    assert ran.logits.dtype == torch.bfloat16
    again = ran.again(torch.zeros(*columns["input_ids"].shape, 16)).logits
    assert torch.equal(again, ran.logits)
    value = objective(ran, ran, columns)["it"]
    assert value == 0
    assert (
        objective.run(model, columns).again(torch.zeros(*columns["input_ids"].shape, 16)).logits.dtype == torch.float32
    )


def test_labels_of_other_kinds() -> None:
    columns, model, teacher = batch(), tiny_berts.bert(0), tiny_berts.bert(1)
    for task, labels in (("multi_label", torch.ones(6, 3)), ("regression", torch.full((6, 3), 2.0))):
        term = Perturbed("logit_mse", epsilon=EPSILON, task=task)
        objective, own = Adversarial(it=term), {**columns, "labels": labels}
        value = objective(objective.run(model, own), objective.run(teacher, own), own)["it"]
        at = torch.zeros(*own["input_ids"].shape, 16, requires_grad=True)
        z = with_embeddings(model, own, at)
        loss = F.binary_cross_entropy_with_logits(z, labels) if task == "multi_label" else F.mse_loss(z, labels)
        on = own["attention_mask"][..., None]
        delta = EPSILON * torch.autograd.grad(loss, at)[0].sign() * on
        expected = F.mse_loss(with_embeddings(model, own, delta), with_embeddings(teacher, own, delta))
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


# ---- what is refused ----
@pytest.mark.parametrize(
    ("settings", "error", "expected"),
    [
        ({"epsilon": -0.1}, ValueError, "epsilon: expected a number that is not negative, got -0.1"),
        ({"steps": 0}, ValueError, "steps: expected a whole number from 1 on, got 0"),
        ({"steps": 1.5}, ValueError, "steps: expected a whole number from 1 on, got 1.5"),
        ({"norm": "l1"}, ValueError, "norm: expected 'sign' or 'l2', got 'l1'"),
        ({"step": "far"}, TypeError, "step: expected a number that is not negative, got 'far'"),
        ({"task": "tokens"}, ValueError, "task: expected .*, got 'tokens'"),
        ({"tokens": "all"}, ValueError, "tokens: expected None: the loss is of whole rows, got 'all'"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], error: type[Exception], expected: str) -> None:
    with pytest.raises(error, match=f"^Perturbed: {expected}$"):
        Perturbed(**settings)


def test_teachers_that_cannot_read_it() -> None:
    columns, student = batch(), tiny_berts.bert(0)
    objective = Adversarial(ce=Labels(), it=Perturbed(epsilon=EPSILON))
    possible = "; clean_teacher is possible, for which it reads the input as it is$"
    wide = objective.run(tiny_berts.bert(1, width=24), columns)
    shapes = r"expected input embeddings \[6, 11, 16\] as the student's, to which the same is added, got \[6, 11, 24\]"
    with pytest.raises(ValueError, match=f"^Perturbed: teacher: {shapes}{possible}"):
        objective(objective.run(student, columns), wide, columns)
    with pytest.raises(Missing, match=f"^Perturbed: teacher: expected one that runs, got none{possible}"):
        objective(objective.run(student, columns), None, columns)
    stored = {**columns, "teacher_logits": torch.zeros(6, 3)}
    with pytest.raises(Missing, match=f"^Perturbed: teacher: expected one that runs, got stored logits{possible}"):
        objective(objective.run(student, stored), None, stored)
    clean = Adversarial(it=Perturbed(epsilon=EPSILON, clean_teacher=True))
    assert clean(clean.run(student, stored), None, stored)["it"] > 1e-3
    assert clean(clean.run(student, columns), wide, columns)["it"] > 1e-3
    with pytest.raises(ValueError, match=r"^Adversarial: terms: expected one that is Perturbed, got kl$"):
        Adversarial(kl=Logits())
    with pytest.raises(ValueError, match=r"^Perturbed: student: expected what Adversarial.run returns, got "):
        Terms(it=Perturbed())(SimpleNamespace(logits=torch.zeros(6, 3)), None, columns)
    embedded = {name: x for name, x in columns.items() if name != "input_ids"}
    embedded["inputs_embeds"] = student.get_input_embeddings()(columns["input_ids"])
    with pytest.raises(ValueError, match=r"^Perturbed: inputs: expected a batch with input_ids, got "):
        clean(clean.run(student, embedded), wide, embedded)
    values, missing = objective.possible(objective.run(student, columns), None, columns)
    assert (list(values), list(missing)) == (["ce"], ["it"])


# ---- the recipe ----
def of_adversarial(steps: int, norm: str, epsilon: float, clean: bool) -> Loss:
    alpha, t, gamma = 0.9, 2.0, 0.5

    def embedded(model: Any, batch: dict[str, Tensor], delta: Tensor | float) -> Tensor:
        own = model_inputs(model, inputs(batch))
        vectors = model.get_input_embeddings()(own.pop("input_ids")) + delta
        return model(inputs_embeds=vectors, **own).logits

    def loss(student: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
        on = batch["attention_mask"][..., None].float()
        delta = torch.zeros(*batch["input_ids"].shape, student.config.hidden_size)
        for _ in range(steps):
            at = delta.clone().requires_grad_()
            ce = F.cross_entropy(embedded(student, batch, at), batch["labels"], reduction="sum")
            g = torch.autograd.grad(ce, at)[0] * on
            if norm == "sign":
                delta = (delta + (epsilon if steps == 1 else 2.5 * epsilon / steps) * g.sign()).clamp(-epsilon, epsilon)
            else:
                delta = delta + (epsilon if steps == 1 else 2.5 * epsilon / steps) * F.normalize(
                    g.flatten(1), dim=1
                ).view_as(g)
                norms = delta.flatten(1).norm(dim=1)[:, None, None]
                delta = delta * (epsilon / norms).clamp(max=1)
        total = (1 - alpha) * F.cross_entropy(embedded(student, batch, 0.0), batch["labels"])
        for weight, move, its in ((alpha, 0.0, 0.0), (gamma, delta, 0.0 if clean else delta)):
            with torch.no_grad():
                p = (embedded(teacher, batch, its) / t).softmax(-1)
            log_s = (embedded(student, batch, move) / t).log_softmax(-1)
            total = total + weight * t**2 * F.kl_div(log_s, p, reduction="batchmean")
        return total

    return loss


@pytest.mark.parametrize(
    ("steps", "norm", "epsilon", "clean"), [(1, "l2", 0.3, False), (2, "l2", 0.5, True), (1, "sign", 0.05, False)]
)
def test_recipe_follows_a_plain_loop(
    steps: int, norm: str, epsilon: float, clean: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = adversarial.Recipe(**SETTINGS, steps=steps, norm=norm, epsilon=epsilon, clean_teacher=clean)
    follow(recipe, {"student": (of_adversarial(steps, norm, epsilon, clean), "teacher")}, tmp_path, monkeypatch)


def test_recipe_of_other_kinds() -> None:
    for kind in ("regression", "multi_label"):
        (stage,) = adversarial.Recipe().stages(3, 6, kind)
        term = stage.objective.terms["adversarial"]
        assert (term.divergence, term.task, stage.teacher) == ("logit_mse", kind, "live")
    assert adversarial.Recipe(clean_teacher=True).stages(3, 6, "classification")[0].teacher == "stored"
