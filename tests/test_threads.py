"""Operators that several threads of Python call at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from accuracy import inputs, value_and_gradient
from torch import Tensor

from kdfast.bench.registry import OPERATORS

THREADS = 4


@pytest.mark.parametrize("name", OPERATORS)
def test_each_gets_what_one_alone_gets(name: str) -> None:
    operator = OPERATORS[name]
    calls = [inputs(sample, 1.0, torch.float32, torch.float32) for sample in operator.samples[:THREADS]]

    def made(call: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        return value_and_gradient(operator.function, *call)

    alone = [made(call) for call in calls]
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(made, calls * 3))
    assert all(bool(gradient.any()) for _, gradient in alone)
    for got, expected in zip(together, alone * 3, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
