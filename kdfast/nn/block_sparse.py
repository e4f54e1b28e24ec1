"""A linear layer of which some blocks of weights live, and only these are there."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.ops import _checks
from kdfast.ops._block_layout import BlockLayout
from kdfast.ops.block_sparse import block_sparse_linear

# Time over a dense layer's, by density: float32, forward and backward, where MKL is at its best (with AVX-512 on Intel).
_PER_BLOCK, _FIXED = 1.05, 0.06


class BlockSparseLinear(nn.Module):
    """y = x · Wᵀ + bias where some blocks of W live: `kdfast.block_sparse_linear`, with the live blocks as parameters.

        layer = kdfast.nn.BlockSparseLinear.from_linear(linear, mask, (64, 64))    # mask [out / 64, in / 64]
        layer.to_linear()                                                           # a dense layer again

    The state is `values`, `bias` and `mask`; a state with another mask for the same shape and blocks makes the layer one
    of these blocks (optimizers made before do not follow). `mask` is there for the state: set no number in it.

    Args:
        layout: which blocks live.
        bias: whether there is one.
        device, dtype: of the parameters; the layout goes with them.

    Attributes:
        values: [live blocks, rows, columns], in row-major order of the mask; drawn as the weights of `nn.Linear`.
        bias: [out], or None.
        layout: the `kdfast.BlockLayout`.

    Raises:
        TypeError: `layout` is none.

    Warns:
        UserWarning: so many blocks live that `expected_speed` is below 1.05.
    """

    def __init__(
        self,
        layout: BlockLayout,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(layout, BlockLayout):
            _checks.wrong_type("BlockSparseLinear", "layout", "a kdfast.BlockLayout", _checks.kind(layout))
        self.layout = layout
        self.out_features, self.in_features = layout.shape
        self.values = nn.Parameter(torch.empty(layout.count, *layout.block, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(layout.shape[0], device=device, dtype=dtype)) if bias else None
        self.mask: Tensor
        self.register_buffer("mask", layout.mask.clone())
        self._follow()
        self.reset_parameters()
        if self.expected_speed < 1.05:
            warnings.warn(
                f"BlockSparseLinear: layout: {layout.density:.0%} of its blocks live, with which a layer is expected to "
                f"have {self.expected_speed:.2f} × the speed of nn.Linear",
                stacklevel=2,
            )

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, mask: Tensor | None = None, block: tuple[int, int] = (64, 64)
    ) -> BlockSparseLinear:
        """A layer with copies of the blocks of another that live: those of a mask, or without one all that have a
        number other than 0.

        Raises:
            ValueError, TypeError: no `nn.Linear`; features that are no multiples of the block's; a mask or a block as
                `kdfast.BlockLayout` refuses them.
        """
        op = "BlockSparseLinear.from_linear"
        if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
            _checks.wrong_type(op, "linear", "an nn.Linear that is no more than that", type(linear).__name__)
        weight = linear.weight.detach()
        layout = BlockLayout.from_weight(weight, block) if mask is None else BlockLayout(mask.to(weight.device), block)
        if layout.shape != weight.shape:
            expected = f"[out / {block[0]}, in / {block[1]}] of a weight of shape {list(weight.shape)}"
            _checks.wrong_value(op, "mask", expected, f"shape {list(layout.mask.shape)}")
        layer = cls(layout, linear.bias is not None, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            layer.values.copy_(layout.values_of(weight))
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
        layer.values.requires_grad_(linear.weight.requires_grad)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """A dense layer with copies of these weights, zero where blocks are dead."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.values.dtype
        )
        linear.weight = nn.Parameter(self.layout.dense(self.values.detach()), self.values.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear.train(self.training)

    def reset_parameters(self) -> None:
        """Draws them as `nn.Linear` does."""
        bound = 1 / math.sqrt(self.in_features)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @property
    def expected_speed(self) -> float:
        """How many times as fast as `nn.Linear` a step, forward and backward, of 512 rows and more may be expected to be
        on a CPU in float32: 1 / (1.05 · density + 0.06), which fits measurements with blocks of 64 on an Intel processor
        (on one of AMD's it is about twice that). It says nothing of a GPU."""
        return 1 / (_PER_BLOCK * self.layout.density + _FIXED)

    def forward(self, x: Tensor) -> Tensor:
        return block_sparse_linear(x, self.values, self.layout, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block={self.layout.block}, density={self.layout.density:.3g}, expected {self.expected_speed:.2g} × as fast"
        )

    def follow_mask(self) -> None:
        """Makes the layout that of `mask`, for who has set it and `values` one by one, as loaders do.

        Raises:
            ValueError: the mask has another number of blocks than the values.
        """
        layout = BlockLayout(self.mask, self.layout.block)
        if self.values.shape != (layout.count, *layout.block):
            expected = f"the mask's blocks, {[layout.count, *layout.block]}"
            _checks.wrong_value("BlockSparseLinear", "values", expected, f"shape {list(self.values.shape)}")
        self.layout = layout

    def _follow(self) -> None:
        """Layout and mask go where the values are, but to a device without memory."""
        if not self.values.is_meta:
            self.layout = self.layout.to(self.values.device)
            self.mask = self.layout.mask.clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockSparseLinear:
        super()._apply(fn, recurse)
        self._follow()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: Any, more: Any, errors: Any
    ) -> None:
        mask, values = (state_dict.get(prefix + name) for name in ("mask", "values"))
        if isinstance(mask, Tensor) and isinstance(values, Tensor) and mask.shape == self.layout.mask.shape:
            layout = BlockLayout(mask.to(self.layout.device), self.layout.block)
            if values.shape != (layout.count, *layout.block):
                expected = f"the mask's blocks, {[layout.count, *layout.block]}"
                errors.append(f"{prefix}values: expected {expected}, got shape {list(values.shape)}")
                return
            if layout != self.layout:
                self.layout = layout
                self.values.grad = None
                self.values.data = self.values.data.new_empty(values.shape)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, more, errors)
        self._follow()
