"""What the modules share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kdfast.ops import _checks, _divergence


class Settings(nn.Module):
    """Holds keyword arguments of a function, refuses what is wrong with them at once, and shows them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings
        name = type(self).__name__
        if settings["reduction"] not in _checks.REDUCTIONS:
            _checks.wrong_value(name, "reduction", "'none', 'mean', 'sum' or 'batchmean'", repr(settings["reduction"]))
        if not isinstance(settings.get("temperature", 1.0), Tensor):
            _checks.check_temperature_number(name, settings.get("temperature", 1.0))
        if "divergence" in settings:
            _divergence.check_divergence(name, settings["divergence"])
        if "tail" in settings:
            _divergence.check_tail(name, settings["tail"])
        for argument in ("beta", "skew", "alpha", "label_smoothing"):
            if argument in settings:
                _checks.check_fraction(name, argument, settings[argument], below_one=argument == "skew")

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
