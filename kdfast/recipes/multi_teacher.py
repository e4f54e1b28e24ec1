"""Several teachers and one student.

1. K teachers are given, or fine-tuned on the labels from the same encoder with K seeds.
2. Each reads the rows by its own tokenizer, so they may be of different kinds (BERT, RoBERTa, MPNet, XLNet): only what
   is said of a whole sequence is compared, never a token's state.
3. A student learns from the labels and from what the teachers say together:

       loss = alpha · T² · KL(p ‖ softmax(z_s/T)) + (1 - alpha) · CE(z_s, label)

   logits:         p = softmax(mean over k of z_k/T), as TextBrewer (Yang et al., 2020, arXiv:2002.12620)
   probabilities:  p = mean over k of softmax(z_k/T)
   confidence:     p = Σ_k w_k · softmax(z_k/T), a teacher's weight by its cross-entropy on the row's label: CA-MKD
                   (Zhang, Chen and Wang, 2022, arXiv:2201.00007), without its term of hidden states
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kdfast.objective import Ensemble, Labels, Terms
from kdfast.objective.ensemble import COMBINED
from kdfast.recipes.base import setting
from kdfast.recipes.classifier import ClassifierRecipe, Stage


@dataclass(frozen=True, kw_only=True)
class Recipe(ClassifierRecipe):
    """What several teachers say together, beside the labels.

    (1 - alpha) · CE + alpha · T² · KL(teachers ‖ student), of their mean logits, their mean probabilities, or
    probabilities weighted by how right each is. Teachers may have tokenizers of their own.
    """

    name = "multi-teacher"
    quick: ClassVar[dict[str, Any]] = {**ClassifierRecipe.quick, "teachers": 2}

    teacher: tuple[str, ...] | None = setting(  # type: ignore[assignment]
        None, "Classifier of this data, a folder or Hub name; once for each. Default: fine-tuned here.", repeated=True
    )
    teachers: int = setting(3, "As many are fine-tuned here, where none is given.")
    combine: str = setting("logits", "What is averaged: logits, probabilities, or probabilities by confidence.")
    cached: bool = setting(True, "Store the teachers' outputs; --no-cached: run the teachers beside the student.")
    alpha: float = setting(0.9, "Weight of the soft term; the labels get 1 - alpha.")
    temperature: float = setting(2.0, "Softens teachers and student alike.")

    def __post_init__(self) -> None:
        self.between(0, 1, "alpha")
        self.positive("temperature")
        self.at_least(1, "teachers")
        self.one_of(COMBINED, "combine")
        if self.teacher is not None and not self.teacher:
            raise ValueError("teacher: expected one or more, or none at all, got an empty list")
        if self.combine == "confidence" and self.count < 2:
            raise ValueError(f"combine: expected 2 teachers or more for confidence, got {self.count}")
        super().__post_init__()

    @property
    def count(self) -> int:
        """K."""
        return self.teachers if self.teacher is None else len(self.teacher)

    def stages(self, student_layers: int, teacher_layers: int, kind: str) -> list[Stage]:
        if kind != "classification" and self.combine != "logits":
            raise ValueError(f"combine: expected logits of a {kind}, which has no classes, got {self.combine}")
        divergence = "kl_div" if kind == "classification" else "logit_mse"
        soft = Ensemble(self.combine, divergence=divergence, weight=self.alpha, temperature=self.temperature)
        objective = Terms(kl=soft, ce=Labels(kind, weight=1 - self.alpha))
        return [Stage("student", "student, of all", objective, teacher="stored" if self.cached else "live")]
