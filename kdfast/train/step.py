"""Steps of `DistillationTrainer`: a model that DDP wraps, the loss inside its forward, and means of what is logged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.data.distances import PROBLEM_TYPES, kind_of, to_teacher
from kdfast.objective import Labels, Logits, Terms


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


def forget_evaluation(trainer: Any) -> None:
    """Undoes what accelerate did to a model before an evaluation, of this trainer or another.

    It takes a model that it prepared to evaluate as prepared to train, and DDP would never wrap it: each process would
    train a model of its own.
    """
    model = trainer.model
    alone = trainer.accelerator.num_processes == 1 or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    wrapped = getattr(trainer.model_wrapped, "_orig_mod", trainer.model_wrapped)  # what torch.compile compiled
    if alone or isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return
    trainer.model_wrapped = model
    model._is_accelerate_prepared = False
    if "_original_forward" in vars(model):  # under mixed precision, which would be put around it once more
        model.forward = vars(model).pop("_original_forward")


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


def kind_between(objective: Any, config: Any, width: int) -> str:
    """What the outputs [B, width] of a student are, by the task of its labels, else by its config, else by its teacher.

    A softmax between the two is of classes. "" where nothing tells: several outputs might be labels that do not exclude
    each other, or numbers.
    """
    terms = [term for term in objective.terms.values() if term.weight] if isinstance(objective, Terms) else []
    tasks = [term.task for term in terms if isinstance(term, Labels) and term.task in PROBLEM_TYPES]
    of_classes = any(isinstance(term, Logits) and term.divergence != "logit_mse" for term in terms)
    return tasks[0] if tasks else kind_of(config, width, "classification" if of_classes else "")


def agreement(student: Any, teacher: Any, objective: Any, config: Any) -> dict[str, Tensor]:
    """`to_teacher` of the logits [B, C] of a classifier or regressor and its teacher.

    Nothing of other outputs, nor where nothing tells what they are.
    """
    if student is None or teacher is None or student.dim() != 2 or student.shape != teacher.shape:
        return {}
    kind = kind_between(objective, config, student.shape[-1])
    return to_teacher(student, teacher, kind) if kind else {}
