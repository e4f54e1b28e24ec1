"""CUDA source on the CPU (tests/shim.py): teachers known in some columns, and gradients into given memory. The CPU's own
kernels, in float64, are the reference: tests/test_operators.py has compared them with plain torch."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import pytest
import torch
from shim import IGNORED, Case, Device, assert_close, logits, shim
from torch import Tensor

from kdfast.ops import _shards
from kdfast.ops._call import (
    KNOWN_EVERYTHING,
    KNOWN_NOTHING,
    SAVE_GRADIENT,
    SAVE_NOTHING,
    SAVE_STATE,
    Call,
    Numbers,
    RowValues,
)
from kdfast.ops._divergence import ALL_KINDS, KINDS, SECOND_LOOK, TAILS

__all__ = ["shim"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TINY, AMPERE = Device(shared=3 << 10), Device(shared=3 << 10, max_cluster=1)


def topk_of(teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = teacher.float().log_softmax(-1).topk(k)
    return values, indices


def call(columns: int, kind: str, divisor: Tensor | None = None, **of: Any) -> Call:
    rows = RowValues(*(of.pop(name, None) for name in RowValues._fields))
    defaults: dict[str, Any] = {"kind": ALL_KINDS.index(kind), "mixing": 0.3, "temperature": 1.5, "columns": columns}
    defaults |= {"vocabulary": columns, "vocab_start": 0, "scale": 0.5, "per_row": False, "distillation": False}
    return Call(rows, divisor, Numbers(**defaults | {"alpha": 1.0, "smoothing": 0.0, "ignore_index": IGNORED} | of))


def exact(s: Tensor, t: Tensor, of: Call, save: int = SAVE_GRADIENT) -> tuple[Tensor, Tensor, Tensor]:
    real = of.rows.map(lambda x: x.double() if x.dtype == torch.float32 else x)
    of = of._replace(rows=real, divisor=None if of.divisor is None else of.divisor.double())
    return torch.ops.kdfast.divergence(s.double(), t.double(), *of.flat(), None, KNOWN_NOTHING, save)


def check(case: Case, s: Tensor, t: Tensor, of: Call) -> None:
    loss, components, gradient = exact(s, t, of)
    forward, fresh = case.ops.divergence, (None, KNOWN_NOTHING)
    state = forward(s, t, *of.flat(), *fresh, SAVE_STATE)[2]
    made = [
        forward(s, t, *of.flat(), *fresh, SAVE_GRADIENT),
        forward(s, t, *of.flat(), state, KNOWN_EVERYTHING, SAVE_GRADIENT),
    ]
    for value, parts, ours in made:
        assert_close(value, loss, torch.float32)
        assert_close(parts, components, torch.float32)
        assert_close(ours, gradient, s.dtype)
    assert_close(forward(s, t, *of.flat(), *fresh, SAVE_NOTHING)[0], loss, torch.float32)
    backward = case.ops.divergence_backward(2 * torch.ones(loss.shape), state, s, t, *of.flat())
    assert_close(backward / 2, gradient, s.dtype)
    case.clean()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "k"), [(2, 1), (9, 3), (1025, 64), (1025, 1025), (20011, 200)])
def test_values_and_gradients(shim: ctypes.CDLL, columns: int, k: int, dtype: torch.dtype, tail: str) -> None:
    case = Case(shim, Device(), seed=7)
    s = logits(3, columns, dtype, width=columns + 3)
    t, indices = topk_of(3 * torch.randn(3, columns), k)
    t[1, k // 2 :] = -torch.inf if k > 1 else t[1, 0]
    check(case, s, t, call(columns, f"topk_{tail}", indices=indices))
    check(case, s, t.bfloat16(), call(columns, f"topk_{tail}", indices=indices, per_row=True, temperature=1.0))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_and_rows(shim: ctypes.CDLL, tail: str, smoothing: float) -> None:
    """Labels among the teacher's columns and not; a student of strided columns; everything per row."""
    case = Case(shim, Device(), seed=3)
    s = logits(1025, 6, torch.float32).T
    t, indices = topk_of(3 * torch.randn(6, 1025), 32)
    labels = torch.tensor([int(indices[0, 4]), 0, 1024, IGNORED, int(indices[4, 31]), 513])
    mask = torch.tensor([True, True, False, True, True, True])
    rows: dict[str, Any] = {
        "mask": mask,
        "weight": torch.linspace(0.5, 2, 6),
        "row_temperature": torch.linspace(1, 3, 6),
    }
    of = {"indices": indices, "labels": labels, "distillation": True, "alpha": 0.6, "smoothing": smoothing}
    for divisor in (None, torch.tensor(5.0), torch.tensor([3.0, 7.0])):
        for per_row in (False, True):
            check(case, s, t, call(1025, f"topk_{tail}", divisor, **of, **rows, per_row=per_row))
            check(case, s, t, call(1025, f"topk_{tail}", divisor, **of, per_row=per_row))


