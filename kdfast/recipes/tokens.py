"""Recipes of students that predict tokens: what they are compared with their teachers by."""

from __future__ import annotations

from dataclasses import dataclass

from kdfast.objective import LanguageModel
from kdfast.recipes.base import Recipe, setting

# The list of csrc/common/divergence_terms.h, without loading it: `--help` is quick.
DIVERGENCES = (
    *("kl_div", "reverse_kl_div", "js_div", "skew_kl_div", "skew_reverse_kl_div", "total_variation"),
    *("soft_cross_entropy", "logit_mse", "symmetric_kl_div"),
)


@dataclass(frozen=True, kw_only=True)
class TokenRecipe(Recipe):
    """alpha · T² · D(student, teacher) + (1 - alpha) · CE over the tokens that count."""

    divergence: str = setting("kl_div", f"Between teacher and student: {', '.join(DIVERGENCES)}.")
    beta: float = setting(0.5, "Of js_div: the teacher's share of the mixture.")
    skew: float = setting(0.1, "Of skew_kl_div and skew_reverse_kl_div.")
    alpha: float = setting(0.9, "Weight of the teacher; the labels get 1 - alpha.")
    temperature: float = setting(1.0, "Softens teacher and student alike.")
    lora: int | None = setting(
        None,
        "Rank of adapters (LoRA) of all linear maps but the output: they alone are trained, and merged in the end. "
        "Default: the whole student is trained.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "lora")

    def objective(self, vocabulary: int | None = None) -> LanguageModel:
        """vocabulary: the tokens that teacher and student have in common, where one has embeddings of more."""
        return LanguageModel(self.alpha, self.temperature, self.divergence, self.beta, self.skew, vocabulary)
