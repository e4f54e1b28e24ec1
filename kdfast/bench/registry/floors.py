"""What rounding does to a result at least, where eager PyTorch happens to be exact: absolute errors that are allowed,
of a value (per result) and of a gradient's norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdfast.bench.registry.operator import Floors, Side, apply, tensors
from kdfast.ops.reference import reduce_rows

Exact = tuple[Tensor, Tensor]
_REDUCTION = ("mask", "weight", "reduction", "num_items")


def of_logits(*, distillation: bool = False, squared: bool = False) -> Floors:
    """2^-22 max|z/T| and 2^-19 ‖p_t‖/T; `squared`: of (z_s - z_t)/T; `distillation`: of both parts of `kd_loss`."""

    def floors(_: Any, student: Tensor, teacher: Tensor, kwargs: dict[str, Any], exact: Exact) -> tuple[Tensor, float]:
        columns, alpha = kwargs.get("vocab_size"), kwargs.get("alpha", 0.5)
        temperature = _temperature(student, kwargs, 2.0 if distillation else 1.0)
        # What kd_loss multiplies by: T² before the divergence, and a cross-entropy of logits that are not divided by T.
        factor = alpha * temperature**2 + (1 - alpha) * temperature if distillation else torch.ones_like(temperature)
        reduction = _reduction(kwargs)
        if reduction["mask"] is None and kwargs.get("labels") is not None:
            reduction["mask"] = kwargs["labels"] != -100
        z = [x[..., :columns].double() / temperature[..., None] for x in (student, teacher)]
        largest = max(map(_largest, [z[0] - z[1]] if squared else z))
        value = reduce_rows(2**-22 * largest ** (2 if squared else 1) * factor, **reduction)
        factors = _factors_of_rows(student, reduction)
        p = z[1].softmax(-1) * (1.5 * factors * factor / temperature)[..., None]
        # The cross-entropy's target instead of p_t.
        labels = (1 - alpha) * 1.5 * factors if distillation else torch.zeros(1)
        return value, 2**-19 * float(p.norm() + labels.norm())

    return floors


def of_topk(
    _: Any, student: Tensor, teacher: tuple[Tensor, Tensor], kwargs: dict[str, Any], exact: Exact
) -> tuple[Tensor, float]:
    """As `of_logits`."""
    temperature, reduction = _temperature(student, kwargs, 1.0), _reduction(kwargs)
    largest = _largest(student.double() / temperature[..., None])
    value = reduce_rows(2**-22 * largest * torch.ones_like(temperature), **reduction)
    factors = _factors_of_rows(student, reduction)
    t = teacher[0].double().exp()
    return value, 2**-19 * float((t * (1.5 * factors / temperature)[..., None]).norm())


def of_products(_: Any, student: Side, teacher: Side, kwargs: dict[str, Any], exact: Exact) -> tuple[Tensor, float]:
    """Some roundings of logits and results."""
    return 2**-19 * (1 + exact[0].abs()), 2**-19 * float(exact[1].norm())


def of_matmuls(_: Any, student: Side, teacher: Side, kwargs: dict[str, Any], exact: Exact) -> tuple[Tensor, float]:
    """A rounding to the dtype, and some of float32's of the largest products."""
    x, weight = student
    short = 0.0 if x.dtype in (torch.float32, torch.float64) else torch.finfo(x.dtype).eps
    products = float(x.abs().max() * weight.abs().max()) if x.numel() and weight.numel() else 0.0
    return 0.51 * short * exact[0].abs() + 2**-21 * products, 2**-21 * float(exact[1].norm())


def of_blocks(
    reference: Callable[..., Tensor], student: Side, teacher: Side, kwargs: dict[str, Any], exact: Exact
) -> tuple[Tensor, float]:
    """As `of_matmuls`, of sums of many products: they grow by the root of their number, and so do their roundings."""
    x, _ = student
    value, gradient = of_matmuls(reference, student, teacher, kwargs, exact)
    products = of_matmuls(reference, student, teacher, kwargs, (torch.zeros(()), exact[1]))[0]
    return value + ((x.shape[-1] / 32) ** 0.5 - 1) * products, gradient


def of_results(_: Any, student: Side, teacher: Side, kwargs: dict[str, Any], exact: Exact) -> tuple[Tensor, float]:
    """A rounding or two."""
    return 2**-21 * exact[0].abs(), 2**-21 * float(exact[1].norm())


def of_scores(power: int) -> Floors:
    """The same of scores, which a softmax follows; they are the inputs' `power`."""

    def floors(
        reference: Callable[..., Tensor], student: Side, teacher: Side, kwargs: dict[str, Any], exact: Exact
    ) -> tuple[Tensor, float]:
        largest = max(map(_largest, tensors(student) + tensors(teacher)), default=0.0) ** power
        mean = apply(reference, student, teacher, **kwargs | {"reduction": "mean"}).detach()
        return 2**-22 * largest * exact[0].abs() / mean, 2**-21 * float(exact[1].norm()) * largest

    return floors


def _largest(x: Tensor) -> float:
    """Of the finite numbers, if there are any."""
    return float(x.abs().masked_fill(~x.isfinite(), 0.0).max()) if x.numel() else 0.0


def _temperature(student: Tensor, kwargs: dict[str, Any], default: float) -> Tensor:
    temperature = torch.as_tensor(kwargs.get("temperature", default), dtype=torch.float64, device=student.device)
    return temperature.expand(student.shape[:-1])


def _reduction(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs.get(name, "mean" if name == "reduction" else None) for name in _REDUCTION}


def _factors_of_rows(student: Tensor, reduction: dict[str, Any]) -> Tensor:
    """What the reduction multiplies each row by."""
    rows = torch.ones(student.shape[:-1], dtype=torch.float64, device=student.device, requires_grad=True)
    (factors,) = torch.autograd.grad(reduce_rows(rows, **reduction).sum(), rows)
    return factors
