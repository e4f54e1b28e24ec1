"""A vocabulary split over the ranks of a process group: which columns are here, and the rows' states put together.

Each rank looks at its own columns once. Two small all-reduces of numbers per row (maxima, then sums referred to them)
give every rank the state of the whole row; divergences that look twice take one more. Loss and gradient follow from the
state and the rank's own columns.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast.ops import _checks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

SUMS = [1, 3, 4, 5, 6, 7, 8]  # of a row's state (csrc/common/row_state.h), which 0 and 2 are the maxima of


class Shard(NamedTuple):
    """The logits of this rank; `columns` of them count, from column `start` of a `vocabulary` on."""

    student: Tensor
    teacher: Tensor
    columns: int
    vocabulary: int
    start: int
    group: ProcessGroup | None


def shard_of(
    op: str,
    student: Tensor,
    teacher: Tensor,
    group: ProcessGroup | None,
    start: int | None,
    vocab_size: int | None,
) -> Shard:
    """What of the vocabulary is here: all of it without a process group."""
    if is_dtensor(student) or is_dtensor(teacher):
        if group is not None:
            _checks.wrong_value(op, "process_group", "None beside DTensors, which have one", group)
        if start is not None:
            _checks.wrong_value(op, "vocab_start", "None beside DTensors, which know it", start)
        return _of_dtensors(op, student, teacher, vocab_size)
    _checks.check_logits(op, student, teacher)
    if group is None:
        if start is not None:
            _checks.wrong_value(op, "vocab_start", "a process_group with it", "none")
        columns = _checks.check_vocab_size(op, student, teacher, vocab_size)
        return Shard(student, teacher, columns, columns, 0, None)
    if not isinstance(group, dist.ProcessGroup):
        _checks.wrong_type(op, "process_group", "a torch.distributed process group", _checks.kind(group))
    for argument, number, least in (("vocab_start", start, 0), ("vocab_size", vocab_size, 1)):
        if number is not None:
            _checks.check_int(op, argument, number)
            if number < least:
                _checks.wrong_value(op, argument, f"{least} or more", number)
    if start is not None and vocab_size is None:
        _checks.wrong_value(op, "vocab_size", "the size of the whole vocabulary beside vocab_start", None)
    width = student.shape[-1]
    if start is None:
        if teacher.shape[-1] != width:
            # Rank by rank such shards hold different columns.
            _checks.wrong_value(op, "teacher_logits", f"a shard as wide as the student's, {width}", teacher.shape[-1])
        start = dist.get_rank(group) * width
    vocabulary = dist.get_world_size(group) * width if vocab_size is None else vocab_size
    return _clipped(student, teacher, min(width, teacher.shape[-1]), vocabulary, start, group)


def is_dtensor(x: object) -> bool:
    # Importing DTensor takes a second; who has one has imported it.
    module = None if type(x) is Tensor else sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def _clipped(student: Tensor, teacher: Tensor, width: int, vocabulary: int, start: int, group: ProcessGroup) -> Shard:
    start = min(start, vocabulary)
    return Shard(student, teacher, min(width, vocabulary - start), vocabulary, start, group)


def _of_dtensors(op: str, student: Tensor, teacher: Tensor, vocab_size: int | None) -> Shard:
    from torch.distributed.tensor import DTensor

    for argument, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if not isinstance(logits, DTensor):
            _checks.wrong_type(op, argument, "a DTensor like the other logits", _checks.kind(logits))
    assert isinstance(student, DTensor)
    assert isinstance(teacher, DTensor)
    if student.device_mesh != teacher.device_mesh or student.placements != teacher.placements:
        _checks.wrong_value(op, "teacher_logits", f"the student's placements {student.placements}", teacher.placements)
    expected = "a DTensor sharded on its last dimension, replicated else"
    group, start = split_of(op, "student_logits", student, student.dim() - 1, expected)
    _checks.check_logits(op, student, teacher)
    if student.shape[-1] != teacher.shape[-1]:
        _checks.wrong_value(op, "teacher_logits", f"the student's width {student.shape[-1]}", teacher.shape[-1])
    columns = _checks.check_vocab_size(op, student, teacher, vocab_size)
    local = student.to_local(), teacher.to_local()
    return _clipped(*local, local[0].shape[-1], columns, start, group)


def split_of(op: str, argument: str, x: DTensor, dim: int, expected: str) -> tuple[ProcessGroup, int]:
    """The ranks that dimension `dim` of `x`, and nothing else of it, is split over,
    and where this rank's part begins."""
    from torch.distributed.tensor import Shard as Split

    mesh, split = x.device_mesh, [p in (Split(dim), Split(dim - x.dim())) for p in x.placements]
    if sum(split) != 1 or not all(here or p.is_replicate() for here, p in zip(split, x.placements, strict=True)):
        _checks.wrong_value(op, argument, expected, x.placements)
    at = split.index(True)
    each = -(-x.shape[dim] // mesh.size(at))  # as torch.chunk splits
    return mesh.get_group(at), mesh.get_local_rank(at) * each


def merged(state: Tensor, kind: int, row_temperature: Tensor | None, temperature: float, group: ProcessGroup) -> Tensor:
    """The rows' states `[..., 9]` of the whole vocabulary from those of this rank's columns.

    Two all-reduces, of 8 and of 28 bytes a row: over P ranks each moves 72·(P - 1)/P bytes a row, 36 over 2 ranks, 63
    over 8 and 71 over 64. Gathering all states would be one collective, of 36·(P - 1): 36, 252 and 2268.
    """
    maxima = torch.stack((state[..., 0], state[..., 2]))
    dist.all_reduce(maxima, dist.ReduceOp.MAX, group=group)
    whole: Tensor = torch.ops.kdfast.divergence_referred(state, maxima, row_temperature, kind, temperature)
    sums = whole[..., SUMS]
    dist.all_reduce(sums, dist.ReduceOp.SUM, group=group)
    whole[..., SUMS] = sums
    return whole


def summed(state: Tensor, group: ProcessGroup) -> Tensor:
    """The same after a second look, whose two sums are this rank's."""
    sums = state[..., 4:6].contiguous()
    dist.all_reduce(sums, dist.ReduceOp.SUM, group=group)
    return torch.cat((state[..., :4], sums, state[..., 6:]), -1)
