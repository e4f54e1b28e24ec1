"""Distillation of a causal language model on real text: SmolLM2 into a student with every third of its layers.

1. The student is made of the teacher's layers that the settings name; embeddings, which are tied to the output, and the
   last norm are copied.
2. It is trained on alpha · T² · D(student, teacher) + (1 - alpha) · CE over the tokens that count: all of a packed
   text, or the completions of rows with prompts. With probability `on_policy`, a batch's completions are samples of the
   student (GKD, Agarwal et al., 2024, arXiv:2306.13649).
3. Teacher and student, before and after, are measured on held-out rows.

Logits of the whole vocabulary are never there for more than a chunk of tokens (`kdfast.linear_kd_loss`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kdfast.recipes.base import setting
from kdfast.recipes.tokens import TokenRecipe


@dataclass(frozen=True, kw_only=True)
class Recipe(TokenRecipe):
    """A causal language model into some of its layers, or a smaller one, on text: alpha · T² · D(student, teacher) + (1 - alpha) · CE.

    Logits of the whole vocabulary are only made for a chunk of tokens at a time. With on-policy 1 and js_div this is
    GKD (Agarwal et al. 2024): the student is trained on what it samples itself, by what the teacher makes of it.
    """

    name = "causal-lm"
    quick: ClassVar[dict[str, Any]] = {"steps": 40, "test_rows": 16}
    measured_on = ("data", "max_length", "test_rows")

    data: str | None = setting(
        None,
        "A .jsonl file with prompt and completion in each line, of which the completions count, or messages, of which "
        "the assistant's do; or a text file with empty lines between the texts, packed. Default: news editorials and "
        "product reviews, packed.",
    )
    teacher: str | None = setting(
        None, "Causal language model, a folder or Hub name. Default: SmolLM2-135M-Instruct (90 MB)."
    )
    student: str | None = setting(
        None, "Causal language model that the student starts from, a folder or Hub name, of the teacher's tokens."
    )
    student_layers: tuple[int, ...] | None = setting(
        None, "Without student: teacher layers that the student keeps, from 0. Default: every third."
    )
    on_policy: float = setting(
        0.0,
        "Share of the batches whose completions the student samples (lambda of GKD). Rows of packed text then have "
        "the first quarter as a prompt, and only the rest counts.",
    )
    max_new_tokens: int = setting(64, "Tokens of the longest sample.")
    max_length: int = setting(256, "Tokens of a row; longer rows are cut.")
    steps: int = setting(300, "Updates of the student.")
    learning_rate: float = setting(5e-4, "Peak of the cosine schedule.")
    batch_size: int = setting(4, "Rows per step.")
    train_rows: int | None = setting(None, "Use no more.")
    test_rows: int = setting(64, "Hold out no more, and no more than a tenth.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "max_new_tokens", "steps", "batch_size", "train_rows", "test_rows")
        self.at_least(8, "max_length")
        self.inside(0, 1, "learning_rate")
        self.between(0, 1, "on_policy")
        self.layer_numbers("student_layers")
        self.none_beside("student", "student_layers")
        self.objective()  # checks the rest
