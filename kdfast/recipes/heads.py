"""Recipes of given teachers whose heads are not of whole sequences: what they have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kdfast.objective import Labels, Objective, Terms
from kdfast.recipes.base import Recipe, setting


@dataclass(frozen=True, kw_only=True)
class HeadRecipe(Recipe):
    """A given teacher into some of its layers, or a student of one's own: soft targets beside the labels."""

    quick: ClassVar[dict[str, Any]] = {"epochs": 1, "train_rows": 400, "test_rows": 200}
    labels: ClassVar[str]  # the kind of `Labels`
    evaluated: ClassVar[bool] = True  # by `kdfast evaluate`

    data: str | None = setting(
        None, "Required. Labelled rows: a JSON, CSV or Parquet file, a folder (train*, test*), or a Hub name."
    )
    teacher: str | None = setting(None, "Required. Model of this task and its labels, a folder or Hub name.")
    student: str | None = setting(
        None, "Model that the student starts from, a folder or Hub name, of the teacher's tokens."
    )
    student_layers: tuple[int, ...] | None = setting(
        None, "Without student: teacher layers that the student keeps, from 0. Default: every second."
    )
    alpha: float = setting(0.9, "Weight of the teacher; the labels get 1 - alpha.")
    temperature: float = setting(2.0, "Softens teacher and student alike.")
    baseline: bool = setting(False, "Train the same student on the labels alone as well.")
    epochs: int = setting(3, "Passes of each student over the training rows.")
    learning_rate: float = setting(1e-4, "Peak of the linear schedule.")
    warmup: float = setting(0.06, "Share of the steps before the peak.")
    batch_size: int = setting(16, "Rows per step.")
    max_length: int = setting(128, "Tokens of a row; longer rows are cut.")
    train_rows: int | None = setting(None, "Use no more, drawn with a fixed seed.")
    test_rows: int | None = setting(None, "Use no more, drawn with a fixed seed.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "epochs", "batch_size", "train_rows", "test_rows")
        self.at_least(8, "max_length")
        self.inside(0, 1, "learning_rate")
        self.between(0, 1, "alpha", "warmup")
        self.positive("temperature")
        self.layer_numbers("student_layers")
        self.none_beside("student", "student_layers")
        self.objective()  # checks the rest

    def objective(self) -> Objective:
        """What the student is trained on: a term of the teacher and one of the labels."""
        raise NotImplementedError

    def labels_only(self) -> Objective:
        """What the student of the baseline is trained on."""
        return Terms(ce=Labels(self.labels))
