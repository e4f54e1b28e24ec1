"""Some fifteen calls that reach every kind of kernel, each compared with its reference in float64; the first wrong one ends
the run, by its name. Small: compute-sanitizer runs it too."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kdfast.bench.evidence.record import DEVICE, DRY, Record
from kdfast.bench.registry import OPERATORS
from kdfast.bench.registry.operator import Side, apply, cast, mapped, tensors
from kdfast.ops._block_layout import BlockLayout
from kdfast.ops.divergence import kl_div

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Of values and of the gradient's norm. Losses are float32 whatever the inputs; gradients are rounded to the inputs' dtype.
ALLOWED = {F32: 1e-4, BF16: 6e-3, F16: 2e-3}
Inputs = tuple[Side, Side, dict[str, Any]]


def randn(*shape: int, seed: int, dtype: torch.dtype = F32, size: float = 3.0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (size * torch.randn(shape, generator=generator, device=DEVICE)).to(dtype)


def logits(rows: int, columns: int, dtype: torch.dtype, **kwargs: Any) -> Inputs:
    """As many rows that a cluster of the wanted size is not spread further; a rehearsal takes few, of few columns."""
    if DRY:
        rows, columns = 3, columns // 64 + 2
    return randn(rows, columns, seed=0, dtype=dtype), randn(rows, columns, seed=1, dtype=dtype), kwargs


def masked(rows: int, columns: int, dtype: torch.dtype) -> Inputs:
    """Every third row is not read, and its blocks leave before their clusters meet; labels, one of them ignored."""
    student, teacher, _ = logits(rows, columns, dtype)
    at = torch.arange(student.shape[0], device=DEVICE)
    mask = at % 3 != 1
    student[~mask] = teacher[~mask] = torch.nan
    labels = torch.where(at == 2, -100, at * 997 % student.shape[1])
    return student, teacher, {"mask": mask, "labels": labels, "label_smoothing": 0.1}


def topk(rows: int, columns: int) -> Inputs:
    student, teacher, _ = logits(rows, columns, BF16)
    values, indices = teacher.float().log_softmax(-1).topk(32)
    return student, (values, indices), {}


def head(dtype: torch.dtype, rows: int = 96, width: int = 64, vocabulary: int = 1000) -> Inputs:
    """Three slabs or more of a large vocabulary's rows, on a GPU."""
    sides = [
        (randn(rows, width, seed=i, dtype=dtype, size=1), randn(vocabulary, width, seed=2 + i, dtype=dtype, size=0.4))
        for i in range(2)
    ]
    labels = torch.arange(rows, device=DEVICE) * 31 % vocabulary
    return *sides, {"labels": labels, "memory_budget": "auto" if DRY else 400_000}  # type: ignore[return-value]


def layers(*shape: int, dtype: torch.dtype, count: int = 2, **kwargs: Any) -> Inputs:
    student, teacher = ([randn(*shape, seed=2 * i + j, dtype=dtype) for i in range(count)] for j in range(2))
    return student, teacher, kwargs


def heads(length: int, size: int, dtype: torch.dtype, **kwargs: Any) -> Inputs:
    sides = [tuple(randn(2, 2, length, size, seed=2 * j + i, dtype=dtype, size=1) for i in range(2)) for j in range(2)]
    return *sides, kwargs  # type: ignore[return-value]


def of_two_dtypes(strided: bool = False, **kwargs: Any) -> Inputs:
    student, teacher = logits(20, 5000, F32)[0], logits(20, 5000, BF16)[1]
    return student, teacher.t().contiguous().t() if strided else teacher, kwargs


