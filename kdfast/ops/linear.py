"""Distillation over large vocabularies: from hidden states and output embeddings, logits only a chunk at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor

from kdfast.ops import _checks, _divergence, _dtensors, _heads, _linear, _shards
from kdfast.ops._divergence import Labels
from kdfast.ops._heads import Head
from kdfast.ops._options import Distillation, KDOptions, LabelOptions, Options, WithLabels, takes
from kdfast.ops._transforms import transformable
from kdfast.ops.kd_loss import KDLossComponents, KDLossEntropy, hard_part, soft_part

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _OfStudent(TypedDict, total=False):
    """For the type checker alone: keyword arguments that the overloads of both functions share."""

    student_bias: Tensor | None
    student_softcap: float | None
    student_logit_scale: float
    memory_budget: int | str


class _OfHeads(_OfStudent, KDOptions, total=False):
    teacher_bias: Tensor | None
    teacher_logits: Tensor | None
    teacher_softcap: float | None
    teacher_logit_scale: float


class _OfTopk(_OfStudent, LabelOptions, total=False):
    tail: str


@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = ...,
    teacher_weight: Tensor | None = ...,
    labels: Tensor | None = ...,
    *,
    return_components: Literal[False] = ...,
    return_entropy: Literal[False] = ...,
    **options: Unpack[_OfHeads],
) -> Tensor: ...
@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = ...,
    teacher_weight: Tensor | None = ...,
    labels: Tensor | None = ...,
    *,
    return_components: Literal[True],
    return_entropy: Literal[False] = ...,
    **options: Unpack[_OfHeads],
) -> KDLossComponents: ...
@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = ...,
    teacher_weight: Tensor | None = ...,
    labels: Tensor | None = ...,
    *,
    return_components: Literal[False] = ...,
    return_entropy: Literal[True],
    **options: Unpack[_OfHeads],
) -> KDLossEntropy: ...
@takes(Distillation)
@transformable
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
    return_components: bool = False,
    return_entropy: bool = False,
    **options: Unpack[KDOptions],
) -> Tensor | KDLossComponents | KDLossEntropy:
    r"""`kd_loss` of logits that are never made: z = cap · tanh(scale · (hidden · weightᵀ + bias) / cap) on both sides.

    alpha · Σ w·T²·D / N_D + (1 − alpha) · Σ w·CE / N_CE, as in `kd_loss`, whose defaults these are. **T² is included.**
    The logits of N tokens over a vocabulary V are N·V float32 numbers per model, and as many again for their gradients;
    here they exist for a few rows at a time, always in float32 (rounding them to 16 bits costs 3 to 22 % of the
    gradient where student and teacher are close), and each is made once: four matrix products with the gradients, which
    are made in the forward. Rows that do not count are dropped before the first one.

    Args:
        student_hidden: `[..., H]`, float32, bfloat16, float16, or float64 on the CPU. Nothing is shifted: for causal
            models pass hidden[:, :-1] and labels[:, 1:].
        student_weight: `[V, H]`, the output embeddings (`model.get_output_embeddings().weight`), of the hidden states'
            dtype; under autocast both are cast. Tied embeddings get the sum of their gradients, as everywhere.
        teacher_hidden, teacher_weight: `[..., Ht]`, `[V, Ht]`; their size and dtype may differ from the student's.
        labels: `[...]`, int64, or None with alpha = 1. Rows whose label is `ignore_index`, prompts and padding, are
            dropped; where a mask is given it decides instead, as in `kd_loss`.
        student_bias, teacher_bias: `[V]`.
        teacher_logits: `[..., V]`, instead of hidden states and weight (as they are: no scale, no soft-cap). With
            alpha = 0, the cross-entropy of the labels alone, there may be no teacher at all.
        student_softcap, teacher_softcap: cap of z (Gemma: `config.final_logit_softcapping`); None: none.
        student_logit_scale, teacher_logit_scale: scale of z (Cohere: `config.logit_scale`; Granite:
            1 / `config.logits_scaling`), applied in float32. `kdfast.models.last_hidden` has it in the hidden states.
        memory_budget: bytes for logits and their gradients, or `"auto"`: a tenth of the device's memory, and no more
            than helps. Not in it are the gradients of hidden states, weight and bias, nor the float32 sum of a 16-bit
            weight's gradient, which is there where the budget holds fewer rows than there are (at most 512 on
            the CPU, 8,192 on the GPU). The results for all budgets are the same to a rounding of the output.
        return_entropy: the student's entropy at T of each row too, from the logits that are there anyway: no product
            more.
        divergence, beta, skew, alpha, temperature, label_smoothing, ignore_index, return_components: as in `kd_loss`.
        mask: as in `kd_loss`. weight, temperature, reduction, num_items: as in `kl_div`, over the leading dimensions.
        vocab_size: the first `vocab_size` rows of both weights count; the gradient of others is 0.
        process_group, vocab_start: of a vocabulary that is split over ranks: weights, biases and teacher_logits are
            this rank's rows, hidden states, labels and the like are whole on every rank. The gradient of the hidden
            states is summed over the ranks here. Two small all-reduces per chunk (three for mixtures), one at the end.

    Returns:
        As `kd_loss`; with return_entropy a `KDLossEntropy`, whatever return_components says.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device, reduction or range, or
        a `memory_budget` that does not hold a row. RuntimeError: a second derivative or forward mode is asked for.
    """
    op = "linear_kd_loss"
    _checks.check_bools(op, return_components=return_components, return_entropy=return_entropy)
    of = Distillation.of(op, options)
    kind, mixing = soft_part(op, of)
    hard = hard_part(op, labels, of)
    student = _heads.checked(
        op, "student", student_hidden, student_weight, student_bias, student_softcap, student_logit_scale
    )
    teacher, of_teacher = None, (teacher_hidden, teacher_weight, teacher_bias, teacher_softcap)
    some = teacher_logit_scale != 1 or any(x is not None for x in of_teacher)
    if teacher_logits is not None and some:
        _checks.wrong_value(op, "teacher_logits", "no other argument of the teacher beside it", "some")
    if teacher_logits is None and (some or of.alpha != 0):
        if teacher_hidden is None or teacher_weight is None:
            got = "neither" if teacher_hidden is None and teacher_weight is None else "one of the two"
            expected = "teacher_hidden and teacher_weight, or teacher_logits"
            remedy = "; alpha=0 is of the labels alone, without a teacher" * (not some)
            _checks.wrong_value(op, "teacher_hidden", expected, got + remedy)
        teacher = _heads.checked(
            op, "teacher", teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale
        )
    of_call = op, kind, student, teacher, teacher_logits, None, of, mixing, hard, memory_budget, return_entropy
    return _returned(*_run(*of_call), return_components, return_entropy)


@overload
def linear_topk_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_topk_logprobs: Tensor,
    teacher_topk_indices: Tensor,
    labels: Tensor | None = ...,
    *,
    return_components: Literal[False] = ...,
    return_entropy: Literal[False] = ...,
    **options: Unpack[_OfTopk],
) -> Tensor: ...
@overload
def linear_topk_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_topk_logprobs: Tensor,
    teacher_topk_indices: Tensor,
    labels: Tensor | None = ...,
    *,
    return_components: Literal[True],
    return_entropy: Literal[False] = ...,
    **options: Unpack[_OfTopk],
) -> KDLossComponents: ...
@overload
def linear_topk_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_topk_logprobs: Tensor,
    teacher_topk_indices: Tensor,
    labels: Tensor | None = ...,
    *,
    return_components: Literal[False] = ...,
    return_entropy: Literal[True],
    **options: Unpack[_OfTopk],
) -> KDLossEntropy: ...
@takes(WithLabels)
@transformable
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
    return_components: bool = False,
    return_entropy: bool = False,
    **options: Unpack[LabelOptions],
) -> Tensor | KDLossComponents | KDLossEntropy:
    """`linear_kd_loss` with `topk_kl_div` as its divergence: the student's logits are never made, the teacher's are the
    top-k that `kdfast.teacher_cache` has stored.

    alpha · Σ w·T²·KL / N_D + (1 − alpha) · Σ w·CE / N_CE. **T² is included.** Mind the temperature, which is 2 by
    default as in `kd_loss`: the log-probabilities must be of that temperature.

    Arguments, results and errors as in these.
    """
    op = "linear_topk_kd_loss"
    _checks.check_bools(op, return_components=return_components, return_entropy=return_entropy)
    _divergence.check_tail(op, tail)
    _checks.check_topk_tensors(op, teacher_topk_logprobs, teacher_topk_indices)
    of = WithLabels.of(op, options)
    hard = hard_part(op, labels, of)
    student = _heads.checked(
        op, "student", student_hidden, student_weight, student_bias, student_softcap, student_logit_scale
    )
    given, indices = teacher_topk_logprobs, teacher_topk_indices
    of_call = op, f"topk_{tail}", student, None, given, indices, of, 0.0, hard, memory_budget, return_entropy
    return _returned(*_run(*of_call), return_components, return_entropy)


def _returned(
    loss: Tensor, components: Tensor, entropies: Tensor, return_components: bool, return_entropy: bool
) -> Tensor | KDLossComponents | KDLossEntropy:
    parts = KDLossComponents(loss, *components.unbind(-1))
    return KDLossEntropy(*parts, entropies) if return_entropy else parts if return_components else loss


def _run(
    op: str,
    kind: str,
    student: Head,
    teacher: Head | None,
    given: Tensor | None,
    indices: Tensor | None,
    options: Options,
    mixing: float,
    labels: Labels,
    memory_budget: int | str,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The checked call over flat rows, and its results in the leading dimensions."""
    options, (student, teacher, given) = _dtensors.local(op, options, student, teacher, given)
    leading, of_teacher = student.hidden.shape[:-1], teacher or student
    _check_pair(op, student, of_teacher, options)
    # What checks of logits ask for, without logits.
    like, t = (
        head.hidden.new_empty(()).expand(*head.hidden.shape[:-1], head.weight.shape[0])
        for head in (student, of_teacher)
    )
    alone = teacher is None and given is None
    if alone:  # the labels: logits of 0 that take no memory, and a divergence from them that is always finite
        given, kind = like.new_zeros(()).expand(like.shape), "reverse_kl_div"
    if given is not None and indices is None:
        t = given
    shard = _shards.shard_of(op, like, t, options.process_group, options.vocab_start, options.vocab_size)
    if indices is not None and given is not None:
        given, indices = _checks.check_topk(op, like, given, indices)
    budget = check_budget(op, memory_budget)
    if torch.float64 in (like.dtype, t.dtype):
        student, teacher = student.double(), teacher and teacher.double()
        given = None if given is None else given.double()
    call = _divergence.call_of(op, kind, student.hidden, shard, options, mixing, labels, indices)
    topk = None if given is None or indices is None else (given, indices, call.rows.mask)
    if topk is not None:
        _checks.check_topk_values(op, *topk, shard.vocabulary)
        given = topk[0].flatten(0, -2)
    rows = call.rows.map(lambda x: x.flatten(0, -2) if x is indices else x.flatten())
    call = call._replace(rows=rows)
    if given is not None:
        given = given.detach()
    group = None if shard.group is None else shard.group.group_name
    loss, components, entropies = _linear.run(_linear.Inputs(op, student, teacher, given, group, budget, entropy, call))
    if topk is not None:
        _checks.check_topk_repeats(op, loss, *topk)
    if alone:
        components = torch.stack([torch.zeros_like(components[..., 0]), components[..., 1]], -1)
    entropies = entropies.view(leading) if entropy else entropies
    if options.reduction == "none":
        return loss.view(leading), components.view(*leading, 2), entropies
    return loss, components, entropies


def _check_pair(op: str, student: Head, teacher: Head, options: Options) -> None:
    leading, widths = student.hidden.shape[:-1], (student.weight.shape[0], teacher.weight.shape[0])
    if teacher.hidden.shape[:-1] != leading:
        expected = f"the student's leading dimensions {list(leading)}"
        _checks.wrong_value(op, "teacher_hidden", expected, list(teacher.hidden.shape))
    if teacher.hidden.device != student.hidden.device:
        _checks.wrong_value(
            op, "teacher_hidden", f"the student's device {student.hidden.device}", teacher.hidden.device
        )
    if widths[0] != widths[1] and options.vocab_size is None:
        expected = f"the student's {widths[0]} rows (for padded vocabularies pass vocab_size=, the rows that count)"
        _checks.wrong_value(op, "teacher_weight", expected, widths[1])


def check_budget(op: str, budget: int | str) -> int:
    if budget == "auto":
        return 0  # what it comes to cannot be traced
    if isinstance(budget, bool) or not isinstance(budget, int):
        _checks.wrong_type(op, "memory_budget", "a number of bytes or 'auto'", _checks.shown(budget))
    if budget < 1:
        _checks.wrong_value(op, "memory_budget", "1 or more", budget)
    return budget
