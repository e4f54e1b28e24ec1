"""The term of self-distillation: a model's earlier classifiers learn from its last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.objective.of_logits import _Soft
from kdfast.objective.schedules import Weight
from kdfast.objective.term import Inputs


class Branches(_Soft):
    """Σ over branches of T² · D(branch, last classifier), each the mean over rows: self-distillation of FastBERT.

        loss = Σ_i mean over rows of KL(softmax(z_last) ‖ softmax(z_i))

    Of a `kdfast.early_exit.EarlyExit`, whose own last classifier is the teacher and gets no gradient here. Neither
    labels nor another teacher are needed.

    Args:
        divergence: "kl_div", KL(last ‖ branch), as FastBERT's code has it; "reverse_kl_div", as its paper writes; or
            another of kdfast's.
        weight: a number or a schedule.
        temperature: T; 1 in FastBERT.
        **settings: of the divergence, as of `Logits`.

    A column `sample_weight` [B] of the batch multiplies every row's loss; it stays out of the divisor.

    Raises:
        TypeError: an argument that neither this class nor the divergence has.
        ValueError: a setting out of range, or a model without branches.

    Source: Liu et al., FastBERT, 2020, arXiv:2004.02178, equations 5 and 6.
    """

    needs = "branches"

    def __init__(
        self, divergence: str = "kl_div", *, weight: Weight = 1.0, temperature: float = 1.0, **settings: Any
    ) -> None:
        super().__init__(divergence, weight, temperature, True, settings, "weight, temperature")

    def forward(self, student: Any, teacher: Any, inputs: Inputs) -> Tensor:
        branches = getattr(student, "branch_logits", None)
        if not branches:
            expected = "a kdfast.early_exit.EarlyExit of two layers or more, with .branch_logits"
            self.refuse("student", expected, type(student).__name__)
        each = torch.stack(branches, 1)
        last = self.output(student, "logits").detach()[:, None].expand_as(each)
        return len(branches) * self.distance(each, last, inputs, None)
