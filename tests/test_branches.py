"""FastBERT's branches, uncertainty, stages and exits against the numbers of the original code, and in plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
from early_exits import PARTS, every_uncertainty, oracle, original, original_batch, plain_branch
from torch import Tensor
from torch.testing import assert_close

import kdfast
from kdfast.early_exit import Branch, EarlyExit, uncertainty
from kdfast.objective import Branches, Labels, Terms


# ---- the originals ----
def test_uncertainty_of_the_original() -> None:
    values, _ = oracle("uncertainty")
    assert_close(uncertainty(values["logits"].double()), values["uncertainty"], rtol=0, atol=1e-10)
    assert_close(uncertainty(values["logits"]), values["uncertainty"].float(), rtol=0, atol=1e-6)


def test_self_distillation_of_the_original() -> None:
    values, _ = oracle("selfdistill_kl")
    students = [values[f"student_logits.{i}"].double().requires_grad_() for i in (0, 1)]
    last = values["teacher_logits"].double().requires_grad_()
    outputs = kdfast.early_exit.EarlyExitOutput(logits=last, branch_logits=tuple(students))
    loss = Branches()(outputs, None, {"input_ids": torch.zeros(len(last), 1)})
    loss.backward()
    assert_close(loss.detach(), values["loss"], rtol=0, atol=1e-10)
    for i, student in enumerate(students):
        assert_close(student.grad, values[f"grad_student_logits.{i}"], rtol=0, atol=1e-10)
    assert last.grad is None


def check_gradients(model: EarlyExit, values: dict[str, Tensor], branches: list[int]) -> None:
    for i, branch in enumerate(model.branches):
        for ours, theirs in PARTS.items():
            for kind in ("weight", "bias"):
                gradient = branch.get_parameter(f"{ours}.{kind}").grad
                if i in branches:
                    assert_close(gradient, values[f"grad.classifiers.{i}.{theirs}.{kind}"], rtol=0, atol=1e-10)
                else:
                    assert gradient is None


def test_first_stage_of_the_original() -> None:
    values, hyper = oracle("stage1_backbone")
    model = original(values, hyper).train_backbone().train()
    inputs = {**original_batch(values), "labels": values["labels"]}
    objective = Terms(ce=Labels())
    outputs = objective.run(model, inputs)
    loss = objective(outputs, None, inputs)["ce"]
    loss.backward()
    assert_close(outputs.logits.detach(), values["logits"], rtol=0, atol=1e-10)
    assert_close(loss.detach(), values["loss"], rtol=0, atol=1e-10)
    gradient = model.get_input_embeddings().weight.grad
    assert_close(gradient, values["grad.embedding.word_embedding.weight"], rtol=0, atol=1e-10)
    check_gradients(model, values, [hyper["layers"] - 1])


@pytest.mark.parametrize("divergence", ["kl_div", "reverse_kl_div"])
def test_second_stage_of_the_original(divergence: str) -> None:
    values, hyper = oracle("stage2_selfdistill")
    model = original(values, hyper).train_branches().train()
    inputs = original_batch(values)  # no labels
    objective = Terms(branches=Branches(divergence))
    outputs = objective.run(model, inputs)
    for i, logits in enumerate(outputs.branch_logits):
        assert_close(logits.detach(), values[f"student_logits.{i}"], rtol=0, atol=1e-10)
        logits.retain_grad()
    loss = objective(outputs, None, inputs)["branches"]
    loss.backward()
    assert_close(outputs.logits, values["teacher_logits"], rtol=0, atol=1e-10)
    of_layers = values["per_layer_kl" if divergence == "kl_div" else "per_layer_reverse_kl_paper"]
    assert_close(loss.detach(), of_layers.sum(), rtol=0, atol=1e-10)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"branches.{i}.{name}" for i in range(hyper["layers"] - 1) for name, _ in model.branches[i].named_parameters()
    }
    if divergence == "kl_div":
        assert_close(loss.detach(), values["loss"], rtol=0, atol=1e-10)
        for i, logits in enumerate(outputs.branch_logits):
            assert_close(logits.grad, values[f"grad_student_logits.{i}"], rtol=0, atol=1e-10)
        check_gradients(model, values, list(range(hyper["layers"] - 1)))


def test_exits_of_the_original() -> None:
    values, hyper = oracle("adaptive_inference")
    model, inputs = original(values, hyper).eval(), original_batch(values)
    assert_close(every_uncertainty(model, inputs), values["uncertainty_all_layers"], rtol=0, atol=1e-10)
    seen = set()
    for speed, layers, logits in zip(
        values["speeds"].tolist(), values["exit_layer"], values["fast_logits"], strict=True
    ):
        with torch.no_grad():
            outputs = model(**inputs, speed=speed)
        assert torch.equal(outputs.layers, layers + 1)
        assert_close(outputs.logits, logits, rtol=0, atol=1e-10)
        at = values["uncertainty_all_layers"][layers, torch.arange(len(layers))]
        assert_close(outputs.uncertainty, at, rtol=0, atol=1e-10)
        seen |= set(layers.tolist())
    assert seen == {0, 1, 2}


# ---- branches and uncertainty ----
@pytest.mark.parametrize("masked", [False, True])
def test_branch_in_plain_torch(masked: bool) -> None:
    torch.manual_seed(0)
    branch = Branch(12, 5, width=12, heads=3).double()
    hidden = torch.randn(4, 12, 7, dtype=torch.float64).mT.requires_grad_()  # strided
    mask = (torch.arange(7) < torch.tensor([7, 3, 1, 5])[:, None]).long() if masked else None
    upstream = torch.randn(4, 5, dtype=torch.float64)
    found = []
    for run in (branch, lambda *given: plain_branch(branch, *given)):
        branch.zero_grad()
        hidden.grad = None
        logits = run(hidden, mask)
        (logits * upstream).sum().backward()
        assert hidden.grad is not None
        found.append(
            [logits.detach(), hidden.grad, *(p.grad.clone() for p in branch.parameters() if p.grad is not None)]
        )
    assert len(found[0]) == 2 + 14
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert found[0][0].abs().min() > 1e-3
    single, lowered = branch.float(), copy.deepcopy(branch).bfloat16()
    expected = found[0][0].float()
    assert_close(single(hidden.detach().float(), mask), expected, rtol=1e-4, atol=1e-5)
    assert_close(lowered(hidden.detach().bfloat16(), mask).float(), expected, rtol=0.05, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(single(hidden.detach().float(), mask).float(), expected, rtol=0.05, atol=0.02)


def test_branch_reads_no_padding() -> None:
    branch = Branch(8, 2, width=4, heads=2)
    hidden, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    changed = hidden.masked_fill(~mask.bool()[..., None], 7.0)
    assert torch.equal(branch(hidden, mask), branch(changed, mask))
    assert not torch.allclose(branch(hidden), branch(changed))
    assert branch(hidden[:0], mask[:0]).shape == (0, 2)


def test_uncertainty_at_its_ends() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [200.0, 0.0, 0.0], [5.0, 5.0, -torch.inf], [torch.nan, 0.0, 0.0]])
    found = uncertainty(logits)
    assert found[0] == 1
    assert found[1] == 0
    assert found[2] == pytest.approx(torch.tensor(2.0).log() / torch.tensor(3.0).log())
    assert found[3].isnan()
    for classes in range(2, 50):
        assert uncertainty(torch.full((classes,), 0.3)) <= 1
    assert uncertainty(logits.bfloat16()).dtype == torch.float32
    assert uncertainty(logits[:0]).shape == (0,)
    for wrong, error in (
        (torch.zeros(3, 1), ValueError),
        (torch.tensor(1.0), ValueError),
        (torch.zeros(2, 3).long(), TypeError),
    ):
        with pytest.raises(error, match=r"uncertainty: logits: expected .* got"):
            uncertainty(wrong)
