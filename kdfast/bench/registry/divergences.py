"""The divergences and `kd_loss`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.bench.registry import floors
from kdfast.bench.registry.operator import Operator, Sample
from kdfast.ops import _divergence, divergence, kd_loss, reference


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
    student[3, 2048:] = teacher[3, 2048:] = float("-inf")  # a whole block of columns
    student[4, :2048] = teacher[4, :2048] = float("-inf")
    return student, teacher


def _with_teacher_zeros(generator: torch.Generator, gap: float) -> tuple[Tensor, Tensor]:
    student, teacher = _logits(6, 3001)(generator, gap)
    teacher[2, ::11] = float("-inf")
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


def _with(samples: tuple[Sample, ...], **settings: Any) -> tuple[Sample, ...]:
    """The samples with more keyword arguments; tensors are made for each."""

    def more(sample: Sample) -> Sample:
        return replace(sample, kwargs=lambda generator: sample.kwargs(generator) | settings)

    return tuple(more(sample) for sample in samples)


def _labelled(samples: tuple[Sample, ...], **settings: Any) -> tuple[Sample, ...]:
    """The samples with labels, every fifth of them ignored."""

    def labelled(sample: Sample) -> Sample:
        def kwargs(generator: torch.Generator) -> dict[str, Any]:
            student, _ = sample.make(generator, 1.0)
            given = sample.kwargs(generator)
            columns = given.get("vocab_size", student.shape[-1])
            labels = torch.randint(columns, student.shape[:-1], generator=generator)
            labels = torch.where(torch.rand(labels.shape, generator=generator) < 0.2, -100, labels)
            return given | {"labels": labels} | settings

        return replace(sample, kwargs=kwargs)

    return tuple(labelled(sample) for sample in samples)


def _eager_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return nn.functional.kl_div(student.float().log_softmax(-1), teacher.float().softmax(-1), reduction="batchmean")


def _eager_logs(of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A mean over rows of a sum over columns, of log-softmaxes."""
    return lambda s, t: of(s.float().log_softmax(-1), t.float().log_softmax(-1)).sum(-1).mean()


def _kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    return nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True)


def _mixed(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    return torch.logsumexp(torch.stack((log_p + math.log(share), log_q + math.log(1 - share))), 0)


def _js_terms(log_s: Tensor, log_t: Tensor) -> Tensor:
    log_m = _mixed(log_t, log_s, 0.5)
    return 0.5 * _kl_terms(log_t, log_m) + 0.5 * _kl_terms(log_s, log_m)


# The code people write: of student and teacher log-softmaxes, the terms of a row.
_EAGER_TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reverse_kl_div": lambda s, t: _kl_terms(s, t),
    "symmetric_kl_div": lambda s, t: (_kl_terms(s, t) + _kl_terms(t, s)) / 2,
    "js_div": _js_terms,
    "skew_kl_div": lambda s, t: _kl_terms(t, _mixed(t, s, 0.1)),
    "skew_reverse_kl_div": lambda s, t: _kl_terms(s, _mixed(s, t, 0.1)),
    "total_variation": lambda s, t: (s.exp() - t.exp()).abs() / 2,
    "soft_cross_entropy": lambda s, t: -t.exp() * s,
}
_EAGER: dict[str, Callable[..., Tensor]] = {
    "kl_div": _eager_kl,
    "logit_mse": lambda s, t: nn.functional.mse_loss(s.float(), t.float()),
    **{name: _eager_logs(terms) for name, terms in _EAGER_TERMS.items()},
}


def _eager_kd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return 0.5 * 4 * _eager_kl(student / 2, teacher / 2) + 0.5 * nn.functional.cross_entropy(student.float(), labels)


