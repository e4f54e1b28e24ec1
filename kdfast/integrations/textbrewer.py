"""TextBrewer's losses by kdfast: its names, arguments and values (textbrewer 0.2.1).

They go into its tables: `textbrewer.presets.KD_LOSS_MAP["ce"] = kd_ce_loss`, `MATCH_LOSS_MAP["hidden_mse"] =
hid_mse_loss`. **None multiplies by T²**, as in TextBrewer. The teacher gets no gradient. Shapes, dtypes and errors are
those of the operators that each names.

Not here are `att_ce_loss` and `att_ce_mean_loss`: they take the softmax over padding too and cut it off afterwards.
`kdfast.attention_kl`, over the keys that count, has their gradient where scores of padding are masked already.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kdfast import (
    attention_mse,
    cls_distance,
    cosine_distance,
    hidden_mse,
    logit_mse,
    qk_attention_mse,
    soft_cross_entropy,
)

FLOOR = -1e-3  # TextBrewer's: scores at or below are a mask's, and 0


def kd_ce_loss(logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor = 1) -> Tensor:
    """Mean over rows of −Σ_c p_t log p_s: `kdfast.soft_cross_entropy`. A temperature per row is [B] or [B, L]."""
    return soft_cross_entropy(logits_S, logits_T, temperature=temperature)


def kd_mse_loss(logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor = 1) -> Tensor:
    """Mean over rows and classes of ((z_s − z_t) / T)²: `kdfast.logit_mse`."""
    return logit_mse(logits_S, logits_T, temperature=temperature)


def hid_mse_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens and width of (h_s − h_t)², [B, L, D]: `kdfast.hidden_mse`."""
    return hidden_mse(state_S, state_T, mask=_bool(mask))


def cos_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of 1 − cos(h_s, h_t), [B, L, D]: `kdfast.cosine_distance`."""
    return cosine_distance(state_S, state_T, mask=_bool(mask))


def pkd_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over rows of ‖h_s/‖h_s‖ − h_t/‖h_t‖‖², of first tokens, [B, L, D] or [B, D]: D times
    `kdfast.cls_distance`. The mask is not used."""
    return cls_distance(state_S, state_T) * state_S.shape[-1]


def att_mse_loss(attention_S: Tensor, attention_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over heads and pairs of tokens of (s − t)², scores [B, H, L, L]: `kdfast.attention_mse`.

    Without a mask [B, L], scores at or below −10⁻³ are 0 on their side, negative scores among them: TextBrewer means
    masks that were added.
    """
    on = _bool(mask)
    return attention_mse(attention_S, attention_T, key_mask=on, query_mask=on, floor=FLOOR if mask is None else None)


def att_mse_sum_loss(attention_S: Tensor, attention_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """`att_mse_loss` of the sums over heads; scores [B, H, L, L], of which H may differ, or [B, L, L]."""
    s, t = (x.sum(1, keepdim=True) if x.dim() == 4 else x[:, None] for x in (attention_S, attention_T))
    return att_mse_loss(s, t, mask)


def mmd_loss(state_S: Sequence[Tensor], state_T: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Mean over pairs of tokens of (S₁S₂ᵀ/c − T₁T₂ᵀ/c)² of two layers [B, L, D] each: `kdfast.qk_attention_mse`.

    c is each side's D; with a mask [B, L] it is L, as in TextBrewer.
    """
    s, t = (1 / (x.shape[2] if mask is None else x.shape[1]) for x in (state_S[1], state_T[1]))
    return _of_products([x[:, None] for x in (*state_S, *state_T)], s, t, _bool(mask))


def fsp_loss(state_S: Sequence[Tensor], state_T: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Mean over pairs of neurons of (S₁ᵀS₂/n − T₁ᵀT₂/n)², n the tokens of a row, of two layers [B, L, D] each, with the
    same D on both sides: `kdfast.qk_attention_mse`."""
    layers, scale = [*state_S, *state_T], 1 / state_S[0].shape[1]
    if mask is not None:
        on, scale = mask[..., None].to(layers[0]), 1.0
        share = on / on.sum(1, keepdim=True)
        layers = [x * on if i % 2 else x * share for i, x in enumerate(layers)]
    return _of_products([x.transpose(1, 2)[:, None] for x in layers], scale, scale, None)


def _of_products(layers: list[Tensor], scale: float, teacher_scale: float, on: Tensor | None) -> Tensor:
    return qk_attention_mse(*layers, student_scale=scale, teacher_scale=teacher_scale, key_mask=on, query_mask=on)


def _bool(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.bool()
