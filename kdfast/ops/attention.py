"""Losses between the attentions of student and teacher, from scores."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdfast.ops import _checks, _layers
from kdfast.ops._layers import HeadMap, Layers, Masks
from kdfast.ops._transforms import transformable


@transformable
def attention_mse(
    student_scores: Layers,
    teacher_scores: Layers,
    *,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    head_map: HeadMap | None = None,
    head_weight: Any = None,
    layer_weight: Any = None,
    floor: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Σ_layers mean (S − T)² between attention scores (TinyBERT: Jiao et al., 2020).

    One pass over the scores makes the loss and its gradient, for all layers together. Score matrices cost memory that
    grows with the square of the length: `qk_attention_mse` gives the same value from queries and keys.

    Args:
        student_scores: [B, H, L, L], or a sequence of such layers; float32, bfloat16, float16 or float64, each its own,
            any strides. What is -inf on both sides counts as equal.
        teacher_scores: as many layers, [B, H_t, L, L]; no gradient flows into them.
        key_mask, query_mask: bool, broadcast to [B, L], True where a token counts. Other scores are not read, have no
            gradient and leave the divisor. TinyBERT's code instead zeroes masked keys by `floor` and counts all.
        head_map: the teacher's head of every student head, [H] or one per layer; -1 skips a head, which leaves the
            divisor too. Needed where the head counts differ.
        head_weight: a weight per head, [H] or per layer. layer_weight: a weight per layer. Numbers; they stay out of
            the divisor.
        floor: scores at or below it count as 0 on their side, have no gradient, and stay in the divisor; -100 is
            TinyBERT's rule (its masks add -10000).
        reduction: `"mean"` divides a layer's sum by its counted elements, `"batchmean"` by B, `"sum"` by nothing;
            layers add up. `"none"` gives the mean of every head, [B, H],
            with a leading dimension for a sequence of layers.

    Returns:
        The loss: float32, or float64 for float64 inputs. 0 where nothing counts.

    Raises:
        ValueError, TypeError: a shape, dtype, device or range is wrong; the message names the argument.
    """
    op = "attention_mse"
    if floor is not None and (isinstance(floor, bool) or not isinstance(floor, (int, float))):
        _checks.wrong_type(op, "floor", "a number", _checks.kind(floor))
    return _of_scores(
        op, "squared", student_scores, teacher_scores, key_mask, query_mask, head_map, head_weight, layer_weight,
        reduction, floor,
    )  # fmt: skip


@transformable
def attention_kl(
    student_scores: Layers,
    teacher_scores: Layers,
    *,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    head_map: HeadMap | None = None,
    layer_weight: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Σ_layers mean over rows of KL(softmax(T) ‖ softmax(S)) between attention scores (MiniLM: Wang et al., 2020).

    The softmax is over the counted keys. For probabilities pass their logarithm.

    Args:
        student_scores, teacher_scores, key_mask, query_mask, head_map, layer_weight: as in `attention_mse`. Scores of
            -inf (a mask that was added) are keys of probability 0. A sequence without a key counts nothing.
        reduction: `"mean"` divides by the counted query rows (of the heads that are not skipped), `"batchmean"` by B,
            `"sum"` by nothing; layers add up. `"none"` gives the mean of every head, [B, H], with a leading dimension
            for a sequence of layers.

    Returns:
        The loss: float32, or float64 for float64 inputs. 0 where nothing counts.

    Raises:
        ValueError, TypeError: a shape, dtype, device or range is wrong; the message names the argument.
    """
    return _of_scores(
        "attention_kl", "kl", student_scores, teacher_scores, key_mask, query_mask, head_map, None, layer_weight,
        reduction, None,
    )  # fmt: skip


def _of_scores(
    op: str,
    distance: str,
    student: Layers,
    teacher: Layers,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    head_map: HeadMap | None,
    head_weight: Any,
    layer_weight: Any,
    reduction: str,
    floor: float | None,
) -> Tensor:
    s, t = _layers.check_layers(op, ("student_scores", "teacher_scores"), student, teacher, "B, H, L, L")
    batch, heads, rows, columns = s[0].shape
    if t[0].shape[0] != batch or t[0].shape[2:] != s[0].shape[2:]:
        _checks.wrong_value(op, "teacher_scores", f"[{batch}, heads, {rows}, {columns}]", list(t[0].shape))
    _checks.check_reduction(op, reduction, s[0])
    masks = Masks(
        _layers.check_mask(op, "query_mask", query_mask, s[0], (batch, rows)),
        _layers.check_mask(op, "key_mask", key_mask, s[0], (batch, columns)),
        (rows, columns),
    )
    if distance == "kl":
        masks = masks.with_columns(s[0])
    maps = _layers.check_head_map(op, head_map, len(s), heads, t[0].shape[1])
    weights = _layers.weights_of(
        maps,
        _layers.check_numbers(op, "layer_weight", layer_weight, len(s)),
        _layers.check_heads(op, "head_weight", head_weight, len(s), heads),
        reduction == "mean",
    )
    elements = distance == "squared"
    loss = _layers.run(op, distance, s, t, masks, maps, weights, reduction, elements, floor)
    return (
        _layers.head_means(loss.sum(-1), masks, elements, isinstance(student, Tensor)) if reduction == "none" else loss
    )
