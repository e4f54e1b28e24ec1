"""Structured pruning with distillation: heads and neurons go while the model learns from what it was.

1. A classifier is given, or fine-tuned ("teacher").
2. A copy is trained on alpha · T² · KL(teacher ‖ student) + (1 - alpha) · CE. On the way units go, those of the lowest scores
   (`kdfast.prune.criteria`) as a schedule says (`kdfast.prune.schedules`), until the target is reached: a share of the
   units, of the parameters, of the operations or of the latency that this machine was measured to need.
3. What is left becomes a smaller model (`kdfast.prune.compact`), which AutoModel loads after `import kdfast`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kdfast.recipes.base import setting
from kdfast.recipes.classifier import ClassifierRecipe, Stage, soft_targets

TARGETS = ("keep", "parameters", "flops", "latency")
SCHEDULES = ("one-shot", "iterative", "cubic", "soft", "surgery", "play-and-prune")
KINDS = ("heads", "groups", "neurons", "layers")
# As in kdfast.prune.criteria, which takes seconds to import.
CRITERIA = (
    *("activation_norm", "apoz", "collaborative", "dcp", "fisher", "fpgm", "group_lasso", "hard_concrete", "l1"),
    *(
        "l1_penalty",
        "l2",
        "lasso",
        "magnitude",
        "michel",
        "movement",
        "nisp",
        "obd",
        "obs",
        "random",
        "slimming",
        "snip",
    ),
    *("taylor", "taylor_batch", "taylor_weights", "thinet", "unit_decay", "variational_dropout"),
)


@dataclass(frozen=True, kw_only=True)
class Recipe(ClassifierRecipe):
    """Prunes a classifier to a target while it is distilled from what it was, and leaves a smaller one.

    Scores say which heads and neurons matter, a schedule when the others go, the target how many stay: keep=0.5 of the
    units, or 0.5 of the parameters, the flops, or the latency as measured on this machine.
    """

    name = "prune"
    quick: ClassVar[dict[str, Any]] = {**ClassifierRecipe.quick, "epochs": 2}
    # The student is the teacher, of which units go: there is none to choose.
    student: ClassVar[None] = None  # type: ignore[misc]
    student_start: ClassVar[str] = "teacher"  # type: ignore[misc]
    student_layers: ClassVar[None] = None  # type: ignore[misc]
    student_config: ClassVar[None] = None  # type: ignore[misc]
    baseline: ClassVar[bool] = False  # type: ignore[misc]

    target: str = setting("keep=0.5", "What is left: keep=SHARE of the units; parameters=, flops= or latency=SHARE.")
    criterion: str = setting("taylor", f"Which units matter: {', '.join(CRITERIA)}.")
    units: tuple[str, ...] = setting(("heads", "neurons"), "Of heads, groups (of keys and values), neurons, layers.")
    schedule: str = setting(
        "cubic",
        "one-shot: all at begin; iterative: in rounds; cubic: fast at first; soft: each epoch anew, until the end; "
        "surgery: units may come back, until end; play-and-prune: in rounds, while the quality allows.",
    )
    begin: float = setting(0.0, "Share of the training before the first units go.")
    end: float = setting(0.5, "Share of the training after which all are gone that go.")
    rounds: int = setting(8, "Times that units go, between begin and end.")
    scope: str = setting("global", "global: of all layers together; local: as many of each. Of keep= alone.")
    bound: float = setting(
        0.01, "Of play-and-prune: by how much the quality on the learning curve's rows may be below the teacher's."
    )
    multiple: int = setting(1, "Neurons of a layer stay in multiples of it, as hardware likes them.")
    allow_empty: bool = setting(False, "Layers may lose all of their heads or neurons.")
    sensitivity: bool = setting(False, "First show how much worse the model is with each layer alone pruned.")
    score_rows: int = setting(512, "Training rows that the scores are made of.")
    alpha: float = setting(0.9, "Weight of the soft term; the labels get 1 - alpha.")
    temperature: float = setting(2.0, "Softens teacher and student alike.")
    freeze_embeddings: bool = setting(True, "Half of a small model's weights, which little data hardly improves.")

    def __post_init__(self) -> None:
        self.one_of(CRITERIA, "criterion")
        self.one_of(SCHEDULES, "schedule")
        self.one_of(("global", "local"), "scope")
        self.between(0, 1, "begin", "end", "alpha")
        self.at_least(1, "rounds", "multiple", "score_rows")
        self.positive("temperature", "bound")
        if self.begin > self.end:
            raise ValueError(f"begin: expected no more than end, {self.end:g}, got {self.begin:g}")
        if not self.units or not {*self.units} <= {*KINDS}:
            raise ValueError(f"units: expected some of {', '.join(KINDS)}, got {', '.join(self.units) or 'none'}")
        name, _ = self.goal
        if self.schedule in ("soft", "surgery", "play-and-prune") and name != "keep":
            raise ValueError(f"target: expected keep=SHARE with the schedule {self.schedule}, got {self.target}")
        of = {"soft": ("heads", "groups", "neurons"), "surgery": ("heads", "neurons")}.get(self.schedule, KINDS)
        if not {*self.units} <= {*of}:
            raise ValueError(
                f"units: expected some of {', '.join(of)} with the schedule {self.schedule}, got {', '.join(self.units)}"
            )
        if self.schedule == "surgery" and self.criterion != "l2":
            raise ValueError(f"criterion: expected l2 with the schedule surgery, which has norms, got {self.criterion}")
        if self.scope == "local" and name != "keep":
            raise ValueError(f"scope: expected global with the target {self.target}, got local")
        super().__post_init__()

    @property
    def goal(self) -> tuple[str, float]:
        """The target's name and its share."""
        name, _, text = self.target.partition("=")
        try:
            share = float(text)
        except ValueError:
            share = 0.0
        if name not in TARGETS or not 0 < share < 1:
            expected = " or ".join(f"{one}=SHARE" for one in TARGETS)
            raise ValueError(f"target: expected {expected}, above 0 and below 1, got {self.target}")
        return name, share

    def student_default(self, teacher_layers: int) -> tuple[int, ...]:
        return tuple(range(teacher_layers))

    def stages(self, student_layers: int, teacher_layers: int, kind: str) -> list[Stage]:
        objective = soft_targets(kind, self.alpha, self.temperature)
        return [Stage("masked", "student, pruned", objective, teacher="stored")]
