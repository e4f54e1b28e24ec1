"""What `DistillationTrainer` takes for a teacher and an objective, and where a teacher runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from kdfast.models.inputs import unwrapped
from kdfast.objective import Term

WHO = "DistillationTrainer"


def check_objective(objective: Any) -> None:
    if isinstance(objective, Term):
        name = type(objective).__name__
        raise TypeError(f"{WHO}: objective: expected named terms, such as Terms(it={name}()), got {name} alone")
    if isinstance(objective, type):
        name = objective.__name__
        raise TypeError(f"{WHO}: objective: expected an object, such as {name}(), got the class {name}")
    if not callable(objective):
        expected = "a kdfast.objective.Objective, such as Terms(kl=Logits())"
        raise TypeError(f"{WHO}: objective: expected {expected}, got {type(objective).__name__}")


def check_teacher(teacher: Any) -> None:
    if teacher is None or isinstance(teacher, nn.Module):
        return
    if isinstance(teacher, str):
        expected, got = "a module, as from_pretrained makes one of a name", repr(teacher)
    elif isinstance(teacher, type):
        expected, got = "a module", f"the class {teacher.__name__}"
    else:
        several = f" of {len(teacher)}" if isinstance(teacher, (list, tuple, Mapping)) else ""
        expected, got = "one module, or None", f"a {type(teacher).__name__}{several}"
    raise TypeError(f"{WHO}: teacher: expected {expected}, got {got}")


def check_apart(teacher: nn.Module | None, model: nn.Module) -> None:
    """That no training of the model changes the teacher, nor freezing the teacher the model."""
    if teacher is None:
        return
    expected = "one that shares no parameters with model (a copy.deepcopy, or loaded once more)"
    if teacher is model:
        raise ValueError(f"{WHO}: teacher: expected {expected}, got the same module")
    own = {_identity(parameter) for parameter in model.parameters()}
    shared = [name for name, parameter in teacher.named_parameters() if _identity(parameter) in own]
    if shared:
        hint = "; get_peft_model changes the model that it is given" if hasattr(model, "get_base_model") else ""
        raise ValueError(f"{WHO}: teacher: expected {expected}, got {len(shared)} in both, as {shared[0]}{hint}")


def _identity(parameter: Tensor) -> tuple[str, int]:
    """What tells a parameter: its memory, where it has any of its own."""
    plain = type(parameter) is nn.Parameter and parameter.device.type != "meta" and parameter.numel()
    return ("memory", parameter.data_ptr()) if plain else ("object", id(parameter))


def stays(teacher: nn.Module) -> bool:
    """Whether a teacher is left where it is: dispatched over devices by accelerate, or quantised,
    which `.to` may refuse."""
    inner = unwrapped(teacher)
    return getattr(inner, "hf_device_map", None) is not None or bool(getattr(inner, "is_quantized", False))


def has_float32(teacher: nn.Module) -> bool:
    """Whether mixed precision is for it. One that is stored in 16 bits has its own,
    which another's autocast may not take."""
    return any(parameter.dtype == torch.float32 for parameter in teacher.parameters())


def home(teacher: nn.Module, otherwise: torch.device) -> torch.device:
    """Where a teacher that stays takes its inputs; parameters on meta are offloaded."""
    return next((p.device for p in teacher.parameters() if p.device.type != "meta"), otherwise)


def moved(outputs: Any, device: torch.device) -> Any:
    """Outputs of a model, or `kdfast.hf.Features`, with their tensors on a device."""
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, (Mapping, type)):
        fields = {field.name: moved(getattr(outputs, field.name), device) for field in dataclasses.fields(outputs)}
        return dataclasses.replace(outputs, **fields)
    return send_to_device(outputs, device)


def run_where_it_is(run: Callable[[nn.Module, Any], Any], teacher: nn.Module, inputs: Any, device: torch.device) -> Any:
    """`run(teacher, inputs)` of inputs on a device; a teacher that stays takes them where it is, and its outputs come here."""
    if not stays(teacher):
        return run(teacher, inputs)
    return moved(run(teacher, moved(inputs, home(teacher, device))), device)
