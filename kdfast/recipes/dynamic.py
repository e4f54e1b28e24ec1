"""Dynamic distillation: how much a row counts, how soft its targets are, and how much of the loss is the teacher's,
change with the row and with time.

    loss = alpha · mean over rows of w_b · T_b² · KL(softmax(z_t/T_b) ‖ softmax(z_s/T_b))
           + (1 - alpha) · CE(z_s, label)

* w_b by the teacher's uncertainty u_b = H(softmax(z_t)) / log C: 1 ± gamma · (u_b - mean u), "up" where rows of which
  the teacher is unsure count more, "down" where less. The formula is kdfast's, for what articles say in words.
* T_b by TextBrewer's two rules (Yang et al., 2020, arXiv:2002.12620): "flsw" by how far teacher and student are apart
  (after Wen, Lai and Qian, 2019, arXiv:1911.07471), "cwsm" by how sure the student is. TextBrewer has no T² before the
  divergence; here it stands, as in Hinton's loss, so that a row's gradient keeps its size when its T changes:
  `t_squared`.
* alpha goes linearly to `alpha_end` over the training.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdfast.objective import DynamicLogits, Labels, LinearSchedule, Terms
from kdfast.recipes.base import setting
from kdfast.recipes.classifier import ClassifierRecipe, Stage

RULES = (None, "flsw", "cwsm")
DIRECTIONS = ("up", "down", "equal")


@dataclass(frozen=True, kw_only=True)
class Recipe(ClassifierRecipe):
    """Weights and temperatures that differ from row to row, by what the teacher is sure of.

    (1 - alpha) · CE + alpha · the mean over rows of w · T² · KL(teacher ‖ student), where w is larger (or smaller) for
    rows of which the teacher is unsure, and T may follow TextBrewer's rules flsw and cwsm. alpha may change over the
    training.
    """

    name = "dynamic"

    alpha: float = setting(0.9, "Weight of the soft term; the labels get 1 - alpha.")
    alpha_end: float | None = setting(None, "Weight of the soft term at the end, linear from alpha. Default: alpha.")
    temperature: float = setting(2.0, "Softens teacher and student alike; with a rule, the mean of the rows'.")
    direction: str = setting(
        "up", "Rows of which the teacher is unsure count more (up), less (down) or equally (equal)."
    )
    gamma: float = setting(1.0, "How much, from 0 to 1.")
    rule: str | None = setting(None, "Temperatures of rows: flsw or cwsm. Default: the same for all.")
    beta: float = setting(0.25, "How much the rule changes the temperature.")
    power: float = setting(2.0, "Of flsw: the distance between the logits' directions, to this power.")
    t_squared: bool = setting(True, "Multiply by T²; --no-t-squared: as TextBrewer.")

    def __post_init__(self) -> None:
        self.between(0, 1, "alpha", "gamma")
        if self.alpha_end is not None:
            self.between(0, 1, "alpha_end")
        self.positive("temperature")
        self.at_least(0, "beta", "power")
        self.one_of(DIRECTIONS, "direction")
        self.one_of(RULES, "rule")
        super().__post_init__()

    def stages(self, student_layers: int, teacher_layers: int, kind: str) -> list[Stage]:
        if kind != "classification":
            raise ValueError(f"kind: expected classification, whose probabilities tell how sure a model is, got {kind}")
        end = self.alpha if self.alpha_end is None else self.alpha_end
        soft = DynamicLogits(
            weight=LinearSchedule(self.alpha, end),
            temperature=self.temperature,
            direction=None if self.direction == "equal" else self.direction,
            gamma=self.gamma,
            rule=self.rule,
            beta=self.beta,
            power=self.power,
            t_squared=self.t_squared,
        )
        objective = Terms(kl=soft, ce=Labels(kind, weight=LinearSchedule(1 - self.alpha, 1 - end)))
        return [Stage("student", "student, dynamic", objective, teacher="stored")]
