"""liger-kernel's distillation losses by kdfast, on CPUs too: its names, arguments and values (liger-kernel 0.8).

`LigerFusedLinearJSDLoss` is of `liger_kernel.chunked_loss`, the others are of `liger_kernel.transformers`. Where those
take log-probabilities or probabilities, so do these, and the logits behind them get the same gradients; but `kdfast`'s
own functions take the logits, which saves the softmaxes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast import js_div, kl_div, linear_kd_loss, total_variation
from kdfast.data.text import OFF
from kdfast.ops import _checks


class LossParts(NamedTuple):
    """What `LigerFusedLinearJSDLoss(return_soft_hard_loss=True)` returns; the parts have no weights and no gradient."""

    loss: Tensor
    soft_loss: Tensor
    hard_loss: Tensor


class LigerFusedLinearJSDLoss(nn.Module):
    """weight_hard_loss · Σ CE / N + weight_soft_loss · Σ JSD_beta(t, s) / N by `kdfast.linear_kd_loss`, N the rows whose
    label is not `ignore_index`.

    The divergence is `kdfast.js_div` at `temperature`, **without T²**, as liger has it. A teacher with more rows of
    vocabulary than the student is refused (liger gives the student logits of 0 there):
    `kdfast.linear_kd_loss(vocab_size=)` counts those that both have.

    Args:
        weight_hard_loss, weight_soft_loss: not negative; they need not add up to 1.
        beta, ignore_index, temperature, return_soft_hard_loss: as in liger.
        compiled, chunk_size: taken for their names' sake; kdfast compiles nothing and chooses its chunks.

    Raises:
        ValueError: a weight or temperature out of range; and what `kdfast.linear_kd_loss` raises.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = OFF,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        for name, weight in (("weight_hard_loss", weight_hard_loss), ("weight_soft_loss", weight_soft_loss)):
            if weight < 0:
                _checks.wrong_value(op, name, "a number that is not negative", weight)
        if weight_hard_loss + weight_soft_loss == 0:
            _checks.wrong_value(op, "weight_soft_loss", "one of the two weights above 0", "0 for both")
        _checks.check_temperature_number(op, temperature)
        self.weight_hard_loss, self.weight_soft_loss = weight_hard_loss, weight_soft_loss
        self.beta, self.ignore_index, self.temperature = beta, ignore_index, temperature
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | LossParts:
        """Inputs [N, H] and [N, Ht], weights [V, H] and [V, Ht], labels [N], biases [V]; a scalar, or three."""
        t_squared = self.temperature**2  # which linear_kd_loss multiplies the divergence by
        soft = self.weight_soft_loss / t_squared
        both = soft + self.weight_hard_loss
        loss, divergence, cross_entropy = linear_kd_loss(
            *(student_input, student_weight, teacher_input, teacher_weight, true_labels),
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            alpha=soft / both,
            temperature=self.temperature,
            divergence="js_div",
            beta=self.beta,
            ignore_index=self.ignore_index,
            return_components=True,
        )
        loss = loss * both
        return LossParts(loss, divergence / t_squared, cross_entropy) if self.return_soft_hard_loss else loss


class LigerFusedLinearJSD(nn.Module):
    """Σ JSD_beta(t, s) / N of hidden states by `kdfast.linear_kd_loss`, N the rows whose label is not `ignore_index`,
    all of them without labels. At `temperature`, **without T²**, as liger has it.

    Raises:
        ValueError: a temperature out of range; and what `kdfast.linear_kd_loss` raises.
    """

    def __init__(self, jsd_beta: float = 0.5, ignore_index: int = OFF, temperature: float = 1.0) -> None:
        super().__init__()
        _checks.check_temperature_number(type(self).__name__, temperature)
        self.jsd_beta, self.ignore_index, self.temperature = jsd_beta, ignore_index, temperature

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """Inputs [N, H] and [N, Ht], weights [V, H] and [V, Ht], labels [N] or None; a scalar."""
        loss = linear_kd_loss(
            *(student_input, student_weight, teacher_input, teacher_weight),
            alpha=1.0,
            temperature=self.temperature,
            divergence="js_div",
            beta=self.jsd_beta,
            mask=_counted(shift_labels, self.ignore_index),
        )
        return loss / self.temperature**2


class LigerJSD(nn.Module):
    """Σ JSD_beta(t, s) / N of log-probabilities [N, V] by `kdfast.js_div`, N the rows whose label is not
    `ignore_index`, all of them without labels. Raises what `kdfast.js_div` raises.

    The gradient is that of the logits behind `log_q`: a softmax is taken again, which changes nothing.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = OFF) -> None:
        super().__init__()
        self.beta, self.ignore_index = beta, ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """The student's and the teacher's log-probabilities, labels [N] or None; a scalar."""
        return js_div(log_q, log_p, beta=self.beta, mask=_counted(shift_labels, self.ignore_index))


class LigerKLDIVLoss(nn.KLDivLoss):
    """`torch.nn.KLDivLoss` of [N, V] by `kdfast.kl_div`: the mean over rows and columns is its default, as in torch;
    "batchmean" is KL. `reduction="none"`, a value for each column, is torch's own.

    y_pred are log-probabilities; y_true probabilities, or their logarithms with `log_target`. Both sides' rows must add
    up to 1. Raises what `kdfast.kl_div` raises.

    Args:
        eps: taken for its name's sake: p log p is 0 where p is.
        *args, **kwargs: of `torch.nn.KLDivLoss`.
    """

    def __init__(self, eps: float = 1e-10, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        if self.reduction == "none":
            return F.kl_div(y_pred, y_true, reduction="none", log_target=self.log_target)
        logarithms = y_true if self.log_target else y_true.log()
        loss = kl_div(y_pred, logarithms, reduction=self.reduction)
        return loss / y_pred.shape[-1] if self.reduction == "mean" else loss


class LigerTVDLoss(nn.Module):
    """½ Σ_v |p − q| of probabilities [N, V] by `kdfast.total_variation`, over rows whose label is not `ignore_index`.

    "batchmean" divides by their number, "mean" by V too, "sum" by nothing; "none", a value for each column, is
    torch's. Where p = q the gradient of a column is 0 (liger: −½). The gradient is that of the logits behind p.
    Raises what `kdfast.total_variation` raises.
    """

    def __init__(self, reduction: str = "batchmean", ignore_index: int = OFF) -> None:
        super().__init__()
        _checks.check_reduction(type(self).__name__, reduction, torch.empty(0, 0))
        self.reduction, self.ignore_index = reduction, ignore_index

    def forward(self, p: Tensor, q: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """The student's and the teacher's probabilities, labels [N] or None; a scalar, or [N, V]."""
        counted = _counted(shift_labels, self.ignore_index)
        if self.reduction == "none":
            losses = (p - q).abs() / 2
            return losses if counted is None else losses.masked_fill(~counted[:, None], 0)
        # Probabilities that have become 0 have no gradient.
        logits = p.clamp(min=torch.finfo(p.dtype).tiny).log()
        loss = total_variation(logits, q.log(), mask=counted, reduction="sum" if self.reduction == "sum" else "mean")
        return loss / p.shape[-1] if self.reduction == "mean" else loss


def _counted(labels: Tensor | None, ignore_index: int) -> Tensor | None:
    return None if labels is None else labels != ignore_index
