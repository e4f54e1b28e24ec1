"""The accuracy rule: at most twice the error of eager PyTorch of the same dtype, or a floor of rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast import _C
from kdfast.bench.registry import Operator, Sample
from kdfast.bench.registry.operator import Side, apply, cast, mapped, tensors

ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2**-9, torch.float16: 2**-12}


def inputs(sample: Sample, gap: float, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(7)
    student, teacher = sample.make(generator, gap)
    kwargs = with_trained(sample.kwargs(generator), student_dtype)
    return strided_to(student, student_dtype), strided_to(teacher, teacher_dtype), kwargs


def strided_to(side: Side, dtype: torch.dtype) -> Side:
    """Casts without making a non-contiguous sample contiguous."""
    return mapped(
        lambda x: torch.empty_strided(x.shape, x.stride(), dtype=dtype if x.is_floating_point() else x.dtype).copy_(x),
        side,
    )


def with_trained(kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Parameters have the student's dtype."""
    return {name: x.to(dtype) if name in ("projection", "bias", "student_bias") else x for name, x in kwargs.items()}


def value_and_gradient(function: Any, student: Side, teacher: Side, kwargs: Any) -> tuple[Tensor, Tensor]:
    """The gradients of a student of several tensors as one vector."""
    student = mapped(lambda x: x.detach().requires_grad_(x.is_floating_point()), student)
    value = apply(function, student, teacher, **kwargs)
    # A different factor per element: a constant one would hide rows that are mixed up.
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape)
    gradients = torch.autograd.grad(value, tensors(student), upstream)
    assert [g.shape for g in gradients] == [x.shape for x in tensors(student)]
    return value.detach(), gradients[0] if len(gradients) == 1 else torch.cat([g.flatten() for g in gradients])


def check(
    operator: Operator,
    sample: Sample,
    gap: float,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    device: str = "cpu",
) -> None:
    """The operator's value and gradient on one sample, under every CPU variant or on the device, where everything that they
    are compared with is made too."""
    student, teacher, kwargs = inputs(sample, gap, student_dtype, teacher_dtype)
    if device != "cpu":
        student, teacher, kwargs = (mapped(lambda x: x.to(device), x) for x in (student, teacher, kwargs))
    doubled = [cast(side, torch.float64) for side in (student, teacher)]
    exact = value_and_gradient(operator.reference, *doubled, with_trained(kwargs, torch.float64))
    eager = value_and_gradient(operator.reference, student, teacher, kwargs)
    dtypes = (student_dtype, teacher_dtype)
    value_floor, gradient_floor = limits(operator, student, teacher, kwargs, dtypes, exact)
    real = torch.float64 if torch.float64 in dtypes else torch.float32
    result = student_dtype if operator.product else real
    kwargs |= sample.on_gpu if device == "cuda" else {}
    for variant in _C.cpu_variants() if device == "cpu" else (_C.cpu_variant(),):
        value, gradient = under_variant(variant, operator, student, teacher, kwargs)
        assert value.dtype == result
        assert gradient.dtype == student_dtype
        close(value, exact[0], eager[0], value_floor, variant)
        close(gradient, exact[1], eager[1], torch.tensor(gradient_floor), variant, norm=True)


def limits(
    operator: Operator,
    student: Side,
    teacher: Side,
    kwargs: dict[str, Any],
    dtypes: tuple[torch.dtype, torch.dtype],
    exact: tuple[Tensor, Tensor],
) -> tuple[Tensor, float]:
    """The errors of value and gradient that are allowed whatever eager PyTorch makes."""
    value, gradient = operator.floors(operator.reference, student, teacher, kwargs, exact)
    if torch.float64 in dtypes:
        # The exact result is no more exact than this one (on aarch64 eager sums are off by four of these floors, where
        # kdfast is not), and 1 - cos loses what cos rounds.
        value = value * 2**-26 + operator.exact
        gradient = gradient * 2**-26 * (2 if operator.exact else 1)
    return value, gradient + ROUNDING[dtypes[0]] * float(exact[1].norm())


def under_variant(
    variant: str, operator: Operator, student: Side, teacher: Side, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    before = _C.cpu_variant()
    _C.set_cpu_variant(variant)
    try:
        return value_and_gradient(operator.function, student, teacher, kwargs)
    finally:
        _C.set_cpu_variant(before)


def close(got: Tensor, exact: Tensor, eager: Tensor, floor: Tensor, label: str, norm: bool = False) -> None:
    """NaN never passes; an infinity only where the exact result has the same one; zeros must fail."""
    finite = exact.isfinite()
    assert torch.equal(got.double()[~finite], exact[~finite]), "infinities differ"
    got, exact, eager = (torch.where(finite, x.double(), 0.0) for x in (got, exact, eager))
    size = (lambda x: x.norm()) if norm else (lambda x: x.abs())
    allowed = torch.maximum(2 * size(eager - exact), floor.to(got.device))
    error = size(got - exact)
    assert bool((error <= allowed).all()), f"{label}: error {error.max():.3e}, allowed {allowed.max():.3e}"
    if exact.any():
        assert not bool((size(exact) <= allowed).all()), "a zero result would pass: the tolerance is too loose"
