"""The CUDA kernels' own source, run on the CPU by the host shim (tests/cuda_host), against plain torch in float64.

The device is described by each test: a small shared memory makes rows of a few thousand columns take clusters. Outputs
start as NaN between canaries; masked rows and padding columns hold NaN, so that reading them shows.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kdfast
from kdfast.ops import divergence

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the shim switches fibers on x86-64 only")

ROOT = Path(__file__).parents[1]
OPS = ("kl_div", "kl_div_backward", "scale_")
NONE, MEAN, SUM, BATCHMEAN = range(4)
BOTH_ORDERS = pytest.mark.parametrize("seed", [0, 7], ids=["ordered", "shuffled"])
ALL_ORDERS = pytest.mark.parametrize("seed", [0, 1, 7], ids=["ordered", "block by block", "shuffled"])


@pytest.fixture(scope="module")
def shim() -> Iterator[ctypes.CDLL]:
    build = ROOT / "build" / "cuda_host"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    configure = ["cmake", "-S", str(Path(__file__).parent / "cuda_host"), "-B", str(build), "-G", "Ninja"]
    configure.append(f"-DKDFAST_TORCH={Path(torch.__file__).parent}")
    for command in (configure, ["cmake", "--build", str(build)]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    library = torch.library.Library("kdfast_cuda_host", "DEF")
    for op in OPS:
        library.define(str(getattr(torch.ops.kdfast, op).default._schema).removeprefix("kdfast::"))
    path = build / "libkdfast_cuda_host.so"
    torch.ops.load_library(str(path))
    yield ctypes.CDLL(str(path))
    library._destroy()


@dataclass
class Device:
    """By default a GPU of one multiprocessor, so that no row is spread further than it must."""

    shared: int = 227 << 10
    max_cluster: int = 16
    multiprocessors: int = 1


AMPERE = Device(max_cluster=1)
# 102 vectors of each of the logits fit a block: 816 columns of bfloat16.
TINY = Device(shared=4 << 10)
TINY_AMPERE = Device(shared=4 << 10, max_cluster=1)


def logits(rows: int, columns: int, dtype: torch.dtype, *, offset: int = 0, width: int | None = None) -> Tensor:
    """`[rows, width or columns]` normal numbers; memory is contiguous and starts `offset` elements off 16 bytes."""
    width = width or columns
    memory = torch.full((rows * width + 16,), torch.nan, dtype=dtype)
    first = (-memory.data_ptr() % 16) // memory.element_size() + offset
    z = memory[first : first + rows * width].view(rows, width)
    z[:, :columns] = 3 * torch.randn(rows, columns)
    return z


def reference(s: Tensor, t: Tensor, columns: int, reduction: int, scale: float, **rows: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64; `scale` as the operator takes it."""
    s64 = s.detach().double().requires_grad_()
    names = {code: name for name, code in divergence._checks.REDUCTIONS.items()}
    loss = divergence.kl_div_reference(s64, t.double(), vocab_size=columns, reduction=names[reduction], **rows) * scale
    loss.sum().backward()
    return loss.detach(), torch.nan_to_num(s64.grad) if rows.get("mask") is not None else s64.grad


