"""liger-kernel's distillation losses by kdfast, on CPUs too: its names, arguments and values (liger-kernel 0.8).

`LigerFusedLinearJSDLoss` and `LigerFusedLinearCosineSimilarityLoss` are of `liger_kernel.chunked_loss`, the others are of
`liger_kernel.transformers`. Where those take log-probabilities or probabilities, so do these, and the logits behind them
get the same gradients; but `kdfast`'s own functions take the logits, which saves the softmaxes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdfast import cosine_distance, js_div, kl_div, linear_kd_loss, total_variation
from kdfast.data.text import OFF
from kdfast.models.head import product
from kdfast.ops import _checks, _heads
from kdfast.ops._heads import Head


class LossParts(NamedTuple):
    """What the losses with two weights return with `return_soft_hard_loss=True`; the parts have no weights and no
    gradient."""

    loss: Tensor
    soft_loss: Tensor
    hard_loss: Tensor


class _SoftAndHard(nn.Module):
    """The settings that the losses of `liger_kernel.chunked_loss` share."""

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
        self.chunk_size, self.return_soft_hard_loss = chunk_size, return_soft_hard_loss


class LigerFusedLinearJSDLoss(_SoftAndHard):
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


class LigerFusedLinearCosineSimilarityLoss(_SoftAndHard):
    """weight_hard_loss · Σ CE / N + weight_soft_loss · Σ beta · (1 − cos(z_s, z_t)) / N, N the rows whose label is not
    `ignore_index`, or 1.

    The cosine is of both models' **logits** z = hidden · weightᵀ + bias, by `kdfast.cosine_distance`; `temperature` does
    not change it, nor, as in liger, the cross-entropy. As liger has it, rows whose label is `ignore_index` are in the sum
    of the cosines, though not in N. The cosines' logits are there for `chunk_size` rows at a time, and made once more in
    the backward; the cross-entropy is `kdfast.linear_kd_loss`'s.

    Args:
        weight_hard_loss, weight_soft_loss: not negative, one of them above 0; they need not add up to 1.
        beta: from 0 to 1, a factor.
        chunk_size: at least 1.
        ignore_index, temperature, return_soft_hard_loss: as in liger; `soft_loss` has beta in it.
        compiled: taken for its name's sake.

    Raises:
        TypeError, ValueError: a setting out of range; a shape, dtype or device that does not fit, or a teacher of
            another vocabulary; and what `kdfast.linear_kd_loss` raises.
    """

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
        op = type(self).__name__
        _checks.check_fraction(op, "beta", self.beta)
        _checks.check_int(op, "chunk_size", self.chunk_size)
        if self.chunk_size < 1:
            _checks.wrong_value(op, "chunk_size", "1 or more", self.chunk_size)
        student = _heads.checked(op, "student", student_input, student_weight, student_bias, None, 1.0)
        teacher = _heads.checked(op, "teacher", teacher_input, teacher_weight, teacher_bias, None, 1.0)
        if teacher.hidden.shape[:-1] != student.hidden.shape[:-1]:
            expected = f"the student's leading dimensions {list(student.hidden.shape[:-1])}"
            _checks.wrong_value(op, "teacher_input", expected, list(teacher.hidden.shape))
        if len(teacher.weight) != len(student.weight):
            _checks.wrong_value(op, "teacher_weight", f"the student's {len(student.weight)} rows", len(teacher.weight))
        hard = linear_kd_loss(
            *student[:2], labels=true_labels, student_bias=student.bias, alpha=0.0, ignore_index=self.ignore_index
        )
        counted = (true_labels != self.ignore_index).sum().clamp(min=1)
        soft = self.beta * self._distances(student.flat(), teacher.flat().detached()) / counted
        loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        return LossParts(loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss

    def _distances(self, student: Head, teacher: Head) -> Tensor:
        """Σ (1 − cos) over all rows."""

        def of(rows: slice) -> Tensor:
            s, t = (product(head.hidden[rows], head.weight, head.bias) for head in (student, teacher))
            return cosine_distance(s[None], t[None], reduction="sum")

        # One chunk where there is no row: the weights are used.
        chunks = range(0, max(len(student.hidden), 1), self.chunk_size)
        parts = [
            checkpoint(of, slice(begin, begin + self.chunk_size), use_reentrant=False, preserve_rng_state=False)
            for begin in chunks
        ]
        return torch.stack(parts).sum()


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
