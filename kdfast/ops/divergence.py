"""Divergences between the next-token (or class) distributions of a student and a teacher, on logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.ops import _checks

SAVE_NOTHING, SAVE_STATE, SAVE_GRADIENT = range(3)
STATE_SIZE = 5  # numbers per row: csrc/common/rowmath.h, RowState


def kl_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence of the student from the teacher, Σ_v p_t · (log p_t − log p_s), p = softmax(z / T).

    Hinton et al., 2015 (arXiv:1503.02531). Losses are per row, unlike the elements of `torch.nn.functional.kl_div`: its
    "sum" and "batchmean" are the same, its "mean" divides by V too. **T² is not included**: multiply
    by it yourself, or use a function that says it does. Loss and gradient are made in one pass over the logits; neither
    probabilities nor a float32 copy of the logits are ever stored.

    Args:
        student_logits: `[..., V]`, float32, bfloat16, float16, or float64 on the CPU; any strides.
        teacher_logits: the same leading dimensions; its dtype may differ; gets no gradient.
        temperature: T > 0, a number or a tensor that broadcasts to the leading dimensions.
        mask: bool, broadcasts to the leading dimensions, True = counted. Rows that are off are never read.
        weight: floating point, broadcasts to the leading dimensions; multiplies each row's loss.
        vocab_size: only the first `vocab_size` columns exist, on both sides (padded vocabularies).
        reduction: `"none"` (a value per row, 0 where masked), `"sum"`, `"mean"` (Σ weight·loss / number of unmasked
            rows; weights stay out of the denominator) or `"batchmean"` (sum / size of dimension 0).
        num_items: replaces the denominator of `"mean"` (`num_items_in_batch` of `transformers.Trainer`).

    Returns:
        float32 (float64 for float64 logits) in nats: a scalar, or the leading dimensions for `"none"`. A column that is
        -inf on both sides counts nothing; p_t > 0 where p_s = 0 gives +inf; a row that is all -inf, or holds +inf or
        NaN, gives NaN in that row only. Empty input gives 0.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device, reduction or range.
    """
    op = "kl_div"
    columns = _checks.check_logits(op, student_logits, teacher_logits, vocab_size)
    reduction_code = _checks.check_reduction(op, reduction, student_logits)
    number, row_temperature = _checks.check_temperature(op, temperature, student_logits)
    scale, items = _checks.check_num_items(op, num_items, reduction, student_logits)
    if num_items is not None and items is None:
        reduction_code = _checks.REDUCTIONS["sum"]  # 1/num_items is in the scale
    teacher_logits = teacher_logits.detach()
    if torch.float64 in (student_logits.dtype, teacher_logits.dtype):
        student_logits, teacher_logits = student_logits.double(), teacher_logits.double()
    rows = (
        row_temperature,
        _checks.check_rows(op, "mask", mask, student_logits),
        _checks.check_rows(op, "weight", weight, student_logits),
        items,
    )
    settings = (number, columns, reduction_code, scale)
    if torch.is_grad_enabled() and student_logits.requires_grad:
        return _KLDiv.apply(student_logits, teacher_logits, *rows, *settings)  # type: ignore[no-any-return]
    loss, _ = torch.ops.kdfast.kl_div(student_logits, teacher_logits, *rows, *settings, SAVE_NOTHING)
    return loss  # type: ignore[no-any-return]


class _KLDiv(torch.autograd.Function):
    """The gradient for an upstream factor of 1 is made in the forward, where the logits are in cache.

    Two cases recompute it in the backward from the rows' states instead: `none`, whose upstream is a factor per row, and
    float16, where a gradient divided by the number of rows underflows before a GradScaler's factor can save it.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, *args: Any) -> Tensor:
        reduction = args[6]
        in_forward = reduction != _checks.REDUCTIONS["none"] and student.dtype != torch.float16
        save = SAVE_GRADIENT if in_forward else SAVE_STATE
        loss, saved = torch.ops.kdfast.kl_div(student, teacher, *args, save)
        ctx.settings = args[4:]
        if in_forward:
            ctx.save_for_backward(saved)
        else:
            ctx.save_for_backward(saved, student, teacher, *args[:4])
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("kl_div")
        saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
        if len(saved) == 1:
            gradient = scaled(saved[0], grad_loss)
        else:
            gradient = torch.ops.kdfast.kl_div_backward(grad_loss, *saved, *ctx.settings)
        return gradient, *(None,) * 9


def refuse_double_backward(op: str) -> None:
    """Gradients are made without a graph of their own; asking for one (create_graph=True) must not give silent zeros."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{op}: double backward is not available: expected backward without create_graph=True")


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient · factor. In place only where nobody can ask for the saved gradient again."""
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * factor
    if gradient.device.type == "cuda":
        torch.ops.kdfast.scale_(gradient, factor)  # looks at the factor on the device
        return gradient
    if gradient.device.type == "cpu" and float(factor) == 1.0:
        return gradient
    return gradient.mul_(factor)


@torch.library.register_fake("kdfast::scale_")
def _(x: Tensor, factor: Tensor) -> None:
    return None


@torch.library.register_fake("kdfast::kl_div")
def _(
    student: Tensor,
    teacher: Tensor,
    row_temperature: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    num_items: Tensor | None,
    temperature: float,
    columns: int,
    reduction: int,
    scale: float,
    save: int,
) -> tuple[Tensor, Tensor]:
    real = _checks.loss_dtype(student)
    per_row = reduction == _checks.REDUCTIONS["none"]
    loss = student.new_empty(student.shape[:-1] if per_row else (), dtype=real)
    if save == SAVE_GRADIENT:
        return loss, student.new_empty(student.shape)
    return loss, student.new_empty((*student.shape[:-1], STATE_SIZE) if save == SAVE_STATE else (0,), dtype=real)


@torch.library.register_fake("kdfast::kl_div_backward")
def _(grad_loss: Tensor, state: Tensor, student: Tensor, *args: Any) -> Tensor:
    return student.new_empty(student.shape)


def kl_div_reference(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """`kl_div` in plain torch: what tests, benchmarks and readers compare with. Computes in the inputs' precision."""
    temperature = torch.as_tensor(temperature, dtype=_checks.loss_dtype(student_logits), device=student_logits.device)
    s, t = (
        z[..., :vocab_size].to(temperature.dtype) / temperature[..., None] for z in (student_logits, teacher_logits)
    )
    log_s, log_t = s.log_softmax(-1), t.detach().log_softmax(-1)
    p_t = log_t.exp()
    rows = torch.where(p_t > 0, p_t * (log_t - log_s), p_t).sum(-1)
    return reduce_rows(rows, mask, weight, reduction, num_items)


def reduce_rows(
    rows: Tensor, mask: Tensor | None, weight: Tensor | None, reduction: str, num_items: float | Tensor | None
) -> Tensor:
    """The reductions of every operator, in plain torch."""
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
        return total / rows.shape[0]
    return total / (counted.sum().clamp(min=1) if num_items is None else num_items)
