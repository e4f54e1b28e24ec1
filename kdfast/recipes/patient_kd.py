"""Patient knowledge distillation (Sun, Cheng, Gan and Liu, 2019, arXiv:1908.09355).

The student is the first layers of the pre-trained encoder, as wide as the teacher. Beside the teacher's softened logits
and the labels it learns, patiently, the first token's hidden states of the teacher's layers:

    loss = (1 - alpha) · CE + alpha · T²/C · KL(teacher ‖ student) + beta · PT
    PT   = mean over rows, layers and width of (h_s/‖h_s‖ - h_t/‖h_t‖)²

from every student layer but the last, which learns by the logits, to the teacher's every (N/M)-th layer ("skip") or its
last ones ("last"). The teacher runs once, in eval mode, and is stored.

Paper and code disagree; the code is followed where its published settings depend on it:
* PT and the soft term are sums in the paper, means in the code, the soft term over the C classes too: beta of 10 to
  1000 makes sense with the means only. The paper's sum of PT is rows · layers · width times the code's.
* The paper always normalises; the code's selected runs for MNLI, QNLI, QQP, RACE and 3-layer RTE do not: `normalize`.
* Its beta goes from 10 to 1000; selected runs have 0.1, 1 and 8 too: `GLUE`.
* The code rounds PT to float16, never shuffles, and multiplies the rate under gradient accumulation: not done here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdfast.objective import CLS, Terms, layer_map
from kdfast.recipes.base import setting
from kdfast.recipes.classifier import ClassifierRecipe, Stage, soft_targets

# What the authors selected, by task and number of student layers (result_summary of their repository), all "skip".
GLUE: dict[tuple[str, int], dict[str, Any]] = {
    ("mrpc", 6): {"normalize": True, "learning_rate": 2e-5, "temperature": 20.0, "alpha": 0.7, "beta": 1.0},
    ("mrpc", 3): {"normalize": True, "learning_rate": 5e-5, "temperature": 5.0, "alpha": 0.7, "beta": 0.1},
    ("sst2", 6): {"normalize": True, "learning_rate": 5e-5, "temperature": 10.0, "alpha": 0.5, "beta": 100.0},
    ("sst2", 3): {"normalize": True, "learning_rate": 5e-5, "temperature": 20.0, "alpha": 0.2, "beta": 1.0},
    ("rte", 6): {"normalize": True, "learning_rate": 1e-5, "temperature": 10.0, "alpha": 0.7, "beta": 500.0},
    ("rte", 3): {"normalize": False, "learning_rate": 2e-5, "temperature": 20.0, "alpha": 0.2, "beta": 10.0},
    ("mnli", 6): {"normalize": False, "learning_rate": 5e-5, "temperature": 10.0, "alpha": 0.5, "beta": 100.0},
    ("mnli", 3): {"normalize": False, "learning_rate": 5e-5, "temperature": 5.0, "alpha": 0.7, "beta": 1000.0},
    ("qnli", 6): {"normalize": False, "learning_rate": 5e-5, "temperature": 20.0, "alpha": 0.5, "beta": 100.0},
    ("qnli", 3): {"normalize": False, "learning_rate": 5e-5, "temperature": 20.0, "alpha": 0.7, "beta": 100.0},
    ("qqp", 6): {"normalize": False, "learning_rate": 5e-5, "temperature": 20.0, "alpha": 0.7, "beta": 100.0},
    ("qqp", 3): {"normalize": False, "learning_rate": 5e-5, "temperature": 20.0, "alpha": 0.7, "beta": 100.0},
}


@dataclass(frozen=True, kw_only=True)
class Recipe(ClassifierRecipe):
    """The teacher's layers, patiently: Patient-KD (Sun et al. 2019).

    (1 - alpha) · CE + alpha · T²/C · KL(teacher ‖ student) + beta · the distance of the first token's normalised states
    between layers, all but the student's last. The student starts as the pre-trained encoder's first layers,
    and is as wide.
    """

    name = "patient-kd"

    alpha: float = setting(0.7, "Weight of the soft term; the labels get 1 - alpha.")
    temperature: float = setting(10.0, "Softens teacher and student alike.")
    beta: float = setting(500.0, "Weight of the distance between layers.")
    layers: str = setting("skip", "Teacher's layers: skip, every (N/M)-th, or last.")
    normalize: bool = setting(True, "Compare directions; --no-normalize: the states themselves.")
    student_start: str = setting("base", "Whose layers students start from: the fine-tuned teacher's, or the base's.")
    student_layers: tuple[int, ...] | None = setting(None, "These layers, from 0. Default: the first half.")
    learning_rate: float = setting(5e-5, "Peak of the linear schedule.")
    warmup: float = setting(0.1, "Share of the steps before the peak.")
    epochs: int = setting(4, "Passes of each student over the training rows.")

    def __post_init__(self) -> None:
        self.between(0, 1, "alpha")
        self.positive("temperature")
        self.at_least(0, "beta")
        self.one_of(("skip", "last"), "layers")
        super().__post_init__()

    @classmethod
    def for_glue(cls, task: str, student_layers: int, **settings: Any) -> Recipe:
        """What the authors selected for a task of GLUE and students of 3 or 6 layers, sequences of 128.

        Raises:
            KeyError: no such selection.
        """
        return cls(data=task, max_length=128, **(GLUE[task, student_layers] | settings))

    def student_default(self, teacher_layers: int) -> tuple[int, ...]:
        return tuple(range((teacher_layers + 1) // 2))

    def stages(self, student_layers: int, teacher_layers: int, kind: str) -> list[Stage]:
        layers = layer_map(self.layers, student_layers, teacher_layers, "patient-kd")
        soft = soft_targets(kind, self.alpha, self.temperature, per_class=True)
        patient = CLS(layers, normalize=self.normalize, weight=self.beta)
        objective = Terms(**soft.terms, pt=patient)
        return [Stage("student", "student, patient", objective, teacher="stored", cls_layers=tuple(layers.values()))]
