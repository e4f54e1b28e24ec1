"""linear_kd_loss and linear_topk_kd_loss beyond their values, which tests/test_operators.py checks over the registry."""

from __future__ import annotations

import itertools
from typing import Any

import accuracy
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kdfast
from kdfast.bench import harness
from kdfast.bench.registry import Operator, Sample
from kdfast.bench.registry.linear import LINEAR
from kdfast.ops import _chunks, _heads, _linear
from kdfast.ops.linear_reference import linear_kd_loss as reference

ROWS, WIDTH, VOCABULARY = 37, 16, 600
ROW = 4 * VOCABULARY  # bytes
LEAST = _heads.WORKSPACE


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    h, w, th, tw = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((ROWS, WIDTH), (VOCABULARY, WIDTH), (ROWS, WIDTH), (VOCABULARY, WIDTH))
    )
    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return h.requires_grad_(), w.requires_grad_(), th, tw, labels


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


# ---- chunks ----
@pytest.mark.parametrize(("on_gpu", "several"), [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("tail", [0, 1, 2, 4])
@pytest.mark.parametrize("rows", [1, 255, 1000, 8192, 30000])
def test_chunks_cover_all_rows_and_their_logits_have_room(rows: int, tail: int, on_gpu: bool, several: bool) -> None:
    for fits in (1 + tail, 100, 1500, 9300, 100_000):
        plan = _chunks.plan(rows, fits, tail, on_gpu, several)
        assert plan.memory <= fits
        chunks = [chunk for slab in plan.slabs for chunk in slab]
        assert chunks[0].begin == 0
        assert chunks[-1].end == rows
        assert all(a.end == b.begin for a, b in itertools.pairwise(chunks))
        for slab in plan.slabs:
            for begin, end in slab:
                # The chunk's logits, at the end, are beyond the gradients that are written with it.
                assert end > begin
                assert plan.memory - tail * (end - begin) >= end - slab[0].begin


FEW = [(o, s) for o in LINEAR.values() for s in o.samples if "memory_budget" in s.kwargs(torch.Generator())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("operator", "sample"), [pytest.param(o, s, id=f"{o.name}-{s.name}") for o, s in FEW])
def test_samples_of_few_rows_take_several_slabs_on_a_gpu(
    operator: Operator, sample: Sample, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which has no workspace beside its rows: the CPU's budget would hold all of them."""
    plans = []

    def planned(loop: _linear.Loop, budget: int, padding: int) -> None:
        plans.append(loop.plan(budget))
        raise InterruptedError

    student, teacher, kwargs = accuracy.inputs(sample, 1.0, dtype, dtype)
    monkeypatch.setattr(_heads, "on_gpu", lambda x: True)
    monkeypatch.setattr(_linear.Loop, "run", planned)
    with pytest.raises(InterruptedError):
        accuracy.value_and_gradient(operator.function, student, teacher, kwargs | sample.on_gpu)
    assert len(plans[0].slabs) > 1


def test_chunks_of_the_gpu_study() -> None:
    """8192 rows, 16-bit gradients, float32 logits of both models: few and large, in a tail of 1024 rows."""
    plan = _chunks.plan(8192, 1 << 20, 4, True, True)
    assert plan.memory == 8192 + 4 * 256
    sizes = [chunk.end - chunk.begin for chunk in plan.slabs[0]]
    assert len(plan.slabs) == 1
    assert sizes == [1792, 1408, 1152, 896, 768, 640, 512, 384, 256, 256, 128]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_result_for_every_budget(dtype: torch.dtype) -> None:
    h, w, th, tw, labels = inputs(dtype)
    found = []
    for rows in (1, 2, 5, 36, 37, 1000):
        loss = kdfast.linear_kd_loss(h, w, th, tw, labels, memory_budget=LEAST + 2 * ROW * rows)
        found.append((loss, *torch.autograd.grad(loss, (h, w))))
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    for loss, *gradients in found[1:]:
        assert relative(loss, found[0][0]) < 1e-6
        assert all(relative(a, b) < rounding for a, b in zip(gradients, found[0][1:], strict=True))
    again = kdfast.linear_kd_loss(h, w, th, tw, labels, memory_budget=LEAST + 2 * ROW * 5)
    assert all(map(torch.equal, (again, *torch.autograd.grad(again, (h, w))), found[2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gap", [1.0, 0.1, 0.05])
def test_as_exact_as_float32_logits(gap: float, dtype: torch.dtype) -> None:
    """The closer student and teacher are, the more a rounded logit costs; none is rounded."""
    generator = torch.Generator().manual_seed(0)
    th, tw = torch.randn(64, 48, generator=generator), torch.randn(9000, 48, generator=generator) / 2
    student = [(x + gap * torch.randn(x.shape, generator=generator) / 2).to(dtype).requires_grad_() for x in (th, tw)]
    teacher = [x.to(dtype) for x in (th, tw)]
    double = [x.detach().double().requires_grad_() for x in student]
    exact = torch.autograd.grad(reference(*double, *(x.double() for x in teacher), alpha=1.0), double)
    eager = torch.autograd.grad(reference(*student, *teacher, alpha=1.0), student)
    budget = LEAST + 20 * 2 * 4 * 9000
    ours = torch.autograd.grad(kdfast.linear_kd_loss(*student, *teacher, alpha=1.0, memory_budget=budget), student)
    for got, usual, true in zip(ours, eager, exact, strict=True):
        assert 0 < relative(got, true) <= 2 * relative(usual, true)


def test_memory_budget_holds() -> None:
    """Peak memory beyond the inputs: the gradients, the budget, and little else."""
    generator = torch.Generator().manual_seed(0)
    h, w, th, tw = (torch.randn(n, 64, generator=generator) for n in (512, 50000, 512, 50000))
    h.requires_grad_(), w.requires_grad_()
    budget = 64 << 20

    def ours() -> object:
        return torch.autograd.grad(kdfast.linear_kd_loss(h, w, th, tw, alpha=1.0, memory_budget=budget), (h, w))

    def eager() -> object:
        return torch.autograd.grad(reference(h, w, th, tw, alpha=1.0), (h, w))

    gradients = 4 * (h.numel() + w.numel()) / 1e6
    assert harness.peak_memory(ours, "cpu") < gradients + budget / 1e6 + 4
    assert harness.peak_memory(eager, "cpu") > 300


# ---- autograd ----
def test_backward_scales_what_the_forward_made() -> None:
    h, w, th, tw, labels = inputs()
    h64, w64 = (x.detach().double().requires_grad_() for x in (h, w))
    exact = torch.autograd.grad(reference(h64, w64, th.double(), tw.double(), labels), (h64, w64))
    loss = kdfast.linear_kd_loss(h, w, th, tw, labels)
    for factor in (3.0, 0.0, 1.0, -0.5):  # the graph is kept: nothing may be scaled in place
        for got, expected in zip(torch.autograd.grad(factor * loss, (h, w), retain_graph=True), exact, strict=True):
            assert (got - factor * expected).norm() <= 1e-6 * abs(factor) * expected.norm()
    (2 * loss).backward()
    assert relative(w.grad, 2 * exact[1]) < 1e-6
    kdfast.linear_kd_loss(h, w, th, tw, labels).backward()  # accumulates
    assert relative(w.grad, 3 * exact[1]) < 1e-6


def test_only_what_needs_a_gradient_gets_one() -> None:
    h, w, th, tw, labels = inputs()
    both = torch.autograd.grad(kdfast.linear_kd_loss(h, w, th, tw, labels), (h, w))
    frozen = kdfast.linear_kd_loss(h, w.detach(), th, tw, labels)
    assert torch.equal(torch.autograd.grad(frozen, h)[0], both[0])
    frozen = kdfast.linear_kd_loss(h.detach(), w, th, tw, labels)
    assert torch.equal(torch.autograd.grad(frozen, w)[0], both[1])
    assert not kdfast.linear_kd_loss(h.detach(), w.detach(), th.requires_grad_(), tw, labels).requires_grad
    with torch.no_grad():
        value = kdfast.linear_kd_loss(h, w, th, tw, labels)
    assert not value.requires_grad
    torch.testing.assert_close(value, frozen.detach())


def test_double_backward_is_refused() -> None:
    h, w, th, tw, labels = inputs()
    loss = kdfast.linear_kd_loss(h, w, th, tw, labels)
    with pytest.raises(RuntimeError, match="linear_kd_loss: double backward is not available"):
        torch.autograd.grad(loss, (h, w), create_graph=True)


def test_tied_embeddings_and_checkpointing() -> None:
    """The weight is an input of the hidden states too; and the forward may run twice."""
    _, w, _, tw, labels = inputs()

    def loss_of(function: Any, weight: Tensor) -> Tensor:
        hidden = torch.tanh(weight[labels] * 2)
        return function(hidden, weight, tw[labels].to(weight.dtype), tw.to(weight.dtype), labels)

    exact = w.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(loss_of(reference, exact), exact)
    (ours,) = torch.autograd.grad(loss_of(kdfast.linear_kd_loss, w), w)
    (again,) = torch.autograd.grad(checkpoint(loss_of, kdfast.linear_kd_loss, w, use_reentrant=False), w)
    assert relative(ours, expected) < 1e-6
    assert torch.equal(again, ours)


def test_float16_gradients_do_not_underflow() -> None:
    """Divided by many rows they would; a GradScaler's factor comes later."""
    h, w, th, tw, labels = inputs(torch.float16)
    factor, rows = 2.0**13, 2.0**20
    loss = kdfast.linear_kd_loss(h, w, th, tw, labels, num_items=rows)
    gradients = torch.autograd.grad(factor * loss, (h, w))
    exact = [x.detach().double().requires_grad_() for x in (h, w)]
    expected = torch.autograd.grad(factor * reference(*exact, th.double(), tw.double(), labels, num_items=rows), exact)
    for got, wanted in zip(gradients, expected, strict=True):
        assert got.dtype == torch.float16
        assert relative(got, wanted) < 2e-3


def test_autocast() -> None:
    h, w, th, tw, labels = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = kdfast.linear_kd_loss(h, w, th, tw, labels)
    assert loss.dtype == torch.float32
    gradients = torch.autograd.grad(loss, (h, w))
    low = [x.detach().bfloat16().requires_grad_() for x in (h, w)]
    direct = kdfast.linear_kd_loss(*low, th.bfloat16(), tw.bfloat16(), labels)
    assert torch.equal(loss, direct)
    for got, x, expected in zip(gradients, (h, w), torch.autograd.grad(direct, low), strict=True):
        assert got.dtype == x.dtype
        assert torch.equal(got, expected.float())


# ---- inputs ----
def test_given_logits_of_the_teacher() -> None:
    """Shifted, masked, of another dtype: no copy but of a chunk."""
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(3, 12, WIDTH, generator=generator, requires_grad=True)
    _, w, *_ = inputs()
    teacher = torch.randn(3, 12, VOCABULARY, generator=generator).bfloat16()
    mask = torch.rand(3, 11, generator=generator) < 0.5
    for more in ({}, {"mask": mask}, {"mask": mask, "reduction": "none"}):
        loss = kdfast.linear_kd_loss(
            h[:, :-1], w, teacher_logits=teacher[:, 1:], alpha=1.0, memory_budget=LEAST + 9 * ROW, **more
        )
        expected = kdfast.kd_loss(h[:, :-1] @ w.T, teacher[:, 1:], alpha=1.0, **more)
        torch.testing.assert_close(loss, expected)
        for got, wanted in zip(
            torch.autograd.grad(loss.sum(), (h, w)), torch.autograd.grad(expected.sum(), (h, w)), strict=True
        ):
            assert relative(got, wanted) < 1e-6


@pytest.mark.parametrize("side", ["student", "teacher", "logits"])
def test_one_side_in_float64(side: str) -> None:
    h, w, th, tw, labels = inputs()
    if side == "student":
        h, w = (x.detach().double().requires_grad_() for x in (h, w))
    else:
        th, tw = th.double(), tw.double()
    teacher: Any = {"teacher_logits": th @ tw.T} if side == "logits" else {"teacher_hidden": th, "teacher_weight": tw}
    loss = kdfast.linear_kd_loss(h, w, labels=labels, **teacher)
    assert loss.dtype == torch.float64
    exact = [x.detach().double().requires_grad_() for x in (h, w)]
    expected = reference(*exact, th.double(), tw.double(), labels)
    assert abs(float((loss - expected).detach())) < 1e-12
    for got, wanted in zip(torch.autograd.grad(loss, (h, w)), torch.autograd.grad(expected, exact), strict=True):
        assert relative(got, wanted) < (1e-12 if side == "student" else 1e-7)


def test_masked_rows_are_not_read() -> None:
    h, w, th, tw, labels = inputs()
    mask = torch.arange(ROWS) % 3 != 0
    bad_h, bad_th = h.detach().clone(), th.clone()
    bad_h[~mask] = bad_th[~mask] = torch.nan
    bad_h.requires_grad_()
    labels[0] = 10**6
    loss = kdfast.linear_kd_loss(bad_h, w, bad_th, tw, labels, mask=mask)
    gradients = torch.autograd.grad(loss, (bad_h, w))
    expected = kdfast.linear_kd_loss(h[mask], w, th[mask], tw, labels[mask])
    exact = torch.autograd.grad(expected, (h, w))
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, exact, strict=True))
    assert (gradients[0][~mask] == 0).all()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "batchmean"])
def test_no_rows(reduction: str) -> None:
    h, w, th, tw, labels = inputs()
    nothing = torch.zeros(ROWS, dtype=torch.bool)
    for rows, more in ((ROWS, {"mask": nothing}), (0, {})):
        loss = kdfast.linear_kd_loss(h[:rows], w, th[:rows], tw, labels[:rows], reduction=reduction, **more)
        assert loss.shape == ((rows,) if reduction == "none" else ())
        assert (loss == 0).all()
        for gradient, x in zip(torch.autograd.grad(loss.sum(), (h, w)), (h, w), strict=True):
            assert gradient.shape == x.shape
            assert (gradient == 0).all()


def test_components() -> None:
    h, w, th, tw, labels = inputs()
    labels[::5] = -100
    ours = kdfast.linear_kd_loss(
        h, w, th, tw, labels, alpha=0.3, memory_budget=LEAST + 20 * ROW, return_components=True
    )
    expected = kdfast.kd_loss(h @ w.T, th @ tw.T, labels, alpha=0.3, return_components=True)
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    assert not ours.divergence.requires_grad
    rows = kdfast.linear_kd_loss(h, w, th, tw, labels, reduction="none", return_components=True)
    assert rows.cross_entropy.shape == (ROWS,)
    assert (rows.cross_entropy[::5] == 0).all()


def test_topk_of_everything_is_kl_div() -> None:
    h, w, th, tw, labels = inputs()
    teacher = th @ tw.T
    log_t, indices = (teacher / 2).log_softmax(-1).sort(-1, descending=True)
    for tail in ("bucket", "renormalize", "drop"):
        loss = kdfast.linear_topk_kd_loss(h, w, log_t, indices, labels, tail=tail)
        expected = kdfast.linear_kd_loss(h, w, teacher_logits=teacher, labels=labels)
        torch.testing.assert_close(loss, expected)
        logits = (h @ w.T).detach().requires_grad_()
        direct = kdfast.topk_kl_div(logits, log_t, indices.int(), tail=tail, temperature=2.0)
        dense = kdfast.kl_div(logits, teacher, temperature=2.0)
        torch.testing.assert_close(direct, dense)
        ours, exact = torch.autograd.grad(direct, logits), torch.autograd.grad(dense, logits)
        assert relative(ours[0], exact[0]) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reduction": "none", "mask": True},
        {"student_softcap": 5.0, "return_components": True},
        {"return_entropy": True},
    ],
)
def test_compiles_without_graph_breaks(settings: dict[str, Any]) -> None:
    h, w, th, tw, labels = inputs()
    more = settings | ({"mask": torch.arange(ROWS) % 3 != 0} if "mask" in settings else {})

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        loss = kdfast.linear_kd_loss(hidden, weight, th, tw, labels, **more)
        return loss.loss if isinstance(loss, tuple) else loss

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss_of, compiled):
        loss = function(h, w)
        results.append((loss, *torch.autograd.grad(loss.sum(), (h, w))))
    assert all(map(torch.equal, *results))


