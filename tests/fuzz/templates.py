"""The registry's samples as templates of calls: the same arguments in other sizes.

Where a sample's arguments have a size in common they keep one in common: each size of student and teacher (the number of
layers is one too) gets another, and a keyword argument's sizes follow those that they equal there. Integers follow the size
that they count to, as labels and indices do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdfast.bench.registry import Operator, Sample
from kdfast.bench.registry.operator import Side
from kdfast.ops._block_layout import BlockLayout

MOST_NUMBERS = 8_000  # of a tensor whose sizes may be others
Origin = tuple[int, int]  # a leaf and a dimension of it, from its end


@dataclass
class Keyword:
    """A keyword argument of a sample; `sizes` and `counts_to` are where its sizes, and the bound of its integers, come from
    (None: from nowhere)."""

    value: Any
    sizes: list[Origin | None]
    counts_to: Origin | None


@dataclass
class Template:
    """A sample's arguments. `keywords`: of every sample of the operator, by name."""

    operator: Operator
    sample: Sample
    own: dict[str, Keyword]
    keywords: dict[str, list[Keyword]]


def templates(operator: Operator) -> list[Template]:
    made = [Template(operator, sample, _keywords(sample), {}) for sample in operator.samples]
    every: dict[str, list[Keyword]] = {}
    for template in made:
        for name, keyword in template.own.items():
            every.setdefault(name, []).append(keyword)
        template.keywords = every
    return made


def leaves(student: Side, teacher: Side) -> list[Tensor]:
    """The tensors of both, in turn; of layers, all in one tensor, which the layers' number leads."""
    sides = [x for side in (student, teacher) for x in (side if isinstance(side, tuple) else (side,))]
    return [(torch.stack(x) if x else torch.empty(0)) if isinstance(x, list) else x for x in sides]


def _keywords(sample: Sample) -> dict[str, Keyword]:
    generator = torch.Generator().manual_seed(7)
    student, teacher = sample.make(generator, 1.0)
    shapes = [x.shape for x in leaves(student, teacher)]
    places = [(n, (i, d - len(shape))) for i, shape in enumerate(shapes) for d, n in enumerate(shape)]
    layers = isinstance(student[0], list) or isinstance(student, list)
    # Tensors are of what is in layers, lists of the layers if they can be.
    inside = [(n, (i, d)) for n, (i, d) in places if not layers or d != -len(shapes[i])]

    def of(value: Any) -> Keyword:
        array = _array(value)
        if array is None:
            return Keyword(value, [], None)
        found = inside if isinstance(value, Tensor) else places
        sizes = [next((at for size, at in found if size == n != 1), None) for n in array.shape]
        most = 0 if array.is_floating_point() or array.dtype == torch.bool or not array.numel() else int(array.max())
        # A number is a size or below one; what is in a list or tensor, an index.
        at_least = most if array.dim() == 0 else most + 1
        larger = [(size, at) for size, at in found if size >= at_least > 1]
        return Keyword(value, sizes, min(larger, key=lambda x: x[0])[1] if larger else None)

    return {name: of(value) for name, value in sample.kwargs(generator).items()}


def _array(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (bool, str)) or value is None or isinstance(value, (BlockLayout, Mapping)):
        return None
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


def sizes_of(template: Template) -> list[int]:
    """The sizes that may be others; those beside an object are its own, but for the leading dimensions of the first tensor."""
    student, teacher = template.sample.make(torch.Generator().manual_seed(0), 1.0)
    given = leaves(student, teacher)
    sizes = {n for x in given for n in x.shape}
    if any(isinstance(keyword.value, BlockLayout) for keyword in template.own.values()):
        sizes = {*given[0].shape[:-1]} - {given[0].shape[-1], *(n for x in given[1:] for n in x.shape)}
    return sorted(sizes - {0, 1})


