"""Classifiers of several tasks that share one encoder while they are trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from kdfast.models.inputs import model_inputs


class SharedEncoder(nn.Module):
    """The encoder of the first model, in all of them; each keeps its own head.

    `forward(task="sst2", input_ids=...)` is that task's classifier. `save_pretrained` writes a folder for each task,
    which loads as the plain class. Whatever is in the encoder is shared: of BERT the pooler too.

    Args:
        models: of transformers, by their tasks' names; of one class and of the same sizes but for the heads. They are
            changed in place.

    Raises:
        ValueError: no models, a name with a dot, or models whose encoders differ in class or shape.
    """

    models: dict[str, Any]

    def __init__(self, models: Mapping[str, Any]) -> None:
        super().__init__()
        if not models or any("." in name for name in models):
            got = ", ".join(models) or "none"
            raise ValueError(f"SharedEncoder: models: expected some, by names without a dot, got {got}")
        first = next(iter(models.values()))
        prefix, shapes = first.base_model_prefix, _shapes(first.base_model)
        for name, model in models.items():
            if type(model) is not type(first) or _shapes(model.base_model) != shapes:
                expected = f"{type(first).__name__} with the encoder of the first"
                raise ValueError(f"SharedEncoder: models: expected {expected}, got {type(model).__name__} for {name}")
            setattr(model, prefix, first.base_model)
        self.encoder = first.base_model
        self.heads = nn.ModuleDict(
            {
                name: nn.ModuleDict({child: part for child, part in model.named_children() if child != prefix})
                for name, model in models.items()
            }
        )
        # No submodules, which would have every parameter of the encoder once for each task.
        self.__dict__["models"] = dict(models)

    def train(self, mode: bool = True) -> SharedEncoder:
        super().train(mode)
        for model in self.models.values():
            model.training = mode
        return self

    def forward(self, task: str, **inputs: Any) -> Any:
        model = self.models[task]
        return model(**model_inputs(model, inputs))

    def save_pretrained(self, folder: str | Path) -> None:
        for name, model in self.models.items():
            model.save_pretrained(Path(folder) / name)


def _shapes(encoder: nn.Module) -> dict[str, Any]:
    return {name: value.shape for name, value in encoder.state_dict().items()}
