"""Heads whose weights are DTensors: of a vocabulary that is split (tensor parallelism), or of shards that fully_shard
(FSDP2) keeps, which are put together for a call. The hidden states tell which: DTensors, or the rank's own rows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdfast.ops import _checks, _shards
from kdfast.ops._heads import Head
from kdfast.ops._options import Options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

Sides = tuple[Head, Head | None, Tensor | None]


def local(
    op: str, options: Options, student: Head, teacher: Head | None, given: Tensor | None
) -> tuple[Options, Sides]:
    """Plain tensors, and where the vocabulary is split the options that say so."""
    heads = [head for head in (student, teacher) if head is not None]
    if not any(_shards.is_dtensor(x) for x in (*(x for head in heads for x in head[:3]), given)):
        return options, (student, teacher, given)
    if not any(_shards.is_dtensor(head.hidden) for head in heads):
        return options, (_whole(student), None if teacher is None else _whole(teacher), given)
    if options.process_group is not None or options.vocab_start is not None:
        _checks.wrong_value(op, "process_group", "neither it nor vocab_start beside DTensors, which know both", "one")
    weight, group, start = _split(op, "student_weight", student.weight)
    columns = weight.shape[0] if options.vocab_size is None else options.vocab_size
    options = replace(options, process_group=group, vocab_start=start, vocab_size=columns)
    sides = _part(op, "student", student, weight), None if teacher is None else _part(op, "teacher", teacher, weight)
    if given is not None and _shards.is_dtensor(given):
        given = given.to_local()  # type: ignore[attr-defined]
    return options, (*sides, given)


def _split(op: str, argument: str, weight: Tensor) -> tuple[DTensor, ProcessGroup, int]:
    from torch.distributed.tensor import DTensor

    expected = "a DTensor sharded on dimension 0 by one dimension of its mesh, replicated else"
    if not isinstance(weight, DTensor):
        _checks.wrong_type(op, argument, expected + ", as the hidden states are DTensors", _checks.kind(weight))
    return weight, *_shards.split_of(op, argument, weight, 0, expected)


def _part(op: str, side: str, head: Head, like: DTensor) -> Head:
    weight, *_ = _split(op, f"{side}_weight", head.weight)
    if weight.device_mesh != like.device_mesh or weight.placements != like.placements:
        _checks.wrong_value(op, f"{side}_weight", f"the student's placements {like.placements}", weight.placements)
    hidden: Any = head.hidden
    if not _shards.is_dtensor(hidden) or not all(p.is_replicate() for p in hidden.placements):
        got = hidden.placements if _shards.is_dtensor(hidden) else _checks.kind(hidden)
        _checks.wrong_value(op, f"{side}_hidden", "a replicated DTensor beside weights that are split", got)
    bias: Any = head.bias
    if bias is not None:
        bias = _split(op, f"{side}_bias", bias)[0].to_local()
    return head._replace(hidden=hidden.to_local(), weight=weight.to_local(), bias=bias)


def _whole(head: Head) -> Head:
    bias = None if head.bias is None else _gathered(head.bias)
    return head._replace(weight=_gathered(head.weight), bias=bias)


def _gathered(x: Tensor) -> Tensor:
    return _Gathered.apply(x) if _shards.is_dtensor(x) else x  # type: ignore[no-any-return]


class _Gathered(torch.autograd.Function):
    """The whole of a parameter that is sharded; its gradient is the mean over the ranks, as fully_shard makes it."""

    @staticmethod
    def forward(ctx: Any, x: DTensor) -> Tensor:  # type: ignore[override]
        ctx.mesh, ctx.placements = x.device_mesh, x.placements
        return x.full_tensor()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> DTensor:  # type: ignore[override]
        from torch.distributed.tensor import DTensor, Partial

        parts = DTensor.from_local(gradient / ctx.mesh.size(), ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return parts.redistribute(placements=ctx.placements)
