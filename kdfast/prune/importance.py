"""How much the loss hangs on each head and neuron: DynaBERT's importance (Hou et al., 2020) and Michel's (2019).

    heads, neurons = kdfast.prune.importance(model, batches)      # on the development set, with labels
    kdfast.prune.rewire(model, heads, neurons)                    # the important ones first

Gates on what linear maps get and make see values and gradients; no weight is given one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdfast.models.inputs import TARGETS, model_inputs, parameters_of, unwrapped
from kdfast.ops import _checks
from kdfast.prune.layers import Layer, layers_of, matrix
from kdfast.prune.masked import KeptPart

__all__ = ["Importance", "importance"]

_OP = "kdfast.prune.importance"
Criterion = Literal["dynabert", "michel"]
Loss = Callable[[Any, Any], Tensor]


class Importance(NamedTuple):
    """heads: [layers, heads]. neurons: [layers, neurons]."""

    heads: Tensor
    neurons: Tensor


@overload
def importance(
    model: nn.Module,
    batches: Iterable[Any],
    of: Literal["both"] = "both",
    criterion: Criterion = "dynabert",
    accumulate: bool = False,
    loss: Loss | None = None,
) -> Importance: ...
@overload
def importance(
    model: nn.Module,
    batches: Iterable[Any],
    of: Literal["heads", "neurons"],
    criterion: Criterion = "dynabert",
    accumulate: bool = False,
    loss: Loss | None = None,
) -> Tensor: ...
def importance(
    model: nn.Module,
    batches: Iterable[Any],
    of: Literal["heads", "neurons", "both"] = "both",
    criterion: Criterion = "dynabert",
    accumulate: bool = False,
    loss: Loss | None = None,
) -> Importance | Tensor:
    """How much the loss would change, to first order, without a head or neuron.

    With c_h what head h gives to the attention's output map, a_i what the expanding maps of the feed-forward network
    make for neuron i, g_i what the contracting one reads, and sums over all places and features of a batch:

        "dynabert"   heads    Σ_batches |Σ c_h · ∂L/∂c_h|
                     neurons  Σ_batches (|Σ a_i · ∂L/∂a_i| + |Σ g_i · ∂L/∂g_i|)
        "michel"     heads    mean over rows x of |Σ c_h · ∂L_x/∂c_h|
                     neurons  mean over rows x of |Σ g_i · ∂L_x/∂g_i|

    The first is the derivative by a gate before the softmax's product with the values. The neuron's two are Σ w · ∂L/∂w
    over its rows of weights with biases, and its column; in gated networks the rows of both expanding maps are one sum.

    One pass makes both, in evaluation mode, and no gradient of a weight: the memory is less than a training step's. The
    model stays as it was: modes, gradients, hooks. Sums are of float32, float64 for such a model, also in bfloat16.
    Where a process group is initialised, the sums are over all ranks' batches (some may have none) and equal on all.

    Args:
        model: of transformers, wrapped or not.
        batches: with labels; its rows are those of a mean for Michel's. The original's are of 8.
        of: "heads", "neurons", or "both" (a pair).
        criterion: compare Michel's between layers only after a division by each layer's norm, as its authors do.
        accumulate: for DynaBERT's as released, where no gradient is set to zero: batch t adds |Σ of batches 1 to t|.
        loss: of the model and a batch, as it comes, the mean over rows. None: the model's own, with labels.

    Returns:
        [layers, heads or neurons]; of ALBERT [distinct layers, …]. In a model whose layers have different numbers of
        them, rows end in NaN.

    Raises:
        TypeError: no model of transformers.
        ValueError: an unknown architecture, criterion or `of`; no batches, on no rank; a batch without labels, or a
            model that makes no loss of them; a loss that is no scalar or does not depend on the model.
    """
    _check(of, criterion, accumulate)
    inner = unwrapped(model)
    layers = layers_of(inner, _OP)
    wide = torch.promote_types(inner.dtype, torch.float32)
    sums = [_Sums(layer, criterion == "michel", wide, inner.device) for layer in layers]
    counted = torch.zeros((), dtype=torch.float64, device=inner.device)
    eager = torch.compiler.set_stance("force_eager")  # compiled models do not call hooks that came later
    with _evaluation(inner), _gates(sums) as root, torch.enable_grad(), eager:
        for batch in batches:
            _backward(_own_loss(inner, batch) if loss is None else loss(inner, batch), root)
            counted += max(1, *(layer.close(keep=accumulate) for layer in sums))
    found = [layer.heads for layer in sums] + [layer.neurons for layer in sums]
    _all_reduce([counted, *found])
    if not counted:
        _checks.wrong_value(_OP, "batches", "at least one", "none")
    if criterion == "michel":
        found = [total / counted.to(wide) for total in found]
    pair = Importance(_rows(found[: len(sums)]), _rows(found[len(sums) :]))
    return pair if of == "both" else pair.heads if of == "heads" else pair.neurons


def _check(of: str, criterion: str, accumulate: bool) -> None:
    if of not in ("heads", "neurons", "both"):
        _checks.wrong_value(_OP, "of", "'heads', 'neurons' or 'both'", repr(of))
    if criterion not in ("dynabert", "michel"):
        _checks.wrong_value(_OP, "criterion", "'dynabert' or 'michel'", repr(criterion))
    if accumulate and criterion != "dynabert":
        _checks.wrong_value(_OP, "accumulate", f"False with criterion {criterion!r}, as it is DynaBERT's", accumulate)


# ---- sums ----
class _Gate(torch.autograd.Function):
    """The identity on what a linear map gets or makes, which adds its value times its gradient to a sum. `root` requires
    a gradient: frozen models then have one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, root: Tensor, linear: nn.Module, of_input: bool, to: _Sum) -> Tensor:
        linear = getattr(linear, "base_layer", linear)  # below an adapter of peft
        kept = getattr(linear, "_kdfast_masked", None)
        live = (kept.packed.columns if of_input else kept.packed.rows) if isinstance(kept, KeptPart) else None
        ctx.to, ctx.live, ctx.width = to, live, matrix(linear).shape[of_input]
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.to.show(*ctx.saved_tensors, gradient, ctx.live, ctx.width)
        return gradient, None, None, None, None


