"""A call of a divergence as the raw operators take it (csrc/library.cpp), and these operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

SAVE_NOTHING, SAVE_STATE, SAVE_GRADIENT = range(3)
KNOWN_NOTHING, KNOWN_NORMALISERS, KNOWN_EVERYTHING = range(3)
STATE_SIZE = 9  # numbers per row: csrc/common/row_state.h, RowState


class RowValues(NamedTuple):
    """Tensors of the leading dimensions, `indices` of [..., k]; None: not given."""

    indices: Tensor | None
    labels: Tensor | None
    row_temperature: Tensor | None
    mask: Tensor | None
    weight: Tensor | None

    def map(self, of: Callable[[Tensor], Tensor]) -> RowValues:
        return RowValues(*(None if x is None else of(x) for x in self))


class Numbers(NamedTuple):
    """What is no tensor. The sum over the rows (each by itself with `per_row`) is multiplied by `scale`."""

    kind: int  # of csrc/common/divergence_terms.h
    mixing: float
    temperature: float
    columns: int
    vocabulary: int
    vocab_start: int
    scale: float
    per_row: bool
    distillation: bool
    alpha: float
    smoothing: float
    ignore_index: int


class Call(NamedTuple):
    """All that follows student and teacher. The result is over `divisor`: one number or, of divergence and
    cross-entropy, [2]; where it is 0 nothing counts."""

    rows: RowValues
    divisor: Tensor | None
    numbers: Numbers

    def flat(self) -> tuple[Any, ...]:
        """In the order of the schemas."""
        return *self.rows, self.divisor, *self.numbers

    @classmethod
    def of(cls, flat: Sequence[Any]) -> Call:
        tensors, numbers = flat[:TENSORS], flat[TENSORS:]
        return cls(RowValues(*tensors[:-1]), tensors[-1], Numbers(*numbers))


TENSORS = len(RowValues._fields) + 1  # of a flat call: the rows' and the divisor
ARGUMENTS = TENSORS + len(Numbers._fields)


# By position, here alone: for keywords the dispatcher takes 2 µs more, of the 8 that a call takes.
def divergence(
    student: Tensor, teacher: Tensor, call: Call, state: Tensor | None, known: int, save: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, components, and what is saved."""
    return torch.ops.kdfast.divergence.default(  # type: ignore[no-any-return]
        student, teacher, *call.flat(), state, known, save
    )


def divergence_into(
    gradient: Tensor, student: Tensor, teacher: Tensor, call: Call, state: Tensor | None, known: int
) -> tuple[Tensor, Tensor]:
    """Loss and components; the gradient goes into given memory."""
    return torch.ops.kdfast.divergence_into.default(  # type: ignore[no-any-return]
        gradient, student, teacher, *call.flat(), state, known
    )


def divergence_backward(grad_loss: Tensor, state: Tensor, student: Tensor, teacher: Tensor, call: Call) -> Tensor:
    return torch.ops.kdfast.divergence_backward.default(  # type: ignore[no-any-return]
        grad_loss, state, student, teacher, *call.flat()
    )
