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

import kdfast
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


def planned(columns: int, dtype: torch.dtype, device: Device) -> dict[str, Any]:
    """As the shim describes its device."""
    shared = {"shared_per_block": device.shared, "shared_per_multiprocessor": 3 * (device.shared + 1024)}
    limits = {"multiprocessors": device.multiprocessors, "max_cluster": device.max_cluster} | shared
    flags = {"same_elements": False, "alike": True, "aligned": False, "again": True, "given": False, "topk": True}
    return kdfast._C.cuda_plan(rows=5, columns=columns, element_size=dtype.itemsize, **flags, **limits)


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


@pytest.mark.parametrize("seed", [1, 7])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(
    ("columns", "width", "offset", "dtype", "device", "cluster"),
    [
        pytest.param(1501, 1501, 0, torch.bfloat16, Device(), 1, id="block"),
        pytest.param(1501, 1503, 5, torch.bfloat16, Device(), 1, id="edges"),
        pytest.param(5003, 5003, 0, torch.bfloat16, TINY, 8, id="cluster"),
        pytest.param(5003, 5008, 3, torch.float32, TINY, 16, id="cluster, edges"),
        pytest.param(2600, 2601, 2, torch.float16, TINY, 4, id="cluster of 4"),
        pytest.param(5003, 5003, 1, torch.bfloat16, AMPERE, 0, id="two reads"),
        pytest.param(5003, 5003, 1, torch.float32, AMPERE, 0, id="two reads, float32"),
    ],
)
def test_where_the_student_is_kept(
    shim: ctypes.CDLL,
    columns: int,
    width: int,
    offset: int,
    dtype: torch.dtype,
    device: Device,
    cluster: int,
    tail: str,
    seed: int,
) -> None:
    """The teacher's columns at both edges of the row and of every block; labels among them and not."""
    assert (planned(columns, dtype, device)["cluster"] if cluster else 0) == cluster
    assert planned(columns, dtype, device)["kernel"] == ("on_chip" if cluster else "two_reads")
    case = Case(shim, device, seed, offset=offset)  # gradients as the logits, misaligned alike
    s = logits(5, columns, dtype, width=width, offset=offset)
    teacher = 3 * torch.randn(5, columns)
    teacher[:, :9] += 9
    teacher[:, -9:] += 9
    teacher[:, columns // 2 - 9 : columns // 2 + 9] += 9
    t, indices = topk_of(teacher, 70)
    order = torch.randperm(70)
    of: dict[str, Any] = {"indices": indices[:, order]}
    check(case, s, t[:, order], call(columns, f"topk_{tail}", **of))
    labels = torch.tensor([0, columns - 1, IGNORED, columns // 2 + 100, 8])
    of |= {"labels": labels, "distillation": True, "alpha": 0.6, "smoothing": 0.1}
    of["mask"] = torch.tensor([True, True, True, True, False])
    check(case, s, t[:, order], call(columns, f"topk_{tail}", torch.tensor([4.0, 3.0]), **of))


def test_gradients_unlike_the_logits(shim: ctypes.CDLL) -> None:
    """Misaligned otherwise: single columns; of another dtype, as linear_topk_kd_loss wants them."""
    s, (t, indices) = logits(3, 1501, torch.bfloat16, offset=3), topk_of(3 * torch.randn(3, 1501), 40)
    check(Case(shim, Device(), offset=1), s, t, call(1501, "topk_bucket", indices=indices))
    case = Case(shim, Device())
    for dtype, of_gradient in itertools.permutations(DTYPES, 2):
        s = logits(3, 1501, dtype, width=1504)
        of = call(1501, "topk_bucket", indices=indices)
        loss, _, gradient = exact(s, t, of)
        memory = torch.full((5, 1504), 7.0, dtype=of_gradient)
        ours, _ = case.ops.divergence_into(memory[1:4], s, t, *of.flat(), None, KNOWN_NOTHING)
        assert_close(ours, loss, torch.float32)
        assert_close(memory[1:4], gradient, of_gradient)
        assert (memory[::4] == 7).all()


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
    for columns, device in ((50, Device()), (1501, TINY), (1501, AMPERE)):
        case = Case(shim, device)
        s = logits(4, columns, torch.float32)
        t, indices = topk_of(torch.randn(4, columns), 5)
        indices[1, 3] = indices[1, 0]
        indices[2, 2] = columns
        t[3, 3:], indices[3, 3:] = -torch.inf, 0
        for tail in TAILS:
            of = call(columns, f"topk_{tail}", indices=indices, per_row=True)
            loss, _, gradient = case.ops.divergence(s, t, *of.flat(), None, KNOWN_NOTHING, SAVE_GRADIENT)
            assert loss.isnan().tolist() == [False, True, True, False]
            assert gradient.isnan().any(-1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("gap", [30, 69, 104, 461, 2000, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("columns", "device"),
    [(1501, Device()), (5003, TINY), (5003, AMPERE)],
    ids=["block", "cluster", "two reads"],
)
def test_a_rest_far_below(shim: ctypes.CDLL, columns: int, device: Device, dtype: torch.dtype, gap: float) -> None:
    """Of which a thread sees some before, some beside columns that the teacher has, or nothing else."""
    case = Case(shim, device)
    s = logits(5, columns, torch.float32)
    t, indices = topk_of(3 * torch.randn(5, columns), 9)
    indices[1:] = torch.arange(9) + torch.tensor([[0], [columns - 9], [columns // 2], [8]])
    s -= torch.tensor([gap]).where(torch.ones(5, columns, dtype=torch.bool).scatter(1, indices, False), 0.0)
    s = s.to(dtype)
    check(case, s, t, call(columns, "topk_bucket", indices=indices, temperature=1.0))
    labels = torch.tensor([0, columns - 1, IGNORED, columns // 2 + 100, 8])
    if gap == torch.inf:
        labels = indices[:, 2]
    of = {"indices": indices, "labels": labels, "distillation": True, "alpha": 0.6}
    check(case, s, t, call(columns, "topk_bucket", temperature=1.0, per_row=True, **of))


@pytest.mark.parametrize("gap", [0, 461])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("tail", TAILS)
def test_shards(shim: ctypes.CDLL, tail: str, device: str, gap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the vocabulary, one empty, one without any of the teacher's columns."""

    def all_reduce(x: Tensor, op: Any, group: Any) -> None:  # of states that are stacked over the parts
        x.copy_((x.amax(1, True) if op == torch.distributed.ReduceOp.MAX else x.sum(0, True)).expand_as(x))

    monkeypatch.setattr(_shards.dist, "all_reduce", all_reduce)
    case = Case(shim, Device())
    ops = torch.ops.kdfast if device == "cpu" else case.ops
    monkeypatch.setattr(torch.ops.kdfast, "divergence_referred", ops.divergence_referred)
    s, teacher = logits(6, 1025, torch.float32), 3 * torch.randn(6, 1025)
    teacher[:, 700:] -= 100
    t, indices = topk_of(teacher, 20)
    s -= torch.full((6, 1025), 2.0 * gap).scatter(1, indices, 0.0)
    of = call(1025, f"topk_{tail}", indices=indices, temperature=2.0)
    starts = [0, 300, 300, 700, 1025]
    parts = [
        (s[:, a:b], t, *of._replace(numbers=of.numbers._replace(columns=b - a, vocab_start=a)).flat())
        for a, b in itertools.pairwise(starts)
    ]
    states = torch.stack([ops.divergence(*part, None, KNOWN_NOTHING, SAVE_STATE)[2] for part in parts])
    states = _shards.merged(states, len(KINDS) + TAILS.index(tail), None, 2.0, None)
    made = [ops.divergence(*p, state, KNOWN_EVERYTHING, SAVE_GRADIENT) for p, state in zip(parts, states, strict=True)]
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
