"""What stays takes the part of what goes: output maps by least squares, clusters of neurons by their sums."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.models.inputs import unwrapped
from kdfast.ops import _checks
from kdfast.prune.criteria.reconstruction import damped
from kdfast.prune.criteria.streams import Moments, Streams
from kdfast.prune.layers import layers_of, matrix
from kdfast.prune.masks import Masks, check
from kdfast.prune.scores import Kind

_OP = "kdfast.prune.criteria.compensate"


@torch.no_grad()
def compensate(model: nn.Module, masks: Masks, batches: Iterable[Any], *, damping: float = 1e-4) -> None:
    """Gives the output maps of attention and feed-forward networks, in place, the weights with which what lives does best
    what all did: the update of OBS and ZipLM for the whole set at once, and the least squares of ThiNet and LASSO channel
    selection.

        masks = kdfast.prune.select(model, kdfast.prune.criteria.score(model, "obs", "neurons", batches), keep=0.5)
        kdfast.prune.criteria.compensate(model, masks, batches)
        smaller = kdfast.prune.compact(model, masks)

    With S the features that live, H the second moments of what the map of the whole model reads, and λ = damping · the
    mean of H_SS's diagonal: W_S ← (W H_:S + λ W_S)(H_SS + λI)⁻¹. Where the map has a bias, moments are about the mean, and the bias
    takes up the mean of what goes. Columns of what is dead stay as they are, which `apply` and `compact` never read.
    Each map is fitted to the inputs that it has in the whole model.

    Args:
        model: without masks.
        masks: what will live; layers that do not are left alone.
        batches: read twice. A few thousand tokens; more than a layer has features, or damping decides.

    Raises:
        TypeError, ValueError: a model as in `score`, or one with masks; masks of another model; no batches.
    """
    check(_OP, masks, layers_of(model, _OP), unwrapped(model).config)
    if any(module.__dict__.get("_kdfast_masked") is not None for module in model.modules()):
        _checks.wrong_value(_OP, "model", "one without masks", "one that has some; kdfast.prune.remove(model) first")
    given = list(batches)
    kinds: tuple[Kind, ...] = ("heads", "neurons")
    found = [(kind, Streams(model, kind, given, op=_OP)) for kind in kinds]
    moments = {kind: streams.moments() for kind, streams in found}  # all of the whole model, before any changes
    for kind, streams in found:
        for i, layer in enumerate(streams.layers):
            live = masks.neurons[i] if kind == "neurons" else masks.heads[i].repeat_interleave(layer.head_size)
            if bool(masks.layers[i]) and bool(live.any()) and not bool(live.all()):
                _fit(streams.output_map(layer), moments[kind][i], live, damping)


def _fit(linear: Any, moments: Moments, live: Tensor, damping: float) -> None:
    weight, has_bias = matrix(linear), isinstance(linear.bias, Tensor)
    live = live.to(weight.device)
    second = moments.second - torch.outer(moments.first, moments.first) if has_bias else moments.second
    fitted = refitted(weight.to(second.dtype), second, live, damping)
    if has_bias:
        missing = weight.to(second.dtype) @ moments.first - fitted @ moments.first[live]
        linear.bias += missing.to(linear.bias.dtype)
    weight[:, live] = fitted.to(weight.dtype)


def refitted(weight: Tensor, second: Tensor, live: Tensor, damping: float) -> Tensor:
    """(W H_:S + λ W_S)(H_SS + λI)⁻¹, [out, live], of H = `second`; λ keeps weights near what they were, not near zero."""
    inside = damped(second[live][:, live], damping)
    extra = inside - second[live][:, live]
    factor = torch.linalg.cholesky(inside)
    right = weight @ second[:, live] + weight[:, live] @ extra
    return torch.cholesky_solve(right.mT, factor).mT
