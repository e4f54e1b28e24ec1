"""The distances between layers: attentions, hidden states, CLS tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.bench.registry import floors
from kdfast.bench.registry.operator import Floors, Operator, Sample, Shape, Side
from kdfast.ops import attention, hidden, layer_reference, qk

Make = Callable[[torch.Generator, float], tuple[Side, Side]]


def _near(*shape: int, layers: int | None = None, size: float = 3.0) -> Make:
    """Layers of a teacher, and of a student `gap` beside it; `layers` None: a single tensor."""

    def make(generator: torch.Generator, gap: float) -> tuple[Side, Side]:
        options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
        teacher = [size * torch.randn(shape, **options) for _ in range(layers or 1)]
        student = [t + gap * torch.randn(shape, **options) for t in teacher]
        return (student, teacher) if layers else (student[0], teacher[0])

    return make


def _strided(*shape: int) -> Make:
    """Tokens before heads in memory, as models have them, and numbers two apart."""

    def make(generator: torch.Generator, gap: float) -> tuple[Side, Side]:
        b, h, rows, columns = shape
        student, teacher = _near(b, rows, h, 2 * columns)(generator, gap)
        return student.transpose(1, 2)[..., ::2], teacher.transpose(1, 2)[..., 1::2]

    return make


def _apart(student: tuple[int, ...], teacher: tuple[int, ...], layers: int) -> Make:
    """Layers of different shapes: the gap says nothing."""

    def make(generator: torch.Generator, gap: float) -> tuple[Side, Side]:
        options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
        one, other = ([torch.randn(shape, **options) for _ in range(layers)] for shape in (student, teacher))
        return one, other

    return make


def _pair(first: Make, second: Make) -> Make:
    """Queries and keys."""

    def make(generator: torch.Generator, gap: float) -> tuple[Side, Side]:
        (sq, tq), (sk, tk) = first(generator, gap), second(generator, gap)
        return (sq, sk), (tq, tk)

    return make


def _heads(*shape: int, layers: int | None = None) -> Make:
    return _pair(_near(*shape, layers=layers, size=1.5), _near(*shape, layers=layers, size=1.5))


def _mask(generator: torch.Generator, *shape: int) -> Tensor:
    mask = torch.rand(shape, generator=generator) < 0.7
    mask[:, 0] = True
    return mask


def _floored(generator: torch.Generator, gap: float) -> tuple[Side, Side]:
    student, teacher = _near(2, 3, 9, 20)(generator, gap)
    student[:, :, :, 15:] -= 10000
    teacher[:, :, :, 14:] -= 10000
    student[0, 0, 0, 0] = -100  # at the floor
    return student, teacher


def _infinite_keys(generator: torch.Generator, gap: float) -> tuple[Side, Side]:
    student, teacher = _near(2, 3, 9, 40)(generator, gap)
    student[:, :, :, 30:] = teacher[:, :, :, 30:] = -torch.inf
    return student, teacher


def _score_samples() -> tuple[Sample, ...]:
    return (
        Sample("single", "one layer, no masks, an odd length", _near(2, 3, 17, 17)),
        Sample(
            "masked",
            "both masks, a mask that broadcasts, several layers and their weights",
            _near(3, 4, 37, 37, layers=2),
            lambda g: {"key_mask": _mask(g, 3, 37), "query_mask": _mask(g, 1, 37), "layer_weight": [1.0, 0.5]},
        ),
        Sample(
            "mapped",
            "heads of their own for each layer, and skipped ones",
            _apart((2, 3, 18, 18), (2, 5, 18, 18), 2),
            lambda g: {"head_map": [[4, -1, 0], [1, 1, 2]], "key_mask": _mask(g, 2, 18)},
        ),
        Sample(
            "per_head",
            "values of heads and their gradients",
            _near(2, 3, 19, 19, layers=2),
            lambda g: {"key_mask": _mask(g, 2, 19), "query_mask": _mask(g, 2, 19), "reduction": "none"},
        ),
        Sample("strided", "heads and numbers that memory keeps apart", _strided(2, 3, 16, 33)),
        Sample("long", "rows of several blocks", _near(1, 2, 3, 2100), lambda g: {"reduction": "batchmean"}),
    )


def _token_samples() -> tuple[Sample, ...]:
    return (
        Sample("single", "one layer, an odd width", _near(3, 7, 70)),
        Sample(
            "masked",
            "a mask, several layers and their weights",
            _near(3, 9, 96, layers=3),
            lambda g: {"mask": _mask(g, 3, 9), "layer_weight": [1.0, 0.5, 2.0]},
        ),
        Sample(
            "per_token",
            "values of tokens and their gradients",
            _near(2, 5, 33, layers=2),
            lambda g: {"mask": _mask(g, 2, 5), "reduction": "none"},
        ),
        Sample("wide", "rows of several blocks", _near(2, 3, 2500), lambda g: {"reduction": "sum"}),
        Sample("far", "a student that is not near its teacher", _apart((3, 5, 40), (3, 5, 40), 2)),
    )


def _projected(generator: torch.Generator) -> dict[str, Any]:
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    return {"projection": torch.randn(24, 16, **options) / 4, "bias": torch.randn(24, **options)}


def _cls_samples() -> tuple[Sample, ...]:
    last = {"token_index": -1, "layer_weight": [0.5, 0.25]}
    return (
        Sample("first", "one layer", _near(4, 6, 48)),
        Sample("last", "a token from the end, several layers", _near(3, 5, 70, layers=2), lambda g: dict(last)),
        Sample(
            "each_its_own",
            "a token for every sequence",
            _near(3, 5, 32, layers=2),
            lambda g: {"token_index": torch.tensor([0, 4, 2]), "reduction": "none"},
        ),
        Sample("raw", "norms that count", _near(3, 5, 40, layers=2), lambda g: {"normalize": False}),
        Sample("far", "a student that is not near its teacher", _apart((3, 5, 40), (3, 5, 40), 2)),
        Sample("tokens", "the tokens alone", _near(5, 24, layers=2)),
    )


def _qk_samples() -> tuple[Sample, ...]:
    masks = lambda g, b, n: {"key_mask": _mask(g, b, n), "query_mask": _mask(g, b, n)}  # noqa: E731
    return (
        Sample("scores", "so short that scores are made", _heads(2, 3, 37, 24)),
        Sample("grams", "the linear form; widths of no whole vector", _heads(1, 2, 401, 20)),
        Sample("masked", "both masks, several layers", _heads(2, 2, 320, 16, layers=2), lambda g: masks(g, 2, 320)),
        Sample(
            "per_head",
            "values of heads and their gradients",
            _heads(2, 3, 50, 16, layers=2),
            lambda g: masks(g, 2, 50) | {"reduction": "none"},
        ),
        Sample(
            "shared_keys",
            "groups of heads with one key head; head sizes that differ; heads of their own",
            _pair(_apart((2, 4, 30, 12), (2, 6, 30, 20), 2), _apart((2, 2, 30, 12), (2, 3, 30, 20), 2)),
            lambda g: {"head_map": [5, 0, -1, 2], "layer_weight": [1, 2], "reduction": "sum"},
        ),
        Sample(
            "shared_keys_grams",
            "the same in the linear form",
            _pair(_apart((1, 4, 300, 12), (1, 6, 300, 20), 1), _apart((1, 2, 300, 12), (1, 3, 300, 20), 1)),
            lambda g: {"head_map": [5, 0, -1, 2], "key_mask": _mask(g, 1, 300)},
        ),
        Sample("strided", "tokens before heads", _pair(_strided(2, 3, 33, 16), _strided(2, 3, 33, 16))),
        Sample("causal", "made scores above the diagonal", _heads(2, 2, 50, 16), lambda g: {"is_causal": True}),
        Sample(
            "causal_grams",
            "prefix sums, and masks",
            _heads(1, 2, 400, 16),
            lambda g: masks(g, 1, 400) | {"is_causal": True, "student_scale": 0.3, "teacher_scale": 0.2},
        ),
    )


def _relation_samples() -> tuple[Sample, ...]:
    return (
        Sample("one_tile", "all keys at once", _heads(2, 3, 37, 24)),
        Sample("tiles", "keys of several tiles", _heads(1, 2, 1000, 16), lambda g: {"key_mask": _mask(g, 1, 1000)}),
        Sample(
            "resplit",
            "relation heads; widths that differ",
            _pair(_apart((2, 4, 30, 12), (2, 6, 30, 20), 2), _apart((2, 4, 30, 12), (2, 6, 30, 20), 2)),
            lambda g: {"relation_heads": 8, "key_mask": _mask(g, 2, 30), "query_mask": _mask(g, 2, 30)},
        ),
        Sample(
            "per_head",
            "values of heads and their gradients",
            _heads(2, 3, 50, 16, layers=2),
            lambda g: {"query_mask": _mask(g, 2, 50), "reduction": "none", "layer_weight": [1, 3]},
        ),
    )


# ---- benchmarks ----
def _made_scores(shape: tuple[int, ...], options: dict[str, Any]) -> tuple[Side, Side]:
    layers, *of_layer = shape
    teacher = [torch.randn(of_layer, **options) for _ in range(layers)]
    return [t + 0.3 * torch.randn(of_layer, **options) for t in teacher], teacher


def _made_heads(shape: tuple[int, ...], options: dict[str, Any]) -> tuple[Side, Side]:
    (sq, tq), (sk, tk) = (_made_scores((1, *shape), options) for _ in range(2))
    return (sq[0], sk[0]), (tq[0], tk[0])


def _summed(of: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda student, teacher: torch.stack([of(s, t) for s, t in zip(student, teacher, strict=True)]).sum()


def _eager_cls(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (nn.functional.normalize(x[:, 0], dim=-1) for x in (student, teacher))
    return nn.functional.mse_loss(s, t)


def _eager_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    width = student.shape[-1]
    target = torch.ones(student.numel() // width, device=student.device)
    return nn.functional.cosine_embedding_loss(student.reshape(-1, width), teacher.reshape(-1, width), target)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * math.sqrt(1 / q.shape[-1])


def _eager_qk(student_q: Tensor, student_k: Tensor, teacher_q: Tensor, teacher_k: Tensor) -> Tensor:
    return nn.functional.mse_loss(_scores(student_q, student_k), _scores(teacher_q, teacher_k))


def _eager_kl(student: Tensor, teacher: Tensor) -> Tensor:
    rows = student.numel() // student.shape[-1]
    return nn.functional.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="sum") / rows


def _eager_relation(student_a: Tensor, student_b: Tensor, teacher_a: Tensor, teacher_b: Tensor) -> Tensor:
    return _eager_kl(_scores(student_a, student_b), _scores(teacher_a, teacher_b))


def _gram_flops(student: Side, gradient: bool) -> float:
    """The linear form's: two Gram matrices 2d wide, and two products with them."""
    batch, heads, length, size = student[0].shape
    return float(2 * batch * heads * length * size**2 * (12 if gradient else 8))