def assert_close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Norm-relative to what one rounding of the dtype does, for tensors that are finite."""
    eps = max(torch.finfo(dtype).eps, 1e-5)
    error = (ours.double() - exact).norm()
    assert error <= eps * exact.norm() + 1e-7 * exact.numel() ** 0.5, float(error / exact.norm())


class Case:
    def __init__(self, shim: ctypes.CDLL, device: Device, seed: int = 0, offset: int = 0) -> None:
        torch.manual_seed(0)
        self.shim = shim
        shim.cuda_host_device(device.multiprocessors, device.shared, device.max_cluster, seed, offset)
        self.ops = torch.ops.kdfast_cuda_host

    def clean(self) -> None:
        assert self.shim.cuda_host_clobbered() == 0

    def check(
        self,
        s: Tensor,
        t: Tensor,
        *,
        temperature: float = 1.5,
        row_temperature: Tensor | None = None,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        columns: int | None = None,
        reduction: int = SUM,
        scale: float = 0.5,
    ) -> None:
        """Loss and gradient of the forward, state, and the backward from it."""
        columns = columns or s.shape[-1]
        temperatures = temperature if row_temperature is None else row_temperature
        loss, gradient = reference(s, t, columns, reduction, scale, temperature=temperatures, mask=mask, weight=weight)
        inputs = (row_temperature, mask, weight, None, temperature, columns, reduction, scale)
        save = divergence.SAVE_GRADIENT
        ours, ours_gradient = self.ops.kl_div(s, t, *inputs, save)
        only, nothing = self.ops.kl_div(s, t, *inputs, divergence.SAVE_NOTHING)
        again, state = self.ops.kl_div(s, t, *inputs, divergence.SAVE_STATE)
        ones = torch.ones(loss.shape)
        backward = self.ops.kl_div_backward(2 * ones, state, s, t, *inputs)
        assert nothing.numel() == 0
        for value in (ours, only, again):
            assert value.dtype == torch.float32
            assert_close(value, loss, torch.float32)
        assert_close(ours_gradient, gradient, s.dtype)
        assert_close(backward, 2 * gradient, s.dtype)
        self.check_state(state, s, t, columns, temperatures, mask)
        self.clean()

    def check_state(
        self, state: Tensor, s: Tensor, t: Tensor, columns: int, temperature: Any, mask: Tensor | None
    ) -> None:
        temperature = torch.as_tensor(temperature, dtype=torch.float64)[..., None]
        for z, most, total in ((s, state[..., 0], state[..., 1]), (t, state[..., 2], state[..., 3])):
            exact = (z[..., :columns].double() / temperature).logsumexp(-1)
            ours = most.double() / temperature[..., 0] + total.double().log()
            counted = torch.ones_like(exact, dtype=torch.bool) if mask is None else mask.expand(exact.shape)
            assert_close(ours[counted], exact[counted], torch.float32)
            assert (state[~counted] == 0).all()


# Small rows: a lane, 8 lanes, a warp; whole vectors or not. The last two do not fill their block's last warp.
@BOTH_ORDERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 2, 8, 9, 64, 65, 999, 1000, 1024])
def test_registers(shim: ctypes.CDLL, columns: int, dtype: torch.dtype, seed: int) -> None:
    case = Case(shim, Device(), seed)
    case.check(logits(7, columns, dtype), logits(7, columns, dtype))
    case.check(logits(3, columns, dtype, offset=3), logits(3, columns, dtype, offset=1))


def test_registers_of_many_blocks(shim: ctypes.CDLL) -> None:
    Case(shim, Device()).check(logits(300, 3, torch.float32), logits(300, 3, torch.float32), reduction=MEAN)


# 1 to 16 blocks per row, odd and even.
@ALL_ORDERS
@pytest.mark.parametrize(
    ("columns", "dtype", "device", "cluster"),
    [
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
def test_on_chip(shim: ctypes.CDLL, columns: int, dtype: torch.dtype, device: Device, cluster: int, seed: int) -> None:
    shared = {"shared_per_block": device.shared, "shared_per_multiprocessor": 3 * (device.shared + 1024)}
    flags = {"same_elements": True, "alike": True, "aligned": False, "gradient": True, "given": False}
    limits = {"multiprocessors": 1, "max_cluster": device.max_cluster}
    plan = kdfast._C.cuda_plan(rows=3, columns=columns, element_size=dtype.itemsize, **flags, **shared, **limits)
    assert (plan["kernel"], plan["cluster"]) == ("on_chip", cluster)
    Case(shim, device, seed).check(logits(3, columns, dtype), logits(3, columns, dtype))


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("device", [Device(), TINY, TINY_AMPERE], ids=["block", "cluster", "two reads"])
def test_misaligned_alike(shim: ctypes.CDLL, device: Device, offset: int) -> None:
    case = Case(shim, device, seed=3, offset=offset)
    for columns in (1025, 1032):
        case.check(*(logits(2, columns, torch.bfloat16, offset=offset) for _ in range(2)))
    case.check(*(logits(2, 1027, torch.float32, offset=offset) for _ in range(2)))


@BOTH_ORDERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1025, 2600, 9000])
def test_two_reads(shim: ctypes.CDLL, columns: int, dtype: torch.dtype, seed: int) -> None:
    Case(shim, TINY_AMPERE, seed).check(logits(3, columns, dtype), logits(3, columns, dtype))


@BOTH_ORDERS
@pytest.mark.parametrize("columns", [3, 1500])
def test_any_layout(shim: ctypes.CDLL, columns: int, seed: int) -> None:
    case = Case(shim, Device(), seed)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for student in dtypes:
        for teacher in dtypes:
            if student != teacher:
                case.check(logits(3, columns, student), logits(3, columns, teacher))
    case.check(logits(columns, 4, torch.bfloat16).T, logits(columns, 4, torch.bfloat16).T)
    case.check(logits(4, columns, torch.float32), logits(columns, 4, torch.float32).T)
    case.check(logits(4, columns, torch.float32, offset=1), logits(4, columns, torch.float32))  # misaligned unlike
    case.check(*(logits(4, columns, torch.float32, offset=1) for _ in range(2)))  # alike, but unlike the gradient


KINDS = [
    pytest.param(40, torch.bfloat16, Device(), id="registers"),
    pytest.param(128, torch.bfloat16, Device(), id="registers, vectors"),
    pytest.param(1501, torch.bfloat16, Device(), id="block"),
    pytest.param(1501, torch.float32, TINY, id="cluster"),
    pytest.param(1501, torch.float32, TINY_AMPERE, id="two reads"),
    pytest.param(1501, None, Device(), id="any layout"),
]


def pair(columns: int, dtype: torch.dtype | None, rows: int = 6, **layout: int) -> tuple[Tensor, Tensor]:
    return logits(rows, columns, dtype or torch.bfloat16, **layout), logits(
        rows, columns, dtype or torch.float32, **layout
    )


@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM, BATCHMEAN])
@pytest.mark.parametrize(("columns", "dtype", "device"), KINDS)
def test_rows_and_reductions(
    shim: ctypes.CDLL, columns: int, dtype: torch.dtype | None, device: Device, reduction: int
) -> None:
    """Masks, weights, temperatures per row; padding beyond the vocabulary and masked rows hold NaN."""
    case = Case(shim, device)
    s, t = pair(columns, dtype, width=columns + 11)
    mask = torch.tensor([True, False, True, True, False, True])
    s[~mask] = t[~mask] = torch.nan
    rows = {"row_temperature": torch.linspace(0.5, 3, 6), "weight": torch.linspace(-1, 2, 6)}
    case.check(s, t, columns=columns, mask=mask, reduction=reduction, **rows)
    case.check(s.view(2, 3, -1), t.view(2, 3, -1), columns=columns, mask=mask.view(2, 3), reduction=reduction)
    case.check(s[mask], t[mask], columns=columns, reduction=reduction)
    wide = torch.tensor([[True], [False]]).expand(2, 3)
    case.check(s.view(2, 3, -1)[:1], t.view(2, 3, -1)[:1], columns=columns, mask=mask[:3][None], reduction=reduction)
    clean_s, clean_t = (torch.nan_to_num(z) for z in (s, t))
    case.check(
        clean_s.view(3, 2, -1).transpose(0, 1), clean_t.view(3, 2, -1).transpose(0, 1), mask=wide, reduction=reduction
    )


@pytest.mark.parametrize(("columns", "dtype", "device"), KINDS)
def test_infinities(shim: ctypes.CDLL, columns: int, dtype: torch.dtype | None, device: Device) -> None:
    case = Case(shim, device, seed=5)
    s, t = pair(columns, dtype)
    inf = torch.inf
    s[0, ::3] = t[0, ::3] = -inf  # counts nothing
    t[1, ::5] = -inf  # p·log p = 0
    s[2, 7] = -inf  # p_t > 0 where p_s = 0
    s[3] = -inf  # no distribution
    t[4, 1] = torch.nan
    s[5, 2] = inf
    s[0, 1::3] = t[0, 1::3] = torch.finfo(s.dtype).min if s.dtype == t.dtype else -1e38  # a mask that is finite
    inputs = (None, None, None, None, 1.0, columns, NONE, 1.0)
    loss, gradient = case.ops.kl_div(s, t, *inputs, divergence.SAVE_GRADIENT)
    exact, exact_gradient = reference(s, t, columns, NONE, 1.0)
    assert_close(loss[:2], exact[:2], torch.float32)
    assert loss[2] == inf
    assert loss[3:].isnan().all()
    assert_close(gradient[:2], exact_gradient[:2], s.dtype)
    p = [z[2].double().softmax(-1) for z in (s, t)]
    assert_close(gradient[2], p[0] - p[1], s.dtype)
    assert gradient[3:].isnan().any(-1).all()
    case.clean()


@pytest.mark.parametrize(("columns", "dtype", "device"), KINDS)
def test_mean_of_nothing_and_given_items(
    shim: ctypes.CDLL, columns: int, dtype: torch.dtype | None, device: Device
) -> None:
    case = Case(shim, device)
    s, t = pair(columns, dtype)
    none = torch.zeros(6, dtype=torch.bool)
    loss, gradient = case.ops.kl_div(s, t, None, none, None, None, 1.0, columns, MEAN, 1.0, divergence.SAVE_GRADIENT)
    assert loss == 0
    assert (gradient == 0).all()
    items = torch.tensor(12.0)
    ours, gradient = case.ops.kl_div(s, t, None, None, None, items, 1.0, columns, MEAN, 1.0, divergence.SAVE_GRADIENT)
    exact, exact_gradient = reference(s, t, columns, MEAN, 0.5)
    assert_close(ours, exact, torch.float32)
    assert_close(gradient, exact_gradient, s.dtype)
    case.clean()


def test_empty(shim: ctypes.CDLL) -> None:
    case = Case(shim, Device())
    for shape in ((0, 5), (3, 0), (2, 0, 5)):
        z = torch.zeros(shape)
        for save, of in ((divergence.SAVE_GRADIENT, shape), (divergence.SAVE_STATE, (*shape[:-1], 5))):
            loss, saved = case.ops.kl_div(z, z, None, None, None, None, 1.0, shape[-1], MEAN, 1.0, save)
            assert loss == 0
            assert saved.shape == of
            assert (saved == 0).all()
    case.clean()


def test_few_rows_spread_over_the_device(shim: ctypes.CDLL) -> None:
    """No gradient is wanted, but clusters keep more multiprocessors busy; rows in clusters are deterministic."""
    case = Case(shim, Device(multiprocessors=16))
    s, t = logits(2, 20011, torch.bfloat16), logits(2, 20011, torch.bfloat16)
    case.check(s, t, reduction=MEAN)
    results = []
    for seed in (0, 1, 2):
        shim.cuda_host_device(16, 227 << 10, 16, seed, 0)
        results.append(case.ops.kl_div(s, t, None, None, None, None, 1.0, 20011, MEAN, 1.0, divergence.SAVE_GRADIENT))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


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
    with pytest.raises(
        RuntimeError, match="kl_div: logits: expected float32, bfloat16 or float16 on the GPU, got float64"
    ):
        case.ops.kl_div(z.double(), z.double(), None, None, None, None, 1.0, 5, MEAN, 1.0, 0)
    with pytest.raises(RuntimeError, match="scale_: x: expected contiguous"):
        case.ops.scale_(z.T, torch.tensor(1.0))
