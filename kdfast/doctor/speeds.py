"""How fast this machine copies memory and multiplies matrices, in a second or two."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from kdfast.bench import timing

COPIED = {"cpu": 2**27, "cuda": 2**30}  # bytes: more than caches hold
SECONDS = 0.25  # of each measurement
# Milliseconds of a product. Below the first, or a width of 1024, it says little, most of all on a machine that others use too.
LONG_ENOUGH, TOO_LONG = 20.0, 500.0
NARROWEST, WIDEST = 1024, 8192


@dataclass(frozen=True)
class Speeds:
    """`copy`: bytes read and written per second; `products`: floating-point operations per second, by dtype."""

    copy: float
    products: dict[str, float]

    def of_product(self, dtype: str) -> float:
        """The rate that products of such numbers could have: theirs, or float32's where widening them is faster."""
        return max(self.products[dtype], self.products["float32"] if dtype != "float64" else 0.0)


def measure(device: str, dtypes: Iterable[str]) -> Speeds:
    """The fastest of many calls each: others may share the machine."""
    source = torch.ones(COPIED[device] // 4, device=device)
    target = torch.empty_like(source)
    copy = 2e3 * COPIED[device] / _fastest(lambda: target.copy_(source), device)
    return Speeds(copy, {dtype: _of_product(device, getattr(torch, dtype)) for dtype in dtypes})


def _of_product(device: str, dtype: torch.dtype) -> float:
    """Of square matrices, each twice as wide as the last, until one is large."""
    width = 256
    while True:
        a, b = (torch.ones(width, width, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)

        def call(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> object:
            return torch.mm(a, b, out=out)

        once = min(timing.interleaved({"product": call}, device, rounds=2)["product"])
        if once > (LONG_ENOUGH if width >= NARROWEST else TOO_LONG) or width >= WIDEST:
            return 2e3 * width**3 / min(once, _fastest(call, device))
        width *= 2


def _fastest(call: Callable[[], object], device: str) -> float:
    """Milliseconds."""
    return min(timing.interleaved({"call": call}, device, rounds=2, seconds=SECONDS)["call"])
