"""Outputs of a student and a teacher that no model made, and the comparison of a term with plain torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdfast.models.reader import Features

BATCH, LENGTH, CLASSES = 4, 6, 5
LENGTHS = torch.tensor([6, 3, 1, 5])
MASK = torch.arange(LENGTH) < LENGTHS[:, None]
TOKEN_LABELS = torch.where(MASK & (torch.arange(LENGTH) % 3 != 1), torch.arange(LENGTH) % CLASSES, -100)
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
WEIGHTED = pytest.mark.parametrize("weighted", [False, True], ids=["", "sample_weight"])
ByHand = Callable[[Any, Any, Any], Tensor]


def side(
    seed: int, dtype: torch.dtype = torch.float64, *, layers: int = 2, width: int = 12, heads: int = 2,
    shared_by: int = 1, tokens: bool = False, **more: Any,
) -> Features:  # fmt: skip
    """What a model might have returned: random leaves, with gradients for even seeds (students)."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64).float().to(dtype)
        return drawn.requires_grad_(seed % 2 == 0)

    logits = leaf(BATCH, LENGTH, CLASSES) if tokens else leaf(BATCH, CLASSES)
    hidden = tuple(leaf(BATCH, LENGTH, width) for _ in range(layers + 1))
    counts = {"q": heads, "k": heads // shared_by, "v": heads // shared_by}
    read = {name: [leaf(BATCH, n, LENGTH, width // heads) for _ in range(layers)] for name, n in counts.items()}
    given: dict[str, Any] = {"scale": 0.3 + 0.2 * (seed % 2), "mask": None, "cls_index": 0, "causal": False, **more}
    return Features(outputs=SimpleNamespace(logits=logits), hidden=hidden, **read, bias=[], **given)


def batch(weighted: bool = False, tempered: bool = False, **columns: Any) -> dict[str, Any]:
    inputs = {"input_ids": torch.ones(BATCH, LENGTH, dtype=torch.long), "attention_mask": MASK.long(), **columns}
    if weighted:
        inputs["sample_weight"] = torch.tensor([0.5, 2.0, 0.0, 1.25])
    if tempered:
        inputs["sample_temperature"] = torch.tensor([1.0, 0.5, 4.0, 2.5])
    return inputs


def leaves(student: Any, *modules: nn.Module) -> list[Tensor]:
    return [
        student.logits,
        *student.hidden,
        *student.q,
        *student.k,
        *student.v,
        *(p for m in modules for p in m.parameters()),
    ]


def compare(got: Tensor, expected: Tensor, inputs: Sequence[Tensor], tolerance: float) -> None:
    """Values, and the gradients of every input: those that the one side has none of must be zero on the other."""
    assert abs(expected.item()) > 1e-4, "zeros would pass"
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=0)
    mine, its = (
        [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]
        for grads in (torch.autograd.grad(value, inputs, allow_unused=True) for value in (got, expected))
    )
    assert sum(float(g.norm()) for g in its) > 1e-4, "zeros would pass"
    for a, b in zip(mine, its, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, float(b.norm())))


def check(term: Any, by_hand: ByHand, student: Any, teacher: Any, inputs: Any, tolerance: float) -> None:
    compare(term(student, teacher, inputs), by_hand(student, teacher, inputs), leaves(student, term), tolerance)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def rows_of(outputs: Features, rows: Tensor) -> Features:
    """The sequences of these numbers."""
    read = {name: [x[rows] for x in getattr(outputs, name)] for name in ("hidden", "q", "k", "v")}
    return dataclasses.replace(outputs, outputs=SimpleNamespace(logits=outputs.logits[rows]), **read)
