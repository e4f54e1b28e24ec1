"""A linear layer of which the first inputs and outputs live: the widths of an elastic (DynaBERT, once-for-all) layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdfast.ops import _checks, _live_linear, _products
from kdfast.ops._transforms import transformable


@transformable
def prefix_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_features: int | None = None,
    out_features: int | None = None,
) -> Tensor:
    """y = x · weight[:out_features, :in_features]ᵀ + bias[:out_features]: a layer of an elastic width
    (DynaBERT: Hou et al., 2020).

    The weight is read where it lies. Slicing it with autograd makes a gradient of the whole weight, of zeros but for
    the live part, at every call; here, where the weight has a `.grad` already (accumulation over sub-networks or
    batches) and no hooks that would see it, the product is added straight to its live part.

    Args:
        x: [..., in_features], any strides; float32, bfloat16, float16 or (on the CPU) float64.
        weight: [out, in], the whole of it, any strides; of the dtype of x, but under autocast, where both are cast.
        bias: [out], the whole of it, or None.
        in_features, out_features: how many inputs and outputs live, 0 to all; None: all.

    Returns:
        [..., out_features], of the dtype that `torch.nn.functional.linear` gives. What does not live is never read; its
        gradient is exactly zero.

    Raises:
        ValueError, TypeError: a shape, dtype, device or size is wrong; the message names the argument.
    """
    op = "prefix_linear"
    _live_linear.check(op, x, weight, bias)
    outputs = _size(op, "out_features", out_features, weight.shape[0])
    inputs = _size(op, "in_features", in_features, weight.shape[1])
    _live_linear.check_width(op, x, inputs)
    return _live_linear.run(Prefix(outputs, inputs), x, weight, bias)


def prefix_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_features: int | None = None,
    out_features: int | None = None,
) -> Tensor:
    """`prefix_linear` in plain torch."""
    part = weight[:out_features, :in_features]
    return nn.functional.linear(x, part, None if bias is None else bias[:out_features])


class Prefix(NamedTuple):
    """The first rows and columns of a weight as `Live`."""

    outputs: int
    inputs: int
    op: str = "prefix_linear"

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return prefix_linear_reference(x, weight, bias, in_features=self.inputs, out_features=self.outputs)

    def part(self, weight: Tensor, dtype: torch.dtype, recorded: bool) -> Tensor:
        part = self._part(weight)
        return part if part.dtype is dtype else part.to(dtype)

    def part_of_bias(self, bias: Tensor, dtype: torch.dtype) -> Tensor:
        part = bias[: self.outputs]
        return part if part.dtype is dtype else part.to(dtype)

    def add_product_(self, grad: Tensor, left: Tensor, right: Tensor) -> None:
        if left.dtype is grad.dtype:
            _products.add_product_(self._part(grad), left, right)
        else:
            self._part(grad).add_(left @ right)

    def product(self, weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
        gradient = torch.empty_like(weight)
        part = self._part(gradient)
        if left.dtype is gradient.dtype:
            _products.product_into(part, left, right)
        else:
            part.copy_(left @ right)
        gradient[: self.outputs, self.inputs :].zero_()
        gradient[self.outputs :].zero_()
        return gradient

    def of_bias(self, bias: Tensor, gradient: Tensor) -> Tensor:
        whole = torch.zeros_like(bias)
        whole[: self.outputs] = gradient
        return whole

    def used(self) -> None:
        pass

    def _part(self, weight: Tensor) -> Tensor:
        return weight.as_strided(self[:2], weight.stride())  # a microsecond, where two slices take two


def _size(op: str, argument: str, given: int | None, whole: int) -> int:
    if given is None:
        return whole
    _checks.check_int(op, argument, given)
    if not 0 <= given <= whole:
        _checks.wrong_value(op, argument, f"0 to {whole}", given)
    return given
