"""Collaborative channel pruning: units chosen together, as what one unit lacks another may have."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.ops import _checks
from kdfast.prune.criteria.registry import criterion
from kdfast.prune.criteria.streams import Streams


@criterion("labels", of=("heads", "groups", "neurons"))
def collaborative(streams: Streams, *, keep: float = 0.5, steps: int = 300) -> list[Tensor]:
    """When a unit goes, as a share of all, by the quadratic problem of collaborative channel pruning (Peng et al., 2019).

    With x_i = 1 for what goes, g_x the gates' gradients of row x, u = |mean g_x| and P = ½ · mean g_x g_xᵀ, the second
    order of the loss with g gᵀ for its Hessian: the minimum of uᵀx + xᵀPx with Σx = (1 − keep) · units, over 0 ≤ x ≤ 1
    instead of 0 or 1, by `steps` of Frank and Wolfe's; units with the largest x go first, of equal ones those of which
    another bit would cost least. Layer by layer, with no meaning between layers; select with the same `keep`.
    """
    if not 0 < keep < 1:
        _checks.wrong_value(streams.op, "keep", "a number between 0 and 1", keep)
    first, rows = streams.zeros(), 0
    second = [torch.outer(x, x) for x in first]
    for gates in streams.gates():
        rows += len(gates[0])
        for u, p, gate in zip(first, second, gates, strict=True):
            u += gate.sum(0)
            p.addmm_(gate.mT, gate)
    counted = streams.over_ranks([*first, *second], rows)
    return [_order((u / counted).abs(), p / (2 * counted), keep, steps) for u, p in zip(first, second, strict=True)]


def _order(linear: Tensor, quadratic: Tensor, keep: float, steps: int) -> Tensor:
    if not len(linear):
        return linear
    goes = relaxed(linear, quadratic, len(linear) - max(1, round(keep * len(linear))), steps)
    cost = linear + 2 * quadratic @ goes
    order = torch.argsort(cost, stable=True)
    order = order[torch.argsort(goes[order], descending=True, stable=True)]
    return torch.empty_like(linear).index_copy_(0, order, torch.linspace(0, 1, len(order)).to(linear))


def relaxed(linear: Tensor, quadratic: Tensor, count: int, steps: int) -> Tensor:
    """Near the minimum of linearᵀx + xᵀ · quadratic · x with Σx = count, 0 ≤ x ≤ 1: each step goes towards the `count`
    units of the least slope (Frank & Wolfe, 1956), as far as the quadratic falls."""
    x = torch.full_like(linear, count / len(linear))
    for _ in range(steps):
        slope = linear + 2 * quadratic @ x
        towards = torch.zeros_like(x).index_fill_(0, slope.topk(count, largest=False).indices, 1) - x
        falls, curves = -(slope @ towards), 2 * (towards @ quadratic @ towards)
        x = x + torch.where(curves > 0, falls / curves, 1).clamp(0, 1) * towards
    return x