def _relation_flops(student: Side, gradient: bool) -> float:
    batch, heads, length, size = student[0].shape
    return float(2 * batch * heads * length**2 * size * (4 if gradient else 2))


# The CPU's and the GPU's.
_Shapes = tuple[tuple[Shape, ...], tuple[Shape, ...]]
_SCORES: _Shapes = (
    (((4, 8, 12, 128, 128), "float32"), ((4, 2, 12, 512, 512), "float32"), ((4, 8, 12, 128, 128), "bfloat16")),
    (((4, 16, 12, 512, 512), "bfloat16"),),
)
_HIDDEN: _Shapes = (
    (((5, 32, 128, 384), "float32"), ((5, 32, 128, 768), "bfloat16")),
    (((13, 64, 512, 768), "bfloat16"),),
)
_CLS: _Shapes = (
    (((12, 4, 64, 384), "float32"), ((12, 32, 128, 768), "float32")),
    (((12, 64, 512, 768), "bfloat16"),),
)
_HEADS: _Shapes = (
    (
        ((8, 12, 16, 32), "float32"),
        ((8, 12, 128, 32), "float32"),
        ((2, 12, 512, 64), "float32"),
        ((2, 12, 2048, 64), "float32"),
        ((2, 12, 2048, 64), "bfloat16"),
    ),
    (((8, 12, 4096, 64), "float32"), ((8, 12, 128, 64), "float32"), ((8, 12, 4096, 64), "bfloat16")),
)
_RELATIONS: _Shapes = (
    (((8, 12, 128, 32), "float32"), ((2, 12, 512, 64), "float32")),
    (((16, 12, 512, 64), "float32"), ((16, 12, 512, 64), "bfloat16")),
)


