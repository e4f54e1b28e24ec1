"""`SubnetworkTrainer`: a `DistillationTrainer` each of whose steps trains sub-networks of one set of weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.objective import Objective
from kdfast.train.trainer import DistillationTrainer


class SubnetworkTrainer(DistillationTrainer):
    """Trains the sub-networks of a `kdfast.elastic.Elastic`, all in every step: their gradients add up, and then the
    optimizer makes one step (DynaBERT; Hou et al., 2020). Logged are means over the sub-networks, of the loss too.
    Evaluations are of the whole model.

    Args:
        model, args, **kwargs: as of `DistillationTrainer`.
        networks: the sub-networks of `model`.
        objective: of the whole model, in evaluations.
        objective_of: of the sub-network of a width and a depth, without parameters, with the terms of `objective`.
        teacher: runs once for every batch, with all its layers and its full width; or by `teacher_networks`, sub-networks of
            it, as wide as the student.
        sandwich: how many sub-networks of a step are drawn anew, beside the largest and the smallest
            (Yu and Huang, 2019). None: all are trained.
        in_place: the largest sub-network's outputs, in the same step and without their gradient, are the others' teacher's.
            There is no other teacher then.

    Raises:
        ValueError, TypeError: as of `DistillationTrainer`; a teacher beside `in_place`; an objective with parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any = None,
        *,
        networks: Any,
        objective: Objective,
        objective_of: Callable[[float, float], Objective],
        teacher: nn.Module | None = None,
        teacher_networks: Any = None,
        sandwich: int | None = None,
        in_place: bool = False,
        **kwargs: Any,
    ) -> None:
        if in_place and teacher is not None:
            raise ValueError("SubnetworkTrainer: teacher: expected none beside in_place, got one")
        super().__init__(model, args, teacher=teacher, objective=objective, **kwargs)
        self.networks, self.teacher_networks = networks, teacher_networks
        self.sandwich, self.in_place = sandwich, in_place
        self._objectives = {of: self._prepared(objective_of(*of)) for of in networks.subnetworks}
        if any(True for one in self._objectives.values() if isinstance(one, nn.Module) for _ in one.parameters()):
            raise ValueError("SubnetworkTrainer: objective_of: expected one without parameters, got one with some")
        self._known: dict[float, Any] | None = None  # within a step: the teacher's outputs by its width

    def drawn(self) -> list[tuple[float, float]]:
        """Widths and depths of this step's sub-networks, the largest first; the same on every rank and after a resume."""
        every = self.networks.subnetworks
        if self.sandwich is None or len(every) <= self.sandwich + 2:
            return list(every)
        between = Random(f"{self.args.seed} {self.state.global_step}").sample(every[1:-1], self.sandwich)
        return [of for of in every if of in (every[0], every[-1], *between)]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's, of one sub-network after another; the mean of their losses."""
        drawn, whole, losses = self.drawn(), self.objective, []
        inputs, self._known = self._prepare_inputs(inputs), {}
        try:
            for width, depth in drawn:
                self.networks.set(width, depth)
                self.objective = self._objectives[width, depth]
                last = (width, depth) == drawn[-1]  # whose backward alone is synchronised
                with nullcontext() if last else self.accelerator.no_sync(model):
                    losses.append(super().training_step(model, inputs, num_items_in_batch))
        finally:
            self._known = None
            self.networks.set()
            self.objective = whole
        return torch.stack(losses).mean()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As of `DistillationTrainer`; within a step, `in_place` keeps what the first sub-network answers."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.in_place and self._known is not None:
            self._known.setdefault(1.0, _targets(outputs))
        return (loss, outputs) if return_outputs else loss

    def _teacher_outputs(self, inputs: dict[str, Any]) -> Any:
        width = 1.0 if self.teacher_networks is None or self._known is None else self.networks.width
        if self.teacher_networks is not None:
            self.teacher_networks.set(width)
        if self._known is None or self.in_place:
            return (self._known or {}).get(1.0) or super()._teacher_outputs(inputs)
        if width not in self._known:
            self._known[width] = super()._teacher_outputs(inputs)
        return self._known[width]


def _targets(outputs: Any) -> Any:
    """What terms read of a teacher, without gradients."""
    hidden = tuple(state.detach() for state in getattr(outputs, "hidden", ()))
    return SimpleNamespace(logits=outputs.logits.detach(), hidden=hidden)
