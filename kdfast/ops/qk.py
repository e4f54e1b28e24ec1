"""Losses between the attentions of student and teacher, from queries and keys: no score matrix is made."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from kdfast.ops import _checks, _layers
from kdfast.ops._layers import HeadMap, Layers, Masks, QkNumbers, Tensors
from kdfast.ops._transforms import transformable

LOSSES = ("mse", "kl")  # in the order of csrc/common/qk.h


@transformable
def qk_attention_mse(
    student_q: Layers,
    student_k: Layers,
    teacher_q: Layers,
    teacher_k: Layers,
    *,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    is_causal: bool = False,
    head_map: HeadMap | None = None,
    layer_weight: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Σ_layers mean (a·Q_s K_sᵀ − b·Q_t K_tᵀ)²: `attention_mse` in time and memory linear in the length L.

    With X = [a·Q_s − b·Q_t, b·Q_t] and Y = [K_s, K_s − K_t] the sum is ⟨XᵀX, YᵀY⟩: two d × d Gram matrices per head
    stand for the L × L scores, exactly, and as precisely the closer the student is. Short sequences take the scores, 48
    rows at a time. Models keep their fused attention: `kdfast.hf` reads queries and keys out of them.

    Args:
        student_q, student_k: [B, H, L, d] and [B, heads, L, d], or sequences of such layers; keys may be shared by
            groups of query heads (their count divides H). float32, bfloat16, float16 or float64, each its own,
            any strides.
        teacher_q, teacher_k: as many layers, of their own H and d; no gradient flows into them.
        student_scale, teacher_scale: a and b; None is 1/√d of each.
        key_mask, query_mask: bool, broadcast to [B, L], True where a token counts. Others are not read, have no
            gradient and leave the divisor.
        is_causal: only keys at or before their query count.
        head_map: the teacher's head of every student head, [H] or one per layer; -1 skips a head, which leaves the
            divisor too. Needed where the head counts differ.
        layer_weight: a weight per layer; it stays out of the divisor.
        reduction: `"mean"` divides a layer's sum by its counted scores, `"batchmean"` by B, `"sum"` by nothing; layers
            add up. `"none"` gives the mean of every head, [B, H], with a leading dimension for a sequence of layers.

    Returns:
        The loss: float32, or float64 for float64 inputs. 0 where nothing counts.

    Raises:
        ValueError, TypeError: a shape, dtype, device or range is wrong; the message names the argument.
    """
    op, names = "qk_attention_mse", ("student_q", "student_k", "teacher_q", "teacher_k")
    _checks.check_bools(op, is_causal=is_causal)
    lists = _check_qk(op, names, (student_q, student_k, teacher_q, teacher_k))
    scales = (student_scale, teacher_scale)
    return _of_heads(
        op, "mse", lists, scales, key_mask, query_mask, is_causal, head_map, layer_weight, reduction,
        isinstance(student_q, Tensor),
    )  # fmt: skip


