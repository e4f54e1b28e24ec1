"""linear_kd_loss as it runs on a GPU, on the CPU: that path's memory, and products that widen as its do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from test_linear import ROWS, inputs, relative
from torch import Tensor

import kdfast
from kdfast.ops import _chunks, _heads, _linear


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """Its memory and its products, which widen."""
    mm, addmm = torch.mm, torch.addmm

    def widening(product: Any) -> Any:
        def call(*args: Tensor, out: Tensor, out_dtype: torch.dtype | None = None, **more: Any) -> Tensor:
            assert out_dtype in (None, out.dtype)
            assert out_dtype is not None or all(x.dtype == out.dtype for x in args)
            return out.copy_(product(*(x.to(torch.float32) for x in args), **more))

        return call

    @contextmanager
    def patched() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(_heads, "on_gpu", lambda x: True)
            patch.setattr(_chunks, "LEAST_CHUNK", 3)
            patch.setattr(torch, "mm", widening(mm))
            patch.setattr(torch, "addmm", widening(addmm))
            yield

    return patched


def test_the_gpu_path(as_on_gpu: Callable[[], AbstractContextManager[None]]) -> None:
    """Logits in the place of gradients that are not written yet."""
    for dtype, (width, budget) in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), ((600, "auto"), (577, 60 * 640 * 2))
    ):
        h, w, th, tw, labels = inputs(dtype)
        w, tw, labels = w[:width].detach().requires_grad_(), tw[:width], labels % width
        bias = torch.randn(width).to(dtype).requires_grad_()
        mask = torch.arange(ROWS) % 4 != 0
        given = {"student_bias": bias, "mask": mask, "student_softcap": 9.0, "label_smoothing": 0.1}
        expected = torch.autograd.grad(kdfast.linear_kd_loss(h, w, th, tw, labels, **given), (h, w, bias))
        with as_on_gpu():
            loss = kdfast.linear_kd_loss(h, w, th, tw, labels, memory_budget=budget, **given)
            ours = torch.autograd.grad(loss, (h, w, bias))
        for got, wanted in zip(ours, expected, strict=True):
            assert got.dtype == wanted.dtype
            assert relative(got, wanted) < max(4 * torch.finfo(dtype).eps, 1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("width", [600, 577])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_logits_on_the_gpu(
    as_on_gpu: Callable[[], AbstractContextManager[None]],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    width: int,
    offset: int,
    masked: bool,
) -> None:
    """Rows that do not start as the student's are copied beside them: else the kernels would read them column by
    column."""
    h, w, th, tw, labels = inputs(torch.float32)
    w, labels = w[:width].detach().requires_grad_(), labels % width
    memory = torch.empty(ROWS * width + offset, dtype=dtype)
    teacher = memory[offset:].view(ROWS, width).copy_(th @ tw[:width].T)
    more: dict[str, Any] = {"mask": torch.arange(ROWS) % 4 != 0} if masked else {}
    expected = kdfast.linear_kd_loss(h, w, teacher_logits=teacher, labels=labels, **more)
    wanted = torch.autograd.grad(expected, (h, w))
    starts, into = [], _linear._call.divergence_into

    def seen(g: Tensor, s: Tensor, t: Tensor, *call: Any) -> Any:
        starts.extend((x.data_ptr() // x.element_size() % 4, x.stride(0) % 4) for x in (s, t))
        return into(g, s, t, *call)

    with as_on_gpu():
        monkeypatch.setattr(_linear._call, "divergence_into", seen)
        loss = kdfast.linear_kd_loss(h, w, teacher_logits=teacher, labels=labels, memory_budget=60 * 640 * 4, **more)
        ours = torch.autograd.grad(loss, (h, w))
    assert len(starts) > 4
    assert set(starts) == {(0, 0)}
    assert all(relative(got, x) < 1e-5 for got, x in zip((loss, *ours), (expected, *wanted), strict=True))
