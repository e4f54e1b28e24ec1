"""Criteria that pull on the weights while a model is trained: L1, group lasso, hidden-unit decay; and movement, which
watches where they go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.prune.criteria.registry import criterion
from kdfast.prune.criteria.tracker import Tracker
from kdfast.prune.geometry import views
from kdfast.prune.scores import Kind

_UNITS: tuple[Kind, ...] = ("heads", "groups", "neurons")


class _Pull(Tracker):
    """weight: λ."""

    def __init__(self, model: nn.Module, of: Sequence[Kind], *, weight: float = 1e-3) -> None:
        super().__init__(model, of)
        self.weight = weight

    def norms(self, of: Kind) -> Iterator[Tensor]:
        """‖w‖ of each unit, by layer."""
        return (w.norm(dim=1) for w in self.streams[of].weights())

    def values(self, of: Kind) -> list[Tensor]:
        return [*self.norms(of)]


@criterion("training", of=_UNITS, name="l1_penalty")
class L1Penalty(_Pull):
    """λ Σ |w| beside the loss, by its proximal step after each of the optimizer's: w ← sign(w) · max(|w| − ηλ, 0) with the
    learning rate η. A score is Σ |w|."""

    @torch.no_grad()
    def after_step(self, learning_rate: float) -> None:
        for kind, streams in self.streams.items():
            for layer in streams.layers:
                for view in views(layer, kind):
                    view.copy_(nn.functional.softshrink(view, learning_rate * self.weight))

    def values(self, of: Kind) -> list[Tensor]:
        return [w.abs().sum(1) for w in self.streams[of].weights()]


@criterion("training", of=_UNITS, name="group_lasso")
class GroupLasso(_Pull):
    """λ Σ_g √p_g ‖W_g‖₂ over units of p weights (Wen et al., 2016, structured sparsity learning), by its proximal step:
    W_g ← W_g · max(1 − ηλ√p_g/‖W_g‖, 0), which makes units exactly zero. A score is ‖W_g‖₂ / √p_g."""

    @torch.no_grad()
    def after_step(self, learning_rate: float) -> None:
        for kind, streams in self.streams.items():
            for layer, w in zip(streams.layers, streams.weights(), strict=True):
                pull = learning_rate * self.weight * w.shape[1] ** 0.5
                _scale(views(layer, kind), (1 - pull / w.norm(dim=1)).clamp(min=0))

    def values(self, of: Kind) -> list[Tensor]:
        return [w.norm(dim=1) / max(w.shape[1], 1) ** 0.5 for w in self.streams[of].weights()]


@criterion("training", of=_UNITS, name="unit_decay")
class UnitDecay(_Pull):
    """λ Σ_g ‖W_g‖₂ beside the loss, by its gradient λ W_g / ‖W_g‖: a decay of weights that is the stronger the smaller
    their unit (Hanson & Pratt, 1989). A score is ‖W_g‖₂."""

    @torch.no_grad()
    def before_step(self) -> None:
        for kind, streams in self.streams.items():
            for layer, norms in zip(streams.layers, self.norms(kind), strict=True):
                factors = self.weight / norms.clamp(min=torch.finfo(norms.dtype).tiny)
                weights, gradients = views(layer, kind), views(layer, kind, _gradient)
                for weight, gradient in zip(weights, gradients, strict=True):
                    gradient += weight * _along(factors, weight)


@criterion("training", name="movement")
class Movement(Tracker):
    """S = − Σ over steps of Σ w · g over a unit's weights (Sanh et al., 2020): the larger, the further they moved away from
    zero. Hard movement keeps the largest (`keep=` of `kdfast.prune.select`), soft movement those with σ(S) > τ
    (`threshold=log(τ / (1 − τ))`).

    Units that `apply` holds dead have no gradient, and scores that stay; `kdfast.prune.Surgery` lets them go on.
    """

    def __init__(self, model: nn.Module, of: Sequence[Kind], *, block: tuple[int, int] = (32, 32)) -> None:
        super().__init__(model, of, block)
        self.sums = {kind: streams.zeros() for kind, streams in self.streams.items()}

    @torch.no_grad()
    def before_step(self) -> None:
        for kind, streams in self.streams.items():
            for total, products in zip(self.sums[kind], streams.weights(lambda w: w * _gradient(w)), strict=True):
                total -= products.sum(1)

    def values(self, of: Kind) -> list[Tensor]:
        return [total.clone() for total in self.sums[of]]

    def state_dict(self) -> dict[str, Any]:
        return {kind: [x.clone() for x in sums] for kind, sums in self.sums.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for kind, sums in self.sums.items():
            for mine, x in zip(sums, state[kind], strict=True):
                mine.copy_(x)


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _along(factors: Tensor, view: Tensor) -> Tensor:
    """[units] beside [units, ...]."""
    return factors.to(view.dtype).view(-1, *(1,) * (view.dim() - 1))


def _scale(of_units: list[Tensor], factors: Tensor) -> None:
    for view in of_units:
        view.mul_(_along(factors, view))