# ---- labels alone ----
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_labels_alone_need_no_teacher(dtype: torch.dtype, reduction: str) -> None:
    h, w, _, _, labels = inputs(dtype)
    labels[:5] = -100
    bias, softcap, budget = torch.randn(VOCABULARY).to(dtype), 8.0, LEAST + 9 * ROW
    settings: dict[str, Any] = {"student_bias": bias, "student_softcap": softcap, "memory_budget": budget}
    loss = kdfast.linear_kd_loss(
        h, w, labels=labels, alpha=0.0, label_smoothing=0.1, reduction=reduction, **settings, return_components=True
    )
    z = softcap * torch.tanh((h.double() @ w.double().T + bias.double()) / softcap)
    exact = torch.nn.functional.cross_entropy(z, labels, label_smoothing=0.1, reduction=reduction)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert relative(loss.loss, exact) < tolerance
    assert relative(loss.cross_entropy, exact) < tolerance
    assert not loss.divergence.any()
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3}[dtype]
    for got, expected in zip(*(torch.autograd.grad(x.sum(), (h, w)) for x in (loss.loss, exact)), strict=True):
        assert relative(got, expected) < rounding


@pytest.mark.parametrize("divergence", ["kl_div", "reverse_kl_div", "js_div", "logit_mse"])
def test_labels_alone_with_columns_that_cannot_be(divergence: str) -> None:
    """Whose divergence from anything would be infinite."""
    h, w, _, _, labels = inputs()
    bias = torch.zeros(VOCABULARY)
    bias[::7], labels = -torch.inf, labels // 7 * 7 + 1
    loss = kdfast.linear_kd_loss(h, w, labels=labels, alpha=0.0, student_bias=bias, divergence=divergence)
    exact = torch.nn.functional.cross_entropy(h @ w.T + bias, labels)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    assert torch.autograd.grad(loss, w)[0].isfinite().all()
