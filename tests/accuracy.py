"""The accuracy rule: at most twice the error of eager PyTorch of the same dtype, or a floor of rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast import _C
from kdfast.ops.reference import reduce_rows
from kdfast.registry import Operator, Sample
from kdfast.registry.divergences import DIVERGENCES
from kdfast.registry.linear import LINEAR
from kdfast.registry.operator import Side, apply, cast, mapped, tensors

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
    student = mapped(lambda x: x.detach().requires_grad_(), student)
    value = apply(function, student, teacher, **kwargs)
    # A different factor per element: a constant one would hide rows that are mixed up.
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape)
    gradients = torch.autograd.grad(value, tensors(student), upstream)
    assert [g.shape for g in gradients] == [x.shape for x in tensors(student)]
    return value.detach(), gradients[0] if len(gradients) == 1 else torch.cat([g.flatten() for g in gradients])


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
    if reduction["mask"] is None and kwargs.get("labels") is not None:
        reduction["mask"] = kwargs["labels"] != -100
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


def layer_floors(
    operator: Operator, student: Side, teacher: Side, kwargs: Any, exact: tuple[Tensor, Tensor]
) -> tuple[Tensor, float]:
    """Where eager happens to be exact: a rounding or two of the result; where there is a softmax, of its scores."""
    gradient = 2**-21 * float(exact[1].norm())
    if (
        operator.native[0] == "layer_distance" and operator.name != "attention_kl"
    ) or operator.name == "qk_attention_mse":
        return 2**-21 * exact[0].abs(), gradient
    z = max(float(x[x.isfinite()].abs().max()) for x in tensors(student) + tensors(teacher))
    largest = z if operator.name == "attention_kl" else z**2
    mean = apply(operator.reference, student, teacher, **kwargs | {"reduction": "mean"}).detach()
    return 2**-22 * largest * exact[0].abs() / mean, gradient * largest


def topk_floors(student: Tensor, log_t: Tensor, kwargs: Any) -> tuple[Tensor, float]:
    """As `floors`."""
    kwargs = {"mask": None, "weight": None, "reduction": "mean", "num_items": None} | kwargs
    temperature = torch.as_tensor(kwargs.pop("temperature", 1.0), dtype=torch.float64).expand(student.shape[:-1])
    kwargs.pop("tail")
    largest = float((student.double() / temperature[..., None]).abs().max())
    factors = torch.ones(student.shape[:-1], dtype=torch.float64, requires_grad=True)
    value = reduce_rows(2**-22 * largest * factors, **kwargs)
    (factors,) = torch.autograd.grad(reduce_rows(factors, **kwargs).sum(), factors)
    return value.detach(), 2**-19 * float((log_t.double().exp() * (1.5 * factors / temperature)[..., None]).norm())


def linear_floors(exact: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
    """Some roundings of logits and results."""
    return 2**-19 * (1 + exact[0].abs()), 2**-19 * float(exact[1].norm())


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
    doubled = [cast(side, torch.float64) for side in (student, teacher)]
    exact = value_and_gradient(operator.reference, *doubled, with_trained(kwargs, torch.float64))
    eager = value_and_gradient(operator.reference, student, teacher, kwargs)
    if operator.name == "topk_kl_div":
        value_floor, gradient_floor = topk_floors(student, teacher[0], kwargs)
    elif operator.name in LINEAR:
        value_floor, gradient_floor = linear_floors(exact)
    elif operator.name in DIVERGENCES:
        value_floor, gradient_floor = floors(student, teacher, kwargs, operator.name)
    else:
        value_floor, gradient_floor = layer_floors(operator, student, teacher, kwargs, exact)
    real = torch.float64 if torch.float64 in (student_dtype, teacher_dtype) else torch.float32
    if real == torch.float64:
        # The exact result is no more exact than this one, and 1 - cos loses what cos rounds.
        ours = 0.0 if operator.name in DIVERGENCES else 2**-48
        value_floor, gradient_floor = value_floor * 2**-29 + ours, gradient_floor * 2**-29 * (16 if ours else 1)
    rounding = ROUNDING[student_dtype] * float(exact[1].norm())
    for variant in _C.cpu_variants() if device == "cpu" else (None,):
        value, gradient = on_device(operator, student, teacher, kwargs, device, variant)
        assert value.dtype == real
        assert gradient.dtype == student_dtype
        close(value.cpu(), exact[0], eager[0], value_floor, str(variant))
        close(gradient.cpu(), exact[1], eager[1], torch.tensor(gradient_floor + rounding), str(variant), norm=True)


def on_device(
    operator: Operator, student: Side, teacher: Side, kwargs: dict[str, Any], device: str, variant: str | None
) -> tuple[Tensor, Tensor]:
    student, teacher, moved = (mapped(lambda x: x.to(device), side) for side in (student, teacher, kwargs))
    before = _C.cpu_variant()
    if variant is not None:
        _C.set_cpu_variant(variant)
    try:
        return value_and_gradient(operator.function, student, teacher, moved)
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
