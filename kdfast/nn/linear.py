"""The twins of the losses for large vocabularies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kdfast.nn.settings import Settings
from kdfast.ops.kd_loss import KDLossComponents
from kdfast.ops.linear import linear_kd_loss, linear_topk_kd_loss
from kdfast.ops.topk import topk_kl_div

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TopkKLDivLoss(Settings):
    """`kdfast.topk_kl_div` as a module: KL from the top-k log-probabilities of a teacher, without T².

    Args:
        tail: `"bucket"`, `"renormalize"` or `"drop"`: what becomes of the teacher's other columns.
        temperature, vocab_size, reduction, process_group: as in `kdfast.kl_div`.
    """

    def __init__(
        self,
        *,
        tail: str = "bucket",
        temperature: float | Tensor = 1.0,
        vocab_size: int | None = None,
        reduction: str = "mean",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            tail=tail,
            temperature=temperature,
            vocab_size=vocab_size,
            reduction=reduction,
            process_group=process_group,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_topk_logprobs: Tensor,
        teacher_topk_indices: Tensor,
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
        vocab_start: int | None = None,
    ) -> Tensor:
        return topk_kl_div(
            student_logits,
            teacher_topk_logprobs,
            teacher_topk_indices,
            mask=mask,
            weight=weight,
            num_items=num_items,
            vocab_start=vocab_start,
            **self.settings,
        )


class LinearKDLoss(Settings):
    """`kdfast.linear_kd_loss` as a module: `KDLoss` from hidden states and output embeddings. **T² is included.**

    Args:
        student_softcap, teacher_softcap: z = cap · tanh(z / cap).
        memory_budget: bytes for logits and their gradients, or `"auto"`.
        alpha, temperature, divergence, beta, skew, label_smoothing, ignore_index, return_components: as in
            `kdfast.kd_loss`.
        vocab_size, reduction, process_group: as in `kdfast.kl_div`.
    """

    def __init__(
        self,
        *,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        memory_budget: int | str = "auto",
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
            student_softcap=student_softcap,
            teacher_softcap=teacher_softcap,
            memory_budget=memory_budget,
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
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
        vocab_start: int | None = None,
    ) -> Tensor | KDLossComponents:
        result: Tensor | KDLossComponents = linear_kd_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            teacher_logits=teacher_logits,
            mask=mask,
            weight=weight,
            num_items=num_items,
            vocab_start=vocab_start,
            **self.settings,
        )
        return result


class LinearTopkKDLoss(Settings):
    """`kdfast.linear_topk_kd_loss` as a module: `LinearKDLoss` from the top-k log-probabilities of a teacher.

    Args:
        tail: as of `TopkKLDivLoss`.
        student_softcap, memory_budget, alpha, temperature, label_smoothing, ignore_index, return_components, vocab_size,
            reduction, process_group: as of `LinearKDLoss`.
    """

    def __init__(
        self,
        *,
        student_softcap: float | None = None,
        tail: str = "bucket",
        memory_budget: int | str = "auto",
        alpha: float = 0.5,
        temperature: float | Tensor = 2.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        vocab_size: int | None = None,
        reduction: str = "mean",
        process_group: ProcessGroup | None = None,
        return_components: bool = False,
    ) -> None:
        super().__init__(
            student_softcap=student_softcap,
            tail=tail,
            memory_budget=memory_budget,
            alpha=alpha,
            temperature=temperature,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            vocab_size=vocab_size,
            reduction=reduction,
            process_group=process_group,
            return_components=return_components,
        )

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_topk_logprobs: Tensor,
        teacher_topk_indices: Tensor,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
        vocab_start: int | None = None,
    ) -> Tensor | KDLossComponents:
        result: Tensor | KDLossComponents = linear_topk_kd_loss(
            student_hidden,
            student_weight,
            teacher_topk_logprobs,
            teacher_topk_indices,
            labels,
            student_bias=student_bias,
            mask=mask,
            weight=weight,
            num_items=num_items,
            vocab_start=vocab_start,
            **self.settings,
        )
        return result
