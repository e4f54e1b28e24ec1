"""Which rows of a large-vocabulary loss are in memory at once: plain arithmetic.

Rows are taken in slabs, of which the logits' gradients are held, and a slab in chunks, of which the float32 logits are.
These lie in the part of the slab that is not written yet, and in a tail of it:

    rows of the slab:  | written | this chunk's | ........ not yet ........ | tail |
                                            | student's logits | teacher's logits |

Gradients are held of as many rows as the budget allows, because every further slab reads and writes the gradient of the
whole weight again, in float32.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

# Rows of a slab from which on larger ones gain little: the weight gradient's traffic is 2 % of its products' time.
SATURATED = {False: 512, True: 8192}  # on the CPU, on the GPU
LEAST_CHUNK = 256  # rows of a product, on the GPU


class Chunk(NamedTuple):
    begin: int
    end: int


@dataclass(frozen=True)
class Plan:
    """Slabs of rows, each in chunks, and the rows of the memory they all take in turn."""

    slabs: list[list[Chunk]]
    memory: int


def plan(rows: int, fits: int, tail: int, on_gpu: bool, several: bool) -> Plan:
    """The budget holds the gradients of `fits` rows, 1 + `tail` or more; a row's logits beside its gradient take as
    much as `tail` rows of these. `several`: chunks of a slab."""
    most = min(rows, SATURATED[on_gpu])
    least = min(most, fits // (1 + tail), LEAST_CHUNK if several else most)
    slab = min(most, fits - tail * least) if several else least
    slab = -(-rows // -(-rows // slab))  # of equal size
    slabs = [_chunks(begin, min(rows, begin + slab), tail, least, several) for begin in range(0, rows, slab)]
    return Plan(slabs, slab + tail * least)


def _chunks(begin: int, end: int, tail: int, least: int, several: bool) -> list[Chunk]:
    chunks = []
    while begin < end:
        rows = min(end - begin, (end - begin + tail * least) // (1 + tail))
        if several and rows > 128:
            rows -= rows % 128  # whole tiles
        chunks.append(Chunk(begin, begin + rows))
        begin += rows
    return chunks


def automatic(device: torch.device) -> int:
    """A tenth of the device's memory, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 10
