"""Divergences between the next-token (or class) distributions of a student and a teacher, on logits.

All on one template: loss and gradient are made in one pass over the logits, without probabilities or a float32 copy of
the logits ever being stored. `kl_div` states what they have in common.
"""

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
def kl_div(student_logits: Tensor, teacher_logits: Tensor, **options: Unpack[DivergenceOptions]) -> Tensor:
    r"""Kullback-Leibler divergence of the student from the teacher, Σ_v p_t · (log p_t − log p_s), p = softmax(z / T).

    Hinton et al., 2015 (arXiv:1503.02531). Losses are per row, unlike the elements of `torch.nn.functional.kl_div`: its
    "sum" and "batchmean" are the same, its "mean" divides by V too. **T² is not included**: multiply
    by it yourself, or use `kd_loss`, which does.

    Args:
        student_logits: `[..., V]`, float32, bfloat16, float16, or float64 on the CPU; any strides.
        teacher_logits: the same leading dimensions; its dtype may differ; gets no gradient.
        temperature: T > 0, a number or a tensor that broadcasts to the leading dimensions.
        mask: bool, broadcasts to the leading dimensions, True = counted. Rows that are off are never read.
        weight: floating point, broadcasts to the leading dimensions; multiplies each row's loss.
        vocab_size: only the first `vocab_size` columns exist, on both sides (padded vocabularies); over shards, the
            size of the whole vocabulary.
        reduction: `"none"` (a value per row, 0 where masked), `"sum"`, `"mean"` (Σ weight·loss / number of unmasked
            rows; weights stay out of the denominator) or `"batchmean"` (sum / size of dimension 0).
        num_items: replaces the denominator of `"mean"` (`num_items_in_batch` of `transformers.Trainer`).
        process_group: the logits are this rank's columns of a vocabulary that is split over the group, in rank order;
            every rank gets the loss of whole rows and the gradient of its columns. Two small all-reduces (three for
            `js_div`, the skewed divergences and `total_variation`). DTensors sharded on their last dimension need none
            of this and give a plain tensor.
        vocab_start: the first column of this rank; by default rank · width. Needs `vocab_size`.

    Returns:
        float32 (float64 for float64 logits) in nats: a scalar, or the leading dimensions for `"none"`. A column that is
        -inf on both sides counts nothing; p_t > 0 where p_s = 0 gives +inf; a row that is all -inf, or holds +inf or
        NaN, gives NaN in that row only. Empty input gives 0.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device, reduction or range.
        RuntimeError: a second derivative or forward mode is asked for.

    `torch.func.grad`, `vjp`, `jacrev` and `vmap` work on all of kdfast's operators; they look at the logits once more in
    the backward, and `vmap` takes its batch one by one.
    """
    return _divergence.of("kl_div", student_logits, teacher_logits, options)


@takes(Options)
@transformable
def reverse_kl_div(student_logits: Tensor, teacher_logits: Tensor, **options: Unpack[DivergenceOptions]) -> Tensor:
    """KL(s ‖ t) = Σ_v p_s · (log p_s − log p_t): mode-seeking, as in MiniLLM (Gu et al., 2023, arXiv:2306.08543).

    p_s > 0 where p_t = 0 gives +inf. Arguments, reductions, dtypes, shards and errors as in `kl_div`.
    """
    return _divergence.of("reverse_kl_div", student_logits, teacher_logits, options)


@takes(Options)
@transformable
def symmetric_kl_div(student_logits: Tensor, teacher_logits: Tensor, **options: Unpack[DivergenceOptions]) -> Tensor:
    """(KL(t ‖ s) + KL(s ‖ t)) / 2, half of Jeffreys' divergence.

    Arguments, reductions, dtypes, shards and errors as in `kl_div`.
    """
    return _divergence.of("symmetric_kl_div", student_logits, teacher_logits, options)


@takes(Options)
@transformable
def js_div(
    student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 0.5, **options: Unpack[DivergenceOptions]
) -> Tensor:
    """Generalised Jensen-Shannon divergence, beta · KL(t ‖ m) + (1 − beta) · KL(s ‖ m),
    m = beta · p_t + (1 − beta) · p_s.

    Agarwal et al., 2023 (GKD, arXiv:2306.13649). beta in [0, 1]; as there, 0 is *defined* as `kl_div` and 1 as
    `reverse_kl_div` (between them the divergence itself goes to 0 at both ends). Always finite. TRL's GKD trainer sums
    it over the vocabulary like this; its beta is this one.

    Other arguments, reductions, dtypes, shards and errors as in `kl_div`.
    """
    _checks.check_fraction("js_div", "beta", beta)
    return _divergence.of("js_div", student_logits, teacher_logits, options, beta=beta)


@takes(Options)
@transformable
def skew_kl_div(
    student_logits: Tensor, teacher_logits: Tensor, *, skew: float = 0.1, **options: Unpack[DivergenceOptions]
) -> Tensor:
    """KL(t ‖ m) with m = skew · p_t + (1 − skew) · p_s, skew in [0, 1); 0 is `kl_div`.

    Ko et al., 2024 (DistiLLM, arXiv:2402.03898). At most −log skew. Other arguments, reductions, dtypes, shards and
    errors as in `kl_div`.
    """
    _checks.check_fraction("skew_kl_div", "skew", skew, below_one=True)
    return _divergence.of("skew_kl_div", student_logits, teacher_logits, options, skew=skew)


@takes(Options)
@transformable
def skew_reverse_kl_div(
    student_logits: Tensor, teacher_logits: Tensor, *, skew: float = 0.1, **options: Unpack[DivergenceOptions]
) -> Tensor:
    """KL(s ‖ m) with m = skew · p_s + (1 − skew) · p_t, skew in [0, 1); 0 is `reverse_kl_div`.

    Ko et al., 2024 (DistiLLM, arXiv:2402.03898). At most −log skew. Other arguments, reductions, dtypes, shards and
    errors as in `kl_div`.
    """
    _checks.check_fraction("skew_reverse_kl_div", "skew", skew, below_one=True)
    return _divergence.of("skew_reverse_kl_div", student_logits, teacher_logits, options, skew=skew)


@takes(Options)
@transformable
def total_variation(student_logits: Tensor, teacher_logits: Tensor, **options: Unpack[DivergenceOptions]) -> Tensor:
    """Total variation distance ½ Σ_v |p_s − p_t|, in [0, 1] (Wen et al., 2023, arXiv:2307.15190).

    Where p_s = p_t the gradient of the column's term is 0. Arguments, reductions, dtypes,
    shards and errors as in `kl_div`.
    """
    return _divergence.of("total_variation", student_logits, teacher_logits, options)


@takes(Options)
@transformable
def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, **options: Unpack[DivergenceOptions]) -> Tensor:
    """Cross-entropy with soft targets, −Σ_v p_t · log p_s: `kl_div` plus the teacher's entropy, with the same gradient.

    As TinyBERT and DynaBERT write their prediction loss. Arguments, reductions, dtypes,
    shards and errors as in `kl_div`.
    """
    return _divergence.of("soft_cross_entropy", student_logits, teacher_logits, options)


@takes(Options)
@transformable
def logit_mse(student_logits: Tensor, teacher_logits: Tensor, **options: Unpack[DivergenceOptions]) -> Tensor:
    """Mean over the vocabulary of ((z_s − z_t) / T)²: no softmax.

    A column that is -inf, or +inf, on both sides counts as equal, and stays in the divisor; on one side it gives +inf.
    Arguments, reductions, dtypes, shards and errors as in `kl_div`.
    """
    return _divergence.of("logit_mse", student_logits, teacher_logits, options)
