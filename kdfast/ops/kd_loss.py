"""Distillation loss with labels: a divergence to the teacher and the cross-entropy, in one pass over the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, overload

from torch import Tensor

from kdfast.ops import _checks, _divergence
from kdfast.ops._divergence import Labels
from kdfast.ops._options import Distillation, KDOptions, WithLabels, takes
from kdfast.ops._transforms import transformable

if TYPE_CHECKING:
    from typing_extensions import Unpack


class KDLossComponents(NamedTuple):
    """What `kd_loss(..., return_components=True)` returns: the parts include T² and not alpha,
    and carry no gradient."""

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor


class KDLossEntropy(NamedTuple):
    """What `linear_kd_loss(..., return_entropy=True)` returns: `KDLossComponents`, and of every row H = −Σ p log p of
    p = softmax(z_student / T), `[...]`, in nats, float32 (float64), without gradient; 0 where a row does not count."""

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    entropy: Tensor


@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    return_components: Literal[False] = ...,
    **options: Unpack[KDOptions],
) -> Tensor: ...
@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    return_components: Literal[True],
    **options: Unpack[KDOptions],
) -> KDLossComponents: ...
@takes(Distillation)
@transformable
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    return_components: bool = False,
    **options: Unpack[KDOptions],
) -> Tensor | KDLossComponents:
    """alpha · T² · D(student, teacher) + (1 − alpha) · cross-entropy with the labels (Hinton et al., 2015).

    With reduction `"mean"`: alpha · Σ w·T²·D / N_D + (1 − alpha) · Σ w·CE / N_CE with the row's T and weight w; N_D
    counts the rows of the divergence, N_CE those of them whose label is not `ignore_index`; `num_items` replaces both.
    **T² is included here**, as nowhere among the divergences: the soft gradient then keeps its size when T changes.
    alpha weighs the **soft** term; some implementations weigh the hard one with it.

    Args:
        labels: int64 class indices, the logits' leading dimensions. Without a mask a row whose label is `ignore_index`
            (prompts and padding of a language model) counts for neither term: it is not read, and its gradient is 0.
            Nothing is shifted: for causal models pass logits[:, :-1] and labels[:, 1:]. None needs alpha = 1.
        mask: as in `kl_div`: the rows that the divergence counts, whatever their labels; the cross-entropy counts those
            of them that have a label. To distil from rows without a label too pass a mask that is True there.
        alpha: from 0 to 1.
        temperature: of the divergence; the cross-entropy is at temperature 1.
        divergence: the name of one of kdfast's divergences; `beta` belongs to `js_div`, `skew` to the skewed ones.
        label_smoothing: of the labels, over the whole vocabulary, as in `torch.nn.functional.cross_entropy`.
        return_components: return the loss, Σ w·T²·D / N_D and Σ w·CE / N_CE, the last two without gradient.

    Other arguments, reductions, dtypes, shards and errors as in `kl_div`. With a vocabulary split over ranks every rank
    passes all labels, as indices into the whole vocabulary.
    """
    op = "kd_loss"
    _checks.check_bools(op, return_components=return_components)
    given = Distillation.of(op, options)
    kind, mixing = soft_part(op, given)
    hard = hard_part(op, labels, given)
    loss, components = _divergence.run(op, kind, student_logits, teacher_logits, given, mixing, hard)
    return KDLossComponents(loss, *components.unbind(-1)) if return_components else loss


def soft_part(op: str, given: Distillation) -> tuple[str, float]:
    """The divergence to compute and its beta or skew."""
    _divergence.check_divergence(op, given.divergence)
    _checks.check_fraction(op, "beta", given.beta)
    _checks.check_fraction(op, "skew", given.skew, below_one=True)
    return _divergence.at_its_ends(given.divergence, beta=given.beta, skew=given.skew)


def hard_part(op: str, labels: Tensor | None, given: WithLabels) -> Labels:
    for argument, number in (("alpha", given.alpha), ("label_smoothing", given.label_smoothing)):
        _checks.check_fraction(op, argument, number)
    _checks.check_int(op, "ignore_index", given.ignore_index)
    if labels is None and given.alpha != 1:
        _checks.wrong_value(op, "labels", "labels where alpha is not 1", f"None with alpha={given.alpha}")
    return Labels(labels, float(given.alpha), float(given.label_smoothing), given.ignore_index)
