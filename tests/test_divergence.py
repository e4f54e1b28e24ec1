"""What is particular to the divergences: edge values, masking, autograd behaviour, errors."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from accuracy import value_and_gradient
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kdfast
from kdfast import _C
from kdfast.ops import reference

INF = float("inf")
kl_div_reference = reference.of("kl_div")


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = 4 * torch.randn(shape, generator=generator)
    return (teacher + torch.randn(shape, generator=generator)).to(dtype), teacher.to(dtype)


# ---- edge values ----
@pytest.mark.parametrize("width", [5, 40, 40000], ids=["lanes", "vectors", "shared_among_threads"])
@pytest.mark.usefixtures("cpu_variant")
def test_infinite_and_nan_rows_stay_in_their_row(width: int) -> None:
    student, teacher = logits(8, width)
    clean = kdfast.kl_div(student, teacher, reduction="none")
    student[0] = -INF
    teacher[1] = -INF
    student[2, 3] = INF
    teacher[3, 1] = INF
    student[4, 2] = math.nan
    teacher[5, 4] = math.nan
    student[6, 1] = -INF  # p_t > 0 there
    value, gradient = value_and_gradient(kdfast.kl_div, student, teacher, {"reduction": "none"})
    assert value[:6].isnan().all()
    assert value[6] == INF
    assert value[7] == clean[7]
    assert value[7] > 0
    assert gradient[:6].isnan().any(-1).all()
    assert gradient[6:].isfinite().all()
    assert gradient[6, 1] < 0  # -p_t: the gradient of an infinite loss still points the right way


@pytest.mark.usefixtures("cpu_variant")
def test_finite_masks_are_exact() -> None:
    """finfo.min on some columns acts as -inf; on a whole row it is a uniform distribution, as in softmax."""
    student, teacher = logits(3, 100)
    least = torch.finfo(torch.float32).min
    expected = kdfast.kl_div(student[:, :90], teacher[:, :90])
    student[:, 90:] = teacher[:, 90:] = least
    torch.testing.assert_close(kdfast.kl_div(student, teacher), expected)
    student[0] = least
    expected = kl_div_reference(torch.zeros(1, 100).double(), teacher[:1].double())
    torch.testing.assert_close(kdfast.kl_div(student[:1], teacher[:1]).double(), expected)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0), (2, 0, 7)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "batchmean"])
def test_empty_input_gives_zero(shape: tuple[int, ...], reduction: str) -> None:
    student, teacher = torch.zeros(shape, requires_grad=True), torch.zeros(shape)
    value = kdfast.kl_div(student, teacher, reduction=reduction)
    assert value.shape == (shape[:-1] if reduction == "none" else ())
    assert not value.any()
    value.sum().backward()
    assert student.grad is not None
    assert student.grad.shape == shape
    assert not student.grad.any()


def test_all_masked_gives_zero_loss_and_gradient() -> None:
    student, teacher = logits(6, 50)
    for reduction in ("none", "mean", "sum"):
        value, gradient = value_and_gradient(
            kdfast.kl_div, student, teacher, {"mask": torch.zeros(6, dtype=torch.bool), "reduction": reduction}
        )
        assert not value.any()
        assert not gradient.any()


@pytest.mark.parametrize("width", [5, 300, 40000])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.usefixtures("cpu_variant")
def test_masked_rows_are_never_read(width: int, reduction: str) -> None:
    student, teacher = logits(6, width)
    mask = torch.tensor([True, False, True, True, False, True])
    kept = value_and_gradient(kdfast.kl_div, student[mask], teacher[mask], {"reduction": "sum"})[0]
    student[~mask] = teacher[~mask] = math.nan
    value, gradient = value_and_gradient(kdfast.kl_div, student, teacher, {"mask": mask, "reduction": reduction})
    torch.testing.assert_close(value.sum() if reduction == "none" else value * 4, kept)
    assert gradient.isfinite().all()
    assert not gradient[~mask].any()
    assert gradient[mask].any(-1).all()


@pytest.mark.usefixtures("cpu_variant")
def test_padding_columns_are_never_read() -> None:
    student, teacher = logits(4, 200)
    student[:, 150:] = math.nan
    teacher[:, 150:] = INF
    value, gradient = value_and_gradient(kdfast.kl_div, student, teacher, {"vocab_size": 150})
    assert value > 0
    assert not gradient[:, 150:].any()
    assert gradient[:, :150].any(-1).all()


def test_vector_exponential_over_its_whole_range(cpu_variant: str) -> None:
    x = torch.cat((torch.linspace(-160, 127.49, 400001), torch.arange(-155, 128.0), torch.tensor([-0.0, -INF, -1e30])))
    got = torch.tensor(_C.vector_exp2(x.tolist()), dtype=torch.float64)
    exact = torch.exp2(x.double())
    ulp = torch.exp2(torch.floor(torch.log2(exact.clamp(min=2.0**-126))) - 23)
    bound = 1.25 if cpu_variant == "portable" else 1.0  # without and with fused multiply-add
    allowed = bound * ulp
    allowed = torch.where(x < -126, exact, allowed)  # no gradual underflow
    assert bool(((got - exact).abs() <= allowed).all())
    whole = (x == x.round()) & (x >= -126) & (x < 127) & x.isfinite()
    assert torch.equal(got[whole], exact[whole])
    assert math.isnan(_C.vector_exp2([math.nan] * 20)[0])


@pytest.mark.usefixtures("cpu_variant")
def test_vector_logarithm_over_its_whole_range() -> None:
    x = torch.cat((torch.linspace(2**-126, 4, 400001), torch.exp2(torch.linspace(-126, 127.9, 100001))))
    got = torch.tensor(_C.vector_log2(x.tolist()), dtype=torch.float64)
    exact = x.double().log2()
    assert bool(((got - exact).abs() <= 1.5e-7 * exact.abs() + 2**-24 * (exact.abs() > 0.5)).all())
    near = 1 + torch.linspace(-0.2, 0.3, 10001)  # relative precision where the result goes to 0
    got, exact = torch.tensor(_C.vector_log2(near.tolist()), dtype=torch.float64), near.double().log2()
    assert bool(((got - exact).abs() <= 2e-7 * exact.abs()).all())
    special = _C.vector_log2([0.0, 1.0, INF, math.nan, -1.0])
    assert special[:3] == [-INF, 0.0, INF]
    assert math.isnan(special[3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("copies", [1, 20], ids=["lanes", "vectors"])
@pytest.mark.usefixtures("cpu_variant")
def test_every_half_precision_logit(dtype: torch.dtype, copies: int) -> None:
    """All finite values (whose sums are finite) as logits, and so gradients of many magnitudes as they are rounded."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    every = every[every.abs() < 1e36]
    student = torch.stack((every, torch.zeros_like(every)), -1).repeat(1, copies)
    teacher = torch.zeros_like(student)
    value, gradient = value_and_gradient(kdfast.kl_div, student, teacher, {"reduction": "none"})
    exact = value_and_gradient(kl_div_reference, student.double(), teacher.double(), {"reduction": "none"})
    torch.testing.assert_close(value.double(), exact[0], rtol=1e-6, atol=5e-7)
    smallest = 2.0**-24 if dtype == torch.float16 else 2.0**-133
    torch.testing.assert_close(
        gradient.double(), exact[1], rtol=0.51 * torch.finfo(dtype).eps, atol=1.2e-7 + smallest / 2
    )


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_threads_do_not_change_the_result(rows: int) -> None:
    student, teacher = logits(rows, 70000)
    results = []
    threads = torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(value_and_gradient(kdfast.kl_div, student, teacher, {}))
    torch.set_num_threads(threads)
    for value, gradient in results[1:]:
        torch.testing.assert_close(value, results[0][0], rtol=1e-7, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-6, atol=1e-12)


