"""x Wᵀ + b with the live part of a weight: what `prefix_linear` and `selected_linear` share."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdfast.ops import _checks, _into_grad, _products, _transforms

# Others (DTensors, fakes, quantised weights) bring operators of their own, which plain torch calls.
_PLAIN = (Tensor, nn.Parameter)


class Live(Protocol):
    """Which part of a weight [out, in] and a bias [out] lives, and how it is read and written.

    Gradients of the part are of its shape, and of the weight's dtype or autocast's.
    """

    @property
    def op(self) -> str:
        """The operator that errors name."""

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer in plain torch, with all the derivatives that has."""

    def part(self, weight: Tensor, dtype: torch.dtype, recorded: bool) -> Tensor:
        """The live part of a weight, in a dtype: a view, or packed. `recorded`: for a backward."""

    def part_of_bias(self, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """That of a bias."""

    def add_product_(self, grad: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds left · right to the live part of a weight's gradient."""

    def product(self, weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """left · right in the live part of a weight's gradient, zero elsewhere."""

    def of_bias(self, bias: Tensor, gradient: Tensor) -> Tensor:
        """A gradient of the live part in a bias' gradient, zero elsewhere."""

    def used(self) -> None:
        """A backward ran: weights that are trained change next."""


def check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """All but sizes, which depend on what lives."""
    check_tensors(op, x, weight=weight, bias=bias)
    if weight.dim() != 2:
        _checks.wrong_value(op, "weight", "[out, in]", f"shape {list(weight.shape)}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        _checks.wrong_value(op, "bias", f"the whole of it, [{weight.shape[0]}]", f"shape {list(bias.shape)}")


def check_tensors(op: str, x: Tensor, **parameters: Tensor | None) -> None:
    """Kinds, dtypes and devices; and that x has features. A bias may be None."""
    tensors: dict[str, Any] = {"x": x, **parameters}
    if tensors.get("bias", x) is None:
        del tensors["bias"]
    for argument, given in tensors.items():
        if not isinstance(given, Tensor):
            _checks.wrong_type(op, argument, "a tensor", _checks.kind(given))
        _checks.check_float(op, argument, given)
        if given.device != x.device:
            _checks.wrong_value(op, argument, f"the device of x, {x.device}", given.device)
    if x.dim() == 0:
        _checks.wrong_value(op, "x", "at least one dimension, the features last", "a scalar")
    for argument, given in tensors.items():
        # What autocast does not cast, float64, has to match.
        if given.dtype is not x.dtype and (torch.float64 in (x.dtype, given.dtype) or not _checks.is_autocast(x)):
            _checks.wrong_type(op, argument, f"the dtype of x, {x.dtype}", given.dtype)


def check_width(op: str, x: Tensor, live: Any) -> None:
    if x.shape[-1] != live:
        _checks.wrong_value(op, "x", f"{live} features, those that live", f"shape {list(x.shape)}")


def run(live: Live, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer, of checked arguments."""
    if not (is_plain(x, weight) and (x.is_cpu or x.is_cuda)) or torch.compiler.is_compiling():
        return live.plain(x, weight, bias)
    dtype = product_dtype(x)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _LiveLinear.apply(x, weight, bias, live, dtype)  # type: ignore[no-any-return]
    return _forward(live, cast(x, dtype), bias, live.part(weight, dtype, False))


def is_plain(x: Tensor, weight: Tensor) -> bool:
    return type(x) in _PLAIN and type(weight) in _PLAIN


def _forward(live: Live, x: Tensor, bias: Tensor | None, part: Tensor) -> Tensor:
    return _products.linear(x, part, None if bias is None else live.part_of_bias(bias, x.dtype))


def product_dtype(x: Tensor) -> torch.dtype:
    """In which the product is made: under autocast in autocast's, but for float64, which it leaves alone."""
    if x.dtype is not torch.float64 and _checks.is_autocast(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def as_rows(x: Tensor) -> Tensor:
    """As [rows, features]; reshape(-1, …) would not do without features."""
    return x if x.dim() == 2 else x.flatten(0, -2) if x.dim() > 2 else x[None]


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)


def sum_of_rows(rows: Tensor) -> Tensor:
    """A bias's gradient, from [rows, features]."""
    if rows.is_cpu and rows.dtype.itemsize == 2 and rows.stride(1) == 1:
        sums: Tensor = torch.ops.kdfast.column_sums(rows)
        return sums
    return rows.sum(0)


@torch.library.register_fake("kdfast::column_sums")
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1])


class _LiveLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, live: Live, dtype: torch.dtype
    ) -> Tensor:
        ctx.live, ctx.dtype, ctx.weight, ctx.bias = live, x.dtype, weight, bias
        x, part = cast(x, dtype), live.part(weight, dtype, True)
        ctx.save_for_backward(x, part)
        return _forward(live, x, bias, part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        live = ctx.live
        if torch.is_grad_enabled():
            _transforms.no_double_backward(live.op)
        _transforms.refuse_batched(live.op, grad, "of a weight's part")
        x, part = ctx.saved_tensors
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        rows = as_rows(grad)
        of: list[Tensor | None] = [None, None, None]
        if of_weight:
            live.used()
            left, right = rows.t(), as_rows(x)
            into = _into_grad.destination(ctx.next_functions[1][0])
            if into is None:
                of[1] = live.product(ctx.weight, left, right)
            else:
                live.add_product_(into, left, right)
        if of_x:
            gradient = _products.product(rows, part)
            of[0] = cast(gradient if x.dim() == 2 else gradient.view(x.shape), ctx.dtype)
        if of_bias:
            of[2] = live.of_bias(ctx.bias, sum_of_rows(rows))
        return *of, None, None
