"""Distilling the knowledge in a neural network (Hinton, Vinyals and Dean, 2015, arXiv:1503.02531).

1. The teacher is fine-tuned on the labels.
2. Its logits are computed once and stored.
3. Two students are trained from the same start, some of the fine-tuned teacher's layers with its embeddings, pooler and
   classifier, on the same batches in the same order: one on the labels alone, one on

       alpha · T² · KL(softmax(z_t/T) ‖ softmax(z_s/T)) + (1 - alpha) · CE(z_s, label)

4. All are measured on the test rows.

Articles print this with alpha on the other term, T² on the labels or nowhere; here it is as the paper has it.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdfast.recipes.base import setting
from kdfast.recipes.classifier import ClassifierRecipe, Stage, soft_targets


@dataclass(frozen=True, kw_only=True)
class Recipe(ClassifierRecipe):
    """Soft targets beside the labels (Hinton, Vinyals and Dean 2015).

    Fine-tunes a teacher, then trains two students from the same start: one on the labels alone, one on
    (1 - alpha) · CE(student, label) + alpha · T² · KL(teacher ‖ student), where the logits of both are divided by the
    temperature T inside KL.
    """

    name = "hinton"

    alpha: float = setting(0.9, "Weight of the soft term; the labels get 1 - alpha.")
    temperature: float = setting(2.0, "Softens teacher and student alike.")
    baseline: bool = setting(True, "Train the same student on the labels alone as well.")

    def __post_init__(self) -> None:
        self.between(0, 1, "alpha")
        self.positive("temperature")
        super().__post_init__()

    def stages(self, student_layers: int, teacher_layers: int, kind: str) -> list[Stage]:
        objective = soft_targets(kind, self.alpha, self.temperature)
        return [Stage("student", "student, distilled", objective, teacher="stored")]