def test_strided_inputs_are_read_in_place() -> None:
    """Peak memory of a call on a transposed view: the gradient, and no copy of the inputs."""
    program = """
import resource, torch, kdfast
student = torch.randn(30000, 1500).T.requires_grad_(); teacher = torch.randn(30000, 1500).T
kdfast.kl_div(student[:8], teacher[:8]).backward(); student.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kdfast.kl_div(student, teacher)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(grown.stdout) < 30000 * 1500 * 4 / 1024 / 4  # KB: a quarter of one input


# ---- autograd ----
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_retained_graph_gives_the_same_gradient_every_time(dtype: torch.dtype, reduction: str) -> None:
    student, teacher = logits(5, 64, dtype=dtype)
    student.requires_grad_()
    loss = kdfast.kl_div(student, teacher, reduction=reduction).sum()
    first, second, last = (
        torch.autograd.grad(factor * loss, student, retain_graph=keep)[0]
        for factor, keep in ((3.0, True), (3.0, True), (-6.0, False))
    )
    assert first.any()
    assert torch.equal(first, second)
    torch.testing.assert_close(last, -2 * first)


def test_used_twice_in_one_graph() -> None:
    student, teacher = logits(5, 64)
    student.requires_grad_()
    loss = kdfast.kl_div(student, teacher)
    (once,) = torch.autograd.grad(loss, student, retain_graph=True)
    (thrice,) = torch.autograd.grad(loss + 2 * loss, student)
    assert once.any()
    torch.testing.assert_close(thrice, 3 * once)


def test_zero_upstream_gives_zero_gradient() -> None:
    student, teacher = logits(5, 64)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(0.0 * kdfast.kl_div(student, teacher), student)
    assert not gradient.any()


def test_accumulates_into_grad() -> None:
    student, teacher = logits(5, 64)
    student.requires_grad_()
    for _ in range(2):
        kdfast.kl_div(student, teacher).backward()
    (once,) = torch.autograd.grad(kdfast.kl_div(student, teacher), student)
    assert once.any()
    torch.testing.assert_close(student.grad, 2 * once)


def test_float16_gradients_survive_many_rows_under_a_grad_scaler() -> None:
    student, teacher = logits(4096, 64, dtype=torch.float16)
    student.requires_grad_()
    loss = kdfast.kl_div(student, teacher, reduction="sum", weight=torch.full((4096,), 2.0**-14))
    (gradient,) = torch.autograd.grad(2.0**14 * loss, student)
    student = student.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(kl_div_reference(student, teacher.double(), reduction="sum"), student)
    assert exact.any()
    torch.testing.assert_close(gradient.double(), exact, rtol=2e-3, atol=1e-6)


def test_grad_scaler_skips_nothing_and_unscales_exactly() -> None:
    """The scale reaches the saved gradient as an upstream factor."""
    linear = nn.Linear(16, 100)
    x, (_, teacher) = torch.randn(8, 16), logits(8, 100)
    kdfast.kl_div(linear(x), teacher).backward()
    expected = [p.grad.clone() for p in linear.parameters() if p.grad is not None]
    linear.zero_grad()
    optimizer, scaler = torch.optim.SGD(linear.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(kdfast.kl_div(linear(x), teacher)).backward()
    scaler.unscale_(optimizer)
    got = [p.grad for p in linear.parameters()]
    assert all(gradient.any() for gradient in expected)
    torch.testing.assert_close(got, expected)


def test_activation_checkpointing() -> None:
    student, teacher = logits(5, 64)
    student.requires_grad_()
    expected = torch.autograd.grad(kdfast.kl_div(student, teacher), student)[0]
    value = checkpoint(lambda s: kdfast.kl_div(s, teacher), student, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(value, student)[0], expected)


def test_double_backward_is_refused() -> None:
    student, teacher = logits(5, 64)
    student.requires_grad_()
    with pytest.raises(RuntimeError, match="kl_div: double backward is not available"):
        torch.autograd.grad(kdfast.kl_div(student, teacher), student, create_graph=True)


def test_teacher_and_no_grad_get_nothing() -> None:
    student, teacher = logits(5, 64)
    teacher.requires_grad_()
    assert not kdfast.kl_div(student, teacher).requires_grad
    with torch.no_grad():
        assert not kdfast.kl_div(student.requires_grad_(), teacher).requires_grad
    kdfast.kl_div(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_under_autocast() -> None:
    linear = nn.Linear(16, 100)
    x, (_, teacher) = torch.randn(8, 16), logits(8, 100)
    with torch.autocast("cpu", torch.bfloat16):
        student = linear(x)
        assert student.dtype == torch.bfloat16
        loss = kdfast.kl_div(student, teacher)
    assert loss.dtype == torch.float32
    loss.backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.any()
    torch.testing.assert_close(loss, kl_div_reference(student.float(), teacher), rtol=1e-5, atol=1e-6)


def test_in_place_scaling_only_when_the_graph_is_not_kept() -> None:
    """A hook sees the gradient tensor; keeping the graph must leave the saved one untouched."""
    student, teacher = logits(5, 64)
    student.requires_grad_()
    loss = kdfast.kl_div(student, teacher)
    (kept,) = torch.autograd.grad(loss, student, 2 * torch.ones(()), retain_graph=True)
    (final,) = torch.autograd.grad(loss, student, torch.ones(()))
    assert kept.any()
    torch.testing.assert_close(kept, 2 * final)


# ---- errors ----
S, T = torch.zeros(3, 4, 7), torch.zeros(3, 4, 7)
BAD = [
    (TypeError, "student_logits: expected float32, bfloat16", (S.long(), T), {}),
    (TypeError, "teacher_logits: expected a tensor, got list", (S, [1.0]), {}),
    (ValueError, "student_logits: expected at least one dimension", (torch.tensor(1.0), T), {}),
    (
        ValueError,
        r"teacher_logits: expected the student's leading dimensions \[3, 4\], got \[3, 5, 7\]",
        (S, torch.zeros(3, 5, 7)),
        {},
    ),
    (ValueError, r"width 7 \(for padded vocabularies pass vocab_size=.*got 8", (S, torch.zeros(3, 4, 8)), {}),
    (ValueError, "vocab_size: expected 1 to 7 for widths 7 and 8, got 8", (S, torch.zeros(3, 4, 8)), {"vocab_size": 8}),
    (ValueError, "vocab_size: expected 1 to 7", (S, T), {"vocab_size": 0}),
    (TypeError, "vocab_size: expected an int, got float", (S, T), {"vocab_size": 3.0}),
    (
        ValueError,
        "reduction: expected 'none', 'mean', 'sum' or 'batchmean', got 'average'",
        (S, T),
        {"reduction": "average"},
    ),
    (ValueError, "reduction: expected logits with a batch dimension", (S[0, 0], T[0, 0]), {"reduction": "batchmean"}),
    (ValueError, "temperature: expected a finite number > 0, got 0", (S, T), {"temperature": 0}),
    (ValueError, "temperature: expected a finite number > 0, got nan", (S, T), {"temperature": math.nan}),
    (TypeError, "temperature: expected a number or a tensor, got str", (S, T), {"temperature": "2"}),
    (
        ValueError,
        "temperature: expected values > 0, got a minimum of -1",
        (S, T),
        {"temperature": torch.tensor([-1.0])},
    ),
    (
        ValueError,
        "temperature: expected a tensor without gradient",
        (S, T),
        {"temperature": torch.ones(1, requires_grad=True)},
    ),
    (ValueError, "weight: expected a tensor without gradient", (S, T), {"weight": torch.ones(4, requires_grad=True)}),
    (
        TypeError,
        "weight: expected a floating-point tensor, got torch.int64",
        (S, T),
        {"weight": torch.ones(4, dtype=torch.long)},
    ),
    (TypeError, "mask: expected a bool tensor.*got torch.int64", (S, T), {"mask": torch.ones(3, 4, dtype=torch.long)}),
    (TypeError, "mask: expected a tensor, got list", (S, T), {"mask": [True]}),
    (
        ValueError,
        r"mask: expected a shape that broadcasts to the leading dimensions \[3, 4\].*pass shape \[B, 1\].*got \[3\]",
        (S, T),
        {"mask": torch.ones(3).bool()},
    ),
    (ValueError, r"weight: expected a shape that broadcasts", (S, T), {"weight": torch.ones(3, 4, 7)}),
    (
        ValueError,
        "num_items: expected reduction='mean' with it, got reduction='sum'",
        (S, T),
        {"num_items": 3, "reduction": "sum"},
    ),
    (ValueError, "num_items: expected a number > 0, got 0", (S, T), {"num_items": 0}),
    (TypeError, "num_items: expected a number or a tensor of one, got str", (S, T), {"num_items": "3"}),
    (ValueError, r"num_items: expected one number, got shape \[2\]", (S, T), {"num_items": torch.ones(2)}),
    (ValueError, "teacher_logits: expected the student's device cpu, got meta", (S, T.to("meta")), {}),
]


@pytest.mark.parametrize(("error", "message", "args", "kwargs"), BAD, ids=[case[1][:40] for case in BAD])
def test_wrong_arguments_raise(error: type[Exception], message: str, args: Any, kwargs: Any) -> None:
    with pytest.raises(error, match="^kl_div: .*" + message):
        kdfast.kl_div(*args, **kwargs)


def test_unknown_cpu_variant_is_refused() -> None:
    with pytest.raises(ValueError, match=r"CPU variant: expected one that this processor runs \(portable.*got 'sse9'"):
        _C.set_cpu_variant("sse9")
    forced = subprocess.run(
        [sys.executable, "-c", "import kdfast; print(kdfast._C.cpu_variant())"],
        env={"KDFAST_CPU_VARIANT": "portable", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert forced.stdout.strip() == "portable"
