"""The CUDA kernels' own source, run on the CPU by the host shim (tests/cuda_host), against plain torch in float64.

The device is described by each test: a small shared memory makes rows of a few thousand columns take clusters. Outputs
start as NaN between canaries; masked rows and padding columns hold NaN, so that reading them shows.
"""

from __future__ import annotations

import ctypes
import itertools
import platform
from dataclasses import replace
from typing import Any

import pytest
import torch
from shim import BATCHMEAN, IGNORED, MEAN, NONE, SUM, Case, Device, Loss, assert_close, logits, shim
from torch import Tensor

import kdfast
from kdfast.ops import _shards
from kdfast.ops._call import (
    KNOWN_EVERYTHING,
    KNOWN_NORMALISERS,
    KNOWN_NOTHING,
    SAVE_GRADIENT,
    SAVE_NOTHING,
    SAVE_STATE,
    STATE_SIZE,
)
from kdfast.ops._divergence import KINDS, SECOND_LOOK

__all__ = ["shim"]  # a fixture
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the shim switches fibers on x86-64 only")

BOTH_ORDERS = pytest.mark.parametrize("seed", [0, 7], ids=["ordered", "shuffled"])
ALL_ORDERS = pytest.mark.parametrize("seed", [0, 1, 7], ids=["ordered", "block by block", "shuffled"])
# One that looks once at the rows, and one that looks twice.
BOTH_LOOKS = pytest.mark.parametrize("kind", ["kl_div", "js_div"])


# 102 vectors of each of the logits fit a block: 816 columns of bfloat16.
TINY = Device(shared=4 << 10)
TINY_AMPERE = Device(shared=4 << 10, max_cluster=1)


# Small rows: a lane, 8 lanes, a warp; whole vectors or not. The last two do not fill their block's last warp.
@BOTH_ORDERS
@BOTH_LOOKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 2, 8, 9, 64, 65, 250, 256, 1000, 1024])
def test_registers(shim: ctypes.CDLL, columns: int, dtype: torch.dtype, kind: str, seed: int) -> None:
    case = Case(shim, Device(), seed)
    case.check(logits(7, columns, dtype), logits(7, columns, dtype), Loss(kind))
    case.check(logits(3, columns, dtype, offset=3), logits(3, columns, dtype, offset=1), Loss(kind))


def test_sums_in_two_stages(shim: ctypes.CDLL) -> None:
    """The last part is shorter; components have sums of their own."""
    s, t = (logits(33001, 2, torch.float32) for _ in range(2))
    of = Loss(labels=torch.arange(33001) % 2, alpha=0.3, reduction=MEAN)
    Case(shim, Device()).check(s, t, of)
    Case(shim, Device()).check(s, t, Loss(reduction=MEAN))


@BOTH_LOOKS
@pytest.mark.parametrize(
    ("columns", "device", "room", "asked"),
    [
        (20011, Device(multiprocessors=16), 8, 1),  # clusters of 8 are wanted, and would fit a block
        (20011, Device(multiprocessors=16), 4, 2),
        (20011, Device(multiprocessors=16), 1, 3),
        (4999, TINY, 8, 1),  # they are needed: with fewer blocks the row is read twice
        (4999, TINY, 4, 1),
    ],
)
def test_room_for_clusters(shim: ctypes.CDLL, columns: int, device: Device, room: int, asked: int, kind: str) -> None:
    """The device is asked once for each kernel and shape. The shim refuses clusters that it has no room for."""
    case = Case(shim, device)
    shim.cuda_host_room(room)
    s, t = (logits(2, columns, torch.bfloat16) for _ in range(2))
    shim.cuda_host_room_calls()
    case.check(s, t, Loss(kind))
    assert shim.cuda_host_room_calls() == asked
    case.check(s, t, Loss(kind))
    assert shim.cuda_host_room_calls() == 0


def test_shared_memory_is_allowed_once(shim: ctypes.CDLL) -> None:
    """All that the device has, whatever a call takes: what a second one takes is not set again."""
    case = Case(shim, Device())
    shim.cuda_host_shared_calls()
    for columns in (20000, 16000, 30000):
        s, t = (logits(2, columns, torch.bfloat16) for _ in range(2))
        case.ops.divergence(s, t, *Loss().args(s), None, KNOWN_NOTHING, SAVE_GRADIENT)
    assert shim.cuda_host_shared_calls() == 1