def token_mask(batch: int, length: int) -> Tensor:
    return torch.arange(length, device=DEVICE) < torch.tensor([[length], [length // 2 + 1]], device=DEVICE)[:batch]


def part() -> Inputs:
    rows = torch.tensor([0, 1, 2, 7, 9, 15, 16, 29, 30], device=DEVICE)
    columns = torch.cat((torch.arange(33), torch.tensor([40, 96, 129]))).to(DEVICE)
    x, weight = randn(7, 36, seed=0, dtype=BF16), randn(31, 130, seed=1, dtype=BF16)
    return (x, weight), (), {"rows": rows, "columns": columns}


def blocks(dtype: torch.dtype) -> Inputs:
    """Two tiles of rows, a quarter of the blocks, an empty block row; as many as a GPU's own kernels are taken for."""
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0, 3] = mask[2, 0] = mask[2, 1] = mask[3, 3] = True
    x, values = randn(161, 256, seed=0, dtype=dtype, size=1), randn(4, 128, 64, seed=1, dtype=dtype, size=0.1)
    return (x, values), (), {"layout": BlockLayout(mask, (128, 64)).to(DEVICE)}


@contextlib.contextmanager
def before_hopper() -> Iterator[None]:
    os.environ["KDFAST_CUDA_NO_CLUSTERS"] = "1"
    try:
        yield
    finally:
        del os.environ["KDFAST_CUDA_NO_CLUSTERS"]


# Operator and inputs. Clusters are those that a Hopper device takes for the width.
CASES: dict[str, tuple[str, Callable[[], Inputs]]] = {
    "registers, lanes": ("kl_div", lambda: logits(8192, 2, BF16)),
    "registers, vectors": ("js_div", lambda: logits(300, 1000, BF16)),
    "cluster of 1, odd width": ("kl_div", lambda: logits(150, 4999, F32)),
    "cluster of 2": ("kl_div", lambda: logits(70, 32000, BF16)),
    "cluster of 4, odd width": ("js_div", lambda: logits(40, 50257, BF16)),
    "cluster of 8": ("kl_div", lambda: logits(20, 128256, F16, temperature=2.0)),
    "cluster of 16": ("kl_div", lambda: logits(10, 262144, BF16)),
    "masked rows and labels in clusters": ("kd_loss", lambda: masked(21, 151936, BF16)),
    "two reads": ("kl_div", lambda: logits(20, 128256, BF16)),
    "two dtypes": ("kl_div", of_two_dtypes),
    "two dtypes, states given": ("kl_div", lambda: of_two_dtypes(reduction="none")),
    "any layout": ("kl_div", lambda: of_two_dtypes(strided=True)),
    "top-k": ("topk_kl_div", lambda: topk(20, 50257)),
    "several slabs, bfloat16": ("linear_kd_loss", lambda: head(BF16)),
    "several slabs, float16": ("linear_kd_loss", lambda: head(F16)),
    "several slabs, float32": ("linear_kd_loss", lambda: head(F32)),
    "scores": ("attention_mse", lambda: layers(2, 3, 37, 40, dtype=BF16, query_mask=token_mask(2, 37))),
    "scores, distributions": ("attention_kl", lambda: layers(2, 3, 40, 40, dtype=F32, key_mask=token_mask(2, 40))),
    "hidden states": ("hidden_mse", lambda: layers(2, 9, 96, dtype=BF16, mask=token_mask(2, 9))),
    "directions": ("cosine_distance", lambda: layers(2, 9, 70, dtype=F32, mask=token_mask(2, 9))),
    "first tokens": ("cls_distance", lambda: layers(2, 9, 96, dtype=F32)),
    "queries and keys, scores": ("qk_attention_mse", lambda: heads(50, 24, F32, key_mask=token_mask(2, 50))),
    "queries and keys, causal": ("qk_attention_mse", lambda: heads(130, 32, BF16, is_causal=True)),
    "queries and keys, panels": ("qk_attention_mse", lambda: heads(70, 72, F32, is_causal=True)),
    "queries and keys, grams": ("qk_attention_mse", lambda: heads(401, 32, F32)),
    "queries and keys, grams of one tile": ("qk_attention_mse", lambda: heads(1050, 64, BF16)),
    "queries and keys, grams of tiles": ("qk_attention_mse", lambda: heads(250, 80, F32)),
    "relations": ("qk_relation_kl", lambda: heads(150, 32, F32, key_mask=token_mask(2, 150))),
    "relations, 16 bits": ("qk_relation_kl", lambda: heads(150, 64, BF16, key_mask=token_mask(2, 150))),
    "relations, panels": ("qk_relation_kl", lambda: heads(70, 72, F16)),
    "part of a matrix": ("selected_linear", part),
    "blocks of a matrix": ("block_sparse_linear", lambda: blocks(BF16)),
    "blocks of a matrix, float16": ("block_sparse_linear", lambda: blocks(F16)),
    "blocks of a matrix, before Hopper": ("block_sparse_linear", lambda: blocks(BF16)),
    "blocks of a matrix, float32": ("block_sparse_linear", lambda: blocks(F32)),
}

BEFORE_HOPPER = ("two reads", "blocks of a matrix, before Hopper")


def value_and_gradients(function: Callable[..., Tensor], inputs: Inputs, factor: float) -> tuple[Tensor, Tensor]:
    student = mapped(lambda x: x.detach().requires_grad_(), inputs[0])
    result = apply(function, student, inputs[1], **inputs[2])
    loss = factor * (result.float().square().mean() if result.dim() else result)
    return loss.detach(), torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, tensors(student))])


