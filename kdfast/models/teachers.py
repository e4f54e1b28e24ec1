"""Several teachers that are called as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from kdfast.models.inputs import TOKENS, model_inputs, parameters_of


class Teachers(nn.Module):
    """K classifiers as one teacher: `.ensemble` are their logits [B, K, C], `.logits` the mean of these.

    All read the student's columns, but a teacher with a tokenizer of its own: of the k-th, from 0, these are
    `teacher_k_input_ids` and the like (`kdfast.data.sampler.TeacherCollator(..., number=k)`).

    Args:
        models: with logits [B, C]; of transformers, or called and answering like one.

    Raises:
        ValueError: none.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        if not models:
            raise ValueError("Teachers: models: expected at least one, got none")
        self.models = nn.ModuleList(models)
        self.config = getattr(models[0], "config", None)
        # The trainer takes these off the batch, without "teacher_".
        self.columns = {f"{k}_{name}" for k in range(len(models)) for name in TOKENS}

    def forward(self, **inputs: Any) -> ModelOutput:
        shared = {name: value for name, value in inputs.items() if name not in self.columns}
        logits = []
        for k, model in enumerate(self.models):
            own = {name.removeprefix(f"{k}_"): x for name, x in inputs.items() if name.startswith(f"{k}_")}
            known = parameters_of(model)
            chosen = {name: x for name, x in own.items() if name in known} if "input_ids" in own else shared
            logits.append(model(**model_inputs(model, chosen)).logits)
        ensemble = torch.stack(logits, 1)
        return ModelOutput(logits=ensemble.float().mean(1), ensemble=ensemble)
