"""Which columns of a batch go into which model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

TEACHER, SAMPLE = "teacher_", "sample_"  # columns that begin so are the objective's, or the teacher's own inputs


TARGETS = ("labels", "start_positions", "end_positions")


def model_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a batch that go into a model: not the labels, nor what belongs to the objective.

    A student without token types gets none where its teacher has them. A model that is set to return tuples is asked
    for outputs with names.
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
    """A batch as the teacher reads it: a column `teacher_x` takes the place of x,
    where x is an argument of its forward.

    With `teacher_input_ids` the student's columns of tokens, [B, L] like its own `input_ids`, are left out: another
    tokenizer made them.
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