def compare(name: str) -> tuple[float, float]:
    """Relative errors of value and gradient; the upstream factor is not 1, so that gradients are scaled too."""
    operator, inputs = OPERATORS[CASES[name][0]], CASES[name][1]()
    with before_hopper() if name in BEFORE_HOPPER else contextlib.nullcontext():
        ours = value_and_gradients(operator.function, inputs, 3.0)
    doubled = cast(inputs[0], torch.float64), cast(inputs[1], torch.float64), inputs[2]
    exact = value_and_gradients(operator.reference, doubled, 3.0)
    return checked(ours, exact, tensors(inputs[0])[0].dtype, operator.product)


def checked(
    ours: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor], dtype: torch.dtype, rounded: bool = False
) -> tuple[float, float]:
    """`rounded`: the value has the dtype's rounding too."""
    gradient, exact_gradient = (x[1].nan_to_num() for x in (ours, exact))  # of masked rows in the reference
    errors = float((ours[0] / exact[0] - 1).abs()), float((gradient - exact_gradient).norm() / exact_gradient.norm())
    allowed = ALLOWED[dtype if rounded else F32], ALLOWED[dtype]
    if not ours[1].isfinite().all() or not all(e <= a for e, a in zip(errors, allowed, strict=True)):
        raise AssertionError(f"value and gradient are {errors[0]:.1e} and {errors[1]:.1e} off, allowed {allowed}")
    return errors


def replayed() -> tuple[float, float]:
    """A CUDA graph, on inputs that changed since."""
    student, teacher, _ = logits(20, 128256, BF16)
    student.requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.autograd.grad(kl_div(student, teacher), student)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = kl_div(student, teacher)
        (gradient,) = torch.autograd.grad(loss, student)
    with torch.no_grad():
        student.copy_(randn(*student.shape, seed=7))
    graph.replay()
    inputs: Inputs = student.detach().double(), teacher.double(), {}
    exact = value_and_gradients(OPERATORS["kl_div"].reference, inputs, 1.0)
    return checked((loss.detach(), gradient.double().flatten()), exact, BF16)


def run(record: Record) -> None:
    calls: dict[str, Callable[[], tuple[float, float]]] = {name: lambda name=name: compare(name) for name in CASES}  # type: ignore[misc]
    # Without its cache of memory torch cannot capture a graph.
    if not DRY and not os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        calls["CUDA graph"] = replayed
    for name, call in calls.items():
        with record.case(name) as found:
            found["value"], found["gradient"] = call()
            if not DRY:
                torch.cuda.synchronize()
        if record.failed:
            sys.exit(f"smoke: {name}: {record.results[-1]['error']}")
