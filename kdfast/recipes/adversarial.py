"""Adversarial distillation: the student learns from the teacher also where small changes of the input mislead it.

    loss = (1 - alpha) · CE(z_s, label) + alpha · T² · KL(teacher(x) ‖ student(x))
           + gamma · T² · KL(teacher(x + δ) ‖ student(x + δ))

δ is added to the word embeddings. It goes up the student's own loss against the label, at every step anew:

    FGSM (Goodfellow et al., 2015, arXiv:1412.6572):  δ = epsilon · sign(g), or epsilon · g/‖g‖ of each row
    PGD (Madry et al., 2018, arXiv:1706.06083):  `steps` smaller steps, each brought back within epsilon

In articles the teacher says what it makes of the perturbed input: the default. In ARD (Goldblum, Fowl, Feizi and
Goldstein, 2020, arXiv:1905.09747) it reads the input as it is, `clean_teacher`: then it is stored, and may be of any
width.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdfast.objective import Adversarial, Perturbed
from kdfast.objective.adversarial import NORMS
from kdfast.recipes.base import setting
from kdfast.recipes.classifier import ClassifierRecipe, Stage, soft_targets


@dataclass(frozen=True, kw_only=True)
class Recipe(ClassifierRecipe):
    """Soft targets also on inputs that are perturbed against the student (FGSM, PGD).

    (1 - alpha) · CE + alpha · T² · KL(teacher ‖ student) + gamma · T² · KL on word embeddings that are moved by at most
    epsilon to where the student's loss is larger.
    """

    name = "adversarial"

    alpha: float = setting(0.9, "Weight of the soft term; the labels get 1 - alpha.")
    temperature: float = setting(2.0, "Softens teacher and student alike.")
    gamma: float = setting(0.5, "Weight of the soft term on perturbed inputs.")
    epsilon: float = setting(0.01, "How far the word embeddings are moved, in their units.")
    steps: int = setting(1, "1 is FGSM; more are PGD's, each a pass of the student.")
    norm: str = setting("sign", "sign: every number moves by epsilon; l2: a row's move has this length.")
    step: float | None = setting(None, "Of PGD. Default: 2.5 · epsilon / steps.")
    clean_teacher: bool = setting(False, "The teacher reads the input as it is, and is stored (ARD).")

    def __post_init__(self) -> None:
        self.between(0, 1, "alpha")
        self.positive("temperature", "epsilon")
        self.at_least(0, "gamma")
        self.at_least(1, "steps")
        self.one_of(NORMS, "norm")
        if self.step is not None:
            self.positive("step")
        super().__post_init__()

    def stages(self, student_layers: int, teacher_layers: int, kind: str) -> list[Stage]:
        perturbed = Perturbed(
            "kl_div" if kind == "classification" else "logit_mse",
            weight=self.gamma,
            temperature=self.temperature,
            epsilon=self.epsilon,
            steps=self.steps,
            norm=self.norm,
            step=self.step,
            clean_teacher=self.clean_teacher,
            task=kind,
        )
        objective = Adversarial(**soft_targets(kind, self.alpha, self.temperature).terms, adversarial=perturbed)
        teacher = "stored" if self.clean_teacher else "live"
        return [Stage("student", "student, adversarial", objective, teacher=teacher)]
