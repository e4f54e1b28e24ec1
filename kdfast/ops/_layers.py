"""What all distances between layers share: the call of the native operator, its autograd Function, its fake kernels.

A layer is [B, H, R, C] here: sequences, heads, rows, numbers of a row; or [B, R, C] of one head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.ops import _checks, _transforms
from kdfast.ops._divergence import refuse_double_backward, scaled

Layers = Tensor | Sequence[Tensor]
HeadMap = Sequence[int] | Sequence[Sequence[int]] | Tensor
# In the order of csrc/common/layer_terms.h.
DISTANCES = ("squared", "cosine", "normalized", "kl")
# Settings of numbers that launches take: a tensor of them is on the CPU.
ON_HOST = ("head_map", "head_weight", "layer_weight")


@dataclass(frozen=True)
class Masks:
    """Rows [B, R] and columns [B, C] that count; None: all. `causal`: column c of row r only where c <= r."""

    rows: Tensor | None
    columns: Tensor | None
    shape: tuple[int, int]  # R, C
    causal: bool = False

    def counted(self, elements: bool) -> Tensor | int:
        """The elements that count of a head, or its rows, in every sequence: [B], or a number for all."""
        if not elements:
            return self.shape[0] if self.rows is None else self.rows.sum(-1)
        if self.rows is None and self.columns is None:
            rows, columns = self.shape
            return rows * (rows + 1) // 2 if self.causal else rows * columns
        if not self.causal:
            of_columns = self.shape[1] if self.columns is None else self.columns.sum(-1)
            return self.counted(elements=False) * of_columns
        mask = self.columns if self.columns is not None else torch.ones_like(self.rows)  # type: ignore[arg-type]
        seen = mask.cumsum(-1)  # of the columns, by every row
        return (seen if self.rows is None else seen * self.rows).sum(-1)

    def with_columns(self, like: Tensor) -> Masks:
        """A softmax over no columns is none: rows of a sequence without columns do not count. `like`: a layer."""
        if self.columns is None and self.shape[1]:
            return self
        columns = like.new_empty(like.shape[0], 0, dtype=torch.bool) if self.columns is None else self.columns
        some = columns.any(-1, keepdim=True)
        rows = some.expand(-1, self.shape[0]) if self.rows is None else some & self.rows
        return replace(self, rows=rows.contiguous())


def as_list(op: str, argument: str, x: Layers) -> list[Tensor]:
    """Layers of one shape; of several dtypes, as autocast leaves some models' states, in the widest."""
    layers = [x] if isinstance(x, Tensor) else list(x) if isinstance(x, Sequence) else [x]
    if not layers:
        _checks.wrong_value(op, argument, "a layer or more", "none")
    # Every layer passes here on every call: what is as before is not looked at again.
    dtype, shape, mixed = None, None, False
    for layer in layers:
        if not isinstance(layer, Tensor):
            _checks.wrong_type(op, argument, "a tensor or a sequence of tensors", _checks.kind(layer))
        if layer.dtype != dtype:
            _checks.check_float(op, argument, layer)
            dtype, mixed = layer.dtype, dtype is not None
        if shape is None:
            shape = layer.shape
        elif layer.shape != shape:
            _checks.wrong_value(op, argument, f"layers of one shape, the first's {list(shape)}", list(layer.shape))
    return in_one_dtype(layers) if mixed else layers


def in_one_dtype(tensors: list[Tensor]) -> list[Tensor]:
    """The widest of theirs, that holds all of them exactly."""
    dtypes = {x.dtype for x in tensors}
    if len(dtypes) == 1:
        return tensors
    widest = functools.reduce(torch.promote_types, dtypes)
    return [x.to(widest) for x in tensors]


