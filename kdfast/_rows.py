"""Which rows and columns of a batch `DistillationTrainer` takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from kdfast.objective._protocol import SAMPLE, TEACHER


def own_rows(accelerator: Any, rows: int) -> int:
    """How many rows of an evaluation's batch are this process's own.

    accelerate fills up the last batches of all processes with rows from the beginning, and drops these from what it
    gathers. It cannot tell where a stream has no length.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return rows
    return int(min(max(state.remainder - accelerator.process_index * rows, 0), rows))


def first_rows(inputs: Mapping[str, Any], count: int, rows: int) -> dict[str, Any]:
    """`count` of a batch's `rows`."""
    cut = {name: x[:count] for name, x in inputs.items() if isinstance(x, Tensor) and x.dim() and len(x) == rows}
    return {**inputs, **cut}


class Columns(list[str]):
    """Names of columns; those of the objective, which no model's forward names, are among them by their prefix."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and name.startswith((TEACHER, SAMPLE)))

    def list_those_of(self, names: Iterable[str]) -> None:
        """For who asks for a list, and not whether a name is in it."""
        self.extend(name for name in names if name in self and name not in list(self))
