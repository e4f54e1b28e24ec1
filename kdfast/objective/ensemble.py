"""Soft targets of several teachers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kdfast.data.text import OFF
from kdfast.objective.of_logits import Logits
from kdfast.objective.schedules import Weight
from kdfast.objective.term import Inputs
from kdfast.ops import _checks

COMBINED = ("logits", "probabilities", "confidence")


def combined(
    ensemble: Tensor, combine: str = "logits", labels: Tensor | None = None, temperature: float | Tensor = 1.0
) -> Tensor:
    """Logits [B, C], in float32 (float64), whose softmax at the temperature is what teachers say together.

        logits:         mean over k of z_k, as TextBrewer does
        probabilities:  softmax(·/T) = mean over k of softmax(z_k/T)
        confidence:     softmax(·/T) = Σ_k w_k · softmax(z_k/T),
                        w_k = (1 - exp(CE_k) / Σ_j exp(CE_j)) / (K - 1),  CE_k = CE(z_k, label)

    The last is CA-MKD's rule for logits (Zhang, Chen and Wang, 2022, arXiv:2201.00007), whose loss, Σ_k w_k · KL_k, has
    the same gradient. Rows without a label, -100, have equal weights, and so do all where `labels` is None.

    Args:
        ensemble: [B, K, C], of K teachers.
        labels: class numbers [B].
        temperature: a number, or [B].
    """
    z = ensemble.to(_checks.loss_dtype(ensemble))
    if combine == "logits":
        return z.mean(1)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(z.dtype)[:, None]
    per_teacher = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    log_p = (z / per_teacher).log_softmax(-1)
    if combine == "probabilities" or labels is None:
        return temperature * (log_p.logsumexp(1) - math.log(z.shape[1]))
    log_w = confidence(z, labels).log()
    return temperature * (log_w[..., None] + log_p).logsumexp(1)


def confidence(ensemble: Tensor, labels: Tensor) -> Tensor:
    """w [B, K] of `combined`."""
    known, count = labels != OFF, ensemble.shape[1]
    at = labels.clamp(min=0)[:, None, None].expand(-1, count, 1)
    cross_entropies = -ensemble.log_softmax(-1).gather(-1, at)[..., 0]
    weights = (1 - cross_entropies.softmax(1)) / max(count - 1, 1)
    return torch.where(known[:, None], weights, torch.full_like(weights, 1 / count))


class Ensemble(Logits):
    """T² · D(student, what several teachers say together): `Logits` beside `combined`.

    The teacher is a `kdfast.models.teachers.Teachers`, or the batch has a column `teacher_ensemble` [B, K, C]: logits
    of K teachers, whatever tokens each reads, as only whole sequences are compared.

    Args:
        combine: "logits", "probabilities" or "confidence".
        divergence, weight, temperature, t_squared, per_class, **settings: as of `Logits`, whose columns are these too.

    Raises:
        TypeError, ValueError: as `Logits`; tokens; "logit_mse" but of "logits"; one teacher for "confidence", whose
            weights are shares of the others, or labels that are no classes.
    """

    def __init__(
        self, combine: str = "logits", *, divergence: str = "kl_div", weight: Weight = 1.0, **settings: Any
    ) -> None:
        super().__init__(divergence, weight=weight, **settings)
        if combine not in COMBINED:
            self.refuse("combine", f"one of {', '.join(COMBINED)}", combine)
        if self.tokens is not None:
            self.refuse("tokens", "None, as teachers of other tokens agree on whole sequences alone", self.tokens)
        if divergence == "logit_mse" and combine != "logits":
            self.refuse("combine", "'logits' beside 'logit_mse', whose logits need be of no classes", combine)
        self.combine = combine

    def forward(self, student: Any, teacher: Any, inputs: Inputs) -> Tensor:
        ensemble = self.output(teacher, "ensemble", teacher=True)
        if ensemble.dim() != 3 or (self.combine == "confidence" and ensemble.shape[1] < 2):
            least = " of 2 teachers or more" if self.combine == "confidence" else ""
            self.refuse("ensemble", f"logits [batch, teachers, classes]{least}", list(ensemble.shape))
        labels = inputs.get("labels") if self.combine == "confidence" else None
        if labels is not None and (labels.dim() != 1 or labels.is_floating_point()):
            self.refuse("labels", "class numbers [batch] for 'confidence'", f"{labels.dtype} {list(labels.shape)}")
        temperature = inputs.get("sample_temperature", self.temperature)
        logits = combined(ensemble, self.combine, labels, temperature)
        return super().forward(student, SimpleNamespace(logits=logits), inputs)
