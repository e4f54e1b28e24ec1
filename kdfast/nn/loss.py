"""A function with its settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kdfast.ops import _checks, _divergence
from kdfast.ops._layers import ON_HOST


class Loss(nn.Module):
    """`function(*tensors, **settings)` as a module:
    `Loss("js_div", beta=0.3, temperature=2.0)(student, teacher, mask=mask)`.

    Args:
        function: of kdfast, or its name.
        **settings: some of its keyword arguments. Tensors among them (a temperature or a weight per row, a mask) are
            buffers, which move with the module; they are not in its state.

    A call takes the function's tensors and more of its keyword arguments, which go before the settings.

    Raises:
        TypeError: a setting that the function does not have, or of a wrong type.
        ValueError: a name that is no function's, or a setting out of range.
    """

    def __init__(self, function: Callable[..., Any] | str, **settings: Any) -> None:
        super().__init__()
        self.function = _named(function) if isinstance(function, str) else function
        self.name = getattr(self.function, "__name__", type(self.function).__name__)
        known = [
            name
            for name, parameter in inspect.signature(self.function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        for name in settings:
            if name not in known:
                _checks.wrong_type(self.name, "arguments", f"some of {', '.join(known)}", name)
        _check_values(self.name, settings)
        self.settings: dict[str, Any] = {}
        for name, value in settings.items():
            if name in ON_HOST:
                self.settings[name] = value.tolist() if isinstance(value, Tensor) else value
            elif isinstance(value, Tensor) and not value.requires_grad:
                self.register_buffer(name, value, persistent=False)
            elif any(isinstance(x, Tensor) for x in pytree.tree_leaves(value)):
                expected = "a tensor without gradient (trained ones belong to a module, as HiddenMSELoss)"
                got = "requires_grad=True" if isinstance(value, Tensor) else f"a {_checks.kind(value)} of tensors"
                _checks.wrong_value(self.name, name, expected, got)
            else:
                self.settings[name] = value

    def forward(self, *tensors: Any, **more: Any) -> Any:
        return self.function(*tensors, **self.settings | dict(self.named_buffers(recurse=False)) | more)

    def extra_repr(self) -> str:
        shown = [f"{name}={value!r}" for name, value in self.settings.items()]
        shown += [f"{name}={list(x.shape)}" for name, x in self.named_buffers(recurse=False)]
        return ", ".join([self.name, *shown])


def _named(name: str) -> Callable[..., Any]:
    import kdfast  # which imports this

    function = getattr(kdfast, name) if name in kdfast.__all__ else None
    if not inspect.isfunction(function):
        _checks.wrong_value("Loss", "function", "a function of kdfast, or its name", repr(name))
    return function


def _check_values(op: str, settings: dict[str, Any]) -> None:
    """At once, not when the first batch comes."""
    if settings.get("reduction", "mean") not in _checks.REDUCTIONS:
        _checks.wrong_value(op, "reduction", "'none', 'mean', 'sum' or 'batchmean'", repr(settings["reduction"]))
    if not isinstance(settings.get("temperature", 1.0), Tensor):
        _checks.check_temperature_number(op, settings.get("temperature", 1.0), "a number or a tensor")
    if "divergence" in settings:
        _divergence.check_divergence(op, settings["divergence"])
    if "tail" in settings:
        _divergence.check_tail(op, settings["tail"])
    for argument in ("beta", "skew", "alpha", "label_smoothing"):
        if argument in settings:
            _checks.check_fraction(op, argument, settings[argument], below_one=argument == "skew")
