"""The divergences and `kd_loss` in plain torch, in the inputs' precision: what tests, benchmarks and readers compare
with. The arguments are those of the functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdfast.ops import _checks


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p · (log p − log q); what is not there must not reach the gradient as 0 · inf either."""
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0.0)).sum(-1)


def _js(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    if beta in (0, 1):
        return _kl(log_s, log_t) if beta else _kl(log_t, log_s)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    return beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m)


def _skewed(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    if skew == 0:
        return _kl(log_p, log_q)
    return _kl(log_p, torch.logaddexp(log_p + math.log(skew), log_q + math.log1p(-skew)))


def _soft_cross_entropy(log_s: Tensor, log_t: Tensor) -> Tensor:
    p_t = log_t.exp()
    return -(p_t * torch.where(p_t > 0, log_s, 0.0)).sum(-1)


_ROWS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "kl_div": lambda s, t, beta, skew: _kl(t, s),
    "reverse_kl_div": lambda s, t, beta, skew: _kl(s, t),
    "symmetric_kl_div": lambda s, t, beta, skew: (_kl(t, s) + _kl(s, t)) / 2,
    "js_div": lambda s, t, beta, skew: _js(s, t, beta),
    "skew_kl_div": lambda s, t, beta, skew: _skewed(t, s, skew),
    "skew_reverse_kl_div": lambda s, t, beta, skew: _skewed(s, t, skew),
    "total_variation": lambda s, t, beta, skew: (s.exp() - t.exp()).abs().sum(-1) / 2,
    "soft_cross_entropy": lambda s, t, beta, skew: _soft_cross_entropy(s, t),
}


def difference(s: Tensor, t: Tensor) -> Tensor:
    """s - t, of what is equal, as two infinities are, 0."""
    equal = s == t
    return torch.where(equal, 0.0, s) - torch.where(equal, 0.0, t)


def _rows(kind: str, s: Tensor, t: Tensor, temperature: Tensor, beta: float, skew: float) -> Tensor:
    s, t = s / temperature[..., None], t / temperature[..., None]
    if kind == "logit_mse":
        return difference(s, t).square().sum(-1) / max(s.shape[-1], 1)
    neither = (s == -torch.inf) & (t == -torch.inf)
    neither = neither & ~neither.all(-1, keepdim=True)  # a row without columns is NaN
    # Columns that are on neither side are taken out: -inf less -inf would be NaN in the gradients of mixtures.
    log_s, log_t = (torch.where(neither, -1e4, z.log_softmax(-1)) for z in (s, t))
    return _ROWS[kind](log_s, log_t, beta, skew)


def divergence(
    kind: str,
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    beta: float = 0.5,
    skew: float = 0.1,
) -> Tensor:
    """Any of the divergences, by its name."""
    s, t, temperature = prepared(student_logits, teacher_logits, temperature, vocab_size)
    rows = _rows(kind, s, t, temperature, beta, skew)
    return reduce_rows(rows, mask, weight, reduction, num_items)


def of(kind: str) -> Callable[..., Tensor]:
    """The reference of one divergence."""

    def reference(student_logits: Tensor, teacher_logits: Tensor, **kwargs: Any) -> Tensor:
        return divergence(kind, student_logits, teacher_logits, **kwargs)

    return reference


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 2.0,
    divergence: str = "kl_div",
    beta: float = 0.5,
    skew: float = 0.1,
    vocab_size: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """`kdfast.kd_loss`."""
    s, t, temperature = prepared(student_logits, teacher_logits, temperature, vocab_size)
    soft_rows = temperature.square() * _rows(divergence, s, t, temperature, beta, skew)
    return with_labels(s, soft_rows, labels, **kwargs)


def with_labels(
    s: Tensor,
    soft_rows: Tensor,
    labels: Tensor | None,
    *,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """The soft part's rows, T² included, beside the cross-entropy; without a mask only rows that have a label."""
    if mask is None and labels is not None:
        mask = labels != ignore_index
    if mask is not None and labels is not None:
        labels = torch.where(mask.expand(labels.shape), labels, ignore_index)  # others are not looked at
    soft = alpha * reduce_rows(soft_rows, mask, weight, reduction, num_items)
    if labels is None:
        return soft
    hard_rows = torch.nn.functional.cross_entropy(
        s.flatten(0, -2) if s.dim() > 1 else s[None],
        labels.flatten(),
        reduction="none",
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    ).reshape(labels.shape)
    labelled = labels != ignore_index
    if mask is not None:
        labelled = labelled & mask
    return soft + (1 - alpha) * reduce_rows(hard_rows, labelled, weight, reduction, num_items)


def prepared(s: Tensor, t: Tensor, temperature: float | Tensor, vocab_size: int | None) -> tuple[Tensor, ...]:
    real = _checks.loss_dtype(s)
    temperature = torch.as_tensor(temperature, dtype=real, device=s.device)
    return s[..., :vocab_size].to(real), t[..., :vocab_size].detach().to(real), temperature


def reduce_rows(
    rows: Tensor, mask: Tensor | None, weight: Tensor | None, reduction: str, num_items: float | Tensor | None
) -> Tensor:
    """The reductions of every operator."""
    counted = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask.expand(rows.shape)
    rows = torch.where(counted, rows, 0.0)
    if weight is not None:
        rows = torch.where(counted, rows * weight, 0.0)
    if reduction == "none":
        return rows
    total = rows.sum()
    if reduction == "sum" or rows.numel() == 0:
        return total
    if reduction == "batchmean":
        return total / max(rows.shape[0], 1)
    if isinstance(num_items, Tensor):
        num_items = num_items.reshape(())
    return total / (counted.sum().clamp(min=1) if num_items is None else num_items)
