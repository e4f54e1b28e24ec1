"""liger-kernel's losses by kdfast: against its chunked one, against its Triton kernels where Triton can interpret them,
and against the formulas that its docstrings state."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from other_libraries import OFF, same, some_labels
from torch import Tensor, nn

from kdfast.integrations import liger

ROWS, VOCABULARY = 23, 37
LABELLED = pytest.mark.parametrize("labelled", [False, True], ids=["", "labels"])
BETAS = pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])  # at both ends it is KL, one way and the other


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def heads(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states, weight and bias of a student, of a width of its own, and of a teacher."""
    sides = [[torch.randn(ROWS, h), torch.randn(VOCABULARY, h), torch.randn(VOCABULARY)] for h in (16, 24)]
    student, teacher = ([x.to(dtype) for x in side] for side in sides)
    return [x.requires_grad_() for x in student], teacher


def jsd(log_q: Tensor, log_p: Tensor, beta: float, labels: Tensor | None) -> Tensor:
    """beta · KL(P ‖ M) + (1 − beta) · KL(Q ‖ M), M = beta · P + (1 − beta) · Q; KL at the ends: LigerJSD's docstring."""
    if beta in (0, 1):
        losses = F.kl_div(log_p, log_q, reduction="none", log_target=True) if beta else F.kl_div(
            log_q, log_p, reduction="none", log_target=True
        )  # fmt: skip
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        of_p, of_q = (F.kl_div(log_m, x, reduction="none", log_target=True) for x in (log_p, log_q))
        losses = beta * of_p + (1 - beta) * of_q
    losses = losses.sum(-1)
    return losses.mean() if labels is None else losses[labels != OFF].mean()


# ---- liger_kernel.chunked_loss, which runs on a CPU ----
def same_parts(ours: Any, theirs: Any, biased: bool) -> tuple[Tensor, ...]:
    """Two losses that return their parts, of the same call: value, gradients and parts. Returns what they are called with."""
    (hidden, weight, bias), (t_hidden, t_weight, t_bias) = heads()
    call = hidden, weight, t_hidden, t_weight, some_labels(ROWS, VOCABULARY), *((bias, t_bias) if biased else ())
    inputs = (hidden, weight, bias) if biased else (hidden, weight)
    same(lambda: ours(*call)[0], lambda: theirs(*call)[0], inputs)
    for mine, its in zip(ours(*call)[1:], theirs(*call)[1:], strict=True):
        assert float(its.detach()) > 0.01
        torch.testing.assert_close(mine, its.detach(), rtol=1e-5, atol=0)
    return call


@BETAS
@pytest.mark.parametrize("biased", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.9), (0.0, 2.0), (1.0, 0.0)])
def test_fused_linear_jsd_loss(weights: tuple[float, float], biased: bool, beta: float) -> None:
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    settings: dict[str, Any] = {"temperature": 1.7, "beta": beta, "return_soft_hard_loss": True, "chunk_size": 8}
    ours, theirs = (
        of(*weights, compiled=False, **settings)
        for of in (liger.LigerFusedLinearJSDLoss, chunked.LigerFusedLinearJSDLoss)
    )
    call = same_parts(ours, theirs, biased)
    assert torch.equal(
        liger.LigerFusedLinearJSDLoss(*weights, 0.5)(*call), liger.LigerFusedLinearJSDLoss(*weights)(*call)
    )


def test_fused_linear_jsd_loss_where_nothing_counts() -> None:
    (hidden, weight, _), (t_hidden, t_weight, _) = heads()
    loss = liger.LigerFusedLinearJSDLoss()(hidden, weight, t_hidden, t_weight, torch.full((ROWS,), OFF))
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize("biased", [False, True], ids=["", "biases"])
@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 0.5), (1.7, 1.0)])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.9), (0.0, 2.0), (1.0, 0.0)])
def test_fused_linear_cosine_similarity_loss(
    weights: tuple[float, float], temperature: float, beta: float, biased: bool
) -> None:
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    settings: dict[str, Any] = {"temperature": temperature, "beta": beta, "return_soft_hard_loss": True}
    ours, theirs = (
        of(*weights, compiled=False, chunk_size=8, **settings)
        for of in (liger.LigerFusedLinearCosineSimilarityLoss, chunked.LigerFusedLinearCosineSimilarityLoss)
    )
    call = same_parts(ours, theirs, biased)
    assert not ours(*call).soft_loss.requires_grad
    of_defaults = (
        of(compiled=False)(*call)
        for of in (liger.LigerFusedLinearCosineSimilarityLoss, chunked.LigerFusedLinearCosineSimilarityLoss)
    )
    torch.testing.assert_close(next(of_defaults), next(of_defaults), rtol=1e-5, atol=0)


