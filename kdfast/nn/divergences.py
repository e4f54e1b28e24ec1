"""The twins of the divergences and of `kd_loss`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kdfast.nn.settings import Settings
from kdfast.ops import divergence
from kdfast.ops.kd_loss import KDLossComponents, kd_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _DivergenceLoss(Settings):
    """A divergence with its settings.

    Args:
        temperature: T > 0. T² is not included.
        vocab_size: only the first `vocab_size` columns count.
        reduction: `"none"`, `"mean"`, `"sum"` or `"batchmean"`, as in `kdfast.kl_div`.
        process_group: the vocabulary is split over its ranks.
    """

    function: Callable[..., Tensor]
    mixing: frozenset[str] = frozenset()

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        vocab_size: int | None = None,
        reduction: str = "mean",
        process_group: ProcessGroup | None = None,
        **mixing: float,
    ) -> None:
        for name in mixing.keys() - self.mixing:
            raise TypeError(f"{type(self).__name__}: {name}: expected no such argument")
        super().__init__(
            **mixing,
            temperature=temperature,
            vocab_size=vocab_size,
            reduction=reduction,
            process_group=process_group,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
        vocab_start: int | None = None,
    ) -> Tensor:
        return type(self).function(
            student_logits,
            teacher_logits,
            mask=mask,
            weight=weight,
            num_items=num_items,
            vocab_start=vocab_start,
            **self.settings,
        )


class KLDivLoss(_DivergenceLoss):
    """`kdfast.kl_div` as a module: Σ_v p_t · (log p_t − log p_s), p = softmax(z / T), without T².

    Args: as of every divergence here: temperature, vocab_size, reduction, process_group.
    """

    function = staticmethod(divergence.kl_div)


class ReverseKLDivLoss(_DivergenceLoss):
    """`kdfast.reverse_kl_div` as a module: Σ_v p_s · (log p_s − log p_t); arguments of `KLDivLoss`."""

    function = staticmethod(divergence.reverse_kl_div)


class SymmetricKLDivLoss(_DivergenceLoss):
    """`kdfast.symmetric_kl_div` as a module: (KL(t ‖ s) + KL(s ‖ t)) / 2; arguments of `KLDivLoss`."""

    function = staticmethod(divergence.symmetric_kl_div)


class JSDivLoss(_DivergenceLoss):
    """`kdfast.js_div` as a module, beta · KL(t ‖ m) + (1 − beta) · KL(s ‖ m); beta in [0, 1], arguments of `KLDivLoss`."""

    function = staticmethod(divergence.js_div)
    mixing = frozenset({"beta"})

    def __init__(self, *, beta: float = 0.5, **settings: Any) -> None:
        super().__init__(beta=beta, **settings)


class SkewKLDivLoss(_DivergenceLoss):
    """`kdfast.skew_kl_div` as a module, KL(t ‖ skew · t + (1 − skew) · s); skew in [0, 1), arguments of `KLDivLoss`."""

    function = staticmethod(divergence.skew_kl_div)
    mixing = frozenset({"skew"})

    def __init__(self, *, skew: float = 0.1, **settings: Any) -> None:
        super().__init__(skew=skew, **settings)


class SkewReverseKLDivLoss(_DivergenceLoss):
    """`kdfast.skew_reverse_kl_div` as a module, KL(s ‖ skew · s + (1 − skew) · t); arguments of `SkewKLDivLoss`."""

    function = staticmethod(divergence.skew_reverse_kl_div)
    mixing = frozenset({"skew"})

    def __init__(self, *, skew: float = 0.1, **settings: Any) -> None:
        super().__init__(skew=skew, **settings)


class TotalVariationLoss(_DivergenceLoss):
    """`kdfast.total_variation` as a module: ½ Σ_v |p_s − p_t|; arguments of `KLDivLoss`."""

    function = staticmethod(divergence.total_variation)


class SoftCrossEntropyLoss(_DivergenceLoss):
    """`kdfast.soft_cross_entropy` as a module: −Σ_v p_t · log p_s; arguments of `KLDivLoss`."""

    function = staticmethod(divergence.soft_cross_entropy)


class LogitMSELoss(_DivergenceLoss):
    """`kdfast.logit_mse` as a module: mean over the vocabulary of ((z_s − z_t) / T)²; arguments of `KLDivLoss`."""

    function = staticmethod(divergence.logit_mse)


class KDLoss(Settings):
    """`kdfast.kd_loss` as a module: alpha · T² · divergence + (1 − alpha) · cross-entropy. **T² is included.**

    Args:
        alpha: weight of the divergence, from 0 to 1.
        temperature: T > 0, of the divergence.
        divergence, beta, skew: which one, and its parameter.
        label_smoothing, ignore_index: of the labels. Without a mask rows of an ignored label count for neither term.
        return_components: return `KDLossComponents` instead of the loss.
        vocab_size, reduction, process_group: as of `KLDivLoss`.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        temperature: float | Tensor = 2.0,
        divergence: str = "kl_div",
        beta: float = 0.5,
        skew: float = 0.1,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        vocab_size: int | None = None,
        reduction: str = "mean",
        process_group: ProcessGroup | None = None,
        return_components: bool = False,
    ) -> None:
        super().__init__(
            alpha=alpha,
            temperature=temperature,
            divergence=divergence,
            beta=beta,
            skew=skew,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            vocab_size=vocab_size,
            reduction=reduction,
            process_group=process_group,
            return_components=return_components,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
        vocab_start: int | None = None,
    ) -> Tensor | KDLossComponents:
        result: Tensor | KDLossComponents = kd_loss(
            student_logits,
            teacher_logits,
            labels,
            mask=mask,
            weight=weight,
            num_items=num_items,
            vocab_start=vocab_start,
            **self.settings,
        )
        return result
