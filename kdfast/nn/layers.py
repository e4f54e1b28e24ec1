"""The twins of the distances between layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kdfast.nn.settings import Settings
from kdfast.ops import attention, hidden, qk
from kdfast.ops._layers import HeadMap, Layers


class AttentionMSELoss(Settings):
    """`kdfast.attention_mse` as a module: Σ_layers mean (S − T)² between attention scores.

    Args:
        head_map, head_weight, layer_weight, floor, reduction: as of `kdfast.attention_mse`.
    """

    def __init__(
        self,
        *,
        head_map: HeadMap | None = None,
        head_weight: Any = None,
        layer_weight: Any = None,
        floor: float | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            head_map=head_map, head_weight=head_weight, layer_weight=layer_weight, floor=floor, reduction=reduction
        )

    def forward(
        self,
        student_scores: Layers,
        teacher_scores: Layers,
        *,
        key_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        return attention.attention_mse(
            student_scores, teacher_scores, key_mask=key_mask, query_mask=query_mask, **self.settings
        )


class AttentionKLLoss(Settings):
    """`kdfast.attention_kl` as a module: Σ_layers mean over rows of KL(softmax(T) ‖ softmax(S)).

    Args:
        head_map, layer_weight, reduction: as of `kdfast.attention_kl`.
    """

    def __init__(self, *, head_map: HeadMap | None = None, layer_weight: Any = None, reduction: str = "mean") -> None:
        super().__init__(head_map=head_map, layer_weight=layer_weight, reduction=reduction)

    def forward(
        self,
        student_scores: Layers,
        teacher_scores: Layers,
        *,
        key_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        return attention.attention_kl(
            student_scores, teacher_scores, key_mask=key_mask, query_mask=query_mask, **self.settings
        )


class QKAttentionMSELoss(Settings):
    """`kdfast.qk_attention_mse` as a module: Σ_layers mean (a·Q_s K_sᵀ − b·Q_t K_tᵀ)², linear in the length.

    Args:
        student_scale, teacher_scale, is_causal, head_map, layer_weight, reduction: as of `kdfast.qk_attention_mse`.
    """

    def __init__(
        self,
        *,
        student_scale: float | None = None,
        teacher_scale: float | None = None,
        is_causal: bool = False,
        head_map: HeadMap | None = None,
        layer_weight: Any = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            student_scale=student_scale,
            teacher_scale=teacher_scale,
            is_causal=is_causal,
            head_map=head_map,
            layer_weight=layer_weight,
            reduction=reduction,
        )

    def forward(
        self,
        student_q: Layers,
        student_k: Layers,
        teacher_q: Layers,
        teacher_k: Layers,
        *,
        key_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        return qk.qk_attention_mse(
            student_q, student_k, teacher_q, teacher_k, key_mask=key_mask, query_mask=query_mask, **self.settings
        )


class QKRelationKLLoss(Settings):
    """`kdfast.qk_relation_kl` as a module: KL between softmax(A Bᵀ/√d) of teacher and student, as of MiniLM.

    Args:
        relation_heads, layer_weight, reduction: as of `kdfast.qk_relation_kl`.
    """

    def __init__(self, *, relation_heads: int | None = None, layer_weight: Any = None, reduction: str = "mean") -> None:
        super().__init__(relation_heads=relation_heads, layer_weight=layer_weight, reduction=reduction)

    def forward(
        self,
        student_a: Layers,
        student_b: Layers,
        teacher_a: Layers,
        teacher_b: Layers,
        *,
        key_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        return qk.qk_relation_kl(
            student_a, student_b, teacher_a, teacher_b, key_mask=key_mask, query_mask=query_mask, **self.settings
        )


class HiddenMSELoss(Settings):
    """`kdfast.hidden_mse` as a module: Σ_layers mean (H_s Wᵀ + b − H_t)², with W and b its parameters.

    Args:
        student_size, teacher_size: widths of the hidden states; with both there is a projection, None: none.
        bias: whether the projection has one.
        separate: for how many layers there is a projection each; None: one for all of them.
        layer_weight, reduction: as of `kdfast.hidden_mse`.
    """

    def __init__(
        self,
        student_size: int | None = None,
        teacher_size: int | None = None,
        *,
        bias: bool = True,
        separate: int | None = None,
        layer_weight: Any = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(layer_weight=layer_weight, reduction=reduction)
        sizes = (student_size, teacher_size)
        if (student_size is None) != (teacher_size is None):
            raise ValueError(f"HiddenMSELoss: student_size, teacher_size: expected both or neither, got {sizes}")
        count = 0 if student_size is None else separate or 1
        self.projections = nn.ModuleList(nn.Linear(student_size, teacher_size, bias=bias) for _ in range(count))  # type: ignore[arg-type]

    def forward(self, student_hidden: Layers, teacher_hidden: Layers, *, mask: Tensor | None = None) -> Tensor:
        linears: list[Any] = list(self.projections)
        weights = [linear.weight for linear in linears] or None
        biases = [linear.bias for linear in linears if linear.bias is not None] or None
        return hidden.hidden_mse(
            student_hidden, teacher_hidden, projection=weights, bias=biases, mask=mask, **self.settings
        )


class CosineDistanceLoss(Settings):
    """`kdfast.cosine_distance` as a module: Σ_layers mean over tokens of 1 − cos.

    Args:
        layer_weight, reduction: as of `kdfast.cosine_distance`.
    """

    def __init__(self, *, layer_weight: Any = None, reduction: str = "mean") -> None:
        super().__init__(layer_weight=layer_weight, reduction=reduction)

    def forward(self, student_hidden: Layers, teacher_hidden: Layers, *, mask: Tensor | None = None) -> Tensor:
        return hidden.cosine_distance(student_hidden, teacher_hidden, mask=mask, **self.settings)


class CLSDistanceLoss(Settings):
    """`kdfast.cls_distance` as a module: Σ_layers mean (s/‖s‖ − t/‖t‖)² of one token's hidden states.

    Args:
        token_index, normalize, layer_weight, reduction: as of `kdfast.cls_distance`.
    """

    def __init__(
        self,
        *,
        token_index: int | Tensor = 0,
        normalize: bool = True,
        layer_weight: Any = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(token_index=token_index, normalize=normalize, layer_weight=layer_weight, reduction=reduction)

    def forward(self, student_hidden: Layers, teacher_hidden: Layers) -> Tensor:
        return hidden.cls_distance(student_hidden, teacher_hidden, **self.settings)