def _made(shape: tuple[int, ...], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    teacher = torch.randn(shape, **options).mul_(4)
    return teacher + torch.randn(shape, **options), teacher


_WIDE = ((64, 152064), "float32")
_CPU_SHAPES = (
    _WIDE,
    ((128, 128256), "bfloat16"),
    ((1, 152064), "float32"),
    ((8192, 1000), "float32"),
    ((100000, 2), "float32"),
)
# About 10^9 logits for the large vocabularies; 8192 rows for classification heads.
_CUDA_SHAPES = tuple(((2**30 // v // 16 * 16, v), "bfloat16") for v in (32000, 50257, 128256, 151936, 262144)) + (
    ((8192, 2), "bfloat16"),
    ((8192, 1000), "bfloat16"),
    ((8192, 1000), "float32"),
    ((4096, 151936), "float32"),
)
_CUDA_WIDE = _CUDA_SHAPES[3]
# About 4 million logits each.
_SWEEP = tuple(
    (({2: 100000, 1000: 8192}.get(v, 2**22 // v), v), dtype)
    for v in (2, 1000, 32000, 50257, 128256, 151936, 262144)
    for dtype in ("float32", "bfloat16")
)


def _is_infinite(kind: str) -> bool:
    """Where the teacher's probability is 0 and the student's is not."""
    value = reference.divergence(kind, torch.zeros(1, 2), torch.tensor([[0.0, -torch.inf]]))
    return bool(value.isinf())


_ONE_SIDED = (Sample("teacher_zeros", "p_t = 0 where p_s > 0", _with_teacher_zeros),)
# More than one value of the parameter: a mixture that leans either way.
_MORE_SAMPLES: dict[str, tuple[Sample, ...]] = {
    "js_div": _with((Sample("beta_0.1", "a mixture that leans on the student", _logits(7, 700)),), beta=0.1)
    + _with((Sample("beta_0.9", "a mixture that leans on the teacher", _logits(6, 9)),), beta=0.9),
    "skew_kl_div": _with((Sample("skew_0.7", "a strong skew", _logits(7, 700)),), skew=0.7),
    "skew_reverse_kl_div": _with((Sample("skew_0.7", "a strong skew", _logits(6, 9)),), skew=0.7),
}


def _kd_samples() -> tuple[Sample, ...]:
    few = tuple(s for s in _divergence_samples() if s.name in ("classes", "odd", "rows"))
    return (
        _labelled(_divergence_samples() + _ONE_SIDED, alpha=0.3)
        + tuple(replace(s, name=f"{s.name}_smoothed") for s in _labelled(few, alpha=0.5, label_smoothing=0.1))
        + tuple(replace(s, name=f"{s.name}_js") for s in _labelled(few, divergence="js_div", beta=0.3))
        + tuple(replace(s, name=f"{s.name}_mse") for s in _labelled(few, divergence="logit_mse"))
        + tuple(replace(s, name=f"{s.name}_unlabelled") for s in _with(few, alpha=1.0))
    )


_NATIVE = ("divergence", "divergence_backward")
DIVERGENCES: dict[str, Operator] = {
    kind: Operator(
        name=kind,
        function=getattr(divergence, kind),
        reference=reference.of(kind),
        native=_NATIVE,
        samples=_divergence_samples() + (() if _is_infinite(kind) else _ONE_SIDED) + _MORE_SAMPLES.get(kind, ()),
        eager=_EAGER.get(kind, reference.of(kind)),
        make=_made,
        floors=floors.of_logits(squared=kind == "logit_mse"),
        exact=0.0,
        cpu_shapes=_CPU_SHAPES if kind == "kl_div" else (_WIDE,),
        cuda_shapes=_CUDA_SHAPES if kind == "kl_div" else (_CUDA_WIDE,),
        sweep_shapes=_SWEEP,
    )
    for kind in _divergence.KINDS
} | {
    "kd_loss": Operator(
        name="kd_loss",
        function=kd_loss.kd_loss,
        reference=reference.kd_loss,
        native=_NATIVE,
        samples=_kd_samples(),
        eager=_eager_kd,
        make=_made,
        floors=floors.of_logits(distillation=True),
        exact=0.0,
        cpu_shapes=(_WIDE,),
        cuda_shapes=(_CUDA_WIDE,),
        sweep_shapes=_SWEEP,
        arguments=lambda student: {"labels": torch.arange(student.shape[0], device=student.device) % student.shape[1]},
    )
}