def _operator(
    name: str,
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    native: str,
    floors: Floors,
    samples: tuple[Sample, ...],
    eager: Callable[..., Tensor],
    shapes: _Shapes,
    **more: Any,
) -> Operator:
    return Operator(
        name, function, reference, (native, native + "_backward"), samples, eager, floors=floors,
        cpu_shapes=shapes[0], cuda_shapes=shapes[1], **({"make": _made_scores} | more),
    )  # fmt: skip


_of = functools.partial
LAYERS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        _operator(
            "attention_mse", attention.attention_mse, _of(layer_reference.attention, "mse"),
            "layer_distance", floors.of_results,
            (
                *_score_samples(),
                Sample("floor", "TinyBERT's masks", _floored, lambda g: {"floor": -100}),
                Sample("head_weight", "weights of heads", _near(2, 3, 8, 8), lambda g: {"head_weight": [1, 0.5, 2]}),
            ),
            _summed(nn.functional.mse_loss), _SCORES,
        ),
        _operator(
            "attention_kl", attention.attention_kl, _of(layer_reference.attention, "kl"),
            "layer_distance", floors.of_scores(1),
            (*_score_samples(), Sample("infinities", "a mask that was added", _infinite_keys)),
            _summed(_eager_kl), _SCORES,
        ),
        _operator(
            "qk_attention_mse", qk.qk_attention_mse, _of(layer_reference.qk, "mse"),
            "qk_distance", floors.of_results, _qk_samples(), _eager_qk, _HEADS,
            make=_made_heads, flops=_gram_flops,
        ),
        _operator(
            "qk_relation_kl", qk.qk_relation_kl, _of(layer_reference.qk, "kl"),
            "qk_distance", floors.of_scores(2), _relation_samples(), _eager_relation, _RELATIONS,
            make=_made_heads, flops=_relation_flops,
        ),
        _operator(
            "hidden_mse", hidden.hidden_mse, _of(layer_reference.hidden, "mse"),
            "layer_distance", floors.of_results,
            (
                *_token_samples(),
                Sample("projected", "widths that differ", _apart((2, 5, 16), (2, 5, 24), 2), _projected),
            ),
            _summed(nn.functional.mse_loss), _HIDDEN,
        ),
        _operator(
            "cosine_distance", hidden.cosine_distance, _of(layer_reference.hidden, "cosine"),
            "layer_distance", floors.of_results, _token_samples(), _summed(_eager_cosine), _HIDDEN,
        ),
        _operator(
            "cls_distance", hidden.cls_distance, layer_reference.cls,
            "layer_distance", floors.of_results, _cls_samples(), _summed(_eager_cls), _CLS,
            reads=lambda x: x.numel() // x.shape[-2],
        ),
    )
}  # fmt: skip