def test_registers_of_many_blocks(shim: ctypes.CDLL) -> None:
    Case(shim, Device()).check(logits(300, 3, torch.float32), logits(300, 3, torch.float32), Loss(reduction=MEAN))


# 1 to 16 blocks per row, odd and even.
@ALL_ORDERS
@BOTH_LOOKS
@pytest.mark.parametrize(
    ("columns", "dtype", "device", "cluster"),
    [
        (257, torch.bfloat16, Device(), 1),  # not whole vectors
        (1025, torch.bfloat16, Device(), 1),
        (1999, torch.float32, Device(), 1),
        (1500, torch.bfloat16, TINY, 2),
        (1025, torch.float16, TINY, 2),
        (1025, torch.float32, TINY, 4),
        (2600, torch.bfloat16, TINY, 4),
        (2003, torch.float32, TINY, 8),
        (4999, torch.bfloat16, TINY, 8),
        (9001, torch.bfloat16, TINY, 16),
        (9001, torch.bfloat16, Device(shared=30 << 10), 2),
    ],
)
def test_on_chip(
    shim: ctypes.CDLL, columns: int, dtype: torch.dtype, device: Device, cluster: int, kind: str, seed: int
) -> None:
    shared = {"shared_per_block": device.shared, "shared_per_multiprocessor": 3 * (device.shared + 1024)}
    flags = {"same_elements": True, "alike": True, "aligned": False, "again": True, "given": False}
    limits = {"multiprocessors": 1, "max_cluster": device.max_cluster}
    plan = kdfast._C.cuda_plan(rows=2, columns=columns, element_size=dtype.itemsize, **flags, **shared, **limits)
    assert (plan["kernel"], plan["cluster"]) == ("on_chip", cluster)
    Case(shim, device, seed).check(logits(2, columns, dtype), logits(2, columns, dtype), Loss(kind))


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("device", [Device(), TINY, TINY_AMPERE], ids=["block", "cluster", "two reads"])
def test_misaligned_alike(shim: ctypes.CDLL, device: Device, offset: int) -> None:
    case = Case(shim, device, seed=3, offset=offset)
    for columns, kind in ((1025, "kl_div"), (1032, "total_variation")):
        case.check(*(logits(2, columns, torch.bfloat16, offset=offset) for _ in range(2)), Loss(kind))
    case.check(*(logits(2, 1027, torch.float32, offset=offset) for _ in range(2)), Loss("skew_kl_div"))


@BOTH_ORDERS
@BOTH_LOOKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1025, 2600, 9000])
def test_two_reads(shim: ctypes.CDLL, columns: int, dtype: torch.dtype, kind: str, seed: int) -> None:
    Case(shim, TINY_AMPERE, seed).check(logits(2, columns, dtype), logits(2, columns, dtype), Loss(kind))


@BOTH_ORDERS
@pytest.mark.parametrize("columns", [3, 1500])
def test_any_layout(shim: ctypes.CDLL, columns: int, seed: int) -> None:
    case = Case(shim, Device(), seed)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for student in dtypes:
        for teacher in dtypes:
            if student != teacher:
                case.check(logits(3, columns, student), logits(3, columns, teacher))
    case.check(logits(columns, 4, torch.bfloat16).T, logits(columns, 4, torch.bfloat16).T, Loss("js_div"))
    case.check(logits(4, columns, torch.float32), logits(columns, 4, torch.float32).T)
    case.check(logits(4, columns, torch.float32, offset=1), logits(4, columns, torch.float32))  # misaligned unlike
    case.check(*(logits(4, columns, torch.float32, offset=1) for _ in range(2)))  # alike, but unlike the gradient


KERNELS = pytest.mark.parametrize(
    ("columns", "dtype", "device"),
    [
        pytest.param(5, torch.float32, Device(), id="lane"),
        pytest.param(40, torch.bfloat16, Device(), id="lanes"),
        pytest.param(100, torch.bfloat16, Device(), id="warp"),
        pytest.param(128, torch.bfloat16, Device(), id="warp, vectors"),
        pytest.param(1501, torch.bfloat16, Device(), id="block"),
        pytest.param(1501, torch.float32, TINY, id="cluster"),
        pytest.param(1501, torch.float32, TINY_AMPERE, id="two reads"),
        pytest.param(1501, None, Device(), id="any layout"),
    ],
)


