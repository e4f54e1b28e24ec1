"""Output embeddings that are no plain product hidden · weightᵀ + bias: adapters, quantised weights, a forward of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdfast._finish import Finish
from kdfast.ops._shards import is_dtensor


def plain(module: nn.Module) -> bool:
    """Whether it is such a product, of a weight that is no subclass with arithmetic of its own."""
    if type(module).forward is not nn.Linear.forward or "forward" in vars(module):  # type: ignore[comparison-overlap]
        return False
    weight: Any = module.weight
    return _ordinary(weight) or is_dtensor(weight)


def _ordinary(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.is_floating_point() and not x.is_meta


class OwnHead:
    """Logits [..., V] as `head` makes them of hidden states [..., H], with the model's scale and bias, in float32.

    Its parameters are widened first, so that the products are not rounded to 16 bits; but not those of heads that have
    others than ordinary floating-point numbers, such as quantised ones: these work as they do in the model, `autocast`
    included.

    Raises:
        ValueError: its parameters are sharded (FSDP2): outside of the forward they cannot be put together for it.
    """

    def __init__(
        self, head: nn.Module, vocabulary: int, finish: Finish, autocast: dict[str, Any], model_name: str
    ) -> None:
        self.head, self.vocabulary, self.finish, self.autocast = head, vocabulary, finish, autocast
        named = dict(head.named_parameters())
        if any(is_dtensor(x) for x in named.values()):
            raise ValueError(
                f"kdfast: {model_name}: expected output embeddings that are a plain nn.Linear where they are sharded, got "
                f"{type(head).__name__}"
            )
        self.ordinary = bool(named) and all(map(_ordinary, (*named.values(), *head.buffers())))
        if self.ordinary:
            self.widest = max((torch.promote_types(x.dtype, torch.float32) for x in named.values()), key=_bytes)
            self.wide = {name: x.to(self.widest) for name, x in named.items() if x.dtype != self.widest}

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.ordinary:
            with torch.autocast(hidden.device.type, enabled=False):
                return self.finish(torch.func.functional_call(self.head, self.wide, (hidden.to(self.widest),)))
        with torch.autocast(**self.autocast):
            made: Tensor = self.head(hidden)
        return self.finish(made.float())


def _bytes(dtype: torch.dtype) -> int:
    return dtype.itemsize
