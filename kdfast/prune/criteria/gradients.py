"""Criteria that read values times gradients: Taylor expansions of the loss, SNIP, and diagonal second order.

With ∂L_x/∂ξ the derivative of row x's loss by a gate on what a unit gives, Σ value · gradient, and w and g weights and
their gradients.
"""

from __future__ import annotations

from torch import Tensor

from kdfast.prune.criteria.registry import criterion
from kdfast.prune.criteria.streams import Streams
from kdfast.prune.scores import Kind

_UNITS: tuple[Kind, ...] = ("heads", "groups", "neurons", "layers")


@criterion("labels", of=_UNITS)
def michel(streams: Streams) -> list[Tensor]:
    """The mean over rows x of |∂L_x/∂ξ| (Michel et al., 2019), as in `kdfast.prune.importance`."""
    return streams.mean([gate.abs() for gate in gates] for gates in streams.gates())


@criterion("labels", of=_UNITS)
def taylor(streams: Streams) -> list[Tensor]:
    """Michel's, divided by the L2 norm of each layer: the first-order Taylor criterion with the absolute value of each
    sample (Molchanov et al., 2017)."""
    return [x / x.norm().clamp(min=1e-30) for x in michel(streams)]


@criterion("labels", of=_UNITS)
def taylor_batch(streams: Streams) -> list[Tensor]:
    """The mean over batches of |mean over rows of ∂L_x/∂ξ|: the signs of a batch's rows cancel out. Heads are DynaBERT's
    (Hou et al., 2020) divided by the number of batches."""
    return streams.mean([gate.mean(0, keepdim=True).abs() for gate in gates] for gates in streams.gates())


@criterion("labels", of=_UNITS)
def fisher(streams: Streams) -> list[Tensor]:
    """½ · the mean over rows of (∂L_x/∂ξ)²: second order in gates, where `obd` is in weights (Theis et al., 2018)."""
    return streams.mean([gate.square() / 2 for gate in gates] for gates in streams.gates())


@criterion("labels")
def taylor_weights(streams: Streams) -> list[Tensor]:
    """The mean over batches of (Σ w · g)² over a unit's weights (Molchanov et al., 2019)."""
    return streams.mean([wg.sum(1).square()[None] for wg in each] for each in streams.products())


@criterion("labels")
def snip(streams: Streams) -> list[Tensor]:
    """|Σ w · g| over a unit's weights, g of the mean loss over batches, as a share of the sum over all units: the
    sensitivity of connections (Lee et al., 2019), asked of a model at its initialisation, by one batch."""
    sums = streams.mean([wg.sum(1)[None] for wg in each] for each in streams.products())
    whole = sum(float(x.abs().sum()) for x in sums)
    return [x.abs() / (whole or 1) for x in sums]


@criterion("labels")
def obd(streams: Streams) -> list[Tensor]:
    """½ Σ H_jj w_j² over a unit's weights, the Hessian's diagonal that of the Fisher matrix, the mean over rows of g²
    (LeCun et al., 1989; Theis et al., 2018). Rows go through the model one by one."""
    return streams.mean([wg.square().sum(1)[None] / 2 for wg in each] for each in streams.products(by_row=True))
