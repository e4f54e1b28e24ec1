"""Losses between the hidden states of student and teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.ops import _checks, _layers, _products
from kdfast.ops._layers import Layers, Masks
from kdfast.ops._transforms import transformable

NAMES = ("student_hidden", "teacher_hidden")


@transformable
def hidden_mse(
    student_hidden: Layers,
    teacher_hidden: Layers,
    *,
    projection: Layers | None = None,
    bias: Layers | None = None,
    mask: Tensor | None = None,
    layer_weight: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Σ_layers mean (H_s Wᵀ + b − H_t)² between hidden states (TinyBERT: Jiao et al., 2020; DynaBERT: Hou et al.,
    2020).

    The matrix product is the vendor library's; the difference, the loss and the gradient are one pass, for all layers
    together.

    Args:
        student_hidden: [B, L, D], or a sequence of such layers; float32, bfloat16, float16 or float64, each its own,
            any strides.
        teacher_hidden: as many layers, [B, L, D_t]; no gradient flows into them.
        projection: W, [D_t, D], trained, one for all layers or one for each; needed where D and D_t differ. TinyBERT's
            code has one W and b for all layers, its paper separate ones without b. Where its dtype is not the student's
            the product is made in the wider of the two (float32 of bfloat16 and float16), and each gets its gradient in
            its own; under autocast in autocast's, as of every linear layer.
        bias: b, [D_t], like `projection`, which it needs.
        mask: bool, broadcast to [B, L], True where a token counts. TinyBERT counts the padding too.
        layer_weight: a weight per layer; it stays out of the divisor.
        reduction: `"mean"` divides a layer's sum by D_t · its counted tokens, `"batchmean"` by B, `"sum"` by nothing;
            layers add up. `"none"` gives the mean over D_t of every token, [B, L], with a leading dimension for a
            sequence of layers.

    Returns:
        The loss: float32, or float64 for float64 inputs. 0 where nothing counts.

    Raises:
        ValueError, TypeError: a shape, dtype, device or range is wrong; the message names the argument.
    """
    op = "hidden_mse"
    s, t = _layers.check_layers(op, NAMES, student_hidden, teacher_hidden, "B, L, D")
    s = _projected(op, s, t, projection, bias)
    weights = _weights(op, layer_weight, s, reduction, t[0].shape[-1])
    return _of_tokens(op, "squared", s, t, mask, weights, reduction, student_hidden)