def pair(columns: int, dtype: torch.dtype | None, rows: int = 6, **layout: int) -> tuple[Tensor, Tensor]:
    return logits(rows, columns, dtype or torch.bfloat16, **layout), logits(
        rows, columns, dtype or torch.float32, **layout
    )


@pytest.mark.parametrize("kind", KINDS)
@KERNELS
def test_every_divergence(
    shim: ctypes.CDLL, columns: int, dtype: torch.dtype | None, device: Device, kind: str
) -> None:
    """Far apart and close together, where the terms of a row cancel."""
    case = Case(shim, device, seed=7)
    s, t = pair(columns, dtype, rows=3)
    case.check(s, t, Loss(kind, mixing=0.1, temperature=2.0))
    case.check((t.float() + 0.2 * s.float()).to(s.dtype), t, Loss(kind, mixing=0.8, temperature=1.0, reduction=NONE))


def labels_of(columns: int) -> Tensor:
    """At both edges of a row, inside, and one that is ignored."""
    return torch.tensor([0, columns - 1, IGNORED, columns // 2, max(columns - 2, 0), min(columns - 1, 9)])


@pytest.mark.parametrize(("temperature", "smoothing"), [(1.0, 0.0), (2.0, 0.1), (3.0, 0.1), (3.0, 0.0)])
@KERNELS
def test_labels(
    shim: ctypes.CDLL, columns: int, dtype: torch.dtype | None, device: Device, temperature: float, smoothing: float
) -> None:
    """Rows of odd width, so that each has other edges; the mean's two denominators differ."""
    case = Case(shim, device, seed=7)
    s, t = pair(columns, dtype, width=columns + (0 if columns == 128 else 1))
    of = Loss(temperature=temperature, labels=labels_of(columns), alpha=0.4, smoothing=smoothing, columns=columns)
    case.check(s, t, replace(of, reduction=MEAN))
    mask = torch.tensor([True, False, True, True, True, False])
    s[~mask] = t[~mask] = torch.nan
    of = replace(of, mask=mask, weight=torch.linspace(0.5, 2, 6), temperature=torch.linspace(1, 3, 6))
    case.check(s, t, replace(of, reduction=MEAN))
    case.check(s, t, replace(of, reduction=NONE))


@pytest.mark.parametrize("kind", KINDS)
def test_labels_beside_every_divergence(shim: ctypes.CDLL, kind: str) -> None:
    of = Loss(kind, labels=labels_of(1025), alpha=0.7, smoothing=0.2)
    for device in (Device(), TINY, TINY_AMPERE):
        Case(shim, device).check(*pair(1025, torch.float32), replace(of, reduction=BATCHMEAN))
    case = Case(shim, Device())
    case.check(*pair(9, torch.float32), replace(of, labels=labels_of(9), reduction=MEAN, items=5.0))
    case.check(*pair(9, torch.float32), Loss(kind, alpha=1.0))  # no labels: no cross-entropy


def test_labels_that_are_none(shim: ctypes.CDLL) -> None:
    """Outside of the vocabulary NaN, in their row only; all ignored, no cross-entropy and no 0 / 0."""
    case = Case(shim, Device())
    s, t = pair(40, torch.float32)
    wrong = Loss(labels=torch.tensor([1, -1, 40, IGNORED, 3, 39]), alpha=0.5, reduction=NONE)
    loss, components, gradient = case.ops.divergence(s, t, *wrong.args(s), None, KNOWN_NOTHING, SAVE_GRADIENT)
    bad = torch.tensor([False, True, True, False, False, False])
    for value in (loss, components[:, 1], gradient.sum(-1)):
        assert torch.equal(value.isnan(), bad)
    case.check(s, t, Loss(labels=torch.full((6,), IGNORED), alpha=0.5, reduction=MEAN))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("device", "width"), [(Device(), 9), (Device(), 1025), (TINY, 1025), (TINY_AMPERE, 1025)])
def test_shards(shim: ctypes.CDLL, device: Device, width: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary in three parts, one of them empty: each part's states, merged, give it the loss and its gradient."""

    def all_reduce(x: Tensor, op: Any, group: Any) -> None:  # of states that are stacked over the parts
        x.copy_((x.amax(1, True) if op == torch.distributed.ReduceOp.MAX else x.sum(0, True)).expand_as(x))

    case = Case(shim, device)
    monkeypatch.setattr(_shards.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.ops.kdfast, "divergence_referred", case.ops.divergence_referred)
    s, t = pair(width, torch.float32)
    s[0] += 100  # far from the other rows' maxima, and from 0
    of = Loss(kind, labels=labels_of(width), alpha=0.4, smoothing=0.1, temperature=2.0)
    starts = [0, width // 3, width, width]
    parts = [(s[:, a:b], t[:, a:b], *of.args(s[:, a:b], a, width)) for a, b in itertools.pairwise(starts)]
    forward = case.ops.divergence
    states = torch.stack([forward(*part, None, KNOWN_NOTHING, SAVE_STATE)[2] for part in parts])
    states = _shards.merged(states, KINDS.index(kind), None, 2.0, None)
    if kind in SECOND_LOOK:
        states = torch.stack(
            [forward(*part, state, KNOWN_NORMALISERS, SAVE_STATE)[2] for part, state in zip(parts, states, strict=True)]
        )
        states[..., 4:6] = states[..., 4:6].sum(0)
    made = [forward(*p, state, KNOWN_EVERYTHING, SAVE_GRADIENT) for p, state in zip(parts, states, strict=True)]
    exact, exact_gradient = of.exact(s, t)
    for loss, components, _ in made:
        assert_close(loss, exact, torch.float32)
        assert_close(components, of.components(s, t), torch.float32)
    assert_close(torch.cat([gradient for *_, gradient in made], -1), exact_gradient, torch.float32)
    case.clean()


@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM, BATCHMEAN])
@BOTH_LOOKS
@KERNELS
def test_rows_and_reductions(
    shim: ctypes.CDLL, columns: int, dtype: torch.dtype | None, device: Device, kind: str, reduction: str
) -> None:
    """Masks, weights, temperatures per row; padding beyond the vocabulary and masked rows hold NaN."""
    case = Case(shim, device)
    s, t = pair(columns, dtype, width=columns + 11)
    mask = torch.tensor([True, False, True, True, False, True])
    s[~mask] = t[~mask] = torch.nan
    of = Loss(kind, columns=columns, reduction=reduction)
    rows = {"temperature": torch.linspace(0.5, 3, 6), "weight": torch.linspace(-1, 2, 6)}
    case.check(s, t, replace(of, mask=mask, **rows))
    case.check(s.view(2, 3, -1), t.view(2, 3, -1), replace(of, mask=mask.view(2, 3)))
    case.check(s[mask], t[mask], of)
    case.check(s.view(2, 3, -1)[:1], t.view(2, 3, -1)[:1], replace(of, mask=mask[:3][None]))
    clean_s, clean_t = (torch.nan_to_num(z).view(3, 2, -1).transpose(0, 1) for z in (s, t))
    wide = torch.tensor([[True], [False]]).expand(2, 3)
    case.check(clean_s, clean_t, Loss(kind, mask=wide, reduction=reduction))


@pytest.mark.parametrize("kind", KINDS)
@KERNELS
def test_infinities(shim: ctypes.CDLL, columns: int, dtype: torch.dtype | None, device: Device, kind: str) -> None:
    """Row by row what the reference says: finite, infinite or NaN."""
    case = Case(shim, device, seed=5)
    s, t = pair(columns, dtype)
    inf = torch.inf
    s[0, ::3] = t[0, ::3] = -inf  # counts nothing
    t[1, ::4] = -inf
    s[2, 3] = -inf
    s[3] = -inf  # no distribution
    t[4, 1] = torch.nan
    s[5, 2] = inf
    if kind != "logit_mse":  # a mask that is finite
        s[0, 1::3] = t[0, 1::3] = torch.finfo(s.dtype).min if s.dtype == t.dtype else -1e38
    of = Loss(kind, temperature=1.0, reduction=NONE, scale=1.0)
    loss, _, gradient = case.ops.divergence(s, t, *of.args(s), None, KNOWN_NOTHING, SAVE_GRADIENT)
    exact, exact_gradient = of.exact(s, t)
    assert torch.equal(loss.isnan(), exact.isnan())
    assert torch.equal(loss.isinf(), exact.isinf())
    assert exact[0].isfinite()
    finite = exact.isfinite()
    assert_close(loss[finite], exact[finite], torch.float32)
    finite &= exact_gradient.isfinite().all(-1)
    assert finite[0]
    assert_close(gradient[finite], exact_gradient[finite], s.dtype)
    assert gradient[exact.isnan()].isnan().any(-1).all()
    if kind == "kl_div":  # infinite, with the gradient of its finite part
        p = [z[2].double().softmax(-1) for z in (s, t)]
        assert_close(gradient[2], p[0] - p[1], s.dtype)
    case.clean()


@KERNELS
def test_mean_of_nothing_and_given_items(
    shim: ctypes.CDLL, columns: int, dtype: torch.dtype | None, device: Device
) -> None:
    case = Case(shim, device)
    s, t = pair(columns, dtype)
    nothing = Loss(mask=torch.zeros(6, dtype=torch.bool), labels=torch.zeros(6, dtype=torch.long), alpha=0.5)
    args = replace(nothing, reduction=MEAN).args(s)
    loss, components, gradient = case.ops.divergence(s, t, *args, None, KNOWN_NOTHING, SAVE_GRADIENT)
    for zero in (loss, components, gradient):
        assert (zero == 0).all()
    case.check(s, t, Loss(reduction=MEAN, items=12.0))


def test_empty(shim: ctypes.CDLL) -> None:
    case = Case(shim, Device())
    args = Loss(reduction=MEAN, alpha=0.5)
    for shape in ((0, 5), (3, 0), (2, 0, 5)):
        z = torch.zeros(shape)
        for save, of in ((SAVE_GRADIENT, shape), (SAVE_STATE, (*shape[:-1], STATE_SIZE))):
            loss, components, saved = case.ops.divergence(z, z, *args.args(z), None, KNOWN_NOTHING, save)
            assert loss == 0
            assert components.tolist() == [0, 0]
            assert saved.shape == of
            assert (saved == 0).all()
    case.clean()


@BOTH_LOOKS
def test_few_rows_spread_over_the_device(shim: ctypes.CDLL, kind: str) -> None:
    """No gradient is wanted, but clusters keep more multiprocessors busy; rows in clusters are deterministic."""
    case = Case(shim, Device(multiprocessors=16))
    s, t = logits(2, 20011, torch.bfloat16), logits(2, 20011, torch.bfloat16)
    of = Loss(kind, reduction=MEAN)
    case.check(s, t, of)
    results = []
    for seed in (0, 1, 2):
        shim.cuda_host_device(16, 227 << 10, 16, seed, 0)
        results.append(case.ops.divergence(s, t, *of.args(s), None, KNOWN_NOTHING, SAVE_GRADIENT))
    for loss, _, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 7, 8, 4099])
