"""Sums over the ranks of a process group, where there is one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def count() -> int:
    """How many ranks there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def add_up(totals: Sequence[Tensor]) -> None:
    """Every tensor becomes its sum over all ranks, in place; summed in float64, in one call."""
    if not totals or not (dist.is_available() and dist.is_initialized()):
        return
    together = torch.cat([total.flatten().to(totals[0].device, torch.float64) for total in totals])
    dist.all_reduce(together)
    for total, one in zip(totals, together.split([total.numel() for total in totals]), strict=True):
        total.copy_(one.view_as(total))
