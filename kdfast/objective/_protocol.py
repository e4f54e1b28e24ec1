"""What the trainer asks of an objective, and which columns of a batch are whose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor


class Missing(ValueError):
    """What a term needs is in neither the batch nor the trainer: labels, a teacher, or a column of its outputs.

    Training stops at it; an evaluation leaves the term out.
    """


class Objective(Protocol):
    """A callable that returns named loss terms; the loss is their sum, so each term already carries its weight.

    Args:
        student_outputs: what the student's forward returned, with `.logits`.
        teacher_outputs: the teacher's outputs without gradient (`.logits` only, where they were stored with the
            rows), or None where there is neither a teacher nor a `teacher_logits` column.
        inputs: the batch as the collator made it, labels included.

    Every term is a mean over the rows it was given, so that gradient accumulation averages equal micro-batches to the
    same result as one large batch. More that an objective may have, and `Terms` and `LanguageModel` have:

    `run(model, inputs)` calls the student or the teacher; what it returns is then the objective's student_outputs or
    teacher_outputs. Without it the trainer calls either with `model_inputs`.

    `num_items(inputs)` counts what a term is a mean of, as a tensor: a scalar, or a number for each of `terms` (its
    names). The trainer adds up the counts of a step's micro-batches, averages over processes, and the objective finds
    the result as `inputs["num_items"]`, to divide by that instead of its own count: exact for micro-batches that are
    not equal. The means of an evaluation are weighted by it.

    `possible(student_outputs, teacher_outputs, inputs)`, for evaluations: the terms that have what they need, and a
    `Missing` for each of the others. Without it there are no terms where the objective raises one.

    `logits(student_outputs)`: predictions, where the outputs have none; asked for in evaluations that want them.

    `for_student(model)` returns the objective to use for this student; the trainer asks once, at its beginning.
    `for_models(student, teacher)`, asked next, the one to use for both, of which the teacher may be None.

    `progress`: an attribute, the share of the training that is done, from 0 to 1; the trainer sets it.

    An objective that is a module may have parameters (projections): they are trained,
    saved and resumed with the student.
    """

    def __call__(self, student_outputs: Any, teacher_outputs: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]: ...