def test_scale(shim: ctypes.CDLL, dtype: torch.dtype, count: int) -> None:
    case = Case(shim, Device())
    for offset in (0, 1, 5):
        for factor in (1.0, 0.0, -3.0):
            memory = logits(3, count, dtype, offset=offset)
            before, x = memory.clone(), memory[1]
            case.ops.scale_(x, torch.tensor(factor))
            assert torch.equal(x, (before[1].float() * factor).to(dtype))
            assert torch.equal(memory[::2], before[::2])


def test_refuses_what_it_cannot_do(shim: ctypes.CDLL) -> None:
    case = Case(shim, Device())
    z = torch.zeros(2, 5)
    args = Loss("js_div").args(z)
    with pytest.raises(
        RuntimeError, match="js_div: logits: expected float32, bfloat16 or float16 on the GPU, got float64"
    ):
        case.ops.divergence(z.double(), z.double(), *args, None, KNOWN_NOTHING, SAVE_NOTHING)
    with pytest.raises(RuntimeError, match="js_div: state: expected one"):
        case.ops.divergence(z, z, *args, None, KNOWN_EVERYTHING, SAVE_NOTHING)
    with pytest.raises(RuntimeError, match="scale_: x: expected contiguous"):
        case.ops.scale_(z.T, torch.tensor(1.0))
