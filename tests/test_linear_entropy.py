"""The student's entropy, which linear_kd_loss and linear_topk_kd_loss return on request, and scales of logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_linear import LEAST, ROW, ROWS, VOCABULARY, inputs, relative
from torch import Tensor

import kdfast
from kdfast.ops.linear_reference import logits


def entropy_of(z: Tensor, temperature: float | Tensor) -> Tensor:
    t = temperature[..., None].double() if isinstance(temperature, Tensor) else temperature
    log_p = (z.double() / t).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale, bias and soft-cap": {"student_logit_scale": 0.4, "student_softcap": 3.0, "bias": True},
    "rows of their own": {"temperature": torch.linspace(0.5, 4, ROWS), "weight": torch.arange(ROWS) / 7.0},
    "some rows": {"mask": torch.arange(ROWS) % 3 != 0, "reduction": "none"},
    "padded": {"vocab_size": VOCABULARY - 70},
    "from logits": {"teacher_logits": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_entropy_and_gradients(dtype: torch.dtype, case: str) -> None:
    settings = {"temperature": 2.0} | CASES[case]
    h, w, th, tw, labels = inputs(dtype)
    labels = labels % (VOCABULARY - 70)
    if settings.pop("bias", False):
        settings["student_bias"] = torch.linspace(-1, 1, VOCABULARY).to(dtype)
    teacher: dict[str, Any] = {"teacher_hidden": th, "teacher_weight": tw}
    if settings.pop("teacher_logits", False):
        teacher = {"teacher_logits": th @ tw.T}
    chunked = settings | {"memory_budget": LEAST + 20 * ROW * (2 if dtype == torch.float64 else 1)}
    got = kdfast.linear_kd_loss(h, w, labels=labels, **teacher, **chunked, return_entropy=True)
    without = kdfast.linear_kd_loss(h, w, labels=labels, **teacher, **chunked)
    assert torch.equal(got.loss, without)
    z = logits(h.double(), w.double(), None, None) + (
        settings["student_bias"].double() if "student_bias" in settings else 0
    )
    z = z * settings.get("student_logit_scale", 1.0)
    cap = settings.get("student_softcap")
    z = z if cap is None else cap * torch.tanh(z / cap)
    expected = entropy_of(z[:, : settings.get("vocab_size")], settings["temperature"])
    mask = settings.get("mask")
    expected = expected if mask is None else expected.where(mask, 0)
    assert got.entropy.shape == (ROWS,)
    assert not got.entropy.requires_grad
    assert got.entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(got.entropy, expected) < (1e-12 if dtype == torch.float64 else 2e-6)
    ours, theirs = (torch.autograd.grad(loss.sum(), (h, w)) for loss in (got.loss, without))
    assert all(map(torch.equal, ours, theirs))


def test_entropy_beside_the_topk_of_a_teacher() -> None:
    h, w, th, tw, labels = inputs()
    labels[::4] = -100
    top = (th @ tw.T / 2).log_softmax(-1).topk(20)
    got = kdfast.linear_topk_kd_loss(h, w, *top, labels, student_logit_scale=0.2, return_entropy=True)
    assert relative(got.entropy, entropy_of(0.2 * h @ w.T, 2.0).where(labels >= 0, 0)) < 2e-6
    expected = kdfast.linear_topk_kd_loss(h * 0.2, w, *top, labels, return_components=True)
    for ours, exact in zip(got[:3], expected, strict=True):
        torch.testing.assert_close(ours, exact)


def test_no_rows() -> None:
    h, w, th, tw, labels = inputs()
    nothing = torch.zeros(ROWS, dtype=torch.bool)
    got = kdfast.linear_kd_loss(h, w, th, tw, labels, mask=nothing, return_entropy=True)
    assert torch.equal(got.entropy, torch.zeros(ROWS))
    empty = kdfast.linear_kd_loss(h[:0], w, th[:0], tw, labels[:0], return_entropy=True)
    assert empty.entropy.shape == (0,)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_scale_of_float16_is_not_rounded(reduction: str) -> None:
    """0.3 times the hidden states would be; gradients are made with it, and what is returned is without."""
    h, w, th, tw, labels = inputs(torch.float16)
    loss = kdfast.linear_kd_loss(h, w, th, tw, labels, student_logit_scale=0.3, reduction=reduction)
    exact = [x.detach().double().requires_grad_() for x in (h, w)]
    of = kdfast.linear_kd_loss(exact[0] * 0.3, exact[1], th.double(), tw.double(), labels, reduction=reduction)
    assert relative(loss, of) < 1e-6
    ours, theirs = torch.autograd.grad(loss.sum(), (h, w)), torch.autograd.grad(of.sum(), exact)
    for got, expected in zip(ours, theirs, strict=True):
        assert relative(got, expected) < 2**-10


def test_scales_that_are_none() -> None:
    h, w, th, tw, labels = inputs()
    for scale in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="student_logit_scale: expected a finite number > 0"):
            kdfast.linear_kd_loss(h, w, th, tw, labels, student_logit_scale=scale)
    with pytest.raises(TypeError, match="teacher_logit_scale: expected a number"):
        kdfast.linear_kd_loss(h, w, th, tw, labels, teacher_logit_scale="2")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="teacher_logits: expected no other argument of the teacher"):
        kdfast.linear_kd_loss(h, w, labels=labels, teacher_logits=th @ tw.T, teacher_logit_scale=2.0)
