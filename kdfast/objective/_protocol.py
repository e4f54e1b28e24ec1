"""What the trainer asks of an objective, and which columns of a batch are whose."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

TEACHER, SAMPLE = "teacher_", "sample_"  # columns that begin so are the objective's, or the teacher's own inputs
TARGETS = ("labels", "start_positions", "end_positions")


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

    `num_items(inputs)` counts what a term is a mean of, as a tensor: a scalar, or a number for each of `terms` (its names).
    The trainer adds up the counts of a step's micro-batches, averages over processes, and the objective finds the result as
    `inputs["num_items"]`, to divide by that instead of its own count: exact for micro-batches that are not equal. The means
    of an evaluation are weighted by it.

    `possible(student_outputs, teacher_outputs, inputs)`, for evaluations: the terms that have what they need, and a `Missing`
    for each of the others. Without it there are no terms where the objective raises one.

    `logits(student_outputs)`: predictions, where the outputs have none; asked for in evaluations that want them.

    `for_student(model)` returns the objective to use for this student; the trainer asks once, at its beginning.

    `progress`: an attribute, the share of the training that is done, from 0 to 1; the trainer sets it.

    An objective that is a module may have parameters (projections): they are trained, saved and resumed with the student.
    """

    def __call__(self, student_outputs: Any, teacher_outputs: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]: ...


def model_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a batch that go into a model: not the labels, nor what belongs to the objective.

    A student without token types gets none where its teacher has them. A model that is set to return tuples is asked for
    outputs with names.
    """
    parameters, own = parameters_of(model), {}
    for name, value in inputs.items():
        if name in (*TARGETS, "num_items") or name.startswith((TEACHER, SAMPLE)):
            continue
        if name != "token_type_ids" or name in parameters:
            own[name] = value
    if getattr(getattr(unwrapped(model), "config", None), "return_dict", True) is False:
        own["return_dict"] = True
    return own


def teacher_inputs(teacher: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as the teacher reads it: a column `teacher_x` takes the place of x, where x is an argument of its forward.

    With `teacher_input_ids` the student's columns of tokens, [B, L] like its own `input_ids`, are left out: another tokenizer
    made them.
    """
    arguments = parameters_of(teacher).keys() - set(TARGETS)
    own = {name.removeprefix(TEACHER): x for name, x in inputs.items() if name.startswith(TEACHER)}
    own = {name: x for name, x in own.items() if name in arguments}
    rest = dict(inputs)
    if own.keys() & {"input_ids", "inputs_embeds"} and "input_ids" in inputs:
        shape = inputs["input_ids"].shape
        rest = {n: x for n, x in inputs.items() if not isinstance(x, Tensor) or n in TARGETS or x.shape[:2] != shape}
    return rest | own


def parameters_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The arguments of a model's forward."""
    return inspect.signature(unwrapped(model).forward).parameters


def unwrapped(model: nn.Module) -> Any:
    """The model inside `torch.compile`, DataParallel, DistributedDataParallel and PEFT."""
    inner: Any = model
    while isinstance(wrapped := getattr(inner, "_orig_mod", getattr(inner, "module", None)), nn.Module):
        inner = wrapped
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner
