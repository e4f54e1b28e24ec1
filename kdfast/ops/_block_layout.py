"""Which blocks of a matrix live, and where: made once for many products."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.ops import _checks

SIDES = (32, 64, 96, 128)  # of blocks: whole vectors and tiles of every processor
_OP = "BlockLayout"


class Order(NamedTuple):
    """Live blocks along one dimension of the matrix: those of block row (or column) i are begin[i] to begin[i + 1] of
    `index`, the other coordinate, ascending, and `place`, which of the values they have."""

    begin: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple's method, which nobody calls
    place: Tensor

    def to(self, device: torch.device) -> Order:
        return Order(*(x.to(device) for x in self))


class BlockLayout:
    """Which blocks of a matrix W [out, in] live: for `kdfast.block_sparse_linear`.

        layout = kdfast.BlockLayout(mask, (64, 64))         # mask [out / 64, in / 64]
        values = layout.values_of(weight)                   # [live blocks, 64, 64]
        y = kdfast.block_sparse_linear(x, values, layout)

    It does not change, and where the blocks of each row and column are is found once, here. Two are equal where their
    shapes, blocks and live blocks are. `state()` and `from_state` make it plain tensors and numbers, and again a layout.

    Args:
        mask: [out / rows, in / columns] bool, True where a block lives; any may, or none.
        block: the rows and columns of a block, each 32, 64, 96 or 128.

    Attributes:
        mask: a copy of the mask.
        block: (rows, columns).
        shape: of W, (out, in).
        count: how many blocks live.
        rows, columns: live blocks by W's block rows, in which order their values lie, and by its block columns.

    Raises:
        ValueError, TypeError: a mask or a block that is not as above; the message names the argument.
    """

    def __init__(self, mask: Tensor, block: tuple[int, int]) -> None:
        self.block = _checked_block(block)
        if not isinstance(mask, Tensor):
            _checks.wrong_type(_OP, "mask", "a bool tensor, True where a block lives", _checks.kind(mask))
        if mask.dtype is not torch.bool:
            _checks.wrong_type(_OP, "mask", "a bool tensor, True where a block lives", mask.dtype)
        if mask.dim() != 2 or 0 in mask.shape:
            _checks.wrong_value(
                _OP, "mask", "[out / rows, in / columns], at least one block", f"shape {list(mask.shape)}"
            )
        self.mask = mask.detach().clone()
        self.shape = (mask.shape[0] * self.block[0], mask.shape[1] * self.block[1])
        row, column = self.mask.nonzero(as_tuple=True)
        self.count = len(row)
        by_column = torch.argsort(column, stable=True)
        places = torch.arange(self.count, device=mask.device)
        self.rows = Order(_begin(self.mask.sum(1)), column.contiguous(), places)
        self.columns = Order(_begin(self.mask.sum(0)), row[by_column].contiguous(), by_column)

    @classmethod
    def from_weight(cls, weight: Tensor, block: tuple[int, int]) -> BlockLayout:
        """The blocks of a weight [out, in] in which any number is not zero."""
        rows, columns = _checked_block(block)
        if not isinstance(weight, Tensor):
            _checks.wrong_type(f"{_OP}.from_weight", "weight", "a tensor", _checks.kind(weight))
        if weight.dim() != 2 or weight.shape[0] % rows or weight.shape[1] % columns:
            expected = f"[out, in], multiples of the block's {rows} and {columns}"
            _checks.wrong_value(f"{_OP}.from_weight", "weight", expected, f"shape {list(weight.shape)}")
        return cls((_blocks(weight.detach(), (rows, columns)) != 0).flatten(2).any(-1), block)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> BlockLayout:
        """A layout from what `state()` gave."""
        return cls(state["mask"], tuple(state["block"]))  # type: ignore[arg-type]

    def state(self) -> dict[str, Any]:
        """Mask and block, for `torch.save`."""
        return {"mask": self.mask, "block": list(self.block)}

    @property
    def device(self) -> torch.device:
        return self.mask.device

    @property
    def density(self) -> float:
        """The share of blocks that live."""
        return self.count / self.mask.numel()

    def to(self, device: torch.device | str) -> BlockLayout:
        """This layout on another device; itself where it is there already."""
        device = torch.device(device)
        if device == self.mask.device:
            return self
        moved = object.__new__(type(self))
        moved.__dict__ = self.__dict__ | {
            "mask": self.mask.to(device),
            "rows": self.rows.to(device),
            "columns": self.columns.to(device),
        }
        return moved

    def values_of(self, weight: Tensor) -> Tensor:
        """The live blocks [count, rows, columns] of a weight of this shape, in row-major order of the mask; a copy,
        through which gradients go."""
        self._check("values_of", "weight", weight, self.shape)
        return _blocks(weight, self.block)[self._at()].contiguous()

    def dense(self, values: Tensor) -> Tensor:
        """The weight [out, in] of live blocks, zero elsewhere; gradients go through it."""
        self._check("dense", "values", values, (self.count, *self.block))
        blocks = values.new_zeros(*self.mask.shape, *self.block).index_put(self._at(), values)
        return blocks.transpose(1, 2).reshape(self.shape)

    def _at(self) -> tuple[Tensor, Tensor]:
        """Block row and column of every live block."""
        counts = self.rows.begin.diff()
        row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=self.count)
        return row, self.rows.index

    def _check(self, method: str, argument: str, given: object, shape: tuple[int, ...]) -> None:
        if not isinstance(given, Tensor):
            _checks.wrong_type(f"{_OP}.{method}", argument, "a tensor", _checks.kind(given))
        if given.shape != shape:
            _checks.wrong_value(f"{_OP}.{method}", argument, f"{list(shape)}", f"shape {list(given.shape)}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockLayout):
            return NotImplemented
        return self.block == other.block and torch.equal(self.mask, other.mask.to(self.device))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"BlockLayout({self.shape[0]} × {self.shape[1]}, {self.count} of {self.mask.numel()} blocks of {self.block[0]} × {self.block[1]} live)"


def _begin(counts: Tensor) -> Tensor:
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def _blocks(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """[block rows, block columns, rows, columns]."""
    rows, columns = block
    blocks = weight.reshape(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)
    return blocks.transpose(1, 2)


def _checked_block(block: Any) -> tuple[int, int]:
    expected = "two sides of 32, 64, 96 or 128"
    if not isinstance(block, (tuple, list)) or any(isinstance(x, bool) or not isinstance(x, int) for x in block):
        _checks.wrong_type(_OP, "block", expected, repr(block))
    if len(block) != 2 or not {*block} <= {*SIDES}:
        _checks.wrong_value(_OP, "block", expected, block)
    return block[0], block[1]
