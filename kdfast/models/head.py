"""Output embeddings: products in float32, and heads that are no plain product hidden · weightᵀ + bias, such as
adapters, quantised weights, a forward of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kdfast.models.finish import Finish
from kdfast.ops._divergence import refuse_double_backward
from kdfast.ops._heads import Gradients, Head, Widening, on_gpu
from kdfast.ops._shards import is_dtensor

_WIDE = (torch.float32, torch.float64)
_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


def plain(module: nn.Module) -> bool:
    """Whether it is such a product, of a weight that is no subclass with arithmetic of its own."""
    if type(module).forward is not nn.Linear.forward or "forward" in vars(module):  # type: ignore[comparison-overlap]
        return False
    weight: Any = module.weight
    return _ordinary(weight) or is_dtensor(weight)


def _ordinary(x: Any) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.is_floating_point() and not x.is_meta


def product(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """hidden [..., H] · weight [V, H]ᵀ + bias [V] as `F.linear` has it, under autocast of operands in its dtype, but of
    16-bit operands in float32. Where their dtypes differ, the weight's counts."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        weight = weight.to(torch.get_autocast_dtype(device))
    hidden = hidden.to(weight.dtype)
    with torch.autocast(device, enabled=False):
        if weight.dtype in _WIDE:
            return F.linear(hidden, weight, None if bias is None else bias.to(weight.dtype))
        made: Tensor = _Product.apply(hidden.reshape(-1, hidden.shape[-1]), weight)
        made = made.view(*hidden.shape[:-1], weight.shape[0])
        return made if bias is None else made + bias.float()


class _Product(torch.autograd.Function):
    """x @ weightᵀ, [N, V] in float32, of 16-bit x [N, H] and weight [V, H]; gradients are in the operands' dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        made = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)
        Head(x, weight, None).logits(slice(0, x.shape[0]), made, Widening(torch.float32))
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        refuse_double_backward("LastHidden.make_logits")
        x, weight = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad, False]
        gradients = Gradients(Head(x, weight, None), Widening(torch.float32), 0, wanted, slabs=1, sharded=False)
        gradients.add(slice(0, x.shape[0]), gradient.to(x.dtype) if on_gpu(x) else gradient)
        found = gradients.hidden.to(x.dtype), gradients.weight.to(x.dtype)
        return found[0] if wanted[0] else None, found[1] if wanted[1] else None


class OwnHead:
    """Logits [..., V] as `head` makes them of hidden states [..., H], with the model's scale and bias, under the
    autocast that it had in the model. Products that make logits are not rounded to 16 bits, but for those of weights
    with an arithmetic of their own, such as quantised ones.

    Raises:
        ValueError: its parameters are sharded (FSDP2): outside of the forward they cannot be put together for it.
    """

    def __init__(
        self, head: nn.Module, vocabulary: int, finish: Finish, autocast: dict[str, Any], model_name: str
    ) -> None:
        if any(is_dtensor(x) for x in head.parameters()):
            raise ValueError(
                f"kdfast: {model_name}: expected output embeddings that are a plain nn.Linear where they are sharded, "
                f"got {type(head).__name__}"
            )
        self.head, self.vocabulary, self.finish, self.autocast = head, vocabulary, finish, autocast

    def __call__(self, hidden: Tensor) -> Tensor:
        with torch.autocast(**self.autocast), _InFloat32(self.vocabulary):
            made: Tensor = self.head(hidden.clone())  # hooks may write to it
        return self.finish(made if made.dtype in _WIDE else made.float())


class _InFloat32(TorchFunctionMode):
    """Products of ordinary tensors whose result is as wide as the vocabulary are `product`s."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if len(args) > 1 and all(_ordinary(x) and x.dim() > 1 for x in args[:2]) and args[1].dim() == 2:
            if func is F.linear and args[1].shape[0] == self.vocabulary:
                return product(*args, **kwargs or {})
            if func in _MATMULS and args[1].shape[1] == self.vocabulary:
                return product(args[0], args[1].t())
        return func(*args, **kwargs or {})
