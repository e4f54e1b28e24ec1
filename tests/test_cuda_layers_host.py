"""The CUDA kernels of the distances between layers, run on the CPU by the host shim, over the registry's samples."""

from __future__ import annotations

import ctypes
import platform

import pytest
import torch
from accuracy import check
from shim import Case, Device, shim

import kdfast
from kdfast.bench.registry.layers import LAYERS
from kdfast.bench.registry.operator import Operator, Sample

__all__ = ["shim"]  # a fixture
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the shim switches fibers on x86-64 only")

SAMPLES = [
    pytest.param(operator, sample, id=f"{operator.name}-{sample.name}")
    for operator in LAYERS.values()
    for sample in operator.samples
]
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)]


@pytest.fixture
def on_shim(shim: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("layer_distance", "qk_distance"):
        for op in (name, name + "_backward"):
            monkeypatch.setattr(torch.ops.kdfast, op, getattr(torch.ops.kdfast_cuda_host, op))


@pytest.mark.parametrize("dtypes", DTYPES, ids=["float32", "bfloat16", "float32-float16"])
@pytest.mark.parametrize(("operator", "sample"), SAMPLES)
@pytest.mark.usefixtures("on_shim")
def test_samples(
    shim: ctypes.CDLL, operator: Operator, sample: Sample, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    case = Case(shim, Device(), seed=3)
    check(operator, sample, 1.0, *dtypes, device="cpu:0")  # not "cpu": that is run under every CPU variant
    case.clean()


@pytest.mark.usefixtures("on_shim")
def test_more_layers_than_a_launch_takes(shim: ctypes.CDLL) -> None:
    case = Case(shim, Device())
    student = [torch.randn(1, 3, 8).requires_grad_() for _ in range(50)]
    teacher = [torch.randn(1, 3, 8) for _ in range(50)]
    for reduction in ("sum", "none"):
        loss = kdfast.hidden_mse(student, teacher, reduction=reduction)
        per = 8 if reduction == "none" else 1
        expected = torch.stack([(s - t).square().sum(-1) / per for s, t in zip(student, teacher, strict=True)])
        torch.testing.assert_close(loss, expected if reduction == "none" else expected.sum())
        factors = torch.arange(1.0, loss.numel() + 1).reshape(loss.shape)
        got = torch.autograd.grad((loss * factors).sum(), student, retain_graph=True)
        wanted = torch.autograd.grad((expected * (factors if reduction == "none" else 1)).sum(), student)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)
    heads = [torch.randn(1, 30, 5, 4).requires_grad_() for _ in range(40)]  # 34 layers of 30 heads at once
    loss = kdfast.qk_attention_mse(heads, heads, [q.detach() + 1 for q in heads], heads, reduction="none")
    loss.sum().backward()
    assert loss.shape == (40, 1, 30)
    each = [kdfast.qk_attention_mse(q, q, q.detach() + 1, q, reduction="none") for q in heads[33:36]]
    torch.testing.assert_close(loss[33:36], torch.stack(each))
    assert all(q.grad is not None and q.grad.any() for q in heads)
    case.clean()


@pytest.mark.usefixtures("on_shim")
def test_misaligned_rows(shim: ctypes.CDLL) -> None:
    """16-byte accesses where all three rows start on them, single numbers elsewhere."""
    for shift in (0, 1):
        case = Case(shim, Device(), offset=shift)
        for start in (0, 1, 4):
            student = torch.randn(3, 2, 72)[..., start : start + 64].requires_grad_()
            teacher = torch.randn(3, 2, 72)[..., start : start + 64]
            loss = kdfast.hidden_mse(student, teacher)
            expected = torch.nn.functional.mse_loss(student, teacher)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, expected)))
        case.clean()