class _Sum:
    """Σ x · ∂L/∂x of one batch by unit, over all gates that show theirs: [rows or 1, units]."""

    def __init__(self, units: int, size: int, by_row: bool, dtype: torch.dtype) -> None:
        self.units, self.size, self.by_row, self.dtype = units, size, by_row, dtype
        self.value: Tensor | None = None

    def show(self, x: Tensor, gradient: Tensor, live: Tensor | None, width: int) -> None:
        """live: which of `width` features x has; None: the first."""
        if self.by_row and x.dim() < 3:
            _checks.wrong_value(_OP, "model", "states [rows, places, features] in its layers", f"{list(x.shape)}")
        rows, found = len(x) if self.by_row else 1, x.shape[-1]
        products = x.to(self.dtype) * gradient
        sums = products.reshape(rows, products.numel() // max(1, rows * found), found).sum(1)
        if found < width:
            live = torch.arange(found) if live is None else live
            sums = sums.new_zeros(rows, width).index_copy_(1, live.to(sums.device), sums)
        units = sums.view(rows, -1, self.units, self.size).sum((1, 3))  # -1: maps that are made side by side
        self.value = units if self.value is None else self.value + units


class _Sums:
    """Of one layer: of all batches so far, and of the one at work."""

    def __init__(self, layer: Layer, by_row: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.layer, self.by_row = layer, by_row
        self.heads = torch.zeros(layer.heads, dtype=dtype, device=device)
        self.neurons = torch.zeros(layer.neurons, dtype=dtype, device=device)
        self.context = _Sum(layer.heads, layer.head_size, by_row, dtype)
        self.expanded, self.activated = (_Sum(layer.neurons, 1, by_row, dtype) for _ in range(2))

    def gates(self) -> Iterator[tuple[nn.Module, bool, _Sum]]:
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
def _gates(sums: list[_Sums]) -> Iterator[Tensor]:
    """Gates on the linear maps of all layers; gives the root of their gradients."""
    root = torch.zeros((), requires_grad=True)

    def before(one: _Sum) -> Callable[[nn.Module, Any], tuple[Tensor]]:
        return lambda linear, inputs: (_Gate.apply(inputs[0], root, linear, True, one),)

    def after(one: _Sum) -> Callable[[nn.Module, Any, Tensor], Tensor]:
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
@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _own_loss(model: Any, batch: Any) -> Tensor:
    takes, or_loss = [name for name in TARGETS if name in parameters_of(model)], "; or give loss=, a function of both"
    if not takes:
        _checks.wrong_value(_OP, "model", "one that makes a loss of labels", type(model).__name__ + or_loss)
    if not isinstance(batch, Mapping) or not any(name in batch for name in takes):
        got = f"columns {', '.join(batch)}" if isinstance(batch, Mapping) else _checks.kind(batch)
        _checks.wrong_value(_OP, "batches", f"columns, among them {' or '.join(takes)}", got + or_loss)
    inputs = model_inputs(model, batch) | {name: batch[name] for name in takes if name in batch}
    inputs = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    found: Tensor = model(**inputs).loss
    return found


def _backward(loss: Tensor, root: Tensor) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        got = f"{list(loss.shape)}, requires_grad={loss.requires_grad}" if isinstance(loss, Tensor) else f"{loss!r}"
        _checks.wrong_value(_OP, "loss", "a scalar that depends on the model's layers", got)
    torch.autograd.grad(loss, root, allow_unused=True)  # only what lies between: no gradient of a weight


# ---- results ----
def _all_reduce(totals: list[Tensor]) -> None:
    """The sums over all ranks, in place."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    together = torch.cat([total.flatten().to(totals[0].device, torch.float64) for total in totals])
    dist.all_reduce(together)
    for total, one in zip(totals, together.split([total.numel() for total in totals]), strict=True):
        total.copy_(one.view_as(total))


def _rows(scores: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(scores, True, torch.nan)
