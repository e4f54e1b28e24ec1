"""torchtune's knowledge-distillation losses by kdfast: its names, arguments and values (torchtune 0.6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdfast import reverse_kl_div, soft_cross_entropy
from kdfast.data.text import OFF
from kdfast.ops import _checks


class SymmetricKLLoss(nn.Module):
    """sym_kd_ratio · Σ_v −p_t log p_s + (1 − sym_kd_ratio) · KL(s ‖ t), over rows whose label is not `ignore_index`.

    As in torchtune the forward term is the cross-entropy with the teacher (`kdfast.soft_cross_entropy`), not KL: the
    teacher's entropy more, with the same gradient. The reverse term is `kdfast.reverse_kl_div`. No temperature. Columns
    with infinite logits count for nothing in torchtune; here they give +inf where the formula does: where one side has
    -inf and the other a probability that is not 0.

    Args:
        sym_kd_ratio: from 0 to 1; at either end the other term is not computed.
        ignore_index: the label of rows that do not count.

    Raises:
        ValueError: a ratio out of range; and what `kdfast.kl_div` raises.
    """

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = OFF) -> None:
        super().__init__()
        _checks.check_fraction(type(self).__name__, "sym_kd_ratio", sym_kd_ratio)
        self.sym_kd_ratio, self.ignore_index = sym_kd_ratio, ignore_index

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
        """Logits [N, V], labels [N]; a scalar: the mean over rows that count, without `normalize` their sum."""
        counted = labels.view(-1) != self.ignore_index
        s, t = (x.reshape(-1, x.shape[-1]) for x in (student_logits, teacher_logits))
        return self._of(s, t, counted, None if normalize else 1)

    def _of(self, s: Tensor, t: Tensor, counted: Tensor, num_items: float | Tensor | None) -> Tensor:
        parts = ((self.sym_kd_ratio, soft_cross_entropy), (1 - self.sym_kd_ratio, reverse_kl_div))
        losses = [r * divergence(s, t, mask=counted, num_items=num_items) for r, divergence in parts if r]
        return sum(losses[1:], losses[0])


class ForwardKLLoss(SymmetricKLLoss):
    """`SymmetricKLLoss` of ratio 1: Σ_v −p_t log p_s."""

    def __init__(self, ignore_index: int = OFF) -> None:
        super().__init__(1.0, ignore_index)


class ReverseKLLoss(SymmetricKLLoss):
    """`SymmetricKLLoss` of ratio 0: KL(s ‖ t)."""

    def __init__(self, ignore_index: int = OFF) -> None:
        super().__init__(0.0, ignore_index)


class SymmetricKLWithChunkedOutputLoss(SymmetricKLLoss):
    """`SymmetricKLLoss` of logits in `num_output_chunks` pieces of the sequence, the mean over all of them.

    kdfast makes no float32 copy of logits, so that pieces save nothing; from hidden states `kdfast.linear_kd_loss`
    makes no logits either. A batch in which nothing counts gives 0, where torchtune's reverse and symmetric ones divide
    by 0.
    """

    def __init__(self, num_output_chunks: int = 8, sym_kd_ratio: float = 0.5, ignore_index: int = OFF) -> None:
        super().__init__(sym_kd_ratio, ignore_index)
        self.num_output_chunks = num_output_chunks

    def forward(  # type: ignore[override]
        self, student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], labels: Tensor
    ) -> Tensor:
        """Lists of logits [B, L / num_output_chunks, V] and labels [B, L], which are cut here; a scalar."""
        counted = labels != self.ignore_index
        items = counted.sum().clamp(min=1)
        chunks = zip(student_logits, teacher_logits, counted.chunk(self.num_output_chunks, 1), strict=True)
        return torch.stack([self._of(s, t, on, items) for s, t, on in chunks]).sum()


class ForwardKLWithChunkedOutputLoss(SymmetricKLWithChunkedOutputLoss):
    """`SymmetricKLWithChunkedOutputLoss` of ratio 1."""

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = OFF) -> None:
        super().__init__(num_output_chunks, 1.0, ignore_index)


class ReverseKLWithChunkedOutputLoss(SymmetricKLWithChunkedOutputLoss):
    """`SymmetricKLWithChunkedOutputLoss` of ratio 0."""

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = OFF) -> None:
        super().__init__(num_output_chunks, 0.0, ignore_index)
