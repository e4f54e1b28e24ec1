"""What a distilled student is trained on: callables that return the weighted terms of its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from kdfast import kl_div


class Objective(Protocol):
    """A callable that returns named loss terms; the loss is their sum, so each term already carries its weight.

    Args:
        student_outputs: what the student's forward returned, with `.logits`.
        teacher_outputs: the teacher's outputs without gradient (`.logits` only, where they were stored with the
            rows), or None where there is neither a teacher nor a `teacher_logits` column.
        inputs: the batch as the collator made it, labels included.

    Every term is a mean over the rows it was given, so that gradient accumulation averages equal micro-batches to the
    same result as one large batch.
    """

    def __call__(self, student_outputs: Any, teacher_outputs: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Hinton:
    """Hinton, Vinyals and Dean (2015): soft targets of the teacher beside the labels.

        loss = alpha · T² · KL(softmax(z_t/T) ‖ softmax(z_s/T)) + (1 - alpha) · CE(z_s, label)

    `alpha` weighs the **soft** term (some implementations weigh the hard one with it). T² stands here, on the soft
    term, and keeps its gradient comparable when T changes; `kdfast.kl_div` itself never multiplies by T². A term of
    weight 0 is left out: alpha = 0 is plain training on the labels and needs no teacher, alpha = 1 needs no labels.

    For classification: logits `[B, C]`, labels `[B]`. Losses over tokens need a mask and, for causal models, a shift:
    write an `Objective` with `kdfast.kl_div(..., mask=labels != -100)`.

    Returns the weighted terms `kl` and `ce`, each a mean over rows.

    Raises:
        ValueError: alpha outside [0, 1], a temperature that is not positive, logits that are not
            `[batch, classes]`, or a batch that lacks what a term needs.
    """

    alpha: float = 0.9
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"Hinton: alpha must be between 0 and 1, got {self.alpha}")
        if not self.temperature > 0:
            raise ValueError(f"Hinton: temperature must be positive, got {self.temperature}")

    def __call__(self, student_outputs: Any, teacher_outputs: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        if student_outputs.logits.dim() != 2:
            raise ValueError(
                f"Hinton: expected logits [batch, classes], got shape {list(student_outputs.logits.shape)}"
            )
        terms = {}
        if self.alpha > 0:
            if teacher_outputs is None:
                raise ValueError("Hinton: alpha > 0 needs a teacher, or rows with a teacher_logits column")
            divergence = kl_div(student_outputs.logits, teacher_outputs.logits, temperature=self.temperature)
            terms["kl"] = self.alpha * self.temperature**2 * divergence
        if self.alpha < 1:
            if "labels" not in inputs:
                raise ValueError("Hinton: alpha < 1 needs rows with labels")
            terms["ce"] = (1 - self.alpha) * F.cross_entropy(student_outputs.logits.float(), inputs["labels"])
        return terms
