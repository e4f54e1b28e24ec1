"""What all divergences between logits share: their calls, the autograd Function, the fake kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kdfast import _C
from kdfast.ops import _call, _checks, _shards, _transforms
from kdfast.ops._call import (
    KNOWN_EVERYTHING,
    KNOWN_NORMALISERS,
    KNOWN_NOTHING,
    SAVE_GRADIENT,
    SAVE_NOTHING,
    SAVE_STATE,
    STATE_SIZE,
    Call,
    Numbers,
    RowValues,
)
from kdfast.ops._options import Options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The list of csrc/common/divergence_terms.h, which numbers them.
ALL_KINDS = tuple(name for name, *_ in _C.divergences)
KINDS = tuple(name for name, topk, *_ in _C.divergences if not topk)
TAILS = tuple(name.removeprefix("topk_") for name, topk, *_ in _C.divergences if topk)
SECOND_LOOK = tuple(name for name, _, again, *_ in _C.divergences if again)
MIXTURES = {name: mixture for name, _, _, *mixture in _C.divergences}  # by what, and what it is where that is 0 or 1


class Labels(NamedTuple):
    """What `kd_loss` adds to a divergence."""

    labels: Tensor | None
    alpha: float
    smoothing: float
    ignore_index: int


def check_divergence(op: str, divergence: str) -> None:
    if divergence not in KINDS:
        _checks.wrong_value(op, "divergence", f"one of {', '.join(KINDS)}", _checks.shown(divergence))


def check_tail(op: str, tail: str) -> None:
    if tail not in TAILS:
        _checks.wrong_value(op, "tail", "'bucket', 'renormalize' or 'drop'", _checks.shown(tail))


def at_its_ends(kind: str, **settings: float) -> tuple[str, float]:
    """The divergence to compute and its beta or skew: at an end of that, a mixture may be another divergence."""
    by, at_zero, at_one = MIXTURES[kind]
    mixing = settings.get(by, 0.0)
    return at_zero if mixing == 0 else at_one if mixing == 1 else kind, float(mixing)


def of(op: str, student: Tensor, teacher: Tensor, given: Mapping[str, Any], **settings: float) -> Tensor:
    """A divergence on its own; `given`: its options, `settings`: beta or skew."""
    kind, mixing = at_its_ends(op, **settings)
    return run(op, kind, student, teacher, Options.of(op, given), mixing, None)[0]


def run(
    op: str,
    kind: str,
    student: Tensor,
    teacher: Tensor,
    options: Options,
    mixing: float,
    labels: Labels | None,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Checks the arguments and calls the native operator: the loss, and the components of `kd_loss`. With `indices`
    the teacher is the log-probabilities of these columns."""
    of_teacher = teacher if indices is None else student
    shard = _shards.shard_of(op, student, of_teacher, options.process_group, options.vocab_start, options.vocab_size)
    student, teacher = shard.student, shard.teacher if indices is None else teacher
    if indices is not None:
        teacher, indices = _checks.check_topk(op, student, teacher, indices)
    if teacher.requires_grad:
        teacher = teacher.detach()
    if torch.float64 in (student.dtype, teacher.dtype):
        student, teacher = student.double(), teacher.double()
    call = call_of(op, kind, student, shard, options, mixing, labels, indices)
    if indices is not None:
        _checks.check_topk_values(op, teacher, indices, call.rows.mask, shard.vocabulary)
    if torch.is_grad_enabled() and student.requires_grad:
        loss, components = _Divergence.apply(op, shard.group, student, teacher, call)
    else:
        loss, components, _ = forward(shard.group, student, teacher, call, SAVE_NOTHING)
    if indices is not None:
        _checks.check_topk_repeats(op, loss, teacher, indices, call.rows.mask)
    return loss, components


def call_of(
    op: str,
    kind: str,
    student: Tensor,
    shard: _shards.Shard,
    options: Options,
    mixing: float,
    labels: Labels | None,
    indices: Tensor | None,
) -> Call:
    """The checked arguments; of `student` only the leading dimensions, the dtype and the device matter."""
    _checks.check_reduction(op, options.reduction, student)
    temperature, row_temperature = _checks.check_temperature(op, options.temperature, student)
    num_items = _checks.check_num_items(op, options.num_items, options.reduction, student)
    mask = _checks.check_rows(op, "mask", options.mask, student)
    weight = _checks.check_rows(op, "weight", options.weight, student)
    hard = own = None
    if labels is not None and labels.labels is not None:
        hard, own = labels.labels, None if mask is None else labels
        mask = _checks.check_labels(op, hard, mask, student, shard.vocabulary, labels.ignore_index)
    if options.reduction == "mean":
        scale, divisor = _of_mean(student, num_items, mask, own)
    else:
        scale, divisor = _over(student.shape[0], student) if options.reduction == "batchmean" else (1.0, None)
    numbers = Numbers(
        kind=ALL_KINDS.index(kind),
        mixing=mixing,
        temperature=temperature,
        columns=shard.columns,
        vocabulary=shard.vocabulary,
        vocab_start=shard.start,
        scale=scale,
        per_row=options.reduction == "none",
        distillation=labels is not None,
        alpha=1.0 if labels is None else labels.alpha,
        smoothing=0.0 if labels is None else labels.smoothing,
        ignore_index=0 if labels is None else labels.ignore_index,
    )
    return Call(RowValues(indices, hard, row_temperature, mask, weight), divisor, numbers)


