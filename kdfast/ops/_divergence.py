"""What all divergences between logits share: the call of the native operator, its autograd Function, its fake kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdfast.ops import _checks, _shards

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# In the order of csrc/common/divergence_terms.h.
KINDS = (
    "kl_div",
    "reverse_kl_div",
    "js_div",
    "skew_kl_div",
    "skew_reverse_kl_div",
    "total_variation",
    "soft_cross_entropy",
    "logit_mse",
    "symmetric_kl_div",
)
SECOND_LOOK = ("js_div", "skew_kl_div", "skew_reverse_kl_div", "total_variation")
SAVE_NOTHING, SAVE_STATE, SAVE_GRADIENT = range(3)
KNOWN_NOTHING, KNOWN_NORMALISERS, KNOWN_EVERYTHING = range(3)
STATE_SIZE = 9  # numbers per row: csrc/common/rowmath.h, RowState


@dataclass(frozen=True)
class Options:
    """The arguments that every divergence takes, as the caller gave them."""

    temperature: float | Tensor
    mask: Tensor | None
    weight: Tensor | None
    vocab_size: int | None
    reduction: str
    num_items: float | Tensor | None
    process_group: ProcessGroup | None
    vocab_start: int | None


@dataclass(frozen=True)
class Labels:
    """What `kd_loss` adds to a divergence."""

    labels: Tensor | None
    alpha: float
    smoothing: float
    ignore_index: int


def at_its_ends(kind: str, beta: float = 0.0, skew: float = 0.0) -> tuple[str, float]:
    """The divergence to compute and its beta or skew: at 0, and js_div at 1, the mixtures are other divergences."""
    if kind == "js_div":
        return "kl_div" if beta == 0 else "reverse_kl_div" if beta == 1 else kind, float(beta)
    if kind in ("skew_kl_div", "skew_reverse_kl_div") and skew == 0:
        kind = kind.removeprefix("skew_")
    return kind, float(skew)


def of(op: str, student: Tensor, teacher: Tensor, options: Options, *, beta: float = 0.0, skew: float = 0.0) -> Tensor:
    """A divergence on its own."""
    kind, mixing = at_its_ends(op, beta, skew)
    return run(op, kind, student, teacher, options, mixing, None)[0]


def run(
    op: str,
    kind: str,
    student: Tensor,
    teacher: Tensor,
    options: Options,
    mixing: float,
    labels: Labels | None,
) -> tuple[Tensor, Tensor]:
    """Checks the arguments and calls the native operator: the loss, and the components of `kd_loss`."""
    shard = _shards.shard_of(op, student, teacher, options.process_group, options.vocab_start, options.vocab_size)
    student, teacher = shard.student, shard.teacher
    reduction = _checks.check_reduction(op, options.reduction, student)
    temperature, row_temperature = _checks.check_temperature(op, options.temperature, student)
    scale, items = _checks.check_num_items(op, options.num_items, options.reduction, student)
    if options.num_items is not None and items is None:
        reduction = _checks.REDUCTIONS["sum"]  # 1/num_items is in the scale
    teacher = teacher.detach()
    if torch.float64 in (student.dtype, teacher.dtype):
        student, teacher = student.double(), teacher.double()
    mask = _checks.check_rows(op, "mask", options.mask, student)
    weight = _checks.check_rows(op, "weight", options.weight, student)
    hard = None if labels is None or labels.labels is None else labels.labels
    if labels is not None and hard is not None:
        hard = _checks.check_labels(op, hard, mask, student, shard.vocabulary, labels.ignore_index)
    args = (
        *(hard, row_temperature, mask, weight, items),
        *(KINDS.index(kind), mixing, temperature, shard.columns, shard.vocabulary, shard.start, reduction, scale),
        *((False, 1.0, 0.0, 0) if labels is None else (True, labels.alpha, labels.smoothing, labels.ignore_index)),
    )
    if torch.is_grad_enabled() and student.requires_grad:
        return _Divergence.apply(op, shard.group, student, teacher, *args)  # type: ignore[no-any-return]
    loss, components, _ = forward(shard.group, student, teacher, args, SAVE_NOTHING)
    return loss, components


def forward(
    group: ProcessGroup | None, student: Tensor, teacher: Tensor, args: tuple[Any, ...], save: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, components and what is saved; over shards, by way of the rows' states."""
    native = torch.ops.kdfast.divergence
    if group is None:
        return native(student, teacher, *args, None, KNOWN_NOTHING, save)  # type: ignore[no-any-return]
    row_temperature, kind, temperature = args[1], KINDS[args[5]], args[7]
    state = native(student, teacher, *args, None, KNOWN_NOTHING, SAVE_STATE)[2]
    state = _shards.merged(state, kind, temperature if row_temperature is None else row_temperature, group)
    if kind in SECOND_LOOK:
        state = native(student, teacher, *args, state, KNOWN_NORMALISERS, SAVE_STATE)[2]
        state = _shards.summed(state, group)
    loss, components, saved = native(student, teacher, *args, state, KNOWN_EVERYTHING, save)
    return loss, components, state if save == SAVE_STATE else saved