def test_what_cannot_be(shim: ctypes.CDLL) -> None:
    """A column that comes twice, or is none of the vocabulary: NaN in that row. Padding is neither."""
    case = Case(shim, Device())
    s = logits(4, 50, torch.float32)
    t, indices = topk_of(torch.randn(4, 50), 5)
    indices[1, 3] = indices[1, 0]
    indices[2, 2] = 50
    t[3, 3:], indices[3, 3:] = -torch.inf, 0
    of = call(50, "topk_bucket", indices=indices, per_row=True)
    loss, _, gradient = case.ops.divergence(s, t, *of.flat(), None, KNOWN_NOTHING, SAVE_GRADIENT)
    assert loss.isnan().tolist() == [False, True, True, False]
    assert gradient.isnan().any(-1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("tail", TAILS)
def test_shards(shim: ctypes.CDLL, tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the vocabulary, one empty, one without any of the teacher's columns."""

    def all_reduce(x: Tensor, op: Any, group: Any) -> None:  # of states that are stacked over the parts
        x.copy_((x.amax(1, True) if op == torch.distributed.ReduceOp.MAX else x.sum(0, True)).expand_as(x))

    monkeypatch.setattr(_shards.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.ops.kdfast, "divergence_referred", torch.ops.kdfast_cuda_host.divergence_referred)
    case = Case(shim, Device())
    s, teacher = logits(6, 1025, torch.float32), 3 * torch.randn(6, 1025)
    teacher[:, 700:] -= 100
    t, indices = topk_of(teacher, 20)
    of = call(1025, f"topk_{tail}", indices=indices, temperature=2.0)
    starts = [0, 300, 300, 700, 1025]
    parts = [
        (s[:, a:b], t, *of._replace(numbers=of.numbers._replace(columns=b - a, vocab_start=a)).flat())
        for a, b in itertools.pairwise(starts)
    ]
    states = torch.stack([case.ops.divergence(*part, None, KNOWN_NOTHING, SAVE_STATE)[2] for part in parts])
    states = _shards.merged(states, len(KINDS) + TAILS.index(tail), None, 2.0, None)
    made = [
        case.ops.divergence(*p, state, KNOWN_EVERYTHING, SAVE_GRADIENT) for p, state in zip(parts, states, strict=True)
    ]
    loss, _, gradient = exact(s, t, of)
    for value, _, _ in made:
        assert_close(value, loss, torch.float32)
    assert_close(torch.cat([ours for *_, ours in made], -1), gradient, torch.float32)
    case.clean()


@pytest.mark.parametrize("of_gradient", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["kl_div", "js_div"])
@pytest.mark.parametrize(
    ("columns", "width", "offset", "device"),
    [
        pytest.param(6, 6, 0, Device(), id="lane"),
        pytest.param(50, 51, 0, Device(), id="lanes"),
        pytest.param(512, 512, 0, Device(), id="vectors"),
        pytest.param(1501, 1536, 0, Device(), id="block"),
        pytest.param(1501, 1536, 0, TINY, id="cluster"),
        pytest.param(1501, 1536, 0, AMPERE, id="two reads"),
        pytest.param(1501, 1501, 1, Device(), id="any layout"),
    ],
)
def test_gradient_into_given_memory(
    shim: ctypes.CDLL,
    columns: int,
    width: int,
    offset: int,
    device: Device,
    kind: str,
    dtype: torch.dtype,
    of_gradient: torch.dtype,
) -> None:
    """Gradients of another dtype than the logits', padding cleared; what is before and after stays."""
    assert kind in KINDS
    case = Case(shim, device)
    s, t = (logits(6, columns, dtype, width=width, offset=offset) for _ in range(2))
    labels = torch.tensor([0, columns - 1, IGNORED, columns // 2, columns - 2, 3])
    of = call(columns, kind, labels=labels, distillation=True, alpha=0.4, smoothing=0.1)
    of = of._replace(divisor=torch.tensor([6.0, 5.0]))
    loss, components, gradient = exact(s, t, of)
    memory = torch.full((8, width), 7.0, dtype=of_gradient)
    state = case.ops.divergence(s, t, *of.flat(), None, KNOWN_NOTHING, SAVE_STATE)[2]
    for known, given in ((KNOWN_NOTHING, None), (KNOWN_EVERYTHING, state)):
        memory[1:7] = torch.nan
        ours, parts = case.ops.divergence_into(memory[1:7], s, t, *of.flat(), given, known)
        assert_close(ours, loss, torch.float32)
        assert_close(parts, components, torch.float32)
        assert_close(memory[1:7], gradient, of_gradient)
        assert (memory[::7] == 7).all()
        assert (memory[1:7, columns:] == 0).all()
    assert kind not in SECOND_LOOK or state.isfinite().all()
    case.clean()
