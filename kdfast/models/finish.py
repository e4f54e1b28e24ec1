"""What a model does to the logits of its output embeddings before it returns them: a scale, a bias, a soft-cap.

It is seen from outside: for one call numbers of our own take the place of the head's, and what comes of them tells.
Cohere and Granite scale, BART adds a bias, Gemma soft-caps; no list of them is needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Close enough to one another that no clamp passes for a soft-cap; the largest is still a float16.
_SIZES = [2.0**power for power in (*range(-4, 15, 2), 15)]
_SMALL, _LARGE = _SIZES[0], _SIZES[-2]
_NUMBERS = [*_SIZES, 0.0, *(-size for size in _SIZES)]


class Finish(NamedTuple):
    """z ↦ softcap · tanh((scale · z + added) / softcap), without softcap if it is None. added: [V]."""

    scale: float = 1.0
    added: Tensor | None = None
    softcap: float | None = None

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """What becomes of the head's own."""
        if bias is None or self.added is None:
            return self.added if bias is None else bias * self.scale
        return bias * self.scale + self.added

    def __call__(self, z: Tensor) -> Tensor:
        z = z * self.scale
        return capped(z if self.added is None else z + self.added, self.softcap)


def capped(z: Tensor, softcap: float | None) -> Tensor:
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def probes(row: Tensor) -> Tensor:
    """[1, n, V] float32 (float64) in place of one row of a head's logits [1, 1, V]: the row,
    and others of one number each."""
    row = row.detach().to(torch.promote_types(row.dtype, torch.float32))
    return torch.cat([row, *(torch.full_like(row, x) for x in _NUMBERS)], 1)


def seen(rows: Tensor, logits: Tensor) -> Finish | None:
    """What makes `logits` of such `rows`; None: something else than a `Finish`, or one that is trained."""
    if logits.shape != rows.shape or logits.requires_grad:
        return None
    exact = logits.dtype in (torch.float32, torch.float64)
    rows, logits = rows[0], logits.detach()[0].to(rows.dtype)
    zero, small, large, larger = (logits[1 + _NUMBERS.index(x)] for x in (0.0, _SMALL, _LARGE, _SIZES[-1]))
    softcap = float(large[0]) if bool((large == large[0]).all()) and torch.equal(large, larger) else None
    if softcap is not None and not 0 < softcap < _LARGE:
        return None
    if softcap is not None:
        zero, small = (softcap * torch.atanh(z / softcap) for z in (zero, small))
    scale = float((small - zero)[zero.abs().argmin()]) / _SMALL
    scale = 1.0 if abs(scale - 1) < (1e-5 if exact else 0.02) else scale
    finish = Finish(scale, zero if bool(zero.any()) else None, softcap)
    # A scale that was read from 16 bits would be wrong by half a percent.
    if not exact and scale != 1:
        return None
    near = (1e-4, 1e-4) if exact else (0.03, 1e-3)
    return finish if torch.allclose(finish(rows), logits, *near, equal_nan=True) else None
