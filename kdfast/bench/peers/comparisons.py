"""What is computed in several ways: the formula, kdfast's call of it, the one in plain torch, and the sizes."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.bench import harness
from kdfast.bench.peers.ways import Inputs, Way, of_logits, way
from kdfast.bench.registry import OPERATORS
from kdfast.bench.registry.operator import Shape, cast, mapped


@dataclass(frozen=True)
class Comparison:
    """`operator`: the row of the registry whose inputs are taken; `settings(inputs)`: what kdfast's function gets beside
    them, and its reference; `torch`: ways that torch alone has, the usual code as "torch". The teacher is left out where
    it is not `taught`."""

    name: str
    formula: str
    operator: str
    torch: dict[str, Way]
    cpu_shapes: tuple[Shape, ...]
    cuda_shapes: tuple[Shape, ...]
    settings: Callable[[Inputs], dict[str, Any]] = field(default=lambda inputs: {})
    taught: bool = True

    def ours(self) -> Way:
        return self._of(OPERATORS[self.operator].function)

    def exact(self) -> Way:
        """Of inputs in float64."""
        return self._of(OPERATORS[self.operator].reference)

    def _of(self, function: Callable[..., Tensor]) -> Way:
        return way(lambda x: function(*x.student, *(x.teacher if self.taught else ()), **self.settings(x)))


@dataclass(frozen=True)
class Case:
    comparison: Comparison
    shape: tuple[int, ...]
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.comparison.name}-{'x'.join(map(str, self.shape))}-{self.dtype}"

    def inputs(self, device: str) -> Inputs:
        sides = harness.make(harness.Case(self.comparison.operator, self.shape, self.dtype, True), device)
        student, teacher = (side if isinstance(side, tuple) else (side,) for side in sides)
        rows, vocabulary = self.shape[0], self.shape[-1]
        return Inputs(student, teacher, torch.arange(rows, device=device) * 31 % vocabulary)


def part(inputs: Inputs, rows: int, dtype: torch.dtype | None = None) -> Inputs:
    """The first rows of these, in another dtype if need be."""
    student, teacher = ((side[0].detach()[:rows], *side[1:]) for side in (inputs.student, inputs.teacher))
    if dtype is not None:
        student, teacher = cast(student, dtype), cast(teacher, dtype)
    return Inputs(mapped(lambda x: x.detach().requires_grad_(), student), teacher, inputs.labels[:rows])


def _soft_labels(student: Tensor, teacher: Tensor) -> Tensor:
    return F.cross_entropy(student.float(), teacher.float().softmax(-1))


def _both_logits(inputs: Inputs) -> tuple[Tensor, Tensor]:
    (hidden, weight), (t_hidden, t_weight) = inputs.student, inputs.teacher
    return (hidden @ weight.T).float(), (t_hidden @ t_weight.T).float()


def _jsd(inputs: Inputs) -> Tensor:
    return OPERATORS["js_div"].eager(*_both_logits(inputs))


def _jsd_and_labels(inputs: Inputs) -> Tensor:
    s, t = _both_logits(inputs)
    return 0.5 * OPERATORS["js_div"].eager(s, t) + 0.5 * F.cross_entropy(s, inputs.labels)


def _labels(inputs: Inputs) -> Tensor:
    hidden, weight = inputs.student
    return F.cross_entropy((hidden @ weight.T).float(), inputs.labels)


def _labels_in_chunks(inputs: Inputs) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    hidden, weight = inputs.student
    return F.linear_cross_entropy(hidden, weight, inputs.labels, options=options)


_WIDE, _WIDE_16 = ((64, 152064), "float32"), ((128, 128256), "bfloat16")
_ON_GPU = (((8192, 128256), "bfloat16"), ((4096, 151936), "float32"))
_LINEAR: dict[str, Any] = {
    "operator": "linear_kd_loss",
    "cpu_shapes": (((256, 576, 49152), "float32"), ((256, 576, 49152), "bfloat16")),
    "cuda_shapes": (((8192, 4096, 128256), "bfloat16"), ((2048, 2048, 151936), "float32")),
}
_JSD: dict[str, Any] = {"temperature": 1.0, "divergence": "js_div"}


def _logits(name: str, formula: str, idiom: Callable[..., Tensor], *cpu_shapes: Shape) -> Comparison:
    return Comparison(name, formula, name, {"torch": of_logits(idiom)}, cpu_shapes, _ON_GPU)


_ALL = (
    _logits("kl_div", "KL(t ‖ s) of logits", OPERATORS["kl_div"].eager, _WIDE, _WIDE_16),
    _logits("soft_cross_entropy", "−Σ t log s of logits", _soft_labels, _WIDE),
    _logits("reverse_kl_div", "KL(s ‖ t) of logits", OPERATORS["reverse_kl_div"].eager, _WIDE),
    _logits("js_div", "JSD of logits, beta 0.5", OPERATORS["js_div"].eager, _WIDE, _WIDE_16),
    Comparison(
        name="linear_js_div",
        formula="JSD of hidden states, beta 0.5",
        torch={"torch": way(_jsd)},
        settings=lambda inputs: {"alpha": 1.0, **_JSD},
        **_LINEAR,
    ),
    Comparison(
        name="linear_js_div_labels",
        formula="JSD of hidden states and cross-entropy of labels, half each",
        torch={"torch": way(_jsd_and_labels)},
        settings=lambda inputs: {"alpha": 0.5, "labels": inputs.labels, **_JSD},
        **_LINEAR,
    ),
    Comparison(
        name="linear_cross_entropy",
        formula="cross-entropy of labels from hidden states, without a teacher",
        # torch 2.13 and later.
        torch={"torch": way(_labels)}
        | ({"torch, linear_cross_entropy": way(_labels_in_chunks)} if hasattr(F, "linear_cross_entropy") else {}),
        settings=lambda inputs: {"alpha": 0.0, "labels": inputs.labels},
        taught=False,
        **_LINEAR,
    ),
)
COMPARISONS = {one.name: one for one in _ALL}


def cases(device: str, only: str = "*") -> list[Case]:
    """Whose names match the pattern `only`."""
    every = (Case(of, *sized) for of in _ALL for sized in (of.cuda_shapes if device == "cuda" else of.cpu_shapes))
    return [case for case in every if fnmatch.fnmatch(case.name, only)]