class _Divergence(torch.autograd.Function):
    """The gradient for an upstream factor of 1 is made in the forward, where the logits are in cache.

    Two cases recompute it in the backward from the rows' states instead: `none`, whose upstream is a factor per row, and
    float16, where a gradient divided by the number of rows underflows before a GradScaler's factor can save it.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, op: str, group: Any, student: Tensor, teacher: Tensor, *args: Any
    ) -> tuple[Tensor, Tensor]:
        per_row = args[11] == _checks.REDUCTIONS["none"]
        in_forward = not per_row and student.dtype != torch.float16
        save = SAVE_GRADIENT if in_forward else SAVE_STATE
        loss, components, saved = forward(group, student, teacher, args, save)
        ctx.op, ctx.numbers = op, args[5:]
        if in_forward:
            ctx.save_for_backward(saved)
        else:
            ctx.save_for_backward(saved, student, teacher, *args[:5])
        ctx.mark_non_differentiable(components)
        return loss, components

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_double_backward(ctx.op)
        saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
        if len(saved) == 1:
            (gradient,) = scaled(saved, grad_loss)
        else:
            gradient = torch.ops.kdfast.divergence_backward(grad_loss, *saved, *ctx.numbers)
        return None, None, gradient, *(None,) * 18


def refuse_double_backward(op: str) -> None:
    """Gradients are made without a graph of their own; asking for one (create_graph=True) must not give silent zeros."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{op}: double backward is not available: expected backward without create_graph=True")


def scaled(gradients: Sequence[Tensor], factor: Tensor) -> Sequence[Tensor]:
    """Each gradient · factor. In place only where nobody can ask for the saved gradients again."""
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return [gradient * factor for gradient in gradients]
    if factor.device.type == "cuda":
        for gradient in gradients:
            torch.ops.kdfast.scale_(gradient, factor)  # looks at the factor on the device
    elif factor.device.type != "cpu" or float(factor) != 1.0:
        for gradient in gradients:
            gradient.mul_(factor)
    return gradients


@torch.library.register_fake("kdfast::scale_")
def _(x: Tensor, factor: Tensor) -> None:
    return None


@torch.library.register_fake("kdfast::divergence")
def _(student: Tensor, teacher: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    real, leading = _checks.loss_dtype(student), student.shape[:-1]
    reduction, distillation, save = args[11], args[13], args[19]
    results = leading if reduction == _checks.REDUCTIONS["none"] else ()
    loss = student.new_empty(results, dtype=real)
    components = student.new_empty((*results, 2) if distillation else (0,), dtype=real)
    if save == SAVE_GRADIENT:
        return loss, components, student.new_empty(student.shape)
    return loss, components, student.new_empty((*leading, STATE_SIZE) if save == SAVE_STATE else (0,), dtype=real)


@torch.library.register_fake("kdfast::divergence_backward")
def _(grad_loss: Tensor, state: Tensor, student: Tensor, *args: Any) -> Tensor:
    return student.new_empty(student.shape)
