"""The CUDA kernels' own source on the CPU (tests/cuda_host): the operators, a device to describe, a case to check."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdfast.bench.registry.divergences import DIVERGENCES
from kdfast.ops._call import (
    KNOWN_EVERYTHING,
    KNOWN_NORMALISERS,
    KNOWN_NOTHING,
    SAVE_GRADIENT,
    SAVE_NOTHING,
    SAVE_STATE,
    STATE_SIZE,
    Call,
    Numbers,
    RowValues,
)
from kdfast.ops._divergence import KINDS, SECOND_LOOK

ROOT = Path(__file__).parents[1]
OPS = (
    *("divergence", "divergence_backward", "divergence_into", "divergence_referred", "scale_"),
    *("layer_distance", "layer_distance_backward", "qk_distance", "qk_distance_backward"),
    *("pack_part", "unpack_part_", "block_sparse_product", "block_sparse_gradient"),
)
NONE, MEAN, SUM, BATCHMEAN = "none", "mean", "sum", "batchmean"
IGNORED = -100


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
    wgmma: bool = False


def logits(rows: int, columns: int, dtype: torch.dtype, *, offset: int = 0, width: int | None = None) -> Tensor:
    """`[rows, width or columns]` normal numbers; memory is contiguous and starts `offset` elements off 16 bytes."""
    width = width or columns
    memory = torch.full((rows * width + 16,), torch.nan, dtype=dtype)
    first = (-memory.data_ptr() % 16) // memory.element_size() + offset
    z = memory[first : first + rows * width].view(rows, width)
    z[:, :columns] = 3 * torch.randn(rows, columns)
    return z


@dataclass(frozen=True)
class Loss:
    """What a test computes: a divergence or, with an alpha, kd_loss. `mixing` is beta or skew."""

    kind: str = "kl_div"
    mixing: float = 0.3
    temperature: float | Tensor = 1.5
    mask: Tensor | None = None
    weight: Tensor | None = None
    columns: int | None = None
    reduction: str = SUM
    scale: float = 0.5
    items: float | None = None
    labels: Tensor | None = None
    alpha: float | None = None
    smoothing: float = 0.0

    def args(self, s: Tensor, start: int = 0, vocabulary: int | None = None) -> tuple[Any, ...]:
        """As the operators take them, between the logits and the state."""
        per_row = isinstance(self.temperature, Tensor)
        columns = s.shape[-1] if self.columns is None else self.columns
        scale, divisor = self.division(s)
        rows = RowValues(None, self.labels, self.temperature if per_row else None, self.mask, self.weight)
        numbers = Numbers(
            kind=KINDS.index(self.kind),
            mixing=self.mixing,
            temperature=1.0 if per_row else self.temperature,
            columns=columns,
            vocabulary=columns if vocabulary is None else vocabulary,
            vocab_start=start,
            scale=self.scale * scale,
            per_row=self.reduction == NONE,
            distillation=self.alpha is not None,
            alpha=1.0 if self.alpha is None else self.alpha,
            smoothing=self.smoothing,
            ignore_index=IGNORED,
        )
        return Call(rows, divisor, numbers).flat()

    def division(self, s: Tensor) -> tuple[float, Tensor | None]:
        """What the sum over rows is multiplied by, and divided by on the device."""
        if self.reduction == BATCHMEAN:
            return 1 / s.shape[0], None
        if self.reduction != MEAN:
            return 1.0, None
        if self.items is not None:
            return 1.0, torch.tensor(self.items)
        mask = torch.ones(s.shape[:-1], dtype=torch.bool) if self.mask is None else self.mask
        counts = [mask.sum()] if self.labels is None else [mask.sum(), (mask & (self.labels != IGNORED)).sum()]
        return 1.0, torch.stack(counts).float()

    def value(self, s: Tensor, t: Tensor) -> Tensor:
        """By the reference, in the logits' precision."""
        # A raw operator's rows count whatever their labels, but for a mask.
        mask = torch.ones(s.shape[:-1], dtype=torch.bool) if self.mask is None else self.mask
        arguments = {"mask": mask, "weight": self.weight, "vocab_size": self.columns, "num_items": self.items}
        arguments |= {"temperature": self.temperature, "beta": self.mixing, "skew": self.mixing}
        arguments["reduction"] = self.reduction
        if self.alpha is None:
            return self.scale * DIVERGENCES[self.kind].reference(s, t, **arguments)
        arguments |= {"labels": self.labels, "alpha": self.alpha, "label_smoothing": self.smoothing}
        return self.scale * DIVERGENCES["kd_loss"].reference(s, t, divergence=self.kind, **arguments)

    def exact(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient in float64."""
        s = s.detach().double().requires_grad_()
        loss = self.value(s, t.double())
        loss.sum().backward()
        assert s.grad is not None
        return loss.detach(), torch.nan_to_num(s.grad) if self.mask is not None else s.grad

    def components(self, s: Tensor, t: Tensor) -> Tensor:
        if self.alpha is None:
            return torch.empty(0)
        parts = [replace(self, alpha=alpha).value(s.double(), t.double()) for alpha in (1.0, 0.0)]
        return torch.stack(parts if self.labels is not None else [parts[0], torch.zeros_like(parts[0])], -1)


def assert_close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Norm-relative to what one rounding of the dtype does, for tensors that are finite; zeros never pass for more."""
    eps = max(torch.finfo(dtype).eps, 1e-5)
    error, allowed = (ours.double() - exact).norm(), eps * exact.norm() + 1e-7 * exact.numel() ** 0.5
    assert ours.shape == exact.shape
    assert error <= allowed, f"error {float(error):.3e} of {float(exact.norm()):.3e}, allowed {float(allowed):.3e}"
    assert allowed < 0.1 * exact.norm() or not exact.any()


class Case:
    def __init__(self, shim: ctypes.CDLL, device: Device, seed: int = 0, offset: int = 0) -> None:
        torch.manual_seed(0)
        self.shim = shim
        shim.cuda_host_device(device.multiprocessors, device.shared, device.max_cluster, seed, offset)
        shim.cuda_host_wgmma(device.wgmma)
        self.ops = torch.ops.kdfast_cuda_host

    def clean(self) -> None:
        assert self.shim.cuda_host_clobbered() == 0

    def check(self, s: Tensor, t: Tensor, of: Loss = Loss()) -> None:
        """Loss and gradient of the forward, state, the backward from it, and the forward with it given."""
        columns = s.shape[-1] if of.columns is None else of.columns
        loss, gradient = of.exact(s, t)
        args = of.args(s)
        fresh = (None, KNOWN_NOTHING)
        ours, components, ours_gradient = self.ops.divergence(s, t, *args, *fresh, SAVE_GRADIENT)
        only, _, nothing = self.ops.divergence(s, t, *args, *fresh, SAVE_NOTHING)
        again, _, state = self.ops.divergence(s, t, *args, *fresh, SAVE_STATE)
        backward = self.ops.divergence_backward(2 * torch.ones(loss.shape), state, s, t, *args)
        known = KNOWN_NORMALISERS if of.kind in SECOND_LOOK else KNOWN_EVERYTHING
        given, _, given_gradient = self.ops.divergence(s, t, *args, state, known, SAVE_GRADIENT)
        for value in (ours, only, again, given):
            assert value.dtype == torch.float32
            assert_close(value, loss, torch.float32)
        for made in (ours_gradient, backward / 2, given_gradient):
            assert_close(made, gradient, s.dtype)
        assert nothing.numel() == 0
        assert_close(components, of.components(s, t), torch.float32)
        self.check_state(state, s, t, columns, of)
        self.clean()

    def check_state(self, state: Tensor, s: Tensor, t: Tensor, columns: int, of: Loss) -> None:
        assert state.shape == (*s.shape[:-1], STATE_SIZE)
        leading = state[..., 0]
        counted = torch.ones_like(leading, dtype=torch.bool) if of.mask is None else of.mask.expand(leading.shape)
        assert (state[~counted] == 0).all()
        if of.kind == "logit_mse":  # makes no sums of powers
            return
        temperature = torch.as_tensor(of.temperature, dtype=torch.float64).expand(leading.shape)
        for z, most, total in ((s, state[..., 0], state[..., 1]), (t, state[..., 2], state[..., 3])):
            exact = (z[..., :columns].double() / temperature[..., None]).logsumexp(-1)
            ours = most.double() / temperature + total.double().log()
            assert_close(ours[counted], exact[counted], torch.float32)
