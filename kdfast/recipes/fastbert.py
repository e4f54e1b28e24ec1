"""FastBERT (Liu, Zhou, Wang, Zhao, Deng and Ju, 2020, arXiv:2004.02178): rows leave after the layer that is sure of them.

1. The pre-trained encoder is fine-tuned with a classifier behind its last layer, on the labels ("teacher").
2. Every other layer gets a classifier of its own. These branches learn from the last one, on text that needs no labels,
   with all else frozen:

       loss = Σ over branches of mean over rows of KL(softmax(z_last) ‖ softmax(z_branch))

3. At inference a row leaves after the first layer whose uncertainty u = -Σ p log p / log C is at most `speed`; the others
   go on in a smaller batch (`kdfast.early_exit`). It is measured at speeds from 0 to 1.

Paper, code and package disagree; the code's experiments are followed but where they are mistaken:
* The paper writes KL(branch ‖ last), the code computes KL(last ‖ branch): `divergence`.
* Rows leave where u ≤ speed in the experiments, u < speed in the package and the paper's words: `strict`.
* The code leaves the frozen part's dropout on, so that its targets are noisy: `frozen_dropout`; off here.
* The code's schedule ends after the epochs of the first stage, and its weight decay is passed by a name that the optimizer
  ignores: here the schedule ends with the training, and the decay of 0.01 is applied.
* Its pooling "mean" is over features instead of tokens: not here; its LayerNorm is another than BERT's, whose weights
  need BERT's.
* Five epochs of the second stage are the paper's; the code's default is ten. The first stage's best epoch by held-out
  accuracy is not chosen: its last is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kdfast.objective import Branches, Terms
from kdfast.recipes.base import setting
from kdfast.recipes.classifier import ClassifierRecipe, Stage

DIVERGENCES = ("kl_div", "reverse_kl_div")


@dataclass(frozen=True, kw_only=True)
class Recipe(ClassifierRecipe):
    """A classifier behind every layer, which easy rows leave by: FastBERT (Liu et al. 2020).

    Fine-tunes the encoder with a classifier behind its last layer, or takes a given teacher with its own; then trains a
    classifier behind every other layer to agree with that one, on text with or without labels, all else frozen. How fast
    it is, and how good, is chosen at inference: rows leave where a classifier's uncertainty is at most the speed.
    """

    name = "fastbert"
    quick: ClassVar[dict[str, Any]] = {**ClassifierRecipe.quick, "teacher_epochs": 2, "learning_rate": 1e-3}
    # The student is the teacher with its branches: there is none to choose.
    student: ClassVar[None] = None  # type: ignore[misc]
    student_start: ClassVar[str] = "teacher"  # type: ignore[misc]
    student_layers: ClassVar[None] = None  # type: ignore[misc]
    student_config: ClassVar[None] = None  # type: ignore[misc]
    baseline: ClassVar[bool] = False  # type: ignore[misc]

    speed: float = setting(
        0.5, "Uncertainty from 0 to 1 up to which rows leave, where nothing else is said; 0: none leaves early."
    )
    strict: bool = setting(False, "Rows leave below the speed only, not at it.")
    divergence: str = setting(
        "kl_div", "Between last classifier and branch: kl_div, or reverse_kl_div as in the paper."
    )
    frozen_dropout: bool = setting(False, "Leave dropout on in the frozen encoder, as the authors' code does.")
    branch_width: int = setting(128, "Width of each branch.")
    branch_heads: int = setting(2, "Heads of its self-attention.")
    teacher_epochs: int = setting(3, "Passes of the first stage, encoder and last classifier.")
    teacher_learning_rate: float | None = setting(None, "Of the first stage. Default: a tenth of learning_rate.")
    epochs: int = setting(5, "Passes of the branches over the text.")
    learning_rate: float = setting(2e-4, "Peak of the branches' linear schedule.")
    warmup: float = setting(0.1, "Share of the steps before the peak.")
    freeze_embeddings: bool = setting(False, "Do not train embeddings in the first stage.")

    def __post_init__(self) -> None:
        self.between(0, 1, "speed")
        self.one_of(DIVERGENCES, "divergence")
        self.at_least(1, "branch_width", "branch_heads")
        if self.branch_width % self.branch_heads:
            raise ValueError(
                f"branch_width: expected a multiple of branch_heads, {self.branch_heads}, got {self.branch_width}"
            )
        self.one_of((None, "classification"), "kind")
        super().__post_init__()

    @property
    def teacher_rate(self) -> float:
        return self.learning_rate / 10 if self.teacher_learning_rate is None else self.teacher_learning_rate

    def stages(self, student_layers: int, teacher_layers: int, kind: str) -> list[Stage]:
        if kind != "classification":
            raise ValueError(f"kind: expected classification, whose uncertainty tells when to leave, got {kind}")
        if teacher_layers < 2:
            raise ValueError(f"base: expected an encoder of two layers or more, got {teacher_layers}")
        return [Stage("student", "student, FastBERT", Terms(branches=Branches(self.divergence)))]
