"""Soft targets whose weight and temperature differ from row to row, by what the models are sure of."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kdfast.objective.of_logits import SPANS, Logits
from kdfast.objective.schedules import Weight, check_weight
from kdfast.objective.term import Inputs
from kdfast.ops import _checks

DIRECTIONS = ("up", "down")
RULES = ("flsw", "cwsm")
OF_NORMS, OF_PROBABILITIES = 1e-4, 1e-3  # TextBrewer adds them to what it divides by


class DynamicLogits(Logits):
    """mean over rows of w_b · T_b² · D(student, teacher), logits [B, C], where w and T are made of the logits.

    Weights, by the teacher's uncertainty u_b = H(softmax(z_t)) / log C, from 0 to 1:

        up:    w_b = 1 + gamma · (u_b - mean u)      rows of which the teacher is unsure count more
        down:  w_b = 1 - gamma · (u_b - mean u)      less

    They are 1 in the mean of a micro-batch, whose mean u is: what gradient accumulation or several processes give
    differs from one large batch in that. Temperatures, as TextBrewer makes them (v, t: the student's and the teacher's
    logits, divided by their norms):

        flsw:  T_b = T + beta · (mean a - a_b),  a_b = (1 - v·t)^power      far apart: sharper (arXiv:1911.07471)
        cwsm:  T_b = T + beta · (mean a - a_b),  a_b = 1 / (max softmax(z_s) + 0.001)      unsure student: sharper

    Neither weights nor temperatures get a gradient.

    Args:
        divergence, weight, t_squared, per_class, **settings: as of `Logits`.
        temperature: T, above the most that `rule` takes from it.
        direction: "up", "down", or None for equal weights.
        gamma: from 0, equal weights, to 1.
        rule: "flsw", "cwsm", or None: T for all rows.
        beta: how much the rule changes the temperature.
        power: of flsw.

    A column `sample_weight` [B] of the batch multiplies the weights; the numbers of one `sample_temperature` [B] take
    the place of T.

    Raises:
        TypeError, ValueError: as `Logits`; gamma outside [0, 1], a negative beta or power, a temperature that rows
            could lose all of, or "logit_mse" with a direction, of which there is no entropy.
    """

    def __init__(
        self,
        divergence: str = "kl_div",
        *,
        weight: Weight = 1.0,
        temperature: float = 1.0,
        direction: str | None = "up",
        gamma: float = 1.0,
        rule: str | None = None,
        beta: float = 1.0,
        power: float = 2.0,
        **settings: Any,
    ) -> None:
        super().__init__(divergence, weight=weight, temperature=temperature, **settings)
        if self.tokens is not None:
            self.refuse("tokens", "None: weights are of whole rows", self.tokens)
        if direction not in (None, *DIRECTIONS):
            self.refuse("direction", "None, 'up' or 'down'", direction)
        if rule not in (None, *RULES):
            self.refuse("rule", "None, 'flsw' or 'cwsm'", rule)
        if direction is not None and divergence == "logit_mse":
            self.refuse("direction", "None beside 'logit_mse', whose logits need be of no classes", direction)
        _checks.check_fraction(type(self).__name__, "gamma", gamma)
        for name, value in (("beta", beta), ("power", power)):
            check_weight(type(self).__name__, name, value)
        self.direction, self.gamma, self.rule, self.beta, self.power = direction, gamma, rule, beta, power
        if rule == "flsw":
            self._check_temperature(2.0**power)

    def _check_temperature(self, most: float) -> None:
        """The mean of numbers from 0 to `most` is less than `most` below any of them."""
        if self.temperature < (taken := self.beta * most):
            self.refuse("temperature", f"at least {taken:g}, which {self.rule} may take from it", self.temperature)

    def forward(self, student: Any, teacher: Any, inputs: Inputs) -> Tensor:
        s = self.output(student, "logits", instead=SPANS).detach()
        t = self.output(teacher, "logits", teacher=True).detach()
        own: dict[str, Tensor] = {}
        if s.dim() == t.dim() == 2:  # of others `Logits` tells
            width = self.settings.get("vocab_size") or s.shape[-1]
            s, t = (x[:, :width].to(_checks.loss_dtype(x)) for x in (s, t))
            if self.direction is not None and width > 1:
                weight = self.weights(t)
                own["sample_weight"] = weight * inputs["sample_weight"] if "sample_weight" in inputs else weight
            if self.rule is not None:
                own["sample_temperature"] = self.temperatures(s, t, inputs.get("sample_temperature"))
        return super().forward(student, teacher, {**inputs, **own})

    def weights(self, teacher_logits: Tensor) -> Tensor:
        """w [B] of the teacher's logits [B, C]."""
        u = torch.special.entr(teacher_logits.softmax(-1)).sum(-1) / math.log(teacher_logits.shape[-1])
        weights: Tensor = 1 + (self.gamma if self.direction == "up" else -self.gamma) * (u - u.mean())
        return weights

    def temperatures(self, student_logits: Tensor, teacher_logits: Tensor, base: Tensor | None = None) -> Tensor:
        """T [B] of logits [B, C]; `base` [B]: in place of `temperature`."""
        if self.rule == "flsw":
            s, t = (z / (z.norm(dim=-1, keepdim=True) + OF_NORMS) for z in (student_logits, teacher_logits))
            a = (1 - (s * t).sum(-1)).clamp(min=0) ** self.power
        else:
            classes = student_logits.shape[-1]
            if base is None:
                self._check_temperature(1 / (1 / classes + OF_PROBABILITIES) - 1 / (1 + OF_PROBABILITIES))
            a = 1 / (student_logits.softmax(-1).amax(-1) + OF_PROBABILITIES)
        temperatures: Tensor = (self.temperature if base is None else base) + self.beta * (a.mean() - a)
        return temperatures
