"""The losses for large vocabularies in plain torch: all logits, in float32 or the inputs' float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.ops import _checks, reference


def topk_kl_div(
    student_logits: Tensor,
    teacher_topk_logprobs: Tensor,
    teacher_topk_indices: Tensor,
    *,
    tail: str = "bucket",
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """`kdfast.topk_kl_div`."""
    s, log_t, temperature = reference.prepared(student_logits, teacher_topk_logprobs, temperature, None)
    rows = _topk_rows(s[..., :vocab_size] / temperature[..., None], log_t, teacher_topk_indices, tail)
    return reference.reduce_rows(rows, mask, weight, reduction, num_items)


def _topk_rows(z: Tensor, log_t: Tensor, indices: Tensor, tail: str) -> Tensor:
    if not z.shape[-1]:
        return z.sum(-1)
    log_s = z.log_softmax(-1)
    there = log_t > -torch.inf
    in_k = torch.zeros_like(z, dtype=torch.bool).scatter(-1, indices, there)
    if tail == "renormalize":
        log_t = log_t.log_softmax(-1)
    t = log_t.exp()
    rows = (t * torch.where(there, log_t - log_s.gather(-1, indices), 0.0)).sum(-1)
    rows = torch.where(there.any(-1), rows, torch.nan)
    if tail != "bucket":
        return rows
    rest = (1 - t.sum(-1)).clamp(min=0)
    log_others = log_s.masked_fill(in_k, -torch.inf)
    some = (log_others > -torch.inf).any(-1, keepdim=True)
    of_student = torch.where(some, log_others, 0.0).logsumexp(-1)  # of none the gradient would be NaN
    counts = (rest > 0) & some.squeeze(-1)
    return rows + rest * torch.where(counts, torch.where(counts, rest, 1.0).log() - of_student, 0.0)


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float = 1.0) -> Tensor:
    """In float32, whatever the inputs are."""
    real = _checks.loss_dtype(hidden)
    z = hidden.to(real) @ weight.to(real).T
    if bias is not None:
        z = z + bias.to(real)
    z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    memory_budget: int | str = "auto",
    **kwargs: Any,
) -> Tensor:
    """`kdfast.linear_kd_loss`."""
    s = logits(student_hidden, student_weight, student_bias, student_softcap, student_logit_scale)
    if teacher_logits is None and teacher_hidden is None:  # labels alone
        teacher_logits = torch.zeros_like(s)
    if teacher_logits is None:
        assert teacher_hidden is not None
        assert teacher_weight is not None
        teacher_logits = logits(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    return reference.kd_loss(s, teacher_logits, labels, **kwargs)


def linear_topk_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_topk_logprobs: Tensor,
    teacher_topk_indices: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    student_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    tail: str = "bucket",
    memory_budget: int | str = "auto",
    temperature: float | Tensor = 2.0,
    **kwargs: Any,
) -> Tensor:
    """`kdfast.linear_topk_kd_loss`."""
    z = logits(student_hidden, student_weight, student_bias, student_softcap, student_logit_scale)
    s, log_t, temperature = reference.prepared(z, teacher_topk_logprobs, temperature, None)
    columns = kwargs.pop("vocab_size", None)
    soft_rows = _topk_rows(s[..., :columns] / temperature[..., None], log_t, teacher_topk_indices, tail)
    return reference.with_labels(s[..., :columns], temperature.square() * soft_rows, labels, **kwargs)
