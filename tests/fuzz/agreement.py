"""Whether an operator and its reference agree on a call, or the operator refuses it in the one form of messages."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accuracy import limits, under_variant, value_and_gradient, with_trained
from calls import Call
from torch import Tensor

from kdfast.bench.registry import Operator
from kdfast.bench.registry.operator import Side, cast, mapped, tensors

# The floors hold for the registry's samples; of any numbers at all sums of roundings are now and then larger.
SLACK = 4
ROUNDINGS = 64
TALLY: Counter[str] = Counter()


def check(operator: Operator, call: Call) -> None:
    try:
        value, gradient = under_variant(call.variant, operator, call.student, call.teacher, call.kwargs)
    except (ValueError, TypeError) as error:
        if not re.fullmatch(rf"{operator.name}: \w+: expected [^\n]+, got [^\n]*", str(error)):
            raise AssertionError("a message of another form") from error
        TALLY["refused"] += 1
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact, eager, floors = _expected(operator, call)
    assert value.dtype == (call.dtypes[0] if operator.product else _real(call))
    assert gradient.dtype == call.dtypes[0]
    _agree_where_infinite(value, exact[0], call.student, operator.product)
    if bool(value.isfinite().all()):
        of_products = isinstance(call.student, tuple)  # in which 0 times what is not finite is NaN
        assert of_products or bool(gradient.isfinite().all()), "a finite value whose gradient is not"
        finite = torch.ones((), dtype=torch.bool)
    else:
        finite = _finite_rows(operator, call)
    at = exact[0].isfinite()
    if isinstance(call.student, tuple) and not all(
        bool(x.isfinite().all()) for x in tensors([call.student, call.teacher])
    ):
        at &= value.isfinite()
    errors = [
        _excess(value.expand_as(exact[0]), exact[0], eager[0], at, floors[0], torch.abs),
        _excess(
            gradient, exact[1], eager[1], finite & exact[1].isfinite() & eager[1].isfinite(), floors[1], torch.norm
        ),
    ]
    if any(error for error, _ in errors):
        # Of a number near 0, which is rounded as what it is the difference of.
        scales = _scales(operator, call)
        for what, (error, message), scale in zip(("value", "gradient"), errors, scales, strict=True):
            assert error <= ROUNDINGS * _epsilon(call) * scale, f"{what}: {message}, of {scale:.3e}"
        TALLY["agreed, near 0"] += 1
    TALLY["agreed"] += 1
    TALLY["agreed, empty"] += not gradient.numel()
    TALLY["agreed, not finite"] += not bool(value.isfinite().all())


def _real(call: Call) -> torch.dtype:
    """A result is float64 where an argument is, but for log-probabilities of a top-k."""
    of_topk = any(not x.is_floating_point() for x in tensors(call.teacher))
    return torch.float64 if torch.float64 in call.dtypes[: 1 if of_topk else 2] else torch.float32


def _epsilon(call: Call) -> float:
    rounding = torch.finfo(_real(call)).eps
    return max(rounding, torch.finfo(call.dtypes[0]).eps)


def _expected(operator: Operator, call: Call) -> tuple[Any, Any, tuple[Tensor, float]]:
    """Value and gradient by the reference, in float64 and in the dtypes of the call; and the floors of errors."""
    kwargs, sides = {name: x for name, x in call.kwargs.items() if x is not None}, (call.student, call.teacher)
    dtypes = (call.dtypes[0], torch.float64 if _real(call) == torch.float64 else torch.float32)
    exact = _exact(operator, call, kwargs)
    eager = value_and_gradient(operator.reference, call.student, call.teacher, kwargs)
    finite = [
        mapped(lambda x: torch.where(x.isfinite(), x, 0.0) if x.is_floating_point() else x, side) for side in sides
    ]
    floors = limits(operator, *finite, kwargs, dtypes, (exact[0].nan_to_num(), exact[1].nan_to_num()))
    return exact, eager, floors


def _exact(operator: Operator, call: Call, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    doubled = [cast(side, torch.float64) for side in (call.student, call.teacher)]
    return value_and_gradient(operator.reference, *doubled, with_trained(kwargs, torch.float64))


def _scales(operator: Operator, call: Call) -> tuple[float, float]:
    """How large value and gradient are of a student that is not near its teacher, and finite."""
    generator = torch.Generator().manual_seed(0)

    def away(x: Tensor) -> Tensor:
        return -2 * torch.where(x.isfinite(), x, 0.0) + torch.randn(x.shape, generator=generator)

    teacher = mapped(lambda x: torch.where(x.isfinite(), x, 0.0) if x.is_floating_point() else x, call.teacher)
    far = replace(call, student=mapped(away, call.student), teacher=teacher)
    value, gradient = _exact(operator, far, {name: x for name, x in call.kwargs.items() if x is not None})
    largest = float(value.abs().max()) if value.numel() else 0.0
    numbers = sum(float(x.double().norm()) for x in tensors(far.student))
    if float(gradient.norm()) * numbers <= 1e-9 * largest:
        return max(largest, numbers), numbers  # as of a single column: what cancels is of the size of the numbers
    return largest, max(float(gradient.norm()), largest / max(numbers, 1.0))


def _finite_rows(operator: Operator, call: Call) -> Tensor:
    """Where the student's gradient is of a row with a finite loss; nowhere, where a gradient is no row's alone."""
    nowhere = torch.zeros((), dtype=torch.bool)
    if not isinstance(call.student, Tensor) or operator.product:
        return nowhere
    kwargs = {name: x for name, x in call.kwargs.items() if name != "num_items"} | {"reduction": "none"}
    rows, _ = _exact(operator, call, kwargs)
    return rows.isfinite()[..., None] if rows.shape == call.student.shape[:-1] else nowhere


def _agree_where_infinite(got: Tensor, exact: Tensor, student: Side, spreads: bool) -> None:
    """An infinity is one, and NaN is NaN; of products (a student of several tensors) either may be the other, and in plain
    torch `spreads` to what does not live."""
    assert got.shape == exact.shape, f"value: shape {list(got.shape)}, expected {list(exact.shape)}"
    got, exact = (x[~exact.isfinite()].double() for x in (got, exact))
    if isinstance(student, tuple):
        assert spreads or not bool(got.isfinite().any()), f"value: {got[:5].tolist()}, expected {exact[:5].tolist()}"
    else:
        same = torch.equal(got.nan_to_num(nan=1e300), exact.nan_to_num(nan=1e300))
        assert same, f"value: {got[:5].tolist()}, expected {exact[:5].tolist()}"


def _excess(
    got: Tensor, exact: Tensor, eager: Tensor, at: Tensor, floor: Tensor | float, size: Callable[[Tensor], Tensor]
) -> tuple[float, str]:
    """The largest error where it is more than is allowed, else 0; and what to say of it."""
    got, exact, eager = (torch.where(at, x.double(), 0.0) for x in (got, exact, eager))
    allowed = torch.maximum(size(eager - exact), torch.as_tensor(floor, dtype=torch.float64).nan_to_num()) * SLACK
    errors = size(got - exact)
    wrong = ~(errors <= allowed)
    if not bool(wrong.any()):
        return 0.0, ""
    return float(errors[wrong].max()), f"error {float(errors[wrong].max()):.3e}, allowed {float(allowed.max()):.3e}"
