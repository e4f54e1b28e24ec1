"""Soft targets (Hinton et al., 2015) of questions that are answered by a part of a text, as in SQuAD.

alpha · T² · (KL(start) + KL(end)) / 2 + (1 - alpha) · (CE(start) + CE(end)) / 2, over positions that are no padding; texts
that are too long are several rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdfast.objective import Labels, Spans, Terms
from kdfast.recipes.base import setting
from kdfast.recipes.heads import HeadRecipe


@dataclass(frozen=True, kw_only=True)
class Recipe(HeadRecipe):
    """Questions answered by a part of a text (SQuAD): soft targets of a teacher's starts and ends beside the labels.

    Rows have question, context and answers (text and answer_start), as SQuAD's.
    """

    name = "question-answering"
    labels = "spans"

    max_length: int = setting(384, "Tokens of a row, question included; longer texts are several.")
    stride: int = setting(128, "Tokens that neighbouring rows of a text have in common.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.stride < self.max_length - 4:
            raise ValueError(f"stride: expected 0 to less than max_length {self.max_length} - 4, got {self.stride}")

    def objective(self) -> Terms:
        soft = Spans(weight=self.alpha, temperature=self.temperature)
        return Terms(kl=soft, ce=Labels(self.labels, weight=1 - self.alpha))
