"""The CUDA kernels of the distances between layers, run on the CPU by the host shim, over the registry's samples."""

from __future__ import annotations

import ctypes
import platform

import pytest
import torch
from accuracy import check, value_and_gradient
from shim import Case, Device, assert_close, shim
from torch import Tensor

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


def qk_sides(
    *size: int, dtypes: tuple[torch.dtype, torch.dtype], key_heads: int, teacher_size: int, offset: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Queries `[B, H, L, d]` and keys of fewer heads, of a student and a teacher that is near where sizes agree; each
    `offset` numbers behind 16 bytes."""
    batch, heads, length, width = size
    sides = []
    for dtype, d in zip(dtypes, (width, teacher_size), strict=True):
        side = []
        for n in (heads, key_heads):
            memory = torch.empty(batch * n * length * (d + offset) + offset, dtype=dtype)
            rows = memory[offset:].view(batch, length, n, d + offset).transpose(1, 2)[..., :d]
            side.append(rows.copy_(torch.randn(rows.shape)))
        sides.append(side)
    if width == teacher_size:
        for s, t in zip(*sides, strict=True):
            s.copy_(t + 0.1 * s)
    return sides[0], sides[1]


QK_CASES = {  # what is not in the registry's samples
    "one tile": ((1, 2, 140, 64), {}),
    "one tile, not full, split": ((1, 1, 1050, 40), {}),
    "tiles": ((1, 1, 200, 72), {}),
    "tiles and shared keys": ((1, 4, 250, 80), {"key_heads": 2}),
    "small and odd": ((2, 2, 70, 7), {}),
    "panels": ((1, 2, 90, 136), {}),
    "panels, causal": ((1, 2, 75, 100), {"is_causal": True}),
    "panels that differ": ((1, 2, 40, 24), {"teacher_size": 72}),
    "panels of the student": ((1, 4, 70, 72), {"teacher_size": 24, "key_heads": 2}),
}


@pytest.mark.parametrize("name", ["qk_attention_mse", "qk_relation_kl"])
@pytest.mark.parametrize("case", QK_CASES)
@pytest.mark.parametrize("layout", ["float32", "bfloat16", "float16", "mixed", "misaligned"])
@pytest.mark.usefixtures("on_shim")
def test_qk_sizes(shim: ctypes.CDLL, name: str, case: str, layout: str) -> None:
    """Every way to a product, from vectors and from single numbers; NaN where nothing counts."""
    shape, options = QK_CASES[case]
    options = dict(options)
    if name == "qk_relation_kl" and options.pop("is_causal", False):
        pytest.skip("relations are not causal")
    one = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(layout, torch.float32)
    dtypes = (one, torch.bfloat16 if layout == "mixed" else one)
    key_heads, teacher_size = options.pop("key_heads", shape[1]), options.pop("teacher_size", shape[3])
    torch.manual_seed(0)
    host = Case(shim, Device(), seed=2)
    student, teacher = qk_sides(
        *shape, dtypes=dtypes, key_heads=key_heads, teacher_size=teacher_size, offset=3 * (layout == "misaligned")
    )
    masks = {n: torch.rand(shape[0], shape[2]) < 0.8 for n in ("query_mask", "key_mask")}
    masks["key_mask"][:, 0] = True  # a causal row has a key
    for q, k in (student, teacher):
        q.masked_fill_(~masks["query_mask"][:, None, :, None], torch.nan)
        k.masked_fill_(~masks["key_mask"][:, None, :, None], torch.nan)
    arguments = masks | options | {"reduction": "none"}
    operator = LAYERS[name]
    doubled = [tuple(x.double().nan_to_num() for x in side) for side in (student, teacher)]
    exact = value_and_gradient(operator.reference, *doubled, arguments)
    got = value_and_gradient(operator.function, tuple(student), tuple(teacher), arguments)
    assert_close(got[0], exact[0], torch.float32)
    assert_close(got[1], exact[1], one)
    split = [x.numel() for x in student]
    for gradient, mask in zip(got[1].split(split), masks.values(), strict=True):
        heads = gradient.numel() // (shape[0] * shape[2] * shape[3])
        assert not gradient.view(shape[0], heads, *shape[2:]).masked_fill(mask[:, None, :, None], 0.0).any()
    host.clean()


@pytest.mark.usefixtures("on_shim")
def test_qk_near_teacher(shim: ctypes.CDLL) -> None:
    """The gradient shrinks with the distance and stays as exact as float32 lets the difference be."""
    Case(shim, Device())
    torch.manual_seed(0)
    teacher = tuple(torch.randn(1, 2, 160, 64) for _ in range(2))
    for distance in (1e-2, 1e-4):
        student = tuple(t + distance * torch.randn(t.shape) for t in teacher)
        exact = value_and_gradient(
            LAYERS["qk_attention_mse"].reference,
            *(tuple(x.double() for x in side) for side in (student, teacher)),
            {"reduction": "sum"},
        )
        got = value_and_gradient(kdfast.qk_attention_mse, student, teacher, {"reduction": "sum"})
        assert_close(got[0], exact[0], torch.float32)
        assert_close(got[1] / distance, exact[1] / distance, torch.float32)
