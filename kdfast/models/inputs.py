"""Which columns of a batch go into which model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

TEACHER, SAMPLE = "teacher_", "sample_"  # columns that begin so are the objective's, or the teacher's own inputs
TARGETS = ("labels", "start_positions", "end_positions")
TOKENS = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")  # what **kwargs may take


def model_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a batch that go into a model: not the labels, nor what belongs to the objective.

    A student without token types gets none where its teacher has them; one whose forward names no `input_ids`, but
    takes `**kwargs`, gets what there is. A model that is set to return tuples is asked for outputs with names.
    """
    parameters, own = parameters_of(model), {}
    for name, value in inputs.items():
        if name in (*TARGETS, "num_items") or name.startswith((TEACHER, SAMPLE)):
            continue
        if name != "token_type_ids" or name in parameters or (_open(parameters) and "input_ids" not in parameters):
            own[name] = value
    if getattr(getattr(unwrapped(model), "config", None), "return_dict", True) is False:
        own["return_dict"] = True
    return own


def teacher_inputs(teacher: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as the teacher reads it: a column `teacher_x` takes the place of x,
    where x is an argument of its forward.

    With `teacher_input_ids` the student's columns of tokens, [B, L] like its own `input_ids`, are left out: another
    tokenizer made them. A forward with `**kwargs` takes those of a tokenizer, named or not.

    Raises:
        ValueError: `teacher_input_ids` for a teacher that takes none.
    """
    parameters = parameters_of(teacher)
    arguments = parameters.keys() - set(TARGETS) | (set(TOKENS) if _open(parameters) else set())
    arguments |= getattr(unwrapped(teacher), "columns", set())  # of several teachers, by their numbers
    own = {name.removeprefix(TEACHER): x for name, x in inputs.items() if name.startswith(TEACHER)}
    if "input_ids" in own and "input_ids" not in arguments:
        name = type(unwrapped(teacher)).__name__
        raise ValueError(
            f"DistillationTrainer: teacher_input_ids: expected a teacher whose forward takes input_ids, got {name}"
        )
    own = {name: x for name, x in own.items() if name in arguments}
    rest = dict(inputs)
    if own.keys() & {"input_ids", "inputs_embeds"} and "input_ids" in inputs:
        shape = inputs["input_ids"].shape
        rest = {n: x for n, x in inputs.items() if not isinstance(x, Tensor) or n in TARGETS or x.shape[:2] != shape}
    return rest | own


def _open(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def parameters_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The arguments of a model's forward."""
    forward = unwrapped(model).forward
    return _parameters(forward.__func__, bound=True) if inspect.ismethod(forward) else _parameters(forward)


@lru_cache(64)  # 0.1 ms anew: as much as a layer of a small encoder takes for one row
def _parameters(function: Callable[..., Any], bound: bool = False) -> Mapping[str, inspect.Parameter]:
    return dict([*inspect.signature(function).parameters.items()][bound:])


def unwrapped(model: nn.Module) -> Any:
    """The model inside `torch.compile`, DataParallel, DistributedDataParallel and PEFT."""
    inner: Any = model
    while isinstance(wrapped := getattr(inner, "_orig_mod", getattr(inner, "module", None)), nn.Module):
        inner = wrapped
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner
