"""DynaBERT (Hou, Huang, Shang, Jiang, Chen and Liu, 2020, arXiv:2004.04037): one model of many widths and depths.

1. The fine-tuned encoder's heads and neurons are sorted by importance (`kdfast.prune.importance`, `rewire`), so that a
   narrower network has the best ones.
2. Width: all widths are trained together, each step summing up the gradients of every one, from the fine-tuned teacher:

       loss = −Σ softmax(z_t) · log softmax(z_s) + λ Σ_i mean (H_s^i − H_t^i)²

   over states i from 0, the embeddings, to N; λ is 0.1.
3. Depth: all widths at all depths are trained together, from the result of the second stage; the states are the inputs of
   the layers that a depth keeps, and the last one's output; λ is 1.
4. Optionally, fine-tuning of all of them on the labels.

What is trained is `kdfast.elastic.Elastic`: sub-networks read first rows and columns of one set of weights.

Paper, article and code disagree, or leave a choice; the default is the code's, but where it is mistaken:

- In the depth stage the paper's teacher is as wide as the student, the code's has its full width: `teacher_width`.
- The code keeps layers ⌊i / depth⌋, of 12 at 0.75 all but 3, 7 and 11; another reading of the paper's rule keeps the
  last layer and leaves out 2, 6 and 10: `keep_last`.
- The code never sets gradients to zero between the batches of its importance: `accumulate`; off here.
- Without variants of the rows the code trains on the labels alone, without saying so: here always on the teacher.
- The code measures importance on the test rows' labels: here on training rows. It also keeps the best of many evaluations of
  the test rows: here the last step's is kept.
- The code counts padding among the states: `padding`; left out here. Its student has dropout, which here it has not.
- Of numbers and of several labels at once the code's first term is 0: here squared differences to the teacher's logits.

`sandwich` and `teacher_width` in_place are of other systems on the same networks: slimmable networks (Yu and Huang, 2019,
arXiv:1903.05134) train the largest, the smallest and some of the others in a step, the largest on the labels and the others on
what it says; once-for-all (Cai et al., 2020, arXiv:1908.09791) draws them too, from a fixed teacher.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kdfast.objective import Hidden, Labels, Logits, Terms
from kdfast.recipes.augmented import AugmentedRecipe
from kdfast.recipes.base import setting
from kdfast.recipes.classifier import Stage

TEACHER_WIDTHS = ("full", "match", "in_place")
IMPORTANCE_BATCH = 8  # rows, as in the code: absolute values are taken batch by batch


def name_of(width: float, depth: float) -> str:
    """What a sub-network is called in a run's metrics; the whole is its student."""
    return "student" if width == depth == 1 else f"width_{width:g}_depth_{depth:g}"


def size_of(name: str) -> tuple[float, float] | None:
    """The other way round; None of a model that is no sub-network."""
    if name == "student":
        return 1.0, 1.0
    found = re.fullmatch(r"width_([\d.e-]+)_depth_([\d.e-]+)", name)
    return None if found is None else (float(found[1]), float(found[2]))


@dataclass(frozen=True)
class ElasticStage(Stage):
    """One training of sub-networks, of all the recipe's widths.

    Attributes:
        depths: shares of layers.
        of_states: the objective of a sub-network by the hidden states that it has, and whether it is the largest of those
            that learn from the largest.
        match: the teacher is as wide as the student.
    """

    depths: Sequence[float] = field(kw_only=True)
    of_states: Callable[[Sequence[int], bool], Terms] = field(kw_only=True)
    match: bool = field(kw_only=True)