@transformable
def qk_relation_kl(
    student_a: Layers,
    student_b: Layers,
    teacher_a: Layers,
    teacher_b: Layers,
    *,
    relation_heads: int | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    layer_weight: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Σ_layers mean over rows of KL(softmax(A_t B_tᵀ/√d_r) ‖ softmax(A_s B_sᵀ/√d_r)) (MiniLM, MiniLMv2: Wang et al.,
    2020).

    MiniLM: queries with keys, and values with values, of the last layer. MiniLMv2: queries, keys and values each with
    themselves. The scores are made in tiles and not kept; the gradients make them again.

    Args:
        student_a, student_b: [B, H, L, d], or sequences of such layers; the same tensor for a relation with itself.
            float32, bfloat16, float16 or float64, each its own, any strides.
        teacher_a, teacher_b: as many layers, of their own H and d; no gradient flows into them.
        relation_heads: r: the heads of a token are joined and split anew into r of H·d/r numbers each (48 for base-size
            teachers of MiniLMv2); None keeps the heads, whose counts must then be equal.
        key_mask, query_mask: bool, broadcast to [B, L], True where a token counts: the softmax is over counted keys,
            the mean over counted queries. Others are not read and have no gradient.
            A sequence without a key counts nothing.
        layer_weight: a weight per layer; it stays out of the divisor.
        reduction: `"mean"` divides a layer's sum by its counted rows, heads · queries, `"batchmean"` by B, `"sum"` by
            nothing; layers add up. `"none"` gives the mean of every head, [B, H], with a leading dimension for a
            sequence of layers.

    Returns:
        The loss: float32, or float64 for float64 inputs. 0 where nothing counts.

    Raises:
        ValueError, TypeError: a shape, dtype, device or range is wrong; the message names the argument.
    """
    op, names = "qk_relation_kl", ("student_a", "student_b", "teacher_a", "teacher_b")
    lists = _check_qk(op, names, (student_a, student_b, teacher_a, teacher_b))
    if relation_heads is not None:
        _checks.check_int(op, "relation_heads", relation_heads)
        lists = [_resplit(op, name, layers, relation_heads) for name, layers in zip(names, lists, strict=True)]
    heads = lists[0][0].shape[1], lists[2][0].shape[1]
    if heads[0] != heads[1]:
        _checks.wrong_value(
            op, "relation_heads", f"a number, as the student has {heads[0]} heads and the teacher {heads[1]}", None
        )
    return _of_heads(
        op, "kl", lists, (None, None), key_mask, query_mask, False, None, layer_weight, reduction,
        isinstance(student_a, Tensor),
    )  # fmt: skip


def _check_qk(op: str, names: tuple[str, ...], given: tuple[Layers, ...]) -> list[list[Tensor]]:
    lists = [_layers.as_list(op, name, x) for name, x in zip(names, given, strict=True)]
    first = lists[0][0]
    for name, layers in zip(names, lists, strict=True):
        if layers[0].dim() != 4:
            _checks.wrong_value(op, name, "[B, H, L, d]", f"shape {list(layers[0].shape)}")
        if len(layers) != len(lists[0]):
            _checks.wrong_value(op, name, f"as many layers as {names[0]}, {len(lists[0])}", len(layers))
        if layers[0].device != first.device:
            _checks.wrong_value(op, name, f"the student's device {first.device}", layers[0].device)
        batch, _, length, _ = layers[0].shape
        if (batch, length) != (first.shape[0], first.shape[2]):
            _checks.wrong_value(op, name, f"[{first.shape[0]}, heads, {first.shape[2]}, d]", list(layers[0].shape))
    for q, k in ((0, 1), (2, 3)):
        (_, heads, _, size), (_, shared, _, of_keys) = lists[q][0].shape, lists[k][0].shape
        if of_keys != size:
            _checks.wrong_value(op, names[k], f"the head size of {names[q]}, {size}", of_keys)
        if shared == 0 or heads % shared:
            _checks.wrong_value(op, names[k], f"a number of heads that divides the {heads} of {names[q]}", shared)
        if lists[k][0].dtype != lists[q][0].dtype:
            count = len(lists[q])
            both = _layers.in_one_dtype(lists[q] + lists[k])
            lists[q], lists[k] = both[:count], both[count:]
    return lists


def _of_heads(
    op: str,
    loss: str,
    lists: list[list[Tensor]],
    scales: tuple[float | None, float | None],
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    causal: bool,
    head_map: HeadMap | None,
    layer_weight: Any,
    reduction: str,
    single: bool,
) -> Tensor:
    q, teacher_q = lists[0][0], lists[2][0]
    batch, heads, length, _ = q.shape
    _checks.check_reduction(op, reduction, q)
    masks = Masks(
        _layers.check_mask(op, "query_mask", query_mask, q, (batch, length)),
        _layers.check_mask(op, "key_mask", key_mask, q, (batch, length)),
        (length, length),
        causal,
    )
    if loss == "kl":
        masks = masks.with_columns(q)
    maps = _layers.check_head_map(op, head_map, len(lists[0]), heads, teacher_q.shape[1])
    of_layers = _layers.check_numbers(op, "layer_weight", layer_weight, len(lists[0]))
    weights = _layers.weights_of(maps, of_layers, [[1.0] * heads] * len(maps), reduction == "mean")
    static, divisor = _layers.denominator(masks, batch, reduction, loss == "mse", q)
    numbers = QkNumbers(
        kind=LOSSES.index(loss),
        student_scale=_scale(op, "student_scale", scales[0], q),
        teacher_scale=_scale(op, "teacher_scale", scales[1], teacher_q),
        causal=causal,
        head_map=[head for row in maps for head in row],
        weight=[w / static for w in weights],
        per_row=reduction == "none",
    )
    tensors = Tensors(lists[:2], lists[2:], masks.rows, masks.columns, divisor)
    value = _layers.call(op, "qk_distance", tensors, numbers)
    return _layers.head_means(value, masks, loss == "mse", single) if reduction == "none" else value


def _scale(op: str, argument: str, scale: float | None, q: Tensor) -> float:
    if scale is None:
        return 1 / math.sqrt(max(q.shape[-1], 1))
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        _checks.wrong_type(op, argument, "a number", _checks.kind(scale))
    return float(scale)


def _resplit(op: str, argument: str, layers: list[Tensor], heads: int) -> list[Tensor]:
    """Joins the heads of a token and splits them anew; without a copy where a token's heads lie together."""
    _, old, _, size = layers[0].shape
    if heads < 1 or old * size % heads:
        _checks.wrong_value(op, "relation_heads", f"a divisor of the width {old * size} of {argument}", heads)
    return [x.transpose(1, 2).flatten(2).unflatten(2, (heads, old * size // heads)).transpose(1, 2) for x in layers]