@transformable
def cosine_distance(
    student_hidden: Layers,
    teacher_hidden: Layers,
    *,
    mask: Tensor | None = None,
    layer_weight: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Σ_layers mean over tokens of 1 − s·t / √((s·s + ε)(t·t + ε)), ε = 10⁻¹² (DistilBERT: Sanh et al., 2019).

    As `torch.nn.CosineEmbeddingLoss` with target 1, and exact also where the student is close to its teacher.

    Args:
        student_hidden, teacher_hidden, mask, layer_weight: as in `hidden_mse`, of the same width.
        reduction: `"mean"` divides a layer's sum by its counted tokens, `"batchmean"` by B, `"sum"` by nothing; layers
            add up. `"none"` gives every token's, [B, L], with a leading dimension for a sequence of layers.

    Returns:
        The loss: float32, or float64 for float64 inputs. 0 where nothing counts.

    Raises:
        ValueError, TypeError: a shape, dtype, device or range is wrong; the message names the argument.
    """
    op = "cosine_distance"
    s, t = _layers.check_layers(op, NAMES, student_hidden, teacher_hidden, "B, L, D")
    weights = _weights(op, layer_weight, s, reduction, 1)
    return _of_tokens(op, "cosine", s, t, mask, weights, reduction, student_hidden)


@transformable
def cls_distance(
    student_hidden: Layers,
    teacher_hidden: Layers,
    *,
    token_index: int | Tensor = 0,
    normalize: bool = True,
    layer_weight: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Σ_layers mean (s/‖s‖ − t/‖t‖)² of one token's hidden states (Patient-KD: Sun et al., 2019).

    The tokens are read where they lie, for all layers together. Patient-KD's code divides by the number of layers too
    (`layer_weight=[1 / M] * M`), and its selected runs for MNLI, QNLI, QQP and RACE do not normalize.

    Args:
        student_hidden: [B, L, D], or a sequence of such layers; or [B, D], the tokens alone.
        teacher_hidden: as many layers of the same width, [B, L, D] or [B, D] (kept from an earlier pass); no gradient
            flows into them.
        token_index: which token, from the end where negative; or an int64 tensor [B], a token for every sequence.
        normalize: False leaves the norms: a mean squared error. A vector shorter than 10⁻¹² counts as
            `torch.nn.functional.normalize` has it, and has no gradient.
        layer_weight: a weight per layer; it stays out of the divisor.
        reduction: `"mean"` divides a layer's sum by B · D, `"batchmean"` by B, `"sum"` by nothing; layers add up.
            `"none"` gives the mean over D of every sequence, [B], with a leading dimension for a sequence of layers.

    Returns:
        The loss: float32, or float64 for float64 inputs. 0 where nothing counts.

    Raises:
        ValueError, TypeError: a shape, dtype, device or range is wrong; the message names the argument.
    """
    op = "cls_distance"
    _checks.check_bools(op, normalize=normalize)
    s, t = (_layers.as_list(op, name, x) for name, x in zip(NAMES, (student_hidden, teacher_hidden), strict=True))
    for name, layers in zip(NAMES, (s, t), strict=True):
        if layers[0].dim() not in (2, 3):
            _checks.wrong_value(op, name, "[B, L, D] or [B, D]", f"shape {list(layers[0].shape)}")
    of_tokens = [layers[0] for layers in (s, t) if layers[0].dim() == 3]
    mask = _place(op, token_index, of_tokens[0]) if of_tokens else None
    if len(of_tokens) < 2:  # what is one token already meets the other's tokens in place
        length = of_tokens[0].shape[1] if of_tokens else 1
        s, t = ([(x if x.dim() == 3 else x[:, None]).expand(-1, length, -1) for x in layers] for layers in (s, t))
    distance = "normalized" if normalize else "squared"
    _layers.check_pair(op, NAMES, s, t, "B, L, D")
    batch, _, width = s[0].shape
    weights = _weights(op, layer_weight, s, reduction, width)
    if reduction == "mean":  # of as many tokens as sequences, wherever they are
        weights, reduction = [w / max(batch, 1) for w in weights], "sum"
    loss = _of_tokens(op, distance, s, t, mask, weights, reduction, student_hidden)
    return loss.sum(-1) if reduction == "none" else loss


def _weights(op: str, layer_weight: Any, layers: list[Tensor], reduction: str, elements: int) -> list[float]:
    """The layers' weights; where tokens are averaged each of them is a mean of `elements`."""
    _checks.check_reduction(op, reduction, layers[0])
    weights = _layers.check_numbers(op, "layer_weight", layer_weight, len(layers))
    return [w / max(elements, 1) for w in weights] if reduction in ("mean", "none") else weights


def _of_tokens(
    op: str,
    distance: str,
    student: list[Tensor],
    teacher: list[Tensor],
    mask: Tensor | None,
    weights: list[float],
    reduction: str,
    given: Layers,
) -> Tensor:
    if student[0].shape != teacher[0].shape:
        hint = " (equal widths: project the student's before)" if student[0].shape[:-1] == teacher[0].shape[:-1] else ""
        shape = f"the student's shape {list(student[0].shape)}{hint}"
        _checks.wrong_value(op, NAMES[1], shape, list(teacher[0].shape))
    batch, length, width = student[0].shape
    masks = Masks(_layers.check_mask(op, "mask", mask, student[0], (batch, length)), None, (length, width))
    maps = [[0]] * len(student)
    loss = _layers.run(op, distance, student, teacher, masks, maps, weights, reduction, elements=False)
    if reduction != "none":
        return loss
    return loss[0, :, 0] if isinstance(given, Tensor) else loss[:, :, 0]


def _projected(
    op: str, student: list[Tensor], teacher: list[Tensor], projection: Layers | None, bias: Layers | None
) -> list[Tensor]:
    width, wanted = student[0].shape[-1], teacher[0].shape[-1]
    if projection is None:
        if bias is not None:
            _checks.wrong_value(op, "bias", "a projection with it", "projection=None")
        if width != wanted:
            _checks.wrong_value(op, "projection", f"one, [{wanted}, {width}], as the widths differ", None)
        return student
    weights = _per_layer(op, "projection", projection, len(student), [wanted, width])
    biases = [None] * len(student) if bias is None else _per_layer(op, "bias", bias, len(student), [wanted])
    return [_linear(x, w, b) for x, w, b in zip(student, weights, biases, strict=True)]


def _linear(*inputs: Tensor | None) -> Tensor:
    x, *weights = _layers.in_one_dtype([x for x in inputs if x is not None])
    return torch.nn.functional.linear(_products.packed(x), *weights)


def _per_layer(op: str, argument: str, x: Layers, count: int, shape: list[int]) -> list[Tensor]:
    given = _layers.as_list(op, argument, x)
    if len(given) not in (1, count):
        _checks.wrong_value(op, argument, f"one for all layers or {count}", len(given))
    if list(given[0].shape) != shape:
        _checks.wrong_value(op, argument, str(shape), list(given[0].shape))
    return given * (count // len(given)) if len(given) == 1 else given


def _place(op: str, index: int | Tensor, like: Tensor) -> Tensor:
    """Where the token is among those of `like`, [B, L]: a mask that broadcasts to it."""
    batch, length, _ = like.shape
    places = torch.arange(length, device=like.device)
    if isinstance(index, Tensor):
        if index.dtype != torch.int64 or list(index.shape) != [batch]:
            _checks.wrong_value(op, "token_index", f"an int64 tensor [{batch}]", f"{index.dtype}, {list(index.shape)}")
        if index.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = (index < -length) | (index >= length)
            if bool(wrong.any()):
                _checks.wrong_value(op, "token_index", f"{-length} to {length - 1}", index[wrong][0].item())
        return places == torch.where(index < 0, index + length, index)[:, None]
    _checks.check_int(op, "token_index", index)
    if not -length <= index < length:
        _checks.wrong_value(op, "token_index", f"{-length} to {length - 1}", index)
    return places == index % length
