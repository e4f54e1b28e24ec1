"""Several tasks and one encoder: a teacher and a head for each.

1. Each task has its teacher, fine-tuned on its labels or given, whose logits are stored.
2. The students are one encoder with a head per task. Every batch is of one task, drawn with probability ∝ size^tau, and
   is trained on

       weight_τ · ((1 - alpha_τ) · CE_τ + alpha_τ · T_τ² · KL_τ(teacher ‖ student))

   of a task of numbers, or of several labels at once, the soft term is the squared difference of the logits.
3. Each task's student is saved and measured as a model of its own.

The draw is TextBrewer's (Yang et al., 2020, arXiv:2002.12620), where all tasks have the same loss; in expectation the
loss is the sum over tasks, each by its share of the batches times its weight.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdfast.recipes.base import setting
from kdfast.recipes.classifier import ClassifierRecipe, Stage, soft_targets

PER_TASK = ("alpha", "temperature", "weight")


@dataclass(frozen=True, kw_only=True)
class OfTask(ClassifierRecipe):
    """One task of several: its teacher, and its student, which the whole run trains with the others'."""

    name = "multi-task-part"

    alpha: float = setting(0.9, "Weight of the soft term; the labels get 1 - alpha.")
    temperature: float = setting(2.0, "Softens teacher and student alike.")

    def stages(self, student_layers: int, teacher_layers: int, kind: str) -> list[Stage]:
        objective = soft_targets(kind, self.alpha, self.temperature)
        return [Stage("student", "student, shared encoder", objective, teacher="stored")]


@dataclass(frozen=True, kw_only=True)
class Recipe(ClassifierRecipe):
    """One encoder for several tasks, with a teacher and a head of each.

    Every batch is of one task, drawn by the tasks' sizes, and is trained on that task's labels and teacher. Each task's
    student is saved as a model of its own.
    """

    name = "multi-task"

    data: tuple[str, ...] = setting(  # type: ignore[assignment]
        ("movie_reviews", "product_reviews"),
        "Labelled text, once for each task: a task of GLUE, another Hub name, a file or a folder.",
        repeated=True,
    )
    teacher: tuple[str, ...] | None = setting(  # type: ignore[assignment]
        None,
        "Classifier of each task's data, in their order, a folder or Hub name. Default: the base, fine-tuned.",
        repeated=True,
    )
    student_start: str = setting("base", "Whose layers the encoder starts from: the base's, or the first teacher's.")
    alpha: tuple[float, ...] = setting(
        (0.9,), "Weight of the soft term; the labels get 1 - alpha. One, or each task's."
    )
    temperature: tuple[float, ...] = setting((2.0,), "Softens teacher and student alike. One, or each task's.")
    weight: tuple[float, ...] = setting((1.0,), "Weight of a task. One, or each task's.")
    tau: float = setting(1.0, "A task is drawn with probability ∝ size^tau: 1 by size, 0 all alike.")
    epochs: int = setting(3, "Passes over the rows of all tasks together.")

    def __post_init__(self) -> None:
        if len(self.data) < 2 or len({*self.data}) < len(self.data):
            raise ValueError(f"data: expected two different tasks or more, got {', '.join(self.data) or 'none'}")
        if self.teacher is not None and len(self.teacher) != len(self.data):
            raise ValueError(f"teacher: expected {len(self.data)}, one for each task, got {len(self.teacher)}")
        for name in PER_TASK:
            if len(values := getattr(self, name)) not in (1, len(self.data)):
                raise ValueError(f"{name}: expected one number or {len(self.data)}, got {len(values)}")
        for name, low, high in (("alpha", 0.0, 1.0), ("weight", 0.0, float("inf"))):
            if wrong := [value for value in getattr(self, name) if not low <= value <= high]:
                raise ValueError(f"{name}: expected {low:g} to {high:g}, got {wrong[0]}")
        if wrong := [value for value in self.temperature if not value > 0]:
            raise ValueError(f"temperature: expected positive numbers, got {wrong[0]}")
        self.at_least(0, "tau")
        super().__post_init__()

    def stages(self, student_layers: int, teacher_layers: int, kind: str) -> list[Stage]:
        return []  # those of its parts

    def parts(self) -> dict[str, OfTask]:
        """The recipe of each task, by its name."""
        shared = {field.name for field in dataclasses.fields(OfTask)} - {"data", "teacher", "alpha", "temperature"}
        settings: dict[str, Any] = {name: getattr(self, name) for name in shared}
        made: dict[str, OfTask] = {}
        for k, data in enumerate(self.data):
            name = re.sub(r"[^\w-]+", "-", Path(data).stem if Path(data).exists() else data)
            name = f"{name}-{k}" if name in made else name
            own: dict[str, Any] = {"data": data, "teacher": None if self.teacher is None else self.teacher[k]}
            made[name] = OfTask(**settings, **own, alpha=self.of("alpha", k), temperature=self.of("temperature", k))
        return made

    def of(self, name: str, task: int) -> float:
        """A setting that is the same for all tasks, or each one's."""
        values = getattr(self, name)
        return float(values[task if len(values) > 1 else 0])
