"""A pass of a batch through a model, forward and back, that shows what heads and neurons give and its gradient.

    sums = [Sums(layer, by_row=True, dtype=torch.float32, device=model.device, op=OP) for layer in layers_of(model)]
    for batch in batches:
        backward(model, sums, batch, loss, OP)
        for layer in sums:
            layer.context.value, layer.activated.value      # [rows, heads] and [rows, neurons]

Gates on what linear maps get and make see values and gradients; no weight is given one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.models.cost import evaluating
from kdfast.models.inputs import TARGETS, model_inputs, parameters_of
from kdfast.ops import _checks
from kdfast.prune.layers import Layer, matrix
from kdfast.prune.masked import live_part

Loss = Callable[[Any, Any], Tensor]


def backward(model: Any, sums: list[Sums], batch: Any, loss: Loss | None, op: str) -> None:
    """Adds one batch to the sums of all layers, in evaluation mode. The model stays as it was."""
    eager = torch.compiler.set_stance("force_eager")  # compiled models do not call hooks that came later
    with evaluating(model), _gates(sums) as root, torch.enable_grad(), eager:
        # only what lies between: no gradient of a weight
        torch.autograd.grad(loss_of(model, batch, loss, op), root, allow_unused=True)


# ---- sums ----
class _Gate(torch.autograd.Function):
    """The identity on what a linear map gets or makes, which adds its value times its gradient to a sum. `root` requires
    a gradient: frozen models then have one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, root: Tensor, linear: nn.Module, of_input: bool, to: Sum) -> Tensor:
        ctx.to, ctx.live, ctx.width = to, live_part(linear, of_input), matrix(linear).shape[of_input]
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.to.show(*ctx.saved_tensors, gradient, ctx.live, ctx.width)
        return gradient, None, None, None, None


class Sum:
    """Σ x · ∂L/∂x of one batch by unit, over all gates that show theirs: [rows or 1, units]."""

    def __init__(self, units: int, size: int, by_row: bool, dtype: torch.dtype, op: str) -> None:
        self.units, self.size, self.by_row, self.dtype, self.op = units, size, by_row, dtype, op
        self.value: Tensor | None = None

    def show(self, x: Tensor, gradient: Tensor, live: Tensor | None, width: int) -> None:
        """live: which of `width` features x has; None: the first."""
        if self.by_row and x.dim() < 3:
            _checks.wrong_value(self.op, "model", "states [rows, places, features] in its layers", f"{list(x.shape)}")
        rows, found = len(x) if self.by_row else 1, x.shape[-1]
        products = x.to(self.dtype) * gradient
        sums = products.reshape(rows, products.numel() // max(1, rows * found), found).sum(1)
        if found < width:
            live = torch.arange(found) if live is None else live
            sums = sums.new_zeros(rows, width).index_copy_(1, live.to(sums.device), sums)
        units = sums.view(rows, -1, self.units, self.size).sum((1, 3))  # -1: maps that are made side by side
        self.value = units if self.value is None else self.value + units


class Sums:
    """Of one layer: of all batches so far, and of the one at work."""

    def __init__(self, layer: Layer, by_row: bool, dtype: torch.dtype, device: torch.device, op: str) -> None:
        self.layer, self.by_row = layer, by_row
        self.heads = torch.zeros(layer.heads, dtype=dtype, device=device)
        self.neurons = torch.zeros(layer.neurons, dtype=dtype, device=device)
        self.context = Sum(layer.heads, layer.head_size, by_row, dtype, op)
        self.expanded, self.activated = (Sum(layer.neurons, 1, by_row, dtype, op) for _ in range(2))

    def gates(self) -> Iterator[tuple[nn.Module, bool, Sum]]:
        """Linear maps, whether it is their input that matters, and where that is summed."""
        adapter, find = self.layer.adapter, self.layer.module.get_submodule
        if self.layer.heads:
            yield find(adapter.output), True, self.context
        if self.layer.neurons:
            yield find(adapter.contract), True, self.activated
            for name in () if self.by_row else dict.fromkeys(adapter.expand):
                yield find(name), False, self.expanded

    def close(self, keep: bool) -> int:
        """Ends a batch; returns its rows, 1 for all. `keep`: the next batch begins with the sums of this one."""
        rows = 0
        for total, one in ((self.heads, self.context), (self.neurons, self.expanded), (self.neurons, self.activated)):
            if one.value is not None:
                rows = len(one.value)
                total += (rows * one.value.abs().sum(0)).to(total.device)  # times rows: the loss is a mean over them
            one.value = one.value if keep else None
        return rows


@contextmanager
def _gates(sums: list[Sums]) -> Iterator[Tensor]:
    """Gates on the linear maps of all layers; gives the root of their gradients."""
    root = torch.zeros((), requires_grad=True)

    def before(one: Sum) -> Callable[[nn.Module, Any], tuple[Tensor]]:
        return lambda linear, inputs: (_Gate.apply(inputs[0], root, linear, True, one),)

    def after(one: Sum) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda linear, _, output: _Gate.apply(output, root, linear, False, one)

    handles = [
        module.register_forward_pre_hook(before(one)) if of_input else module.register_forward_hook(after(one))
        for layer in sums
        for module, of_input, one in layer.gates()
    ]
    try:
        yield root
    finally:
        for handle in handles:
            handle.remove()


# ---- losses ----
def loss_of(model: Any, batch: Any, loss: Loss | None, op: str) -> Tensor:
    """The loss of a batch: the model's own, of labels, or the caller's.

    Raises:
        ValueError: a batch without labels, or a model that makes no loss of them; no scalar, or one without gradient.
    """
    found = _own_loss(model, batch, op) if loss is None else loss(model, batch)
    if not isinstance(found, Tensor) or found.numel() != 1 or not found.requires_grad:
        got = f"{list(found.shape)}, requires_grad={found.requires_grad}" if isinstance(found, Tensor) else f"{found!r}"
        _checks.wrong_value(op, "loss", "a scalar that depends on the model's layers", got)
    return found


def _own_loss(model: Any, batch: Any, op: str) -> Tensor:
    takes, or_loss = [name for name in TARGETS if name in parameters_of(model)], "; or give loss=, a function of both"
    if not takes:
        _checks.wrong_value(op, "model", "one that makes a loss of labels", type(model).__name__ + or_loss)
    if not isinstance(batch, Mapping) or not any(name in batch for name in takes):
        got = f"columns {', '.join(batch)}" if isinstance(batch, Mapping) else _checks.kind(batch)
        _checks.wrong_value(op, "batches", f"columns, among them {' or '.join(takes)}", got + or_loss)
    inputs = inputs_of(model, batch) | {name: _to(model, batch[name]) for name in takes if name in batch}
    found: Tensor = model(**inputs).loss
    return found


def inputs_of(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch goes into a model, without labels, on its device."""
    return {name: _to(model, x) for name, x in model_inputs(model, batch).items()}


def _to(model: Any, x: Any) -> Any:
    return x.to(model.device) if isinstance(x, Tensor) else x
