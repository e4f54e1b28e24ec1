"""The distances between layers in plain torch, in the inputs' precision: what tests, benchmarks and readers compare
with. The arguments are those of the functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast.ops._checks import loss_dtype
from kdfast.ops.reference import difference

Layers = Tensor | Sequence[Tensor]


def _layers(x: Layers) -> list[Tensor]:
    layers = [x] if isinstance(x, Tensor) else list(x)
    return [layer.to(loss_dtype(layer)) for layer in layers]


def _reduced(
    sums: list[Tensor], counts: Tensor, per_layer: list[Tensor], batch: int, reduction: str, single: bool
) -> Tensor:
    """`sums` [B, ...] of what counts, with weights; `counts` [B, ...] of it, `per_layer` those of each layer in all."""
    if reduction == "none":
        means = torch.stack([s / counts.clamp(min=1) for s in sums])
        return means[0] if single else means
    if reduction == "mean":
        return sum(s.sum() / n.clamp(min=1) for s, n in zip(sums, per_layer, strict=True))  # type: ignore[return-value]
    total = sum(s.sum() for s in sums)
    return total / max(batch, 1) if reduction == "batchmean" else total  # type: ignore[return-value]


def attention(
    kind: str,
    student_scores: Layers,
    teacher_scores: Layers,
    *,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    head_map: Any = None,
    head_weight: Any = None,
    layer_weight: Any = None,
    floor: float | None = None,
    is_causal: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """`kdfast.attention_mse` ("mse") and `kdfast.attention_kl` ("kl")."""
    students, teachers = _layers(student_scores), _layers(teacher_scores)
    batch, heads, rows, columns = students[0].shape
    keys = (
        torch.ones(batch, columns, dtype=torch.bool, device=students[0].device)
        if key_mask is None
        else key_mask.expand(batch, columns)
    )
    queries = (
        torch.ones(batch, rows, dtype=torch.bool, device=students[0].device)
        if query_mask is None
        else query_mask.expand(batch, rows)
    )
    if kind == "kl":
        queries = queries & keys.any(-1, keepdim=True)
    maps = torch.as_tensor(range(heads) if head_map is None else head_map).long().expand(len(students), heads)
    of_heads = torch.as_tensor(1.0 if head_weight is None else head_weight).double().expand(len(students), heads)
    of_layers = [1.0] * len(students) if layer_weight is None else list(layer_weight)
    counted = keys[:, None, None, :] & queries[:, None, :, None]
    if is_causal:
        counted = counted.tril()
    per_head = (counted.sum((-1, -2)) if kind == "mse" else queries.sum(-1)[:, None]).expand(batch, 1)
    sums, counts = [], []
    for s, t, heads_of, w, factor in zip(students, teachers, maps, of_heads, of_layers, strict=True):
        live = heads_of >= 0
        t = t.detach()[:, heads_of.clamp(min=0)]
        of = _mse(s, t, counted, floor) if kind == "mse" else _kl(s, t, keys[:, None, None, :], queries[:, None, :])
        sums.append(torch.where(live.to(of.device), of, 0.0) * (factor * w).to(of))
        counts.append(live.sum() * per_head.sum())
    return _reduced(sums, per_head, counts, batch, reduction, isinstance(student_scores, Tensor))


def _mse(s: Tensor, t: Tensor, counted: Tensor, floor: float | None) -> Tensor:
    s, t = (torch.where(counted, x, 0.0) for x in (s, t))
    if floor is not None:
        s, t = (torch.where(x <= floor, 0.0, x) for x in (s, t))
    return difference(s, t).square().sum((-1, -2))


def _kl(s: Tensor, t: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
    shown = keys & queries[..., None]  # rows that do not count are made uniform, lest their NaN reach a gradient
    log_s, log_t = (torch.where(shown, x, -torch.inf).where(queries[..., None], 0.0).log_softmax(-1) for x in (s, t))
    p = log_t.exp()
    rows = (p * torch.where(p > 0, log_t - log_s, 0.0)).sum(-1)
    return torch.where(queries, rows, 0.0).sum(-1)


def hidden(
    kind: str,
    student_hidden: Layers,
    teacher_hidden: Layers,
    *,
    projection: Layers | None = None,
    bias: Layers | None = None,
    mask: Tensor | None = None,
    layer_weight: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """`kdfast.hidden_mse` ("mse"), `kdfast.cosine_distance` ("cosine"), and the normalized ("normalized") of `cls`."""
    single = isinstance(student_hidden, Tensor)
    if projection is not None:
        given = [student_hidden] if isinstance(student_hidden, Tensor) else list(student_hidden)
        weights, biases = (_for_each(x, len(given)) for x in (projection, bias))
        student_hidden = [torch.nn.functional.linear(x, w, b) for x, w, b in zip(given, weights, biases, strict=True)]
    students, teachers = _layers(student_hidden), _layers(teacher_hidden)
    batch, length, width = students[0].shape
    device = students[0].device
    counted = torch.ones(batch, length, dtype=torch.bool, device=device) if mask is None else mask.expand(batch, length)
    of_layers = [1.0] * len(students) if layer_weight is None else list(layer_weight)
    elements = 1 if kind == "cosine" else width
    sums = []
    for s, t, factor in zip(students, teachers, of_layers, strict=True):
        s, t = (torch.where(counted[..., None], x, 1.0) for x in (s, t.detach()))
        sums.append(factor * torch.where(counted, _VECTORS[kind](s, t), 0.0))
    counts = torch.full((batch, length), elements, device=device)
    total = counted.sum() * elements
    return _reduced(sums, counts, [total] * len(sums), batch, reduction, single)


def _for_each(x: Any, layers: int) -> list[Any]:
    given = [x] if x is None or isinstance(x, Tensor) else list(x)
    return given * layers if len(given) == 1 else given


def _cosine(s: Tensor, t: Tensor) -> Tensor:
    norms = ((s.square().sum(-1) + 1e-12) * (t.square().sum(-1) + 1e-12)).sqrt()
    return 1 - (s * t).sum(-1) / norms


def _normalized(s: Tensor, t: Tensor) -> Tensor:
    s, t = (torch.nn.functional.normalize(x, dim=-1) for x in (s, t))
    return (s - t).square().sum(-1)


_VECTORS = {"mse": lambda s, t: difference(s, t).square().sum(-1), "cosine": _cosine, "normalized": _normalized}


def cls(
    student_hidden: Layers,
    teacher_hidden: Layers,
    *,
    token_index: int | Tensor = 0,
    normalize: bool = True,
    layer_weight: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """`kdfast.cls_distance`."""

    def token(x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x[:, None]
        if isinstance(token_index, Tensor):
            return x[torch.arange(x.shape[0]), token_index][:, None]
        return x[:, token_index][:, None]

    s, t = ([token(x) for x in _layers(given)] for given in (student_hidden, teacher_hidden))
    kind = "normalized" if normalize else "mse"
    loss = hidden(kind, s, t, layer_weight=layer_weight, reduction=reduction)
    if reduction != "none":
        return loss
    return loss[0, :, 0] if isinstance(student_hidden, Tensor) else loss[:, :, 0]


def qk(
    kind: str,
    student_q: Layers,
    student_k: Layers,
    teacher_q: Layers,
    teacher_k: Layers,
    *,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    relation_heads: int | None = None,
    **more: Any,
) -> Tensor:
    """`kdfast.qk_attention_mse` ("mse") and `kdfast.qk_relation_kl` ("kl"): of the scores."""

    def scores(q: Layers, k: Layers, scale: float | None) -> list[Tensor]:
        made = []
        for a, b in zip(_layers(q), _layers(k), strict=True):
            if relation_heads is not None:
                a, b = (x.transpose(1, 2).flatten(2).unflatten(2, (relation_heads, -1)).transpose(1, 2) for x in (a, b))
            b = b.repeat_interleave(a.shape[1] // b.shape[1], 1)
            z = a @ b.mT * (max(a.shape[-1], 1) ** -0.5 if scale is None else scale)
            made.append(torch.where(z.isinf(), torch.nan, z) if kind == "mse" else z)  # two infinities do not cancel
        return made

    s, t = scores(student_q, student_k, student_scale), scores(teacher_q, teacher_k, teacher_scale)
    loss = attention(kind, s, t, **more)
    return loss[0] if more.get("reduction") == "none" and isinstance(student_q, Tensor) else loss
