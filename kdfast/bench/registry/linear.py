"""The losses for large vocabularies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.bench.registry import floors
from kdfast.bench.registry.operator import Operator, Sample
from kdfast.ops import linear, linear_reference, topk
from kdfast.ops._heads import WORKSPACE

Make = Callable[[torch.Generator, float], tuple[Any, Any]]


def _heads(*leading: int, width: int, vocabulary: int, teacher_width: int | None = None) -> Make:
    """Hidden states and output embeddings; where the widths are the same a student `gap` away from its teacher."""

    def make(generator: torch.Generator, gap: float) -> tuple[Any, Any]:
        def head(of: int) -> tuple[Tensor, Tensor]:
            options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
            return torch.randn(*leading, of, **options), 3 * of**-0.5 * torch.randn(vocabulary, of, **options)

        if teacher_width is not None:
            return head(width), head(teacher_width)
        teacher = head(width)
        return tuple(t + gap * x for t, x in zip(teacher, head(width), strict=True)), teacher

    return make


def _rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _labels(*leading: int, vocabulary: int) -> Callable[[torch.Generator], dict[str, Any]]:
    """Every fifth of them ignored."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        labels = torch.randint(vocabulary, leading, generator=generator)
        return {"labels": torch.where(_rand(generator, *leading) < 0.2, -100, labels)}

    return make


def _sample(name: str, catches: str, make: Make, vocabulary: int, leading: tuple[int, ...], **settings: Any) -> Sample:
    """Settings that are functions make theirs by the generator."""

    def kwargs(generator: torch.Generator) -> dict[str, Any]:
        made = {k: v(generator) if callable(v) else v for k, v in settings.items()}
        labels = {} if made.get("alpha") == 1.0 else _labels(*leading, vocabulary=vocabulary)(generator)
        return labels | made

    on_gpu = {"memory_budget": settings["memory_budget"] - WORKSPACE} if "memory_budget" in settings else {}
    return Sample(name, catches, make, kwargs, on_gpu)


def _samples() -> tuple[Sample, ...]:
    """A budget of 40 kB holds some ten rows of 500 columns, which makes several slabs of these samples; on the CPU, beside
    the products' workspace."""
    few: dict[str, Any] = {"memory_budget": WORKSPACE + 40_000}
    make, leading = _heads(3, 11, width=24, vocabulary=500), (3, 11)
    mask = lambda g: _rand(g, *leading) < 0.6  # noqa: E731
    of: dict[str, Any] = {"vocabulary": 500, "leading": leading}
    return (
        _sample("slab", "all rows at once", make, **of),
        _sample("slabs", "weight gradients over several slabs", make, **of, **few),
        _sample("vocabulary", "a wide vocabulary", _heads(5, width=8, vocabulary=20001), 20001, (5,)),
        _sample("narrow", "rows in lanes", _heads(19, width=8, vocabulary=7), 7, (19,)),
        _sample("widths", "a wider teacher", _heads(9, width=8, vocabulary=300, teacher_width=30), 300, (9,)),
        _sample(
            "rows",
            "rows dropped; weight and temperature per row",
            make,
            **of,
            **few,
            mask=mask,
            weight=lambda g: _rand(g, 11),
            temperature=lambda g: 0.5 + 3 * _rand(g, 3, 1),
        ),
        _sample("rows_none", "per-row values and their gradients", make, **of, **few, mask=mask, reduction="none"),
        _sample("sum", "a sum", make, **of, reduction="sum"),
        _sample("batchmean", "divided by the first dimension", make, **of, mask=mask, reduction="batchmean"),
        _sample("num_items", "a denominator of the trainer", make, **of, num_items=lambda g: torch.tensor(17)),
        _sample("padded", "rows of the weight that do not count", make, 480, leading, vocab_size=480, **few),
        _sample("bias", "a bias", make, **of, **few, student_bias=lambda g: torch.randn(500, generator=g).double()),
        _sample("softcap", "a soft-cap", make, **of, **few, student_softcap=5.0),
        _sample("scale", "a scale", make, **of, **few, student_logit_scale=0.3, student_softcap=5.0),
        _sample("smoothed", "label smoothing", make, **of, alpha=0.2, label_smoothing=0.1),
    )


