"""The keyword arguments that functions of one family share: for the type checker, and with their defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from torch import Tensor

from kdfast.ops import _checks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self


class DivergenceOptions(TypedDict, total=False):
    """The keyword arguments of every divergence: `kl_div` tells what they are."""

    temperature: float | Tensor
    mask: Tensor | None
    weight: Tensor | None
    vocab_size: int | None
    reduction: str
    num_items: float | Tensor | None
    process_group: ProcessGroup | None
    vocab_start: int | None


class LabelOptions(DivergenceOptions, total=False):
    """What labels add to these: `kd_loss` tells what they are."""

    alpha: float
    label_smoothing: float
    ignore_index: int


class KDOptions(LabelOptions, total=False):
    """Those of `kd_loss`."""

    divergence: str
    beta: float
    skew: float


@dataclass
class Options:
    """`DivergenceOptions` as the caller gave them. Not frozen, which would cost every call a microsecond or two."""

    temperature: float | Tensor = 1.0
    mask: Tensor | None = None
    weight: Tensor | None = None
    vocab_size: int | None = None
    reduction: str = "mean"
    num_items: float | Tensor | None = None
    process_group: ProcessGroup | None = None
    vocab_start: int | None = None

    @classmethod
    def of(cls, op: str, given: Mapping[str, Any]) -> Self:
        for name in given:
            if name not in cls.__dataclass_fields__:
                _checks.wrong_type(op, "arguments", f"some of {', '.join(_KEYWORDS[op])}", name)
        return cls(**given)


@dataclass
class WithLabels(Options):
    """`LabelOptions`, the same."""

    temperature: float | Tensor = 2.0
    alpha: float = 0.5
    label_smoothing: float = 0.0
    ignore_index: int = -100


@dataclass
class Distillation(WithLabels):
    """`KDOptions`, the same."""

    divergence: str = "kl_div"
    beta: float = 0.5
    skew: float = 0.1


_KEYWORDS: dict[str, list[str]] = {}  # by public function
Function = TypeVar("Function", bound=Callable[..., Any])


def takes(options: type[Options]) -> Callable[[Function], Function]:
    """A public function whose `**options` are these: its signature, and so its help, shows each with its default."""

    def shown(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [x for x in signature.parameters.values() if x.kind is not inspect.Parameter.VAR_KEYWORD]
        more = [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for field in fields(options)
        ]
        function.__signature__ = signature.replace(parameters=own + more)  # type: ignore[attr-defined]
        _KEYWORDS[function.__name__] = [x.name for x in own + more if x.kind is inspect.Parameter.KEYWORD_ONLY]
        return function

    return shown
