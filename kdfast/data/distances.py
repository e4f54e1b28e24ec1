"""How far a classifier or regressor is from its teacher, by what its outputs are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast import kl_div

COMPARED = ("agreement", "kl_to_teacher", "mse_to_teacher")  # what `to_teacher` gives some of
PROBLEM_TYPES = {  # of a config of transformers, by the kind of a task
    "classification": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}


def kind_of(config: Any, width: int, otherwise: str = "classification") -> str:
    """The kind of a model of transformers, by its config's `problem_type` or, where it has none, its number of outputs.

    `otherwise`: of several outputs, of which nothing is known.
    """
    kinds = {problem: kind for kind, problem in PROBLEM_TYPES.items()}
    known = kinds.get(getattr(config, "problem_type", None) or "")
    return known or ("regression" if width == 1 else otherwise)


def to_teacher(logits: Tensor, teacher_logits: Tensor, kind: str) -> dict[str, Tensor]:
    """Means over rows of logits [B, C], scalars.

    Args:
        kind: "classification": `agreement`, the share of rows with the same class, and `kl_to_teacher`, KL(teacher ‖
            student) of the softmax at temperature 1 in nats. "multi_label": the same of each label's sigmoid alone,
            means over labels too. "regression": `mse_to_teacher`, the mean of (z_s - z_t)².
    """
    if kind == "regression":
        return {"mse_to_teacher": (logits.float() - teacher_logits.float()).square().mean()}
    if kind == "multi_label":  # a softmax over a logit and 0 is its sigmoid
        pairs = [torch.stack([torch.zeros_like(z), z], -1) for z in (logits, teacher_logits)]
        return {"agreement": ((logits > 0) == (teacher_logits > 0)).float().mean(), "kl_to_teacher": kl_div(*pairs)}
    same = (logits.argmax(-1) == teacher_logits.argmax(-1)).float().mean()
    return {"agreement": same, "kl_to_teacher": kl_div(logits, teacher_logits)}
