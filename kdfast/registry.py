"""Every operator with what tests and benchmarks need to know of it. A new operator is one more row in `OPERATORS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import kdfast.nn
from kdfast.ops import divergence


@dataclass(frozen=True)
class Sample:
    """Inputs of one call. `make(generator, gap)` returns student and teacher in float64, `gap` apart.

    `catches` says what the sample is there for; `kwargs(generator)` makes the keyword arguments.
    """

    name: str
    catches: str
    make: Callable[[torch.Generator, float], tuple[Tensor, Tensor]]
    kwargs: Callable[[torch.Generator], dict[str, Any]] = field(default=lambda generator: {})


@dataclass(frozen=True)
class Operator:
    """A public function, its twins, and the traffic that bounds its speed.

    `native`: the raw operators behind it (`torch.ops.kdfast.<name>`). `eager`: the code people write without kdfast.
    `bytes_moved(student, teacher, gradient)`: the least a call can move, loss only or with its gradient. `cpu_shapes`,
    `cuda_shapes`: rows, columns and dtype of the benchmarks.
    """

    name: str
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    module: type[nn.Module]
    native: tuple[str, ...]
    samples: tuple[Sample, ...]
    eager: Callable[[Tensor, Tensor], Tensor]
    bytes_moved: Callable[[Tensor, Tensor, bool], int]
    cpu_shapes: tuple[tuple[int, int, str], ...]
    cuda_shapes: tuple[tuple[int, int, str], ...]


def _logits(*shape: int, offset: float = 0.0) -> Callable[[torch.Generator, float], tuple[Tensor, Tensor]]:
    def make(generator: torch.Generator, gap: float) -> tuple[Tensor, Tensor]:
        teacher = offset + 4 * torch.randn(shape, generator=generator, dtype=torch.float64)
        return teacher + gap * torch.randn(shape, generator=generator, dtype=torch.float64), teacher

    return make


def _shifted(generator: torch.Generator, gap: float) -> tuple[Tensor, Tensor]:
    student, teacher = _logits(3, 9, 700)(generator, gap)
    return student[:, :-1], teacher[:, 1:]


def _column_strided(generator: torch.Generator, gap: float) -> tuple[Tensor, Tensor]:
    student, teacher = _logits(5000, 6)(generator, gap)
    return student.T, torch.stack((teacher, teacher), -1)[..., 0].T


def _with_infinities(generator: torch.Generator, gap: float) -> tuple[Tensor, Tensor]:
    student, teacher = _logits(6, 3001)(generator, gap)
    student[1, ::7] = teacher[1, ::7] = float("-inf")
    teacher[2, ::11] = float("-inf")
    student[3, 2048:] = teacher[3, 2048:] = float("-inf")  # a whole block of columns
    student[4, :2048] = teacher[4, :2048] = float("-inf")
    return student, teacher


def _mask(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.rand(shape, generator=generator) < 0.6


def _divergence_samples() -> tuple[Sample, ...]:
    rand = lambda g, *shape: torch.rand(shape, generator=g, dtype=torch.float64)  # noqa: E731
    return (
        Sample("classes", "a row per lane; two columns", _logits(37, 2)),
        Sample("narrow", "the widest row that goes through lanes", _logits(19, 32), lambda g: {"reduction": "sum"}),
        Sample("odd", "vector tails of every variant", _logits(7, 4999), lambda g: {"temperature": 2.0}),
        Sample("vocabulary", "several blocks; columns shared among threads", _logits(2, 50257)),
        Sample("one_row", "no leading dimension", _logits(20000), lambda g: {"temperature": 0.5}),
        Sample("large_logits", "cancellation far from 0", _logits(4, 1000, offset=100.0)),
        Sample("shifted", "rows that memory keeps apart", _shifted, lambda g: {"reduction": "batchmean"}),
        Sample("column_strided", "columns with a stride", _column_strided, lambda g: {"reduction": "none"}),
        Sample("infinities", "-inf alone and in whole blocks", _with_infinities),
        Sample(
            "rows",
            "mask, weight and temperature that broadcast differently",
            _logits(3, 5, 333),
            lambda g: {
                "mask": _mask(3, 5)(g),
                "weight": rand(g, 5),
                "temperature": 0.5 + 3 * rand(g, 3, 1),
            },
        ),
        Sample(
            "rows_none",
            "per-row values and their gradients",
            _logits(11, 130),
            lambda g: {"mask": _mask(11)(g), "weight": rand(g, 11), "reduction": "none", "temperature": 1.7},
        ),
        Sample(
            "num_items",
            "a denominator from the trainer, as a tensor",
            _logits(4, 3, 257),
            lambda g: {"mask": _mask(4, 3)(g), "num_items": torch.tensor(5), "temperature": 4.0},
        ),
        Sample("num_items_number", "the same as a number", _logits(9, 21), lambda g: {"num_items": 31}),
        Sample(
            "padded",
            "vocab_size: padding is not read and gets a zero gradient",
            lambda g, gap: (_logits(5, 777)(g, gap)[0], _logits(5, 800)(g, gap)[1]),
            lambda g: {"vocab_size": 750},
        ),
    )


def _eager_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return nn.functional.kl_div(student.float().log_softmax(-1), teacher.float().softmax(-1), reduction="batchmean")


def _divergence_bytes(student: Tensor, teacher: Tensor, gradient: bool) -> int:
    reads = student.numel() * student.element_size() + teacher.numel() * teacher.element_size()
    return reads + (student.numel() * student.element_size() if gradient else 0)


_CPU_SHAPES = (
    (64, 152064, "float32"),
    (128, 128256, "bfloat16"),
    (1, 152064, "float32"),
    (8192, 1000, "float32"),
    (100000, 2, "float32"),
)
# About 10^9 logits for the large vocabularies; 8192 rows for classification heads.
_CUDA_SHAPES = tuple((2**30 // v // 16 * 16, v, "bfloat16") for v in (32000, 50257, 128256, 151936, 262144)) + (
    (8192, 2, "bfloat16"),
    (8192, 1000, "bfloat16"),
    (8192, 1000, "float32"),
    (4096, 151936, "float32"),
)

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        Operator(
            name="kl_div",
            function=divergence.kl_div,
            reference=divergence.kl_div_reference,
            module=kdfast.nn.KLDivLoss,
            native=("kl_div", "kl_div_backward"),
            samples=_divergence_samples(),
            eager=_eager_kl,
            bytes_moved=_divergence_bytes,
            cpu_shapes=_CPU_SHAPES,
            cuda_shapes=_CUDA_SHAPES,
        ),
    )
}
