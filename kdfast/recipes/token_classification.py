"""Soft targets (Hinton et al., 2015) of a class for each word: names in texts, parts of speech.

alpha · T² · KL(softmax(z_t/T) ‖ softmax(z_s/T)) + (1 - alpha) · CE(z_s, label), means over the tokens that have a label,
the first of each word; with `tokens` "all" the teacher's term is a mean over all tokens that are no padding.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdfast.objective import Labels, Logits, Terms
from kdfast.recipes.base import setting
from kdfast.recipes.heads import HeadRecipe


@dataclass(frozen=True, kw_only=True)
class Recipe(HeadRecipe):
    """A class for each word (names in texts, parts of speech): soft targets of a teacher beside the labels.

    Rows have a list of words and one of labels, which are texts, or numbers: of the teacher's labels.
    """

    name = "token-classification"
    labels = "tokens"

    word_column: str | None = setting(None, "Column of the words. Default: found by name.")
    label_column: str | None = setting(None, "Column of the labels. Default: found by name.")
    tokens: str = setting("labels", "Where the teacher is compared: labels, a word's first token; all, every token.")

    def __post_init__(self) -> None:
        self.one_of(("labels", "all"), "tokens")
        super().__post_init__()

    def objective(self) -> Terms:
        soft = Logits(tokens=self.tokens, weight=self.alpha, temperature=self.temperature)
        return Terms(kl=soft, ce=Labels(self.labels, weight=1 - self.alpha))
