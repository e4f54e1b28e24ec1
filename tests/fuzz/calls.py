"""Random calls of an operator, made of the registry's samples: sizes, gaps, strides, dtypes, options of other samples, numbers
that are not finite; and one thing that is wrong in some."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from accuracy import with_trained
from hypothesis import strategies as st
from templates import Template, fitted, leaves, resized, sizes_of, templates
from torch import Tensor

from kdfast import _C
from kdfast.bench.registry import OPERATORS
from kdfast.bench.registry.operator import Side, cast, mapped

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (0, 1, 2, 3, 5, 8, 16, 17, 31, 33, 64, 65, 129)
NOT_FINITE = (-torch.inf, torch.inf, torch.nan)
WRONG: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 1.5, -0.5, 1e4, float("nan"), float("inf"), "bogus", "", [], [1.0, "a"], (2, 3), {}),
    *(torch.tensor(3), torch.tensor(2.5), torch.zeros(2, 3), torch.ones(1, dtype=torch.bool), torch.zeros(0), object()),
)
BROKEN = (
    "int64",
    "bool",
    "complex64",
    "a dimension less",
    "a dimension more",
    "longer",
    "None",
    "a list",
    "numbers",
    "scalar",
)
NEEDED = ("layout", "labels")
STRIDES = ("as it is", "dense", "turned", "every second", "margins")
rarely = st.integers(0, 5).map(lambda n: n == 0)


@dataclass
class Call:
    """Arguments in the dtypes of the call; `exact` is whether something was made wrong on purpose."""

    student: Side
    teacher: Side
    kwargs: dict[str, Any]
    dtypes: tuple[torch.dtype, torch.dtype]
    variant: str
    story: list[str]


@functools.cache
def _templates(name: str) -> list[Template]:
    return templates(OPERATORS[name])


@st.composite
def calls(draw: st.DrawFn, name: str) -> Call:
    template = draw(st.sampled_from(_templates(name)))
    seed, gap = draw(st.integers(0, 999)), draw(st.sampled_from((1.0, 0.05, 0.0, 4.0)))
    story = [f"{template.sample.name}, seed {seed}, gap {gap}"]
    sizes = {n: draw(st.sampled_from((*(n,) * (8 if n < 300 else 2), *SIZES))) for n in sizes_of(template)}
    student, teacher = resized(template, gap, seed, sizes)
    kwargs = _options(draw, template, leaves(student, teacher), seed)
    if draw(rarely):
        student, teacher = _poisoned(draw, student, teacher, seed, story)
    dtypes = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    student, teacher = cast(student, dtypes[0]), cast(teacher, dtypes[1])
    kwargs = with_trained(kwargs, dtypes[0])
    student, teacher = (mapped(lambda x: _laid(x, draw(st.sampled_from(STRIDES))), side) for side in (student, teacher))
    if draw(rarely):
        student, teacher, kwargs = _wrong(draw, name, student, teacher, kwargs, story)
    return Call(student, teacher, kwargs, dtypes, draw(st.sampled_from(_C.cpu_variants())), story)


def _options(draw: st.DrawFn, template: Template, given: list[Tensor], seed: int) -> dict[str, Any]:
    """The sample's, less some, and some of other samples."""
    chosen = {name: keyword for name, keyword in template.own.items() if name in NEEDED or not draw(rarely)}
    others = sorted(template.keywords.keys() - {*NEEDED})
    if others:
        for name in draw(st.lists(st.sampled_from(others), max_size=3, unique=True)):
            chosen[name] = draw(st.sampled_from(template.keywords[name]))
    kwargs = {name: fitted(keyword, given, seed + i) for i, (name, keyword) in enumerate(chosen.items())}
    for name, value in kwargs.items():
        if isinstance(value, float):
            kwargs[name] = draw(st.sampled_from((value, value, value, 0.0, 1.0, 0.5, 8.0)))
        elif isinstance(value, Tensor) and value.dtype == torch.bool and draw(rarely):
            kwargs[name] = torch.full_like(value, draw(st.booleans()))
    return kwargs


def _poisoned(draw: st.DrawFn, student: Side, teacher: Side, seed: int, story: list[str]) -> tuple[Side, Side]:
    """With a number that is not finite in places of one side or of both: in a few, in a row or in a column."""
    number = draw(st.sampled_from(NOT_FINITE))
    where = draw(st.sampled_from(("few", "row", "column")))
    which = draw(st.sampled_from(((0,), (1,), (0, 1))))
    story.append(f"{number} in {where} of {which}")
    sides = [student, teacher]

    def poison(x: Tensor) -> Tensor:
        if not x.is_floating_point() or not x.numel() or x.dim() == 0:
            return x
        generator = torch.Generator().manual_seed(seed)
        rows = x.reshape(-1, x.shape[-1]).clone()
        row, column = (int(torch.randint(n, (), generator=generator)) for n in rows.shape)
        if where == "few":
            rows[torch.rand(rows.shape, generator=generator) < 2 / rows.numel()] = number
        elif where == "row":
            rows[row] = number
        else:
            rows[:, column] = number
        return rows.view(x.shape)

    for side in which:
        sides[side] = mapped(poison, sides[side])
    return sides[0], sides[1]


def _laid(x: Tensor, how: str) -> Tensor:
    """In memory whose other numbers are NaN."""
    if how == "as it is" or not x.is_floating_point() or x.dim() == 0:
        return x
    if how == "dense":
        return x.contiguous()
    if how == "turned":
        return x.mT.contiguous().mT if x.dim() > 1 else x
    if how == "every second":
        return torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]
    room = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
    room[..., 1:-2] = x
    return room[..., 1:-2]


def _wrong(
    draw: st.DrawFn, name: str, student: Side, teacher: Side, kwargs: dict[str, Any], story: list[str]
) -> tuple[Side, Side, dict[str, Any]]:
    """With an argument that is something else, or a tensor that is another one."""
    parameters = inspect.signature(OPERATORS[name].function).parameters.values()
    keywords = [
        p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY and not p.name.startswith("return_")
    ]
    if keywords and draw(st.booleans()):
        keyword, value = draw(st.sampled_from(keywords)), draw(st.sampled_from(WRONG))
        story.append(f"{keyword} = {value!r}")
        return student, teacher, kwargs | {keyword: value}
    count = len(leaves(student, teacher))
    at, how = draw(st.integers(0, max(count - 1, 0))), draw(st.sampled_from(BROKEN))
    story.append(f"tensor {at}: {how}")
    seen = iter(range(count))

    def change(side: Side) -> Side:
        if isinstance(side, tuple):
            return tuple(change(x) for x in side)
        if next(seen) != at:
            return side
        return [_broken(side[0], how), *side[1:]] if isinstance(side, list) and side else _broken(side, how)

    return change(student), change(teacher), kwargs


def _broken(x: Any, how: str) -> Any:
    if how == "None" or not isinstance(x, Tensor):
        return None
    if how in ("int64", "bool", "complex64"):
        return x.to(getattr(torch, how))
    changed: dict[str, Any] = {
        "a dimension less": x.flatten(0, 1) if x.dim() > 1 else x,
        "a dimension more": x[None],
        "longer": torch.cat((x, x[..., :1]), -1) if x.dim() else x,
        "a list": [x],
        "numbers": x.tolist(),
        "scalar": x.sum(),
    }
    return changed[how]