def cosine_by_hand(call: list[Tensor], hard: float, soft: float, beta: float) -> Tensor:
    """Ignored rows are in the sum of cosines, and not in the number that both sums are divided by."""
    hidden, weight, t_hidden, t_weight, labels, bias, t_bias = (
        x.double() if x.is_floating_point() else x for x in call
    )
    z, t = hidden @ weight.T + bias, t_hidden @ t_weight.T + t_bias
    distances = 1 - (z * t).sum(-1) / (z.norm(dim=-1) * t.norm(dim=-1))
    counted = (labels != OFF).sum().clamp(min=1)
    return (hard * F.cross_entropy(z, labels, reduction="sum") + soft * beta * distances.sum()) / counted


@pytest.mark.parametrize("counting", [True, False], ids=["some count", "none counts"])
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)],
    ids=["float64", "float32", "bfloat16"],
)
@pytest.mark.parametrize("chunk_size", [8, ROWS, 1024])
def test_fused_linear_cosine_similarity_loss_by_hand(
    chunk_size: int, dtype: torch.dtype, rtol: float, counting: bool
) -> None:
    (hidden, weight, bias), (t_hidden, t_weight, t_bias) = heads(dtype)
    labels = some_labels(ROWS, VOCABULARY) if counting else torch.full((ROWS,), OFF)
    loss = liger.LigerFusedLinearCosineSimilarityLoss(0.3, 0.9, 0.7, temperature=1.7, chunk_size=chunk_size)
    value = loss(hidden, weight, t_hidden, t_weight, labels, bias, t_bias)
    expected = cosine_by_hand([hidden, weight, t_hidden, t_weight, labels, bias, t_bias], 0.3, 0.9, 0.7)
    assert float(expected.detach()) > 0.1
    torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=0)
    inputs = (hidden, weight, bias)
    of_gradients = 2**-7 if dtype is torch.bfloat16 else rtol  # these are of the inputs' dtype
    for mine, exact in zip(*(torch.autograd.grad(x, inputs) for x in (value, expected)), strict=True):
        assert mine.dtype == dtype
        assert float(exact.norm()) > 1e-3
        assert float((mine.double() - exact.double()).norm()) < of_gradients * float(exact.norm())


