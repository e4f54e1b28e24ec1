"""Distillation from the top-k of a teacher: its log-probabilities in a few columns, as `kdfast.teacher_cache` stores
them. What is not there is never made: no dense teacher, no dense target."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kdfast.ops import _checks, _divergence
from kdfast.ops._options import DivergenceOptions, Options, takes
from kdfast.ops._transforms import transformable

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes(Options)
@transformable
def topk_kl_div(
    student_logits: Tensor,
    teacher_topk_logprobs: Tensor,
    teacher_topk_indices: Tensor,
    *,
    tail: str = "bucket",
    **options: Unpack[DivergenceOptions],
) -> Tensor:
    r"""KL of the student from a teacher that is known in its top-k columns K, with t = exp(log-probability) there.

    What becomes of the rest of the teacher's probability, q = 1 − Σ_K t, is `tail`:

    - `"bucket"`: all other columns are one: Σ_K t · (log t − log s) + q · (log q − log Σ_{not K} s). Never negative,
      and 0 where student and teacher agree in K. Where the student has no other column (-inf, or k = V),
      q counts nothing.
    - `"renormalize"`: Σ_K t' · (log t' − log s), t' = t / Σ_K t: the student is drawn away from all other columns.
    - `"drop"`: Σ_K t · (log t − log s): the rest counts nothing (can be negative).

    s = softmax(z / T) is over the whole vocabulary in each. With k = V all are `kl_div`.

    Args:
        student_logits: `[..., V]`, as in `kl_div`.
        teacher_topk_logprobs: `[..., k]`, float32, bfloat16, float16, or float64 on the CPU: log softmax(z_t / T) **at
            the temperature given here**, over the whole vocabulary, not renormalised. Any order. -inf: no column, as
            where rows have fewer than k; a row without any gives NaN.
        teacher_topk_indices: `[..., k]`, int64 or int32, of the vocabulary, none twice in a row. On the CPU another
            index, or one that comes twice, is an error; on a device, where that would wait, it makes its row NaN, and
            in compiled code one that comes twice does. Indices of masked rows, and beside -inf, are not looked at.
        tail: see above.
        process_group: of a split vocabulary; every rank passes all k columns and takes those that it has.

    Other arguments, reductions, dtypes and errors as in `kl_div`.
    """
    op = "topk_kl_div"
    _divergence.check_tail(op, tail)
    _checks.check_topk_tensors(op, teacher_topk_logprobs, teacher_topk_indices)
    given, kind = Options.of(op, options), f"topk_{tail}"
    return _divergence.run(op, kind, student_logits, teacher_topk_logprobs, given, 0.0, None, teacher_topk_indices)[0]
