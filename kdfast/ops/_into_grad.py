"""Where a backward may add to `weight.grad` itself.

A layer of which a part lives makes a gradient of that part. Handed to autograd it must fill a whole matrix, mostly with
zeros, which is then read again to be added up: where widths are small that costs more than the products. So where
nobody would see the difference the part is added to the gradient that is already there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def destination(node: Any) -> Tensor | None:
    """The `.grad` of a weight to which this backward may add; None where autograd has to be given the gradient.

    Args:
        node: what follows for the weight, of the `next_functions` of the autograd Function whose backward runs.
    """
    if type(node).__name__ != "AccumulateGrad":  # the weight is no leaf
        return None
    weight = node.variable
    grad = weight.grad
    if (
        grad is None
        or type(grad) is not Tensor
        or grad.layout is not torch.strided
        or grad.dtype is not weight.dtype
        or grad.requires_grad
        or 1 not in grad.stride()
        or weight._backward_hooks  # these want to see the gradient
        or weight._post_accumulate_grad_hooks
        or not _accumulates(node)
        or not _is_in_order(grad)
    ):
        return None
    return grad


def _accumulates(node: Any) -> bool:
    """Whether this backward adds to `.grad`: that of `torch.autograd.grad`, or of `backward(inputs=)` without the
    weight, does not. DDP's hooks are on the node, which runs also where it gets no gradient."""
    try:
        return torch._C._will_engine_execute_node(node)  # type: ignore[attr-defined, no-any-return]
    except RuntimeError:  # torch.autograd.grad with the weight among the inputs
        return False


def _is_in_order(grad: Tensor) -> bool:
    """Whether what is enqueued now comes after what wrote `grad`: autograd keeps order between streams, this does not."""
    device = grad.device
    return not grad.is_cuda or torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