def test_a_cosine_loss_makes_few_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And keeps none for the backward, which makes them once more."""
    (hidden, weight, bias), (t_hidden, t_weight, t_bias) = heads()
    made: list[int] = []
    kept: list[tuple[int, ...]] = []
    product = liger.product

    def watched(*head: Any) -> Tensor:
        made.append(len(head[0]))
        return product(*head)

    def keep(x: Tensor) -> Tensor:
        kept.append(tuple(x.shape))
        return x

    monkeypatch.setattr(liger, "product", watched)
    loss = liger.LigerFusedLinearCosineSimilarityLoss(chunk_size=10)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        value = loss(hidden, weight, t_hidden, t_weight, some_labels(ROWS, VOCABULARY), bias, t_bias)
    assert kept
    assert all(VOCABULARY not in shape[1:] for shape in kept)
    value.backward()
    assert sorted(made) == sorted(2 * 2 * [10, 10, 3])  # of two models, twice


# ---- liger_kernel.transformers: Triton ----
@LABELLED
@BETAS
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_fused_linear_jsd(temperature: float, beta: float, labelled: bool) -> None:
    (hidden, weight, _), (t_hidden, t_weight, _) = heads()
    labels = some_labels(ROWS, VOCABULARY) if labelled else None
    ours = liger.LigerFusedLinearJSD(beta, temperature=temperature)

    def by_hand() -> Tensor:
        s, t = (F.log_softmax(h @ w.T / temperature, -1) for h, w in ((hidden, weight), (t_hidden, t_weight)))
        return jsd(s, t, beta, labels)

    same(lambda: ours(hidden, weight, t_hidden, t_weight, labels), by_hand, (hidden, weight))


@LABELLED
@BETAS
def test_jsd(beta: float, labelled: bool) -> None:
    logits, teacher = torch.randn(ROWS, VOCABULARY, requires_grad=True), torch.randn(ROWS, VOCABULARY)
    labels = some_labels(ROWS, VOCABULARY) if labelled else None

    def of(loss: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: loss(F.log_softmax(logits, -1), F.log_softmax(teacher, -1), labels)

    same(of(liger.LigerJSD(beta)), of(lambda q, p, on: jsd(q, p, beta, on)), (logits,))


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("log_target", [False, True])
def test_kl_div(log_target: bool, reduction: str) -> None:
    logits, teacher = torch.randn(ROWS, VOCABULARY, requires_grad=True), 3 * torch.randn(ROWS, VOCABULARY)
    if not log_target:  # a probability of 0; of its logarithm torch makes NaN
        teacher[:, 3] = -torch.inf
    target = F.log_softmax(teacher, -1) if log_target else F.softmax(teacher, -1)

    def of(loss: nn.Module) -> Callable[[], Tensor]:
        return lambda: loss(F.log_softmax(logits, -1), target)

    settings: dict[str, Any] = {"reduction": reduction, "log_target": log_target}
    same(of(liger.LigerKLDIVLoss(1e-10, **settings)), of(nn.KLDivLoss(**settings)), (logits,))


@LABELLED
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
def test_tvd(reduction: str, labelled: bool) -> None:
    logits, teacher = torch.randn(ROWS, VOCABULARY, requires_grad=True), torch.randn(ROWS, VOCABULARY)
    with torch.no_grad():
        logits[:, 5] -= 200  # a probability of 0, of which the logarithm has no gradient
    labels = some_labels(ROWS, VOCABULARY) if labelled else None

    def of(loss: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: loss(F.softmax(logits, -1), F.softmax(teacher, -1), labels)

    def by_hand(p: Tensor, q: Tensor, _: Tensor | None) -> Tensor:
        losses = (p - q).abs() / 2
        counted = torch.ones(ROWS) if labels is None else (labels != OFF).float()
        losses = losses * counted[:, None]
        divisor = {"batchmean": counted.sum(), "mean": counted.sum() * VOCABULARY}
        return losses if reduction == "none" else losses.sum() / divisor.get(reduction, 1)

    same(of(liger.LigerTVDLoss(reduction)), of(by_hand), (logits,))


def test_lower_precision() -> None:
    (hidden, weight, _), (t_hidden, t_weight, _) = heads(torch.bfloat16)
    loss = liger.LigerFusedLinearJSD(0.3)(hidden, weight, t_hidden, t_weight)
    s, t = (F.log_softmax(h.double() @ w.double().T, -1) for h, w in ((hidden, weight), (t_hidden, t_weight)))
    torch.testing.assert_close(loss.double(), jsd(s, t, 0.3, None), rtol=1e-5, atol=0)


IN_TRITON = """
import itertools, torch, torch.nn.functional as F
from liger_kernel import transformers as theirs
from kdfast.integrations import liger as ours
from other_libraries import same, some_labels
rows, vocabulary = 6, 19
z, h, w = (torch.randn(*s, requires_grad=True) for s in ((rows, vocabulary), (rows, 8), (vocabulary, 8)))
t, th, tw = torch.randn(rows, vocabulary), torch.randn(rows, 5), torch.randn(vocabulary, 5)
for labels in (None, some_labels(rows, vocabulary)):
    logs = lambda f: f(F.log_softmax(z, -1), F.log_softmax(t, -1), labels)
    probabilities = lambda f: f(F.softmax(z, -1), F.softmax(t, -1), labels)
    for beta in (0.0, 0.3, 1.0):
        same(*(lambda f=m.LigerJSD(beta): logs(f) for m in (ours, theirs)), [z])
        fused = (m.LigerFusedLinearJSD(beta, temperature=2.5) for m in (ours, theirs))
        same(*(lambda f=f: f(h, w, th, tw, labels) for f in fused), [h, w])
    for reduction in ("batchmean", "mean", "sum", "none"):
        same(*(lambda f=m.LigerTVDLoss(reduction): probabilities(f) for m in (ours, theirs)), [z])
