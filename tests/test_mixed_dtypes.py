"""Student, teacher and trained parameters of different dtypes, outside and inside autocast: against float64 of the same
rounded numbers (tests/accuracy.py), or one clear error. Nothing here depends on whether the processor has bfloat16."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from accuracy import check, inputs, value_and_gradient
from torch import Tensor

import kdfast
from kdfast.bench.registry import OPERATORS, Operator, Sample
from kdfast.bench.registry.linear import LINEAR
from kdfast.bench.registry.operator import apply, mapped, tensors
from kdfast.bench.registry.pruned import PRUNED
from kdfast.ops.linear_reference import linear_kd_loss as linear_reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FIRST = [pytest.param(operator, operator.samples[0], id=name) for name, operator in OPERATORS.items()]


def named(dtypes: tuple[torch.dtype, ...]) -> str:
    return "-".join(map(str, dtypes)).replace("torch.", "")


def pairs(of: tuple[torch.dtype, ...] = FLOATS) -> list[Any]:
    return [pytest.param(*pair, id=named(pair)) for pair in itertools.product(of, of)]


def relative(got: Tensor, exact: Tensor) -> float:
    assert exact.any(), "zeros would pass"
    return float((got.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize(("student", "teacher"), pairs())
@pytest.mark.parametrize(("operator", "sample"), FIRST)
def test_any_two_dtypes(operator: Operator, sample: Sample, student: torch.dtype, teacher: torch.dtype) -> None:
    check(operator, sample, 1.0, student, teacher)


@pytest.mark.parametrize(("student", "teacher"), pairs())
@pytest.mark.parametrize(("operator", "sample"), [case for case in FIRST if case.id not in LINEAR | PRUNED])
def test_autocast_changes_nothing(
    operator: Operator, sample: Sample, student: torch.dtype, teacher: torch.dtype
) -> None:
    """Operators without a matrix product of torch's read 16 bits as they are and add up in float32."""
    given = inputs(sample, 1.0, student, teacher)

    def under_autocast(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return operator.function(*args, **kwargs)

    expected = value_and_gradient(operator.function, *given)
    assert all(x.any() for x in expected)
    assert all(map(torch.equal, value_and_gradient(under_autocast, *given), expected))


# ---- parameters ----
def hidden(student: torch.dtype, parameters: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Student, projection and bias, trained; the teacher's hidden states."""
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(shape, generator=generator) for shape in ((3, 7, 32), (48, 32), (48,), (3, 7, 48))]
    dtypes = (student, parameters, parameters)
    return [x.to(dtype).requires_grad_() for x, dtype in zip(made, dtypes, strict=False)], made[3]


def projected(trained: list[Tensor], teacher: Tensor, reduction: str = "mean") -> Tensor:
    student, weight, bias = trained
    return kdfast.hidden_mse(student, teacher, projection=weight, bias=bias, reduction=reduction)


def in_double(trained: list[Tensor], teacher: Tensor, reduction: str) -> tuple[Tensor, ...]:
    x, weight, bias = doubled = [y.detach().double().requires_grad_() for y in trained]
    squares = (x @ weight.T + bias - teacher.double()).square().mean(-1)
    loss = squares if reduction == "none" else squares.mean()
    return (loss, *torch.autograd.grad(loss.sum(), doubled))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("precision", ["outside", "autocast"])
@pytest.mark.parametrize(("student", "parameters"), pairs((*FLOATS, torch.float64)))
def test_a_projection_of_another_dtype(
    student: torch.dtype, parameters: torch.dtype, precision: str, reduction: str
) -> None:
    """Made in the wider dtype; the gradients in each one's own, to one rounding of it."""
    trained, teacher = hidden(student, parameters)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        loss = projected(trained, teacher, reduction)
    exact = in_double(trained, teacher, reduction)
    product = torch.promote_types(student, parameters)
    assert loss.dtype == torch.promote_types(product, torch.float32)
    if precision == "autocast" and product != torch.float64:
        product = torch.bfloat16
    # 16-bit products are rounded, as any linear layer's; of others a sum has its roundings.
    allowed = torch.finfo(product).eps * (1 if product.itemsize == 2 else 16)
    gradients = torch.autograd.grad(loss.sum(), trained)
    for got, x, wanted in zip((loss, *gradients), (loss, *trained), exact, strict=True):
        assert got.dtype == x.dtype
        assert relative(got, wanted) <= max(allowed, torch.finfo(got.dtype).eps / 2)


def test_a_float32_projection_of_bfloat16_layers_is_exact() -> None:
    """What separates rounding the product from rounding nothing: a student that is close to its teacher."""
    (student, weight, bias), _ = hidden(torch.bfloat16, torch.float32)
    near = (student.double() @ weight.double().T + bias.double()).detach() + 1e-3
    trained = [student, weight, bias]
    loss = projected(trained, near.float())
    exact = in_double(trained, near.float(), "mean")
    assert relative(loss, exact[0]) < 1e-3
    for got, wanted in zip(torch.autograd.grad(loss, trained), exact[1:], strict=True):
        assert relative(got, wanted) < max(1e-3, torch.finfo(got.dtype).eps / 2)


def test_several_layers_share_a_projection_of_another_dtype() -> None:
    (student, weight, bias), teacher = hidden(torch.bfloat16, torch.float32)
    loss = kdfast.hidden_mse([student, 2 * student], [teacher, -teacher], projection=weight, bias=bias)
    exact = [in_double([x, weight, bias], t, "mean") for x, t in ((student, teacher), (2 * student, -teacher))]
    assert relative(loss, exact[0][0] + exact[1][0]) < 2e-6
    assert relative(torch.autograd.grad(loss, weight)[0], exact[0][2] + exact[1][2]) < 2e-6


# ---- heads ----
def head(hidden: torch.dtype, weight: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    of = [torch.randn(shape, generator=generator) for shape in ((9, 16), (70, 16))]
    return of[0].to(hidden).requires_grad_(), of[1].to(weight).requires_grad_()


@pytest.mark.parametrize(("hidden", "weight"), [pair for pair in pairs() if len(set(pair.values)) == 2])
def test_a_head_has_one_dtype_but_under_autocast(hidden: torch.dtype, weight: torch.dtype) -> None:
    student, teacher = head(hidden, weight, 0), head(torch.float32, torch.float32, 1)
    with pytest.raises(
        TypeError, match=f"linear_kd_loss: student_weight: expected the hidden states' dtype {hidden}, got"
    ):
        kdfast.linear_kd_loss(*student, *teacher, alpha=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = kdfast.linear_kd_loss(*student, *teacher, alpha=1.0)
    gradients = torch.autograd.grad(loss, student)
    low = [x.detach().bfloat16().double().requires_grad_() for x in (*student, *teacher)]
    exact = linear_reference(*low, alpha=1.0)
    assert relative(loss, exact) < 1e-5
    for got, x, wanted in zip(gradients, student, torch.autograd.grad(exact, low[:2]), strict=True):
        assert got.dtype == x.dtype
        assert relative(got, wanted) < torch.finfo(torch.bfloat16).eps


# ---- layers ----
LAYERS = (torch.bfloat16, torch.float32, torch.float16)
OF_LAYERS = [
    name for name, operator in OPERATORS.items() if operator.native[:1] in (("layer_distance",), ("qk_distance",))
]


@pytest.mark.parametrize("name", OF_LAYERS)
def test_layers_of_several_dtypes(name: str) -> None:
    """And queries of another dtype than keys. Every layer gets its gradient in its own."""
    operator, generator = OPERATORS[name], torch.Generator().manual_seed(0)
    sample = next(s for s in operator.samples if s.name in ("single", "first", "scores", "one_tile"))

    def made(gap: float) -> tuple[Any, Any]:
        """Three layers of student and teacher."""
        layers = [sample.make(generator, gap) for _ in LAYERS]
        return tuple(
            tuple(zip(*side, strict=True)) if isinstance(side[0], tuple) else tuple(side)
            for side in zip(*layers, strict=True)
        )

    def cast(side: Any, turn: int = 0) -> Any:
        if isinstance(side[0], tuple):
            return tuple(cast(x, turn) for turn, x in enumerate(side))
        return [x.to(LAYERS[(i + turn) % 3]).requires_grad_() for i, x in enumerate(side)]

    student, teacher = (cast(side) for side in made(1.0))
    loss = apply(operator.function, student, teacher)
    doubled = [mapped(lambda x: x.detach().double().requires_grad_(), side) for side in (student, teacher)]
    exact = apply(operator.reference, *doubled)
    assert loss.dtype == torch.float32
    assert relative(loss, exact) < 1e-5
    gradients = torch.autograd.grad(loss, tensors(student))
    for got, x, wanted in zip(
        gradients, tensors(student), torch.autograd.grad(exact, tensors(doubled[0])), strict=True
    ):
        assert got.dtype == x.dtype
        assert relative(got, wanted) < max(1e-5, torch.finfo(got.dtype).eps)


@pytest.mark.parametrize("name", ["hidden_mse", "attention_mse", "attention_kl", "qk_attention_mse", "qk_relation_kl"])
def test_float64_beside_float32_where_a_mask_decides_the_divisor(name: str) -> None:
    operator = OPERATORS[name]
    sample = next(
        sample
        for sample in operator.samples
        if {"mask", "key_mask"} & {*sample.kwargs(torch.Generator().manual_seed(0))}
    )
    given = inputs(sample, 1.0, torch.float32, torch.float64)
    exact = value_and_gradient(operator.function, *inputs(sample, 1.0, torch.float64, torch.float64))
    for got, wanted in zip(value_and_gradient(operator.function, *given), exact, strict=True):
        assert relative(got, wanted) < 1e-6
