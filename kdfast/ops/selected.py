"""A linear layer of which some inputs and outputs live: heads and neurons that are pruned, while their weights stay."""

from __future__ import annotations

from torch import Tensor

from kdfast.ops import _checks, _live_linear
from kdfast.ops._selection import Selection, selected_linear_reference
from kdfast.ops._transforms import transformable

__all__ = ["selected_linear", "selected_linear_reference"]


@transformable
def selected_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """`y = x · weight[rows][:, columns]ᵀ + bias[rows]`: a layer whose dead outputs and inputs are skipped (heads and
    neurons: Michel et al., 2019; Hou et al., 2020).

    Inputs and outputs are compact: x has the live columns alone, y the live rows alone. The live weights are packed
    side by side at every call, for a dense product; `kdfast.nn.SelectedLinear` packs them once for as long as they
    stay. Where the weight has a `.grad` already, and no hooks that would see it, its live part is added to alone.

    Args:
        x: [..., columns], any strides; float32, bfloat16, float16 or (on the CPU) float64.
        weight: [out, in], the whole of it, any strides; of the dtype of x, but under autocast, where both are cast.
        bias: [out], the whole of it, or None.
        rows: the live outputs: int64 indices, sorted, each once, on the device of x (a mask's:
            `mask.nonzero().flatten()`); None: all.
        columns: the live inputs, the same.

    Returns:
        [..., rows], of the dtype that `torch.nn.functional.linear` gives. What does not live is never read; its
        gradient is exactly zero.

    Raises:
        ValueError, TypeError: a shape, dtype, device or index is wrong; the message names the argument. Indices on a
            GPU are not looked at, which would wait for it: there out of range ones are undefined.
    """
    op = "selected_linear"
    _live_linear.check(op, x, weight, bias)
    for argument, indices in (("rows", rows), ("columns", columns)):
        if isinstance(indices, Tensor) and indices.device != x.device:
            _checks.wrong_value(op, argument, f"the device of x, {x.device}", indices.device)
    live = Selection(op, (weight.shape[0], weight.shape[1]), rows, columns)
    _live_linear.check_width(op, x, live.inputs)
    return _live_linear.run(live, x, weight, bias)
