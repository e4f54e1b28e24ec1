"""What the trainer asks of an objective, and which columns of a batch are whose."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

TEACHER, SAMPLE = "teacher_", "sample_"  # columns that begin so are the objective's: no model gets them


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

    `num_items(inputs)` counts what a term is a mean of, as a tensor. The trainer adds up the counts of a step's
    micro-batches, averages over processes, and the objective finds the result as `inputs["num_items"]`, to divide by that
    instead of its own count: exact for micro-batches that are not equal.

    `for_student(model)` returns the objective to use for this student; the trainer asks once, at its beginning.

    `progress`: an attribute, the share of the training that is done, from 0 to 1; the trainer sets it.

    An objective that is a module may have parameters (projections): they are trained, saved and resumed with the student.
    """

    def __call__(self, student_outputs: Any, teacher_outputs: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]: ...


def model_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a batch that go into a model: not the labels, nor what belongs to the objective.

    A student without token types gets none where its teacher has them.
    """
    parameters = inspect.signature(unwrapped(model).forward).parameters
    own = {}
    for name, value in inputs.items():
        if name in ("labels", "num_items") or name.startswith((TEACHER, SAMPLE)):
            continue
        if name != "token_type_ids" or name in parameters:
            own[name] = value
    return own


def unwrapped(model: nn.Module) -> Any:
    """The model inside `torch.compile` and DistributedDataParallel."""
    inner: Any = model
    while isinstance(wrapped := getattr(inner, "_orig_mod", getattr(inner, "module", None)), nn.Module):
        inner = wrapped
    return inner