_SMALL: tuple[Any, ...] = (_heads(12, width=8, vocabulary=300), 300, (12,))
_KD_SAMPLES = (
    *_samples(),
    _sample("js", "a second look", *_SMALL, divergence="js_div", beta=0.3),
    _sample("mse", "no distributions", *_SMALL, divergence="logit_mse"),
    _sample("unlabelled", "the divergence alone", *_SMALL, alpha=1.0),
    _sample("softcaps", "a soft-cap of both", *_SMALL, student_softcap=4.0, teacher_softcap=3.0),
    _sample("scales", "scales of both", *_SMALL, student_logit_scale=1.7, teacher_logit_scale=0.6),
)


def _topk_of(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = logits.log_softmax(-1).topk(min(k, logits.shape[-1]))
    return values, indices


def _from_topk(sample: Sample, k: int = 20) -> Sample:
    """With the top-k of the sample's teacher."""

    def make(generator: torch.Generator, gap: float) -> tuple[Any, Any]:
        student, (hidden, weight) = sample.make(generator, gap)
        return student, _topk_of(hidden @ weight[: 480 if sample.name == "padded" else None].T, k)

    return replace(sample, make=make)


def _topk(k: int, *shape: int, missing: bool = False) -> Make:
    def make(generator: torch.Generator, gap: float) -> tuple[Any, Any]:
        teacher = 4 * torch.randn(shape, generator=generator, dtype=torch.float64)
        values, indices = _topk_of(teacher, k)
        if missing:
            values[..., k // 2 :] = -torch.inf
            indices[..., k // 2 :] = 0
        return teacher + gap * torch.randn(shape, generator=generator, dtype=torch.float64), (values, indices)

    return make


def _topk_samples() -> tuple[Sample, ...]:
    rows = {
        "mask": lambda g: _rand(g, 3, 11) < 0.6,
        "weight": lambda g: _rand(g, 11),
        "temperature": lambda g: 0.5 + 3 * _rand(g, 3, 1),
    }
    samples: list[Sample] = []
    for tail in ("bucket", "renormalize", "drop"):
        of: dict[str, Any] = {"tail": tail, "alpha": 1.0}
        samples += [
            _sample(f"{tail}_wide", "several blocks", _topk(64, 2, 50257), 0, (), **of),
            _sample(f"{tail}_odd", "vector tails", _topk(9, 7, 4999), 0, (), **of, temperature=2.0),
            _sample(f"{tail}_all", "k = V", _topk(700, 5, 700), 0, (), **of, reduction="sum"),
            _sample(f"{tail}_missing", "rows of fewer than k", _topk(8, 9, 300, missing=True), 0, (), **of),
            _sample(f"{tail}_classes", "two columns, one of them known", _topk(1, 37, 2), 0, (), **of),
            _sample(f"{tail}_rows", "mask, weight and temperature", _topk(10, 3, 11, 333), 0, (), **of, **rows),
            _sample(f"{tail}_none", "values per row", _topk(10, 11, 130), 0, (), **of, reduction="none"),
        ]
    return tuple(replace(s, kwargs=_without(s.kwargs, "alpha")) for s in samples)


def _without(kwargs: Callable[[torch.Generator], dict[str, Any]], name: str) -> Callable[..., dict[str, Any]]:
    return lambda generator: {k: v for k, v in kwargs(generator).items() if k != name}


def _eager_kd(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, alpha: float
) -> Tensor:
    s, t = (student_hidden @ student_weight.T).float(), (teacher_hidden @ teacher_weight.T).float()
    return alpha * 4 * nn.functional.kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="batchmean")


def _eager_topk(student_logits: Tensor, log_t: Tensor, indices: Tensor) -> Tensor:
    log_s, t = student_logits.float().log_softmax(-1).gather(-1, indices), log_t.exp()
    rest, of_student = (1 - t.sum(-1)).clamp(1e-9), (1 - log_s.exp().sum(-1)).clamp(1e-9)
    return ((t * (log_t - log_s)).sum(-1) + rest * (rest.log() - of_student.log())).mean()


def _eager_linear_topk(hidden: Tensor, weight: Tensor, log_t: Tensor, indices: Tensor, alpha: float) -> Tensor:
    return alpha * 4 * _eager_topk((hidden @ weight.T).float() / 2, log_t, indices)


def _made(shape: tuple[int, ...], options: dict[str, Any]) -> tuple[Any, Any]:
    rows, width, vocabulary = shape
    heads = [(torch.randn(rows, width, **options), torch.randn(vocabulary, width, **options)) for _ in range(2)]
    return tuple((hidden, weight.mul_(3 * width**-0.5)) for hidden, weight in heads)  # type: ignore[return-value]


def _made_topk(shape: tuple[int, ...], options: dict[str, Any]) -> tuple[Any, Any]:
    teacher = torch.randn(shape, **options).mul_(4)
    return teacher + torch.randn(shape, **options), _topk_of(teacher, 64)


def _made_linear_topk(shape: tuple[int, ...], options: dict[str, Any]) -> tuple[Any, Any]:
    student, _ = _made(shape, options)
    return student, _topk_of(torch.randn(shape[0], shape[2], **options).mul_(4), 64)


def _matmul_flops(student: Any, gradient: bool, products: int) -> float:
    hidden, weight = student
    return float(2 * hidden.shape[0] * weight.numel() * (products if gradient else products - 2))


_LINEAR = ("linear_divergence", "divergence", "divergence_into")
_CPU_LINEAR = (
    ((512, 576, 49152), "float32"),
    ((512, 576, 49152), "bfloat16"),
)  # benchmarks/large_vocabulary.py has more
_CUDA_LINEAR = (((8192, 4096, 128256), "bfloat16"),)
LINEAR: dict[str, Operator] = {
    "topk_kl_div": Operator(
        name="topk_kl_div",
        function=topk.topk_kl_div,
        reference=linear_reference.topk_kl_div,
        native=("divergence", "divergence_backward"),
        samples=_topk_samples(),
        eager=_eager_topk,
        make=_made_topk,
        floors=floors.of_topk,
        cpu_shapes=(((64, 152064), "float32"),),
        cuda_shapes=(((8192, 128256), "bfloat16"),),
    ),
    "linear_kd_loss": Operator(
        name="linear_kd_loss",
        function=linear.linear_kd_loss,
        reference=linear_reference.linear_kd_loss,
        native=_LINEAR,
        samples=_KD_SAMPLES,
        eager=_eager_kd,
        make=_made,
        floors=floors.of_products,
        arguments=lambda student: {"alpha": 1.0},
        flops=lambda student, gradient: _matmul_flops(student, gradient, 4),
        cpu_shapes=_CPU_LINEAR,
        cuda_shapes=_CUDA_LINEAR,
    ),
    "linear_topk_kd_loss": Operator(
        name="linear_topk_kd_loss",
        function=linear.linear_topk_kd_loss,
        reference=linear_reference.linear_topk_kd_loss,
        native=_LINEAR,
        samples=tuple(_from_topk(sample) for sample in _samples()),
        eager=_eager_linear_topk,
        make=_made_linear_topk,
        floors=floors.of_products,
        arguments=lambda student: {"alpha": 1.0},
        flops=lambda student, gradient: _matmul_flops(student, gradient, 3),
        cpu_shapes=_CPU_LINEAR[:1],
        cuda_shapes=_CUDA_LINEAR,
    ),
}