def check_layers(
    op: str, names: tuple[str, str], student: Layers, teacher: Layers, dims: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Lists of layers of one shape, as many of the teacher as of the student. `dims`: what the dimensions are."""
    s, t = as_list(op, names[0], student), as_list(op, names[1], teacher)
    check_pair(op, names, s, t, dims)
    return s, t


def check_pair(op: str, names: tuple[str, str], s: list[Tensor], t: list[Tensor], dims: str) -> None:
    expected = len(dims.split(","))
    for argument, layers in zip(names, (s, t), strict=True):
        if layers[0].dim() != expected:
            _checks.wrong_value(op, argument, f"[{dims}]", f"shape {list(layers[0].shape)}")
    if len(s) != len(t):
        _checks.wrong_value(op, names[1], f"as many layers as of the student, {len(s)}", len(t))
    if s[0].device != t[0].device:
        _checks.wrong_value(op, names[1], f"the student's device {s[0].device}", t[0].device)


def check_mask(op: str, argument: str, mask: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        _checks.wrong_type(op, argument, "a tensor", _checks.kind(mask))
    if mask.dtype != torch.bool:
        _checks.wrong_type(op, argument, "a bool tensor, True where a token counts (attention_mask.bool())", mask.dtype)
    if mask.device != like.device:
        _checks.wrong_value(op, argument, f"the student's device {like.device}", mask.device)
    if mask.dim() > 2 or any(a not in (1, b) for a, b in zip(reversed(mask.shape), reversed(shape), strict=False)):
        _checks.wrong_value(op, argument, f"a shape that broadcasts to {list(shape)}", list(mask.shape))
    return mask.expand(shape).contiguous()


def check_numbers(op: str, argument: str, x: Any, count: int) -> list[float]:
    """`count` weights; held on the host, where the kernels' launches need them."""
    if x is None:
        return [1.0] * count
    if isinstance(x, Tensor):
        if x.device.type != "cpu":
            _checks.wrong_value(op, argument, "numbers or a CPU tensor", f"a tensor on {x.device}")
        x = x.tolist()
    if not isinstance(x, Sequence) or any(isinstance(w, bool) or not isinstance(w, (int, float)) for w in x):
        _checks.wrong_type(op, argument, "a sequence of numbers", _checks.kind(x))
    if len(x) != count:
        _checks.wrong_value(op, argument, f"{count} numbers", len(x))
    return [float(w) for w in x]


def check_heads(op: str, argument: str, x: Any, layers: int, heads: int) -> list[list[float]]:
    """Numbers per head, the same for every layer or each layer's own."""
    if isinstance(x, Tensor) and x.device.type == "cpu":
        x = x.tolist()
    if isinstance(x, Sequence) and len(x) and isinstance(x[0], (Sequence, Tensor)):
        if len(x) != layers:
            _checks.wrong_value(op, argument, f"[{heads}] or a list of them for each of {layers} layers", len(x))
        return [check_numbers(op, argument, row, heads) for row in x]
    return [check_numbers(op, argument, x, heads)] * layers


def check_head_map(op: str, head_map: Any, layers: int, student_heads: int, teacher_heads: int) -> list[list[int]]:
    if head_map is None:
        if student_heads != teacher_heads:
            _checks.wrong_value(
                op, "head_map", f"one, as the student has {student_heads} heads and the teacher {teacher_heads}", None
            )
        return [list(range(student_heads))] * layers
    maps = check_heads(op, "head_map", head_map, layers, student_heads)
    for head in (head for row in maps for head in row):
        if head != int(head) or not -1 <= head < teacher_heads:
            _checks.wrong_value(op, "head_map", f"heads of the teacher, 0 to {teacher_heads - 1}, or -1", f"{head:g}")
    return [[int(head) for head in row] for row in maps]


def weights_of(
    maps: list[list[int]], layer_weight: list[float], head_weight: list[list[float]], mean: bool
) -> list[float]:
    """The weights of every layer and head in turn; a mean is over the heads that are not skipped."""
    weights = []
    for heads, of_layer, of_heads in zip(maps, layer_weight, head_weight, strict=True):
        live = sum(head >= 0 for head in heads)
        weights += [of_layer * w / max(live, 1) if mean else of_layer * w for w in of_heads]
    return weights


def run(
    op: str,
    distance: str,
    student: list[Tensor],
    teacher: list[Tensor],
    masks: Masks,
    maps: list[list[int]],
    weights: list[float],
    reduction: str,
    elements: bool,
    floor: float | None = None,
) -> Tensor:
    """The reduced loss; for `none` that of every row, [layers, B, H, R]. `elements`: a mean divides by elements, else
    by rows."""
    static, divisor = denominator(masks, student[0].shape[0], reduction, elements, student[0])
    numbers = LayerNumbers(
        kind=DISTANCES.index(distance),
        head_map=[head for heads in maps for head in heads],
        weight=[w / static for w in weights],
        floor=math.nan if floor is None else float(floor),
        per_row=reduction == "none",
    )
    return call(op, "layer_distance", Tensors([student], [teacher], masks.rows, masks.columns, divisor), numbers)


def denominator(masks: Masks, batch: int, reduction: str, elements: bool, like: Tensor) -> tuple[float, Tensor | None]:
    """What a reduction divides by, but for the heads: a number, and where masks decide one on the device."""
    if reduction == "batchmean":
        return max(batch, 1), None
    if reduction != "mean":
        return 1, None
    counted = masks.counted(elements)
    if isinstance(counted, Tensor):
        return 1, counted.sum().to(_checks.loss_dtype(like))
    return max(counted * batch, 1), None


def head_means(sums: Tensor, masks: Masks, elements: bool, single: bool) -> Tensor:
    """[layers, B, H]: means of what the heads count; of a single layer [B, H]."""
    counted = masks.counted(elements)
    means = sums / (counted.clamp(min=1)[:, None] if isinstance(counted, Tensor) else max(counted, 1))
    return means[0] if single else means


class Tensors(NamedTuple):
    """What the raw operators take first (csrc/library.cpp): lists of layers, of hidden states or scores one a side, of
    queries and keys two; bool masks [B, R] and [B, C]; and what the loss is over, one number."""

    student: list[list[Tensor]]
    teacher: list[list[Tensor]]
    row_mask: Tensor | None
    column_mask: Tensor | None
    divisor: Tensor | None

    def masks(self) -> tuple[Tensor | None, ...]:  # no property, which torch.compile of torch 2.10 does not follow
        return self.row_mask, self.column_mask, self.divisor

    def flat(self) -> tuple[Tensor | None, ...]:
        """For autograd, which sees no tensors in lists."""
        return *self.masks(), *(x for layers in self.student + self.teacher for x in layers)

    @classmethod
    def of(cls, flat: Sequence[Any], layers: int) -> Tensors:
        row_mask, column_mask, divisor, *given = flat
        lists = [given[i : i + layers] for i in range(0, len(given), layers)]
        each = len(lists) // 2
        return cls(lists[:each], lists[each:], row_mask, column_mask, divisor)


class LayerNumbers(NamedTuple):
    """What `layer_distance` takes beside tensors; head_map and weight of every layer and head in turn."""

    kind: int  # of DISTANCES
    head_map: list[int]
    weight: list[float]
    floor: float
    per_row: bool


class QkNumbers(NamedTuple):
    """The same of `qk_distance`; here a value of its own is a head's."""

    kind: int  # of qk.LOSSES
    student_scale: float
    teacher_scale: float
    causal: bool
    head_map: list[int]
    weight: list[float]
    per_row: bool


def call(op: str, native: str, tensors: Tensors, numbers: LayerNumbers | QkNumbers) -> Tensor:
    """The native operator, the student's layers with gradient."""
    student, divisor = tensors.student, tensors.divisor
    teacher = [[x.detach() if x.requires_grad else x for x in layers] for layers in tensors.teacher]
    if any(layers[0].dtype == torch.float64 for layers in student + teacher):
        student, teacher = ([[x.double() for x in layers] for layers in side] for side in (student, teacher))
        divisor = None if divisor is None else divisor.double()
    tensors = Tensors(student, teacher, tensors.row_mask, tensors.column_mask, divisor)
    if torch.is_grad_enabled() and any(x.requires_grad for layers in student for x in layers):
        return _OfLayers.apply(op, native, len(student[0]), numbers, *tensors.flat())  # type: ignore[no-any-return]
    return _forward(native, tensors, numbers, False)[0]


def _forward(
    native: str, tensors: Tensors, numbers: LayerNumbers | QkNumbers, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    raw = getattr(torch.ops.kdfast, native)
    return raw(*tensors.student, *tensors.teacher, *tensors.masks(), *numbers, gradient)  # type: ignore[no-any-return]


class _OfLayers(torch.autograd.Function):
    """As `_divergence._Divergence`: the gradient is made in the forward, but for `none` and float16."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, op: str, native: str, layers: int, numbers: LayerNumbers | QkNumbers, *flat: Tensor | None
    ) -> Tensor:
        tensors = Tensors.of(flat, layers)
        ctx.in_forward = not numbers.per_row and tensors.student[0][0].dtype != torch.float16
        loss, gradients = _forward(native, tensors, numbers, ctx.in_forward)
        ctx.op, ctx.native, ctx.layers, ctx.numbers = op, native, layers, numbers
        ctx.before, ctx.teachers = 4 + len(tensors.masks()), sum(map(len, tensors.teacher))
        ctx.save_for_backward(*(gradients if ctx.in_forward else flat))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_double_backward(ctx.op)
        saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
        if ctx.in_forward:
            gradients = scaled(saved, grad_loss)
        else:
            _transforms.refuse_batched(ctx.op, grad_loss)
            of, again = Tensors.of(saved, ctx.layers), getattr(torch.ops.kdfast, ctx.native + "_backward")
            gradients = again(grad_loss.contiguous(), *of.student, *of.teacher, *of.masks(), *ctx.numbers)
        return *(None,) * ctx.before, *gradients, *(None,) * ctx.teachers


@torch.library.register_fake("kdfast::layer_distance")
def _(student: list[Tensor], teacher: list[Tensor], *args: Any) -> tuple[Tensor, list[Tensor]]:
    *_, per_row, gradient = args
    return _fake_loss(student, 3 if per_row else 0), _fake_gradients(student) if gradient else []


@torch.library.register_fake("kdfast::layer_distance_backward")
def _(grad_loss: Tensor, student: list[Tensor], *args: Any) -> list[Tensor]:
    return _fake_gradients(student)


@torch.library.register_fake("kdfast::qk_distance")
def _(student_q: list[Tensor], student_k: list[Tensor], *args: Any) -> tuple[Tensor, list[Tensor]]:
    *_, per_head, gradient = args
    return _fake_loss(student_q, 2 if per_head else 0), _fake_gradients(student_q + student_k) if gradient else []


@torch.library.register_fake("kdfast::qk_distance_backward")
def _(grad_loss: Tensor, student_q: list[Tensor], student_k: list[Tensor], *args: Any) -> list[Tensor]:
    return _fake_gradients(student_q + student_k)


def _fake_loss(layers: list[Tensor], leading: int) -> Tensor:
    shape = layers[0].shape if layers[0].dim() == 4 else (layers[0].shape[0], 1, *layers[0].shape[1:])
    sizes = (len(layers), *shape[:leading]) if leading else ()
    return layers[0].new_empty(sizes, dtype=_checks.loss_dtype(layers[0]))


def _fake_gradients(layers: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in layers]
