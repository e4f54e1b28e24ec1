"""Born-again networks (Furlanello, Lipton, Tschannen, Itti and Anandkumar, 2018, arXiv:1805.04770).

1. A teacher is fine-tuned on the labels, or given.
2. Generation 1 has the same architecture, starts from the pre-trained encoder again with another seed, and learns from
   the labels and the teacher:

       loss = alpha · T² · KL(softmax(z_t/T) ‖ softmax(z_s/T)) + (1 - alpha) · CE(z_s, label)

3. Generation k learns from generation k - 1 in place of the teacher. The last one is the student.

The paper adds both terms at T = 1 without weights, which alpha = 1/2 is but for the rate. Its networks start from
random numbers; here, where the encoder is pre-trained, that is the classifier. The other kind of self-distillation,
branches of one model that learn from its last layer, is the recipe of FastBERT.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from kdfast.recipes.base import setting
from kdfast.recipes.classifier import ClassifierRecipe, Stage, soft_targets


@dataclass(frozen=True, kw_only=True)
class Recipe(ClassifierRecipe):
    """Generations of the same architecture, each taught by the one before: born-again networks (Furlanello et al.
    2018).

    (1 - alpha) · CE + alpha · T² · KL(generation k - 1 ‖ generation k). Each starts from the pre-trained encoder with a
    seed of its own; generation 0 is the fine-tuned teacher.
    """

    name = "self-distillation"
    quick: ClassVar[dict[str, Any]] = {**ClassifierRecipe.quick, "generations": 2}

    generations: int = setting(3, "As many after the teacher; the last one is the student.")
    alpha: float = setting(0.5, "Weight of the soft term; the labels get 1 - alpha.")
    temperature: float = setting(1.0, "Softens both generations alike.")
    student_start: str = setting("base", "What generations start from: the pre-trained encoder, or the teacher.")
    student_layers: tuple[int, ...] | None = setting(None, "These layers, from 0. Default: all of them.")

    def __post_init__(self) -> None:
        self.at_least(1, "generations")
        self.between(0, 1, "alpha")
        self.positive("temperature")
        super().__post_init__()

    def student_default(self, teacher_layers: int) -> tuple[int, ...]:
        return tuple(range(teacher_layers))

    def stages(self, student_layers: int, teacher_layers: int, kind: str) -> list[Stage]:
        folders = ["teacher", *(f"generation_{k}" for k in range(1, self.generations)), "student"]
        return [
            Stage(
                folder,
                f"generation {k}",
                soft_targets(kind, self.alpha, self.temperature),
                teacher="stored",
                teacher_of=before,
                seed=k,
            )
            for k, (before, folder) in enumerate(pairwise(folders), 1)
        ]
