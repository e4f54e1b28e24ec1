"""A causal language model up to its logits: last hidden states and output embeddings, for `kdfast.linear_kd_loss`."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LastHidden(NamedTuple):
    """What a model's logits are made of: softcap · tanh((hidden weightᵀ + bias) / softcap), without softcap if it is None.

    hidden: [B, L, H]. weight: [V, H], bias: [V] or None: the model's own parameters, DTensors where FSDP2 has them sharded.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None

    def logits(self, hidden: Tensor | None = None) -> Tensor:
        """Of these hidden states [..., H], by default all: [..., V], float32 (float64 for float64)."""
        hidden = self.hidden if hidden is None else hidden
        weight, dtype = self.weight, torch.promote_types(self.hidden.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):  # would round them
            made = F.linear(hidden.to(dtype), weight.to(dtype), bias)
            return made if self.softcap is None else self.softcap * torch.tanh(made / self.softcap)


# Models whose logits were seen to be what LastHidden says.
_understood: WeakSet[nn.Module] = WeakSet()


def last_hidden(model: nn.Module, **inputs: Any) -> LastHidden:
    """Runs a causal language model of transformers without the logits, of which it makes one row.

    `model(**inputs)` is called as it is, so DDP and FSDP2 do their work around it. For that call the hidden states join
    what it returns: DDP looks there for parameters that the loss does not reach, FSDP2 for where the backward begins.

    Args:
        model: one with output embeddings, plain or wrapped by DistributedDataParallel or `fully_shard`.
        **inputs: arguments of its forward; no labels, which would make it compute a loss of its own.

    Raises:
        TypeError: the model has no output embeddings.
        ValueError: it does more to its logits than `config.final_logit_softcapping`, such as a scale (Cohere, Granite).
    """
    inner = _language_model(model)
    head = inner.get_output_embeddings()
    softcap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)
    hidden: list[Tensor] = []
    rows: list[Tensor] = []

    def one_row(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden.append(arguments[0])
        return (arguments[0][:1, :1],)

    def beside_row(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> tuple[Tensor, Tensor]:
        return output, hidden[-1]

    def row_alone(_: nn.Module, __: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> Tensor:
        rows.append(output[0])
        return output[0]

    def beside_logits(_: nn.Module, __: tuple[Any, ...], outputs: Any) -> dict[str, Tensor]:
        if len(hidden) != 1:
            raise ValueError(
                f"kdfast: {type(inner).__name__}: expected one call of its output embeddings, got {len(hidden)}"
            )
        if inner not in _understood:
            _check_logits(inner, rows[0], outputs.logits, softcap)
            _understood.add(inner)
        return {"hidden": hidden[0], "logits": outputs.logits}

    # FSDP2's own hooks run between those that are prepended and those that are not, and look for tensors in outputs: it
    # gathers parameters again when the gradient of one arrives.
    handles = [
        head.register_forward_pre_hook(one_row),
        head.register_forward_hook(beside_row, prepend=True),
        head.register_forward_hook(row_alone),
        inner.register_forward_hook(beside_logits, prepend=True),
    ]
    try:
        outputs = model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    # Only now: after the forward FSDP2 may have put shards in place of the parameters that the forward used.
    return LastHidden(outputs["hidden"], head.weight, getattr(head, "bias", None), softcap)


def _language_model(model: nn.Module) -> Any:
    inner: Any = model
    while not hasattr(inner, "get_output_embeddings") and hasattr(inner, "module"):
        inner = inner.module
    if not hasattr(inner, "get_output_embeddings") or inner.get_output_embeddings() is None:
        raise TypeError(f"kdfast: expected a model with output embeddings, got {type(inner).__name__}")
    return inner


def _check_logits(model: nn.Module, row: Tensor, logits: Tensor, softcap: float | None) -> None:
    row, logits = row.detach().float(), logits.detach().float()
    expected = row if softcap is None else softcap * torch.tanh(row / softcap)
    # A few roundings of the model's own dtype: caps are applied in it.
    if expected.shape != logits.shape or not torch.allclose(logits, expected, rtol=0.03, atol=1e-3):
        raise ValueError(
            f"kdfast: {type(model).__name__}: its logits are not those of its output embeddings, and "
            f"final_logit_softcapping={softcap} does not explain it: scaled logits are not supported"
        )