for reduction, log in itertools.product(("batchmean", "mean", "sum", "none"), (False, True)):
    target = F.log_softmax(t, -1) if log else F.softmax(t, -1)
    losses = (m.LigerKLDIVLoss(reduction=reduction, log_target=log) for m in (ours, theirs))
    same(*(lambda f=f: f(F.log_softmax(z, -1), target) for f in losses), [z])
print("compared")
"""


def test_against_the_kernels() -> None:
    """Triton's interpreter runs liger's kernels on a CPU; it must be told before it is imported."""
    if not all(importlib.util.find_spec(package) for package in ("triton", "liger_kernel")):
        pytest.skip("triton and liger-kernel are not installed")
    paths = [str(Path(__file__).parent), *sys.path]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_TRITON], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "compared" in done.stdout


def cosine_of_heads(change: Callable[..., Any] = lambda *teacher: teacher, **settings: Any) -> Any:
    (hidden, weight, _), (t_hidden, t_weight, _) = heads()
    loss = liger.LigerFusedLinearCosineSimilarityLoss(**settings)
    return loss(hidden, weight, *change(t_hidden, t_weight), some_labels(ROWS, VOCABULARY))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: liger.LigerFusedLinearJSDLoss(-1.0),
            "weight_hard_loss: expected a number that is not negative, got -1.0",
        ),
        (
            lambda: liger.LigerFusedLinearJSDLoss(0.0, 0.0),
            "weight_soft_loss: expected one of the two weights above 0, got 0",
        ),
        (lambda: liger.LigerFusedLinearJSDLoss(temperature=0), "temperature: expected a finite number > 0, got 0"),
        (
            lambda: liger.LigerFusedLinearCosineSimilarityLoss(-1.0),
            "CosineSimilarityLoss: weight_hard_loss: expected a number that is not negative, got -1.0",
        ),
        (
            lambda: liger.LigerFusedLinearCosineSimilarityLoss(temperature=0),
            "CosineSimilarityLoss: temperature: expected a finite number > 0, got 0",
        ),
        (
            lambda: cosine_of_heads(beta=1.5),
            "CosineSimilarityLoss: beta: expected a number from 0 to 1, got 1.5",
        ),
        (lambda: cosine_of_heads(chunk_size=0), "CosineSimilarityLoss: chunk_size: expected 1 or more, got 0"),
        (
            lambda: cosine_of_heads(lambda hidden, weight: (hidden, torch.cat([weight, weight]))),
            "CosineSimilarityLoss: teacher_weight: expected the student's 37 rows, got 74",
        ),
        (
            lambda: cosine_of_heads(lambda hidden, weight: (hidden[1:], weight)),
            r"CosineSimilarityLoss: teacher_input: expected the student's leading dimensions \[23\], got \[22, 24\]",
        ),
        (
            lambda: cosine_of_heads(lambda hidden, weight: (hidden, weight[:, 1:])),
            r"CosineSimilarityLoss: teacher_weight: expected \[V, 24\], the hidden states' size, got \[37, 23\]",
        ),
        (lambda: liger.LigerFusedLinearJSD(temperature=0), "temperature: expected a finite number > 0, got 0"),
        (lambda: liger.LigerTVDLoss("total"), "reduction: expected 'none', 'mean', 'sum' or 'batchmean', got 'total'"),
    ],
)
def test_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_wider_teacher_is_refused() -> None:
    (hidden, weight, _), (t_hidden, t_weight, _) = heads()
    with pytest.raises(ValueError, match="pass vocab_size="):
        liger.LigerFusedLinearJSD()(hidden, weight, t_hidden, torch.cat([t_weight, t_weight]))
