"""Losses as modules: `Loss` holds a function of kdfast with its settings, others hold parameters too."""

from kdfast.nn.hidden import HiddenMSELoss
from kdfast.nn.loss import Loss

__all__ = ["HiddenMSELoss", "Loss"]
