"""`linear_kd_loss` against the matrix products that it cannot do without, in turn in one process."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from kdfast.bench import harness, timing
from kdfast.bench.evidence.record import DEVICE, DRY, Record
from kdfast.ops.linear import linear_kd_loss

# Rows, hidden size, vocabulary.
SHAPES = ((16, 16, 64),) if DRY else ((8192, 4096, 128256), (8192, 2048, 151936), (2048, 4096, 128256))
SECONDS = 0.05 if DRY else 3.0


class Heads:
    """Student and teacher, of one shape."""

    def __init__(self, rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> None:
        def made(*shape: int, size: float) -> Tensor:
            return (size * torch.randn(shape, device=DEVICE)).to(dtype)

        self.hidden, self.teacher_hidden = (made(rows, width, size=1) for _ in range(2))
        self.weight, self.teacher_weight = (made(vocabulary, width, size=3 * width**-0.5) for _ in range(2))
        self.hidden.requires_grad_()
        self.weight.requires_grad_()

    def kdfast(self) -> tuple[Tensor, ...]:
        loss = linear_kd_loss(self.hidden, self.weight, self.teacher_hidden, self.teacher_weight, alpha=1.0)
        return torch.autograd.grad(loss, (self.hidden, self.weight))

    @torch.no_grad()
    def products(self) -> tuple[Tensor, ...]:
        """Both logits, and of the student's logits' gradients those of hidden states and weight; all rows at once."""
        s, t = self.hidden @ self.weight.T, self.teacher_hidden @ self.teacher_weight.T
        return t, s @ self.weight, s.T @ self.hidden

    @torch.no_grad()
    def in_float32(self) -> Tensor:
        """One product as kdfast makes its logits: never rounded below float32."""
        if DEVICE == "cpu" or self.hidden.dtype == torch.float32:
            return self.hidden.float() @ self.weight.float().T
        return torch.mm(self.hidden, self.weight.T, out_dtype=torch.float32)

    @torch.no_grad()
    def rounded(self) -> Tensor:
        return self.hidden @ self.weight.T


def run(record: Record) -> None:
    torch.manual_seed(0)
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float16)[: 2 if shape == SHAPES[0] else 1]:
            name = f"linear_kd_loss-{'x'.join(map(str, shape))}-{str(dtype).removeprefix('torch.')}"
            if os.environ.get("ONLY", "") not in name:
                continue
            with record.case(name) as found:
                heads = Heads(*shape, dtype)
                calls: dict[str, Callable[[], object]] = {"kdfast": heads.kdfast, "products": heads.products}
                calls |= {"logits_in_float32": heads.in_float32, "logits_rounded": heads.rounded}
                times = timing.back_to_back(calls, DEVICE, rounds=3, seconds=SECONDS)
                found |= {f"{n}_ms": statistics.median(x) for n, x in times.items()}
                found["of_products"] = found["products_ms"] / found["kdfast_ms"]
                gradients = sum(x.numel() * x.element_size() for x in (heads.hidden, heads.weight))
                found["peak_MB_beside_gradients"] = harness.peak_memory(heads.kdfast, DEVICE) - gradients / 1e6
