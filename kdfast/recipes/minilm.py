"""MiniLM (Wang et al., 2020, arXiv:2002.10957) and MiniLMv2 (Wang et al., 2021, arXiv:2012.15828).

1. On text without labels, a student of the pre-trained encoder learns the self-attention of its last layer from the
   teacher's last layer, and nothing else:

       loss = 1/(h·n) Σ_heads Σ_rows KL(A_t ‖ A_s) + 1/(h·n) Σ_heads Σ_rows KL(VR_t ‖ VR_s)

   A = softmax(QKᵀ/√d) over tokens that are no padding, VR = softmax(VVᵀ/√d) ("qk", "vv"). MiniLMv2 has the relations of
   queries, keys and values with themselves ("qq", "kk", "vv"), heads joined and split anew (`relation_heads`, 48 for a
   base-size teacher), and an upper-middle layer of large teachers (`teacher_layer`, 21 of 24).
2. The student is fine-tuned on the labels like any pre-trained model.

Attention maps are never kept: `kdfast.qk_relation_kl` makes them in tiles. A teacher assistant, where a student is at
most half as deep and half as wide, is a run of this recipe whose student becomes the next one's `base`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kdfast.objective import Relations, Terms
from kdfast.recipes.base import setting
from kdfast.recipes.classifier import ClassifierRecipe, Stage, labels_only


@dataclass(frozen=True, kw_only=True)
class Recipe(ClassifierRecipe):
    """The last layer's self-attention, on text without labels, then fine-tuning:
    MiniLM and MiniLMv2 (Wang et al. 2020, 2021).

    KL between the teacher's and the student's relations of queries with keys and of values with values, from the
    pre-trained teacher's last layer to the student's; then the student is fine-tuned on the labels.
    """

    name = "minilm"
    quick: ClassVar[dict[str, Any]] = {**ClassifierRecipe.quick, "relation_epochs": 1}

    relations: tuple[str, ...] = setting(("qk", "vv"), "Pairs of q, k and v: qk,vv is MiniLM, qq,kk,vv MiniLMv2.")
    relation_heads: int | None = setting(None, "Split heads anew into as many (MiniLMv2). Default: as they are.")
    teacher_layer: int = setting(-1, "Layer to learn from, from 1; negative: from the last.")
    relation_epochs: int = setting(2, "Passes over the text, before the labels.")
    relation_rate: float = setting(5e-4, "Peak of the linear schedule, before the labels.")
    student_start: str = setting("base", "Whose layers students start from: the fine-tuned teacher's, or the base's.")

    def __post_init__(self) -> None:
        self.at_least(1, "relation_epochs", "relation_heads")
        self.positive("relation_rate")
        super().__post_init__()

    def stages(self, student_layers: int, teacher_layers: int, kind: str) -> list[Stage]:
        attention = Relations({-1: self.teacher_layer}, relations=self.relations, relation_heads=self.relation_heads)
        return [
            Stage(
                "relations",
                "student, relations",
                Terms(relations=attention),
                teacher="base",
                epochs=self.relation_epochs,
                learning_rate=self.relation_rate,
                measured=False,
            ),
            Stage("student", "student, fine-tuned", labels_only(kind), start="relations"),
        ]
