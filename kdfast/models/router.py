"""The loss that a mixture of experts has of its own: that of its router, which spreads the tokens over the experts."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # in transformers


def router_loss(model: nn.Module, outputs: Any) -> Tensor | None:
    """outputs.aux_loss · the model's coefficient, as transformers adds it to its own loss; None where it computes none
    (`config.output_router_logits`). A model whose coefficient is not found gives None, and a warning."""
    loss: Any = getattr(outputs, "aux_loss", None)
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for holder in (model, config, text) if isinstance(loss, Tensor) else ():
        for name in _COEFFICIENTS:
            if isinstance(coefficient := getattr(holder, name, None), (int, float)):
                weighted: Tensor = coefficient * loss
                return weighted
    warn_of_router_loss("LanguageModel", outputs)
    return None


def warn_of_router_loss(who: str, outputs: Any) -> None:
    """A warning where outputs have what such a loss is made of, with a gradient, and nothing trains on it.
    Python shows it once."""
    for name in ("aux_loss", "router_logits", "encoder_router_logits", "decoder_router_logits"):
        made = getattr(outputs, name, None)
        made = made[0] if isinstance(made, tuple) and made else made
        if isinstance(made, Tensor) and made.requires_grad:
            warnings.warn(
                f"{who}: the student's outputs have {name}: its router's loss is not trained on", stacklevel=2
            )
            return
