"""The accuracy rule: at most twice the error of eager PyTorch of the same dtype, or a floor of rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast import _C
from kdfast.ops.reference import reduce_rows
from kdfast.registry import Operator, Sample

ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2**-9, torch.float16: 2**-12}


def inputs(sample: Sample, gap: float, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(7)
    student, teacher = sample.make(generator, gap)
    return strided_to(student, student_dtype), strided_to(teacher, teacher_dtype), sample.kwargs(generator)


def strided_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts without making a non-contiguous sample contiguous."""
    out = torch.empty_strided(x.shape, x.stride(), dtype=dtype)
    return out.copy_(x)


def value_and_gradient(function: Any, student: Tensor, teacher: Tensor, kwargs: Any) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    value = function(student, teacher, **kwargs)
    # A different factor per element: a constant one would hide rows that are mixed up.
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape)
    (gradient,) = torch.autograd.grad(value, student, upstream)
    return value.detach(), gradient


SETTINGS = ("labels", "alpha", "divergence", "beta", "skew", "label_smoothing")


def floors(student: Tensor, teacher: Tensor, kwargs: Any, operator: str) -> tuple[Tensor, float]:
    """Absolute floors: of the value (2^-22 max|z/T|, per result) and of the gradient's norm (2^-19 ‖p_t‖/T)."""
    kwargs, kd_loss = dict(kwargs), operator == "kd_loss"
    columns = kwargs.pop("vocab_size", None)
    temperature = torch.as_tensor(kwargs.pop("temperature", 2.0 if kd_loss else 1.0), dtype=torch.float64)
    temperature = temperature.expand(student.shape[:-1])
    alpha = kwargs.get("alpha", 0.5)
    # What kd_loss multiplies by: T² before the divergence, and a cross-entropy of logits that are not divided by T.
    factor = alpha * temperature**2 + (1 - alpha) * temperature if kd_loss else torch.ones_like(temperature)
    reduction = {"mask": None, "weight": None, "reduction": "mean", "num_items": None} | kwargs
    reduction = {name: x for name, x in reduction.items() if name not in SETTINGS}
    z = [x[..., :columns].double() / temperature[..., None] for x in (student, teacher)]
    squared = operator == "logit_mse"
    largest = max(float(x[x.isfinite()].abs().max()) for x in ([z[0] - z[1]] if squared else z))
    value = reduce_rows(2**-22 * largest ** (2 if squared else 1) * factor, **reduction)
    coefficients = torch.ones(student.shape[:-1], dtype=torch.float64, requires_grad=True)
    (factors,) = torch.autograd.grad(reduce_rows(coefficients, **reduction).sum(), coefficients)
    p = z[1].softmax(-1) * (1.5 * factors * factor / temperature)[..., None]
    labels = (1 - alpha) * 1.5 * factors if kd_loss else torch.zeros(1)  # the cross-entropy's target instead of p_t
    return value, 2**-19 * float(p.norm() + labels.norm())


def check(
    operator: Operator,
    sample: Sample,
    gap: float,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    device: str = "cpu",
) -> None:
    """The operator's value and gradient on one sample, under every CPU variant or on the device."""
    student, teacher, kwargs = inputs(sample, gap, student_dtype, teacher_dtype)
    exact = value_and_gradient(operator.reference, student.double(), teacher.double(), kwargs)
    eager = value_and_gradient(operator.reference, student, teacher, kwargs)
    value_floor, gradient_floor = floors(student, teacher, kwargs, operator.name)
    real = torch.float64 if torch.float64 in (student_dtype, teacher_dtype) else torch.float32
    if real == torch.float64:
        value_floor, gradient_floor = value_floor * 2**-29, gradient_floor * 2**-29
    rounding = ROUNDING[student_dtype] * float(exact[1].norm())
    for variant in _C.cpu_variants() if device == "cpu" else (None,):
        value, gradient = on_device(operator, student, teacher, kwargs, device, variant)
        assert value.dtype == real
        assert gradient.dtype == student_dtype
        assert gradient.shape == student.shape
        close(value.cpu(), exact[0], eager[0], value_floor, str(variant))
        close(gradient.cpu(), exact[1], eager[1], torch.tensor(gradient_floor + rounding), str(variant), norm=True)


def on_device(
    operator: Operator, student: Tensor, teacher: Tensor, kwargs: dict[str, Any], device: str, variant: str | None
) -> tuple[Tensor, Tensor]:
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in kwargs.items()}
    before = _C.cpu_variant()
    if variant is not None:
        _C.set_cpu_variant(variant)
    try:
        return value_and_gradient(operator.function, student.to(device), teacher.to(device), moved)
    finally:
        _C.set_cpu_variant(before)


def close(got: Tensor, exact: Tensor, eager: Tensor, floor: Tensor, label: str, norm: bool = False) -> None:
    """NaN never passes; an infinity only where the exact result has the same one; zeros must fail."""
    finite = exact.isfinite()
    assert torch.equal(got.double()[~finite], exact[~finite]), "infinities differ"
    got, exact, eager = (torch.where(finite, x.double(), 0.0) for x in (got, exact, eager))
    size = (lambda x: x.norm()) if norm else (lambda x: x.abs())
    allowed = torch.maximum(2 * size(eager - exact), floor)
    error = size(got - exact)
    assert bool((error <= allowed).all()), f"{label}: error {error.max():.3e}, allowed {allowed.max():.3e}"
    if exact.any():
        assert not bool((size(exact) <= allowed).all()), "a zero result would pass: the tolerance is too loose"
