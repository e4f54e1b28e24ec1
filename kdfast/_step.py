"""What `DistillationTrainer` does within a step: the loss inside DDP's forward, means of what it logs, rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdfast import kl_div
from kdfast.objective._protocol import SAMPLE, TEACHER


class Means:
    """Weighted means of named numbers, over batches and processes."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weight: float | Tensor = 0.0

    def add(self, values: Mapping[str, Tensor], weight: float | Tensor, summed: bool = False) -> None:
        """`summed`: the values carry the weight already."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double() * (1.0 if summed else weight)
        self.weight = self.weight + weight

    def take(self, accelerator: Any) -> dict[str, float]:
        """The means, and starts anew. 0 where nothing has a weight."""
        names, device = list(self.sums), accelerator.device
        totals = [torch.as_tensor(x, dtype=torch.float64, device=device) for x in (*self.sums.values(), self.weight)]
        *sums, weight = accelerator.reduce(torch.stack(totals), reduction="sum").tolist()
        self.__init__()  # type: ignore[misc]
        return {name: value / weight if weight else 0.0 for name, value in zip(names, sums, strict=True)}


def inside_forward(model: nn.Module, step: Callable[[nn.Module], dict[str, Tensor]]) -> dict[str, Tensor]:
    """step(model), inside the forward of DistributedDataParallel where that wraps the model.

    What DDP's forward returns tells it which parameters will have gradients. That must be the loss itself: a model's
    outputs come from heads that no term may reach, and lack the queries and keys that some do.
    """
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return step(model)
    inner: Any = model.module
    own = vars(inner).get("forward")  # accelerate's, under mixed precision

    def restore() -> None:
        vars(inner).pop("forward", None)
        if own is not None:
            inner.forward = own

    def forward() -> dict[str, Tensor]:
        restore()
        return step(inner)

    inner.forward = forward
    try:
        terms: dict[str, Tensor] = model()
        return terms
    finally:
        restore()


@contextmanager
def without(model: nn.Module, name: str) -> Iterator[None]:
    """`model` is for a while without its module of this name, if it has one."""
    taken = model._modules.pop(name, None)
    try:
        yield
    finally:
        if taken is not None:
            model.add_module(name, taken)


def agreement(student: Any, teacher: Any) -> dict[str, Tensor]:
    """Of the logits [B, C] of two classifiers of the same classes, C at least 2."""
    if student is None or teacher is None or student.dim() != 2 or student.shape[-1] < 2:
        return {}
    if student.shape != teacher.shape:
        return {}
    same = (student.argmax(-1) == teacher.argmax(-1)).float().mean()
    return {"agreement": same, "kl_to_teacher": kl_div(student, teacher)}


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
