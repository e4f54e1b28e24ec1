"""Linear layers of which a part lives, with all their parameters."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kdfast.ops import _checks
from kdfast.ops._packed import Packed
from kdfast.ops.prefix import prefix_linear

Layer = TypeVar("Layer", bound=nn.Linear)


class PrefixLinear(nn.Linear):
    """An `nn.Linear` of which the first `in_features` inputs and `out_features` outputs are in use:
    `kdfast.prefix_linear`.

    Both may be set between calls; the parameters stay whole, and so does the state, which is that of `nn.Linear`. What
    is out of range is refused by the next call.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> PrefixLinear:
        """A layer with the parameters of another, which both share."""
        return _shared(cls, linear)

    def forward(self, x: Tensor) -> Tensor:
        return prefix_linear(x, self.weight, self.bias, in_features=self.in_features, out_features=self.out_features)


class SelectedLinear(nn.Linear):
    """An `nn.Linear` of which some outputs (`rows`) and inputs (`columns`) live: `kdfast.selected_linear`, with the live
    weights packed once for as long as they stay (`kdfast.ops._packed.Packed` tells how long that is).

    `rows` and `columns` may be set between calls, to sorted int64 indices or to None for all, which is where they
    start. The parameters stay whole, and so does the state, which is that of `nn.Linear`: indices are not in it.

    Raises:
        ValueError, TypeError: indices of a wrong dtype or shape, out of range, repeated or out of order, when they are
            set; an input of another width than `columns`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **options: Any) -> None:
        super().__init__(in_features, out_features, bias, **options)
        self.packed = self._packed(None, None)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, rows: Tensor | None = None, columns: Tensor | None = None
    ) -> SelectedLinear:
        """A layer with the parameters of another, which both share."""
        layer = _shared(cls, linear)
        layer.packed = layer._packed(rows, columns)
        return layer

    @property
    def rows(self) -> Tensor | None:
        return self.packed.rows

    @rows.setter
    def rows(self, indices: Tensor | None) -> None:
        self.packed = self._packed(indices, self.columns)

    @property
    def columns(self) -> Tensor | None:
        return self.packed.columns

    @columns.setter
    def columns(self, indices: Tensor | None) -> None:
        self.packed = self._packed(self.rows, indices)

    def forward(self, x: Tensor) -> Tensor:
        return self.packed(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        live = (f"{name}={len(x)}" for name, x in (("rows", self.rows), ("columns", self.columns)) if x is not None)
        return ", ".join([super().extra_repr(), *live])

    def _packed(self, rows: Tensor | None, columns: Tensor | None) -> Packed:
        return Packed((self.out_features, self.in_features), rows, columns, op="SelectedLinear")


def _shared(cls: type[Layer], linear: nn.Linear) -> Layer:
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        expected = "an nn.Linear that is no more than that"
        _checks.wrong_type(f"{cls.__name__}.from_linear", "linear", expected, type(linear).__name__)
    layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device=torch.device("meta"))
    layer.weight, layer.bias = linear.weight, linear.bias
    return layer.train(linear.training)
