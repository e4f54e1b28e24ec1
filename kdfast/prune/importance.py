"""How much the loss hangs on each head and neuron: DynaBERT's importance (Hou et al., 2020) and Michel's (2019).

    heads, neurons = kdfast.prune.importance(model, batches)      # on the development set, with labels
    kdfast.prune.rewire(model, heads, neurons)                    # the important ones first

The gates that see values and gradients are those of `kdfast/prune/passes.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from kdfast.models.inputs import unwrapped
from kdfast.ops import _checks
from kdfast.prune.layers import layers_of
from kdfast.prune.passes import Loss, Sums, backward
from kdfast.prune.ranks import add_up

__all__ = ["Importance", "importance"]

_OP = "kdfast.prune.importance"
Criterion = Literal["dynabert", "michel"]


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
    sums = [Sums(layer, criterion == "michel", wide, inner.device, _OP) for layer in layers]
    counted = torch.zeros((), dtype=torch.float64, device=inner.device)
    for batch in batches:
        backward(inner, sums, batch, loss, _OP)
        counted += max(1, *(layer.close(keep=accumulate) for layer in sums))
    found = [layer.heads for layer in sums] + [layer.neurons for layer in sums]
    add_up([counted, *found])
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


# ---- results ----
def _rows(scores: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(scores, True, torch.nan)
