"""Modules that hold an operator's settings: the twins of the functions in `kdfast`."""

from __future__ import annotations

from torch import Tensor, nn

from kdfast.ops import divergence

__all__ = ["KLDivLoss"]


class KLDivLoss(nn.Module):
    """`kdfast.kl_div` as a module: Σ_v p_t · (log p_t − log p_s), p = softmax(z / T), without T².

    Args:
        temperature: T > 0.
        vocab_size: only the first `vocab_size` columns count.
        reduction: `"none"`, `"mean"`, `"sum"` or `"batchmean"`, as in `kdfast.kl_div`.
    """

    def __init__(self, *, temperature: float = 1.0, vocab_size: int | None = None, reduction: str = "mean") -> None:
        super().__init__()
        self.temperature = temperature
        self.vocab_size = vocab_size
        self.reduction = reduction

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        return divergence.kl_div(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            mask=mask,
            weight=weight,
            vocab_size=self.vocab_size,
            reduction=self.reduction,
            num_items=num_items,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, vocab_size={self.vocab_size}, reduction={self.reduction!r}"