def _of_mean(
    like: Tensor, num_items: float | Tensor | None, mask: Tensor | None, labels: Labels | None
) -> tuple[float, Tensor | None]:
    """Scale and divisor of a mean over the rows of `mask`, and of the cross-entropy over those of them that have a
    label (None: the same). What is counted stays on the device."""
    if isinstance(num_items, Tensor):
        return 1.0, num_items
    if num_items is not None:
        return _over(num_items, like)
    if mask is None:
        return _over(math.prod(like.shape[:-1]), like)
    real = _checks.loss_dtype(like)
    if labels is None:
        return 1.0, mask.sum(dtype=real)
    both = torch.stack((mask, mask & (labels.labels != labels.ignore_index)))
    return 1.0, both.view(2, -1).sum(1, dtype=real)


def _over(number: float, like: Tensor) -> tuple[float, Tensor | None]:
    """Scale and divisor for a division by a number, which is 0 where nothing counts."""
    if torch.compiler.is_compiling():  # a sum over another number of rows is not compiled anew
        return 1.0, torch.full((), number, dtype=_checks.loss_dtype(like), device=like.device)
    return 1.0 / number if number else 1.0, None


def forward(
    group: ProcessGroup | None, student: Tensor, teacher: Tensor, call: Call, save: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, components and what is saved; over shards, by way of the rows' states."""
    if group is None:
        return _call.divergence(student, teacher, call, None, KNOWN_NOTHING, save)
    state = state_of(group, student, teacher, call)
    loss, components, saved = _call.divergence(student, teacher, call, state, KNOWN_EVERYTHING, save)
    return loss, components, state if save == SAVE_STATE else saved


def state_of(group: ProcessGroup, student: Tensor, teacher: Tensor, call: Call) -> Tensor:
    """The rows' states over all shards."""
    state = _call.divergence(student, teacher, call, None, KNOWN_NOTHING, SAVE_STATE)[2]
    state = _shards.merged(state, call.numbers.kind, call.rows.row_temperature, call.numbers.temperature, group)
    if ALL_KINDS[call.numbers.kind] in SECOND_LOOK:
        state = _call.divergence(student, teacher, call, state, KNOWN_NORMALISERS, SAVE_STATE)[2]
        state = _shards.summed(state, group)
    return state


class _Divergence(torch.autograd.Function):
    """The gradient for an upstream factor of 1 is made in the forward, where the logits are in cache.

    Two cases recompute it in the backward from the rows' states instead: `none`, whose upstream is a factor per row,
    and float16, where a gradient divided by the number of rows underflows before a GradScaler's factor can save it.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, op: str, group: Any, student: Tensor, teacher: Tensor, call: Call
    ) -> tuple[Tensor, Tensor]:
        in_forward = not call.numbers.per_row and student.dtype != torch.float16
        save = SAVE_GRADIENT if in_forward else SAVE_STATE
        loss, components, saved = forward(group, student, teacher, call, save)
        ctx.op, ctx.numbers = op, call.numbers
        if in_forward:
            ctx.save_for_backward(saved)
        else:
            ctx.save_for_backward(saved, student, teacher, *call.rows, call.divisor)
        ctx.mark_non_differentiable(components)
        return loss, components

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_double_backward(ctx.op)
        saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
        if len(saved) == 1:
            (gradient,) = scaled(saved, grad_loss)
        else:
            state, student, teacher, *rows, divisor = saved
            call = Call(RowValues(*rows), divisor, ctx.numbers)
            gradient = _call.divergence_backward(grad_loss, state, student, teacher, call)
        return None, None, gradient, None, None


def refuse_double_backward(op: str) -> None:
    """Gradients are made without a graph of their own; asking for one (create_graph=True) must not give silent
    zeros."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _transforms.no_double_backward(op)


def scaled(gradients: Sequence[Tensor], factor: Tensor) -> Sequence[Tensor]:
    """Each gradient · factor. In place only where nobody can ask for the saved gradients again."""
    kept = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
    if kept or _transforms.is_batched(factor):
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


def new_results(like: Tensor, leading: Sequence[int], numbers: Numbers) -> tuple[Tensor, Tensor]:
    """Loss and components, not initialized."""
    real = _checks.loss_dtype(like)
    results = leading if numbers.per_row else ()
    components = (*results, 2) if numbers.distillation else (0,)
    return like.new_empty(results, dtype=real), like.new_empty(components, dtype=real)


@torch.library.register_fake("kdfast::divergence_into")
def _(gradient: Tensor, student: Tensor, teacher: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *flat, _state, _known = args
    return new_results(student, student.shape[:-1], Call.of(flat).numbers)


@torch.library.register_fake("kdfast::divergence")
def _(student: Tensor, teacher: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *flat, _state, _known, save = args
    real, leading = _checks.loss_dtype(student), student.shape[:-1]
    loss, components = new_results(student, leading, Call.of(flat).numbers)
    if save == SAVE_GRADIENT:
        return loss, components, student.new_empty(student.shape)
    return loss, components, student.new_empty((*leading, STATE_SIZE) if save == SAVE_STATE else (0,), dtype=real)


@torch.library.register_fake("kdfast::divergence_referred")
def _(state: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(state)


@torch.library.register_fake("kdfast::divergence_backward")
def _(grad_loss: Tensor, state: Tensor, student: Tensor, *args: Any) -> Tensor:
    return student.new_empty(student.shape)
