"""What tests and benchmarks need to know of an operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# A tensor; a list of layers; or a tuple of these, which are arguments of their own (queries and keys).
Side = Any
Shape = tuple[tuple[int, ...], str]
# From the reference, student, teacher, keyword arguments, and the exact value and gradient of these: the
# absolute error of the value, per result, and that of the gradient's norm.
Floors = Callable[[Callable[..., Tensor], Side, Side, dict[str, Any], tuple[Tensor, Tensor]], tuple[Tensor, float]]


@dataclass(frozen=True)
class Sample:
    """Inputs of one call. `make(generator, gap)` returns student and teacher in float64, `gap` apart.

    `catches` says what the sample is there for; `kwargs(generator)` makes the keyword arguments, of which some are
    `on_gpu`'s on a GPU.
    """

    name: str
    catches: str
    make: Callable[[torch.Generator, float], tuple[Side, Side]]
    kwargs: Callable[[torch.Generator], dict[str, Any]] = field(default=lambda generator: {})
    on_gpu: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Operator:
    """A public function, its reference, how exact it must be, and the work that bounds its speed.

    `floors`: of the errors that are allowed whatever eager makes (kdfast/bench/registry/floors.py); `exact`: of
    float64, beside. `native`: the raw operators behind it (`torch.ops.kdfast.<name>`). `eager`: the code people write
    without kdfast. `make(shape, options)`: student and teacher of a benchmark, by `torch.randn(..., **options)`;
    `arguments(student)`: what both need beside them. `cpu_shapes`, `cuda_shapes`: shapes and dtypes of the benchmarks;
    `sweep_shapes`: of the sweep over widths. `flops(student, gradient)`: of operators that arithmetic bounds; the
    others are bound by what they must write and read, `reads(x)` of the numbers of each input. `product`: a layer, not a loss: it has a student alone, no
    reduction, and the student's dtype.
    """

    name: str
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    native: tuple[str, ...]
    samples: tuple[Sample, ...]
    eager: Callable[..., Tensor]
    make: Callable[[tuple[int, ...], dict[str, Any]], tuple[Side, Side]]
    floors: Floors
    cpu_shapes: tuple[Shape, ...]
    cuda_shapes: tuple[Shape, ...]
    sweep_shapes: tuple[Shape, ...] = ()
    arguments: Callable[[Side], dict[str, Any]] = field(default=lambda student: {})
    exact: float = 2**-48
    flops: Callable[[Side, bool], float] | None = None
    reads: Callable[[Tensor], int] = Tensor.numel
    product: bool = False


def apply(function: Callable[..., Tensor], student: Side, teacher: Side, **kwargs: Any) -> Tensor:
    """Calls a function of student and teacher, or of what they consist of."""
    both = [side if isinstance(side, tuple) else (side,) for side in (student, teacher)]
    return function(*both[0], *both[1], **kwargs)


def tensors(side: Side) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(side) if isinstance(x, Tensor)]


def mapped(function: Callable[[Tensor], Tensor], side: Side) -> Side:
    return pytree.tree_map_only(Tensor, function, side)


def cast(side: Side, dtype: torch.dtype) -> Side:
    """Indices stay what they are."""
    return mapped(lambda x: x.to(dtype) if x.is_floating_point() else x, side)