def resized(template: Template, gap: float, seed: int, sizes: Mapping[int, int]) -> tuple[Side, Side]:
    """Student and teacher with other sizes, by the sizes that they have in the sample."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = template.sample.make(generator, gap)
    given = leaves(student, teacher)
    chosen = {n: sizes.get(n, n) for x in given for n in x.shape}
    for x in given:
        while _numbers(x, chosen) > MOST_NUMBERS and (free := {*x.shape} & sizes.keys()):
            chosen[max(free, key=lambda n: chosen[n])] //= 2
    picks = {n: _pick(n, m, generator) for n, m in chosen.items()}
    integers = [x for x in given if not x.is_floating_point()]
    vocabulary = max(chosen.values(), default=0) if not integers else _of_indices(given, integers[0], chosen)

    def other(x: Tensor) -> Tensor:
        for d, n in enumerate(x.shape):
            if n != chosen[n]:
                x = x.index_select(d, picks[n])
        return x if x.is_floating_point() else spread(x, vocabulary)

    def like(side: Side) -> Side:
        if isinstance(side, tuple):
            return tuple(like(x) for x in side)
        return list(other(torch.stack(side)).unbind()) if isinstance(side, list) else other(side)

    return like(student), like(teacher)


def _of_indices(given: list[Tensor], indices: Tensor, chosen: Mapping[int, int]) -> int:
    """The new size of what a teacher's indices count to."""
    most = int(indices.max()) + 1
    return chosen[min(n for x in given for n in x.shape if n >= most)]


def _numbers(x: Tensor, chosen: Mapping[int, int]) -> int:
    """How many a tensor has, or would have: what has no features may still have scores."""
    return math.prod(max(chosen[n], 1) for n in x.shape)


def _pick(old: int, new: int, generator: torch.Generator) -> Tensor:
    """Which of the old places the new ones have, in order; repeated where there are more."""
    if new <= old:
        return torch.randperm(old, generator=generator)[:new].sort().values
    return torch.cat((torch.arange(old), torch.randint(old, (new - old,), generator=generator)))


def spread(x: Tensor, count: int) -> Tensor:
    """Integers below `count` in the same order along the last dimension, none twice if there are enough; negative ones (what
    is ignored, or skipped) stay."""
    ranks = x.argsort(dim=-1, stable=True).argsort(-1) * count // max(x.shape[-1], 1)
    return torch.where(x < 0, x, ranks.to(x.dtype))


def fitted(keyword: Keyword, given: list[Tensor], seed: int) -> Any:
    """A keyword argument for student and teacher of other sizes (`given`: as `leaves`)."""
    generator = torch.Generator().manual_seed(seed)
    array = _array(keyword.value)
    if array is None or (array.dim() and not array.numel()):
        return keyword.value
    count = None if keyword.counts_to is None else _size(keyword.counts_to, given)
    if array.dim() == 0:
        if count is None or isinstance(keyword.value, Tensor):
            return keyword.value
        return count if keyword.value < 2 else max(1, min(int(keyword.value), count))
    shape = [n if at is None else _size(at, given) for n, at in zip(array.shape, keyword.sizes, strict=True)]
    while len(shape) > 1 and not _is_there(keyword.sizes[-len(shape)], given):
        del shape[0]
    places = torch.randint(array.numel(), shape, generator=generator)
    made = array.flatten()[places]
    if count is not None:
        made = spread(made.sort(-1).values if _is_sorted(array) else made, count)
    return made if isinstance(keyword.value, Tensor) else made.tolist()


def _is_sorted(x: Tensor) -> bool:
    return x.dim() == 1 and bool((x.diff() > 0).all())


def _size(origin: Origin, given: list[Tensor]) -> int:
    leaf, dimension = origin
    return given[leaf].shape[dimension] if _is_there(origin, given) else 1


def _is_there(origin: Origin | None, given: list[Tensor]) -> bool:
    return origin is None or (origin[0] < len(given) and -origin[1] <= given[origin[0]].dim())
