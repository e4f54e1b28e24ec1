"""Objectives of several tasks, of which each batch has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.objective.schedules import check_weight
from kdfast.objective.term import Inputs, divisor, rows_of
from kdfast.objective.terms import Terms

COLUMN = "sample_task"  # of a batch: its task's name


class Tasks(nn.Module):
    """weight_τ · the terms of task τ, whose name the batch has in `sample_task`; the others are 0.

        Tasks({"sst2": Hinton(0.9, 2.0), "mnli": Hinton(0.5, 4.0)}, weights={"sst2": 1.0, "mnli": 0.5})

    The student is a `kdfast.models.shared_encoder.SharedEncoder`, or a model whose forward takes `task` too. Terms are
    logged as `sst2_kl` and so on. In a step of several micro-batches, or processes, every row counts the same, whatever
    its task: how much a task counts is its share of the batches times its weight.

    Args:
        objectives: by the tasks' names.
        weights: by the same names; 1 where it has none.

    Raises:
        TypeError, ValueError: no objectives, one that is no `Terms`, a name with a dot, a weight that is no number or
            negative, or of no task; a batch of no task.
    """

    def __init__(self, objectives: Mapping[str, Terms], weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        weights = {} if weights is None else weights
        if not objectives or any("." in name for name in objectives):
            got = ", ".join(objectives) or "none"
            raise ValueError(f"Tasks: objectives: expected some, by names without a dot, got {got}")
        if unknown := sorted({*weights} - {*objectives}):
            raise ValueError(f"Tasks: weights: expected those of {', '.join(objectives)}, got {', '.join(unknown)}")
        for name, objective in objectives.items():
            if not isinstance(objective, Terms):
                got = type(objective).__name__
                raise TypeError(f"Tasks: objectives: expected Terms for {name}, got {got}")
            check_weight("Tasks", "weights", weights.get(name, 1.0))
        self.objectives = nn.ModuleDict(objectives)
        self.names = [f"{name}_{term}" for name, of in objectives.items() for term in of.terms]
        self.weights = {name: weights.get(name, 1.0) for name in objectives}

    @property
    def progress(self) -> float:
        return next(iter(self.objectives.values())).progress  # type: ignore[return-value]

    @progress.setter
    def progress(self, share: float) -> None:
        for objective in self.objectives.values():
            objective.progress = share  # type: ignore[assignment]

    def run(self, model: nn.Module, inputs: Inputs) -> Any:
        """The student's classifier of the batch's task."""
        task = self._task(inputs)
        return self.objectives[task].run(model, {**inputs, "task": task})  # type: ignore[operator]

    def num_items(self, inputs: Inputs) -> Tensor:
        """Rows, a scalar."""
        return torch.tensor(rows_of(inputs))

    def forward(self, student_outputs: Any, teacher_outputs: Any, inputs: Inputs) -> dict[str, Tensor]:
        """The terms of all tasks by name, weighted."""
        task, own = self._task(inputs), {name: x for name, x in inputs.items() if name != "num_items"}
        share = rows_of(inputs) / divisor(inputs["num_items"]) if "num_items" in inputs else 1.0
        found = self.objectives[task](student_outputs, teacher_outputs, own)
        device = next(iter(found.values())).device
        # The same names in every process, which may have batches of different tasks.
        values = {name: torch.zeros((), device=device) for name in self.names}
        return values | {f"{task}_{term}": self.weights[task] * share * value for term, value in found.items()}

    def _task(self, inputs: Inputs) -> str:
        task = inputs.get(COLUMN)
        if str(task) not in self.objectives:
            expected = f"one of {', '.join(self.objectives)}"
            raise ValueError(f"Tasks: {COLUMN}: expected {expected}, got {'none' if task is None else repr(task)}")
        return str(task)
