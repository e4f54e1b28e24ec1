"""Hidden states beside their trained projection."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kdfast.nn.loss import Loss
from kdfast.ops._layers import Layers
from kdfast.ops.hidden import hidden_mse


class HiddenMSELoss(Loss):
    """`kdfast.hidden_mse` as a module: Σ_layers mean (H_s Wᵀ + b − H_t)², with W and b its parameters.

    Args:
        student_size, teacher_size: widths of the hidden states; with both there is a projection, None: none.
        bias: whether the projection has one.
        separate: for how many layers there is a projection each; None: one for all of them.
        layer_weight, reduction: as of `kdfast.hidden_mse`.
    """

    def __init__(
        self,
        student_size: int | None = None,
        teacher_size: int | None = None,
        *,
        bias: bool = True,
        separate: int | None = None,
        layer_weight: Any = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(hidden_mse, layer_weight=layer_weight, reduction=reduction)
        sizes = (student_size, teacher_size)
        if (student_size is None) != (teacher_size is None):
            raise ValueError(f"HiddenMSELoss: student_size, teacher_size: expected both or neither, got {sizes}")
        count = 0 if student_size is None else separate or 1
        linears = (nn.Linear(student_size, teacher_size, bias=bias) for _ in range(count))  # type: ignore[arg-type]
        self.projections = nn.ModuleList(linears)

    def forward(self, student_hidden: Layers, teacher_hidden: Layers, *, mask: Tensor | None = None) -> Any:
        linears: list[Any] = list(self.projections)
        weights = [linear.weight for linear in linears] or None
        biases = [linear.bias for linear in linears if linear.bias is not None] or None
        return super().forward(student_hidden, teacher_hidden, projection=weights, bias=biases, mask=mask)
