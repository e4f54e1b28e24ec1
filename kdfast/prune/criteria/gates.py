"""Criteria that train a gate on each unit beside the weights: network slimming, L0 by hard concrete, sparse variational
dropout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.prune.criteria.registry import criterion
from kdfast.prune.criteria.tracker import Tracker
from kdfast.prune.layers import Layer, matrix
from kdfast.prune.masked import live_part
from kdfast.prune.ranks import add_up, count
from kdfast.prune.scores import Kind

_UNITS: tuple[Kind, ...] = ("heads", "groups", "neurons")
_BETA, _GAMMA, _ZETA = 2 / 3, -0.1, 1.1  # of the hard concrete distribution
_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695  # of the KL's approximation
_DEAD = 3.0  # log α


class Gates(Tracker):
    """A number of each unit multiplies what it gives; an Adam of its own makes its steps in `before_step`, by the mean of
    the ranks' gradients, as DDP takes it of the weights.

    weight: of the penalty, beside the loss whose gradients are there. learning_rate: of the gates. start: their
    parameter in the beginning.
    """

    def __init__(
        self, model: nn.Module, of: Sequence[Kind], *, weight: float, learning_rate: float, start: float
    ) -> None:
        super().__init__(model, of)
        self.weight = weight
        self.parameters: dict[Kind, list[Tensor]] = {}
        for kind, streams in self.streams.items():
            values = (torch.full_like(x, start) for x in streams.zeros())
            self.parameters[kind] = [x.requires_grad_() for x in values]
        every = [x for values in self.parameters.values() for x in values]
        self.optimizer = torch.optim.Adam(every, lr=learning_rate)
        self._hooks = [hook for kind in of for hook in self._hooked(kind)]

    def gate(self, parameter: Tensor, training: bool) -> Tensor:
        """[units]: what is multiplied by, a sample of it in training."""
        raise NotImplementedError

    def penalty(self, parameter: Tensor) -> Tensor:
        """A number for a layer."""
        raise NotImplementedError

    def before_step(self) -> None:
        if (ranks := count()) > 1:
            every = [x for values in self.parameters.values() for x in values]
            gradients = [torch.zeros_like(x) if x.grad is None else x.grad / ranks for x in every]
            add_up(gradients)
            for x, gradient in zip(every, gradients, strict=True):
                x.grad = gradient
        penalty = sum(self.penalty(x) for values in self.parameters.values() for x in values)
        (self.weight * penalty).backward()  # type: ignore[union-attr]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def values(self, of: Kind) -> list[Tensor]:
        return [x.detach().clone() for x in self.parameters[of]]

    def gates(self, of: Kind) -> list[Tensor]:
        """[units] of every layer, as they are in evaluation mode."""
        return [self.gate(x.detach(), training=False) for x in self.parameters[of]]

    @torch.no_grad()
    def fold(self) -> None:
        """The gates' values in evaluation mode go into the columns of the output maps, and the gates are gone: the model
        computes what it did."""
        for kind, streams in self.streams.items():
            for layer, gate in zip(streams.layers, self.gates(kind), strict=True):
                if streams.units(layer):
                    matrix(streams.output_map(layer)).mul_(_features(kind, layer, gate))
        self.close()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state_dict(self) -> dict[str, Any]:
        gates = {kind: [x.detach().clone() for x in values] for kind, values in self.parameters.items()}
        return {"gates": gates, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for kind, values in self.parameters.items():
            for mine, x in zip(values, state["gates"][kind], strict=True):
                mine.copy_(x)
        self.optimizer.load_state_dict(state["optimizer"])

    def _hooked(self, kind: Kind) -> Iterator[Any]:
        streams = self.streams[kind]

        def hook(layer: Layer, parameter: Tensor) -> Callable[[nn.Module, Any], tuple[Tensor]]:
            def multiply(linear: nn.Module, inputs: Any) -> tuple[Tensor]:
                gate = _features(kind, layer, self.gate(parameter, linear.training))
                live = live_part(linear, of_input=True)
                gate = gate if live is None else gate[live.to(gate.device)]
                return (inputs[0] * gate.to(inputs[0].dtype),)

            return multiply

        for layer, parameter in zip(streams.layers, self.parameters[kind], strict=True):
            if streams.units(layer):
                yield streams.output_map(layer).register_forward_pre_hook(hook(layer, parameter))


def _features(kind: Kind, layer: Layer, gate: Tensor) -> Tensor:
    """Of every feature that an output map reads, the gate of its unit."""
    if kind == "neurons":
        return gate
    gate = gate[layer.group_of.to(gate.device)] if kind == "groups" else gate
    return gate.repeat_interleave(layer.head_size)


@criterion("training", of=_UNITS, name="slimming")
class Slimming(Gates):
    """Network slimming (Liu et al., 2017): gates γ with the penalty Σ |γ|; a score is |γ|. `fold` puts γ into the weights.

    LayerNorm's own γ, of hidden features that all layers share, are of no unit. start: 1, at which a trained model is
    unchanged (the authors begin at 0.5, before any training).
    """

    def __init__(
        self,
        model: nn.Module,
        of: Sequence[Kind],
        *,
        weight: float = 1e-4,
        learning_rate: float = 1e-2,
        start: float = 1.0,
    ) -> None:
        super().__init__(model, of, weight=weight, learning_rate=learning_rate, start=start)

    def gate(self, parameter: Tensor, training: bool) -> Tensor:
        return parameter

    def penalty(self, parameter: Tensor) -> Tensor:
        return parameter.abs().sum()

    def values(self, of: Kind) -> list[Tensor]:
        return [x.abs() for x in super().values(of)]


@criterion("training", of=_UNITS, name="hard_concrete")
class HardConcrete(Gates):
    """L0 regularisation (Louizos et al., 2018): gates that are exactly 0 or 1 with some probability.

    Of a number u, uniform in (0, 1), for each unit and forward pass:

        s = σ((log u − log(1 − u) + log α) / β) · (ζ − γ) + γ        z = min(1, max(0, s))

    with β = 2/3, γ = −0.1, ζ = 1.1; the penalty is the expected number of gates that are not 0, Σ σ(log α − β log(−γ/ζ)),
    and in evaluation mode z = min(1, max(0, σ(log α)(ζ − γ) + γ)). A score is log α.
    """

    def __init__(
        self,
        model: nn.Module,
        of: Sequence[Kind],
        *,
        weight: float = 1e-3,
        learning_rate: float = 0.1,
        start: float = 2.0,
    ) -> None:
        super().__init__(model, of, weight=weight, learning_rate=learning_rate, start=start)

    def gate(self, parameter: Tensor, training: bool) -> Tensor:
        if not training:
            return (parameter.sigmoid() * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)
        tiny = torch.finfo(parameter.dtype).eps
        u = torch.rand_like(parameter).clamp(tiny, 1 - tiny)
        s = ((u.log() - (-u).log1p() + parameter) / _BETA).sigmoid() * (_ZETA - _GAMMA) + _GAMMA
        return s.clamp(0, 1)

    def penalty(self, parameter: Tensor) -> Tensor:
        return self.open(parameter).sum()

    @staticmethod
    def open(log_alpha: Tensor) -> Tensor:
        """P(z ≠ 0)."""
        return (log_alpha - _BETA * math.log(-_GAMMA / _ZETA)).sigmoid()


@criterion("training", of=_UNITS, name="variational_dropout")
class VariationalDropout(Gates):
    """Sparse variational dropout (Molchanov et al., 2017) of one gate for each unit: z = θ(1 + √α ε), ε normal, θ = 1.

    −KL ≈ k₁ σ(k₂ + k₃ log α) − ½ log(1 + 1/α) − k₁ with k = 0.63576, 1.87320, 1.48695; the penalty is its sum's negative,
    its weight growing from 0 over the first `anneal` steps. A score is −log α; a unit is dead where log α > 3, in
    evaluation mode too. θ is not trained: a scale of what a unit gives is its output weights' own.
    """

    def __init__(
        self,
        model: nn.Module,
        of: Sequence[Kind],
        *,
        weight: float = 1e-3,
        learning_rate: float = 0.1,
        start: float = -6.0,
        anneal: int = 0,
    ) -> None:
        super().__init__(model, of, weight=weight, learning_rate=learning_rate, start=start)
        self.final, self.anneal, self.steps = weight, anneal, 0

    def gate(self, parameter: Tensor, training: bool) -> Tensor:
        if not training:
            return (parameter <= _DEAD).to(parameter.dtype)
        return 1 + (parameter / 2).exp() * torch.randn_like(parameter)

    def penalty(self, parameter: Tensor) -> Tensor:
        sigmoid = (_K2 + _K3 * parameter).sigmoid()
        return (_K1 - _K1 * sigmoid + nn.functional.softplus(-parameter) / 2).sum()

    def before_step(self) -> None:
        self.weight = self.final * min(1.0, self.steps / self.anneal) if self.anneal else self.final
        self.steps += 1
        super().before_step()

    def values(self, of: Kind) -> list[Tensor]:
        return [-x for x in super().values(of)]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.steps = state["steps"]
