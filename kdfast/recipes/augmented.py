"""Settings of recipes that are trained on variants of the rows (`kdfast.data.augment`): TinyBERT, DynaBERT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kdfast.data.augment import Augmentation
from kdfast.recipes.base import setting
from kdfast.recipes.classifier import ClassifierRecipe

VARIANTS = 20


@dataclass(frozen=True, kw_only=True)
class AugmentedRecipe(ClassifierRecipe):
    """A recipe of classifiers whose rows may have variants."""

    demonstration_variants: ClassVar[int]  # of each movie review, where nothing else is said

    augment: int | None = setting(
        None, "Variants of each row, or each text of a pair; 0: none. Default: 20, of the movie reviews fewer."
    )
    augment_probability: float = setting(0.4, "Of a word to be exchanged.")
    augment_candidates: int = setting(15, "Words that take its place, to draw from.")
    augment_model: str | None = setting(
        None,
        "Masked language model that proposes them, a folder or Hub name. Default: the base where it is one, else words "
        "of similar vectors.",
    )
    word_vectors: str | None = setting(
        None,
        "Text file of GloVe's form, for words of several pieces. Default: the base's own, where no model proposes.",
    )
    restore_pairs: bool = setting(True, "Variants of a pair's second text come beside the first as it was.")

    def __post_init__(self) -> None:
        self.at_least(0, "augment")
        self.at_least(1, "augment_candidates")
        self.between(0, 1, "augment_probability")
        super().__post_init__()

    def augmentation(self) -> Augmentation | None:
        """How the variants are made; None without any."""
        count = self.augment
        if count is None:
            count = self.demonstration_variants if self.data is None else VARIANTS
        if not count:
            return None
        return Augmentation(
            count, self.augment_probability, self.augment_candidates, self.augment_model, self.word_vectors,
            self.restore_pairs, self.seed,
        )  # fmt: skip