@dataclass(frozen=True, kw_only=True)
class Recipe(AugmentedRecipe):
    """One model of many widths and depths: DynaBERT (Hou et al. 2020).

    Sorts the heads and neurons of the fine-tuned teacher by importance, then trains networks of its first heads and
    neurons, all widths together, then all widths at all depths: soft cross-entropy and squared differences of hidden
    states. One set of weights is left, of which kdfast export makes a plain model of any of the sizes.
    """

    name = "dynabert"
    demonstration_variants = 0
    quick: ClassVar[dict[str, Any]] = {
        **AugmentedRecipe.quick,
        "epochs": 1,
        "learning_rate": 1e-4,
        "widths": (0.5, 1.0),
        "depths": (0.5, 1.0),
    }
    # The student is the teacher, sorted: there is none to choose.
    student: ClassVar[None] = None  # type: ignore[misc]
    student_start: ClassVar[str] = "teacher"  # type: ignore[misc]
    student_layers: ClassVar[None] = None  # type: ignore[misc]
    student_config: ClassVar[None] = None  # type: ignore[misc]
    baseline: ClassVar[bool] = False  # type: ignore[misc]

    widths: tuple[float, ...] = setting((0.25, 0.5, 0.75, 1.0), "Shares of heads and neurons; 1 among them.")
    depths: tuple[float, ...] = setting((0.5, 0.75, 1.0), "Shares of layers, 1 among them; 1 alone: no depth stage.")
    keep_last: bool = setting(False, "Depths keep the last layer, as one reading of the paper has it.")
    teacher_width: str = setting(
        "full",
        "In the depth stage: full, or match, as wide as the student, as in the paper. in_place, in both stages: the largest "
        "network learns from the labels and teaches the others, without another teacher.",
    )
    sandwich: int | None = setting(
        None,
        "Sub-networks of a step beside the largest and the smallest, drawn anew; where there are no more, all. Default: all.",
    )
    importance_rows: int | None = setting(2000, "Training rows that heads and neurons are sorted by.")
    accumulate: bool = setting(False, "Importance without setting gradients to zero, as the authors' code does.")
    width_hidden: float = setting(0.1, "Weight of the hidden states in the width stage.")
    depth_hidden: float = setting(1.0, "Weight of the hidden states in the depth stage.")
    padding: bool = setting(False, "Count padding among the hidden states, as the code does.")
    finetune_epochs: int = setting(0, "Passes of all sub-networks over the labels at last.")
    freeze_embeddings: bool = setting(False, "Do not train embeddings.")
    epochs: int = setting(3, "Passes of the width stage, and of the depth stage.")
    learning_rate: float = setting(2e-5, "Peak of the linear schedules.")
    warmup: float = setting(0.0, "Share of the steps before the peak. The authors have 0.06 for RoBERTa.")

    def __post_init__(self) -> None:
        self.one_of(TEACHER_WIDTHS, "teacher_width")
        self.at_least(0, "sandwich", "width_hidden", "depth_hidden", "finetune_epochs")
        self.at_least(1, "importance_rows")
        for name in ("widths", "depths"):
            shares = getattr(self, name)
            if 1.0 not in shares or len({*shares}) < len(shares) or not all(0 < share <= 1 for share in shares):
                expected = "different shares above 0, and 1 among them, such as 0.5,1"
                raise ValueError(f"{name}: expected {expected}, got {', '.join(f'{share:g}' for share in shares)}")
        if self.unlabeled is not None and self.teacher_width == "in_place":
            raise ValueError(
                f"unlabeled: expected none with teacher_width in_place, which learns from labels, got {self.unlabeled}"
            )
        super().__post_init__()

    def student_default(self, teacher_layers: int) -> tuple[int, ...]:
        return tuple(range(teacher_layers))

    def stages(self, student_layers: int, teacher_layers: int, kind: str) -> list[Stage]:
        folders = ["width", *["depth"] * (len(self.depths) > 1), *["finetuned"] * bool(self.finetune_epochs)]
        made: list[Stage] = []
        for folder in folders:
            of_states = self._of(folder, kind)
            last = folder == folders[-1]
            taught = folder != "finetuned" and self.teacher_width != "in_place"
            made.append(
                ElasticStage(
                    "student" if last else folder,
                    f"student, {folder}",
                    of_states(range(teacher_layers + 1), True),
                    teacher="live" if taught else None,
                    teacher_of="width" if folder == "depth" and taught else "teacher",
                    start=made[-1].folder if made else "student",
                    rows=None if folder == "finetuned" else self.augmentation(),
                    epochs=self.finetune_epochs if folder == "finetuned" else None,
                    measured=last,
                    depths=(1.0,) if folder == "width" else self.depths,
                    of_states=of_states,
                    match=folder == "depth" and self.teacher_width == "match",
                )
            )
        return made

    def _of(self, folder: str, kind: str) -> Callable[[Sequence[int], bool], Terms]:
        """The objective of a stage."""
        weight = self.width_hidden if folder == "width" else self.depth_hidden
        in_place = self.teacher_width == "in_place"

        def of_states(states: Sequence[int], teaches: bool) -> Terms:
            if folder == "finetuned":
                return Terms(ce=Labels(kind))
            on_labels = in_place and teaches
            divergence = "soft_cross_entropy" if kind == "classification" else "logit_mse"
            terms = {
                "soft": Logits(divergence, weight=0.0 if on_labels else 1.0),
                "hidden": Hidden({i: i for i in states}, weight=0.0 if on_labels else weight, masked=not self.padding),
            }
            # Those of a step have the same terms, whose items are counted once.
            return Terms(**terms, ce=Labels(kind, weight=float(on_labels))) if in_place else Terms(**terms)

        return of_states
