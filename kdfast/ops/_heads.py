"""The matrix products of a head hidden · weightᵀ: its logits in float32, and from their gradients those of its inputs.

Products take 16-bit operands to float32: on the GPU torch's, on the CPU our own (kdfast/ops/_products.py). Where those
are not the faster ones operands are widened, a weight a few columns of the vocabulary at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.ops import _checks, _live_linear, _products, _shards

WIDENED = 16 << 20  # bytes of a weight that are widened at a time
# Of the products on the CPU: a widened piece, or what is packed: by the matrix library (22 MB were seen), or 1 MB by
# each thread of our own.
WORKSPACE = 32 << 20


def on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _own(x: Tensor) -> bool:
    """Whether its products are our own."""
    return not on_gpu(x) and _products.own(x)


class Widening:
    """Weights in a wider dtype, a piece at a time, all in one place: memory of their own would be new each time."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._place: Tensor | None = None

    def room(self, weight: Tensor) -> Tensor:
        """For as many rows of a weight as are taken at a time."""
        if self._place is None:
            self._place = weight.new_empty(WIDENED // self.dtype.itemsize, dtype=self.dtype)
        width = weight.shape[1]
        rows = max(1, min(weight.shape[0], self._place.numel() // max(width, 1)))
        return self._place[: rows * width].view(rows, width)

    def pieces(self, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Each with its columns of the logits."""
        room = self.room(weight)
        for begin in range(0, weight.shape[0], room.shape[0]):
            columns = slice(begin, min(begin + room.shape[0], weight.shape[0]))
            yield columns, room[: columns.stop - begin].copy_(weight[columns])


class Head(NamedTuple):
    """scale · (hidden [N, H] · weight [V, H]ᵀ + bias [V]), soft-capped: cap · tanh(z / cap); a cap of 0 is none."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float = 0.0
    scale: float = 1.0

    def flat(self) -> Head:
        return self._replace(hidden=_live_linear.as_rows(self.hidden))

    def detached(self) -> Head:
        bias = None if self.bias is None else self.bias.detach()
        return self._replace(hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias)

    def double(self) -> Head:
        bias = None if self.bias is None else self.bias.double()
        return self._replace(hidden=self.hidden.double(), weight=self.weight.double(), bias=bias)

    def first(self, columns: int) -> Head:
        """Without padded columns of the vocabulary."""
        bias = None if self.bias is None else self.bias[:columns]
        return self._replace(weight=self.weight[:columns], bias=bias)

    def at(self, places: Tensor) -> Head:
        return self._replace(hidden=self.hidden[places])

    def logits(self, rows: slice, out: Tensor, widening: Widening) -> None:
        """Those of some rows, into `out` [n, V], float32 (float64)."""
        hidden = self.hidden[rows]
        if _own(hidden):
            torch.ops.kdfast.matmul_(out, hidden, self.weight.t(), None, False)
        elif hidden.dtype == out.dtype:
            torch.mm(hidden, self.weight.t(), out=out)
        elif on_gpu(out):
            torch.mm(hidden, self.weight.t(), out_dtype=out.dtype, out=out)
        else:
            hidden = hidden.to(out.dtype)
            for columns, piece in widening.pieces(self.weight):
                torch.mm(hidden, piece.t(), out=out[:, columns])
        if self.bias is not None:
            out += self.bias
        if self.scale != 1:
            out.mul_(self.scale)
        if self.softcap:
            out.div_(self.softcap).tanh_().mul_(self.softcap)

    def through_softcap(self, logits: Tensor, g: Tensor) -> None:
        """Turns the gradients of soft-capped logits into those of the logits before it. `logits` are lost."""
        g.mul_(logits.div_(self.softcap).square_().neg_().add_(1))


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """The student's, but for float16 float32: a gradient divided by the number of rows would underflow before a
    GradScaler's factor can save it."""
    return torch.float32 if weight.dtype == torch.float16 else weight.dtype


class Gradients:
    """The gradients of hidden states, weight and bias (where `wanted`), from the gradients of the logits, slab by slab.

    Sums over several slabs are float32, and so are hidden states' gradients where those of other shards are still to
    come.
    """

    def __init__(
        self, head: Head, widening: Widening, padding: int, wanted: list[bool], slabs: int, sharded: bool
    ) -> None:
        self.head, self.widening, self.wanted = head, widening, wanted
        of, exact = head.weight, torch.promote_types(head.weight.dtype, torch.float32)
        columns = of.shape[0] + padding
        self.dtype = gradient_dtype(of)
        self.hidden = of.new_empty(head.hidden.shape if wanted[0] else (0,), dtype=exact if sharded else self.dtype)
        weight_shape = (columns, of.shape[1]) if wanted[1] else (0,)
        self.weight = of.new_empty(weight_shape, dtype=exact if slabs > 1 else self.dtype)
        self.weight[of.shape[0] if slabs else 0 :].zero_()
        self.bias = of.new_zeros(columns if wanted[2] else 0, dtype=exact)

    def add(self, rows: slice, g: Tensor) -> None:
        """A slab's; `g`: of its logits."""
        columns = self.head.weight.shape[0]
        if self.wanted[0]:
            self._add_hidden(self.hidden[rows], g)
        if self.wanted[1]:
            self._add_weight(self.weight[:columns], self.head.hidden[rows], g, first=rows.start == 0)
        if self.wanted[2]:
            self.bias[:columns] += g.sum(0, dtype=self.bias.dtype)

    def _add_hidden(self, out: Tensor, g: Tensor) -> None:
        weight = self.head.weight
        if _own(weight):
            torch.ops.kdfast.matmul_(out, g, weight, None, False)
        elif g.dtype == weight.dtype == out.dtype:
            torch.mm(g, weight, out=out)
        elif g.dtype == weight.dtype:
            torch.mm(g, weight, out_dtype=out.dtype, out=out)
        else:
            total = g.new_zeros(out.shape)
            for columns, piece in self.widening.pieces(weight):
                total.addmm_(g[:, columns], piece)
            out.copy_(total)

    def _add_weight(self, out: Tensor, hidden: Tensor, g: Tensor, first: bool) -> None:
        if _own(hidden):
            torch.ops.kdfast.matmul_(out, g.t(), hidden, None, not first)
            return
        hidden = hidden.to(g.dtype)
        if g.dtype == out.dtype:
            torch.addmm(out, g.t(), hidden, beta=0 if first else 1, out=out)
        elif on_gpu(out):
            torch.addmm(out, g.t(), hidden, out_dtype=out.dtype, beta=0 if first else 1, out=out)
        else:  # a single slab
            room = self.widening.room(out)
            each = room.shape[0]
            for piece, columns in zip(out.split(each), g.split(each, 1), strict=True):
                piece.copy_(torch.mm(columns.t(), hidden, out=room[: piece.shape[0]]))


def checked(
    op: str,
    side: str,
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
) -> Head:
    """Checked; under autocast in its dtype."""
    for argument, x, dims in (("hidden", hidden, 1), ("weight", weight, 2), ("bias", bias, 1)):
        if argument == "bias" and x is None:
            continue
        argument = f"{side}_{argument}"
        if not isinstance(x, Tensor):
            _checks.wrong_type(op, argument, "a tensor", _checks.kind(x))
        _checks.check_float(op, argument, x)
        if x.dim() < dims or (x.dim() > dims and dims == 2):
            _checks.wrong_value(op, argument, "[V, H]" if dims == 2 else "a dimension or more", list(x.shape))
    assert hidden is not None
    assert weight is not None
    if weight.shape[1] != hidden.shape[-1]:
        _checks.wrong_value(
            op, f"{side}_weight", f"[V, {hidden.shape[-1]}], the hidden states' size", list(weight.shape)
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        _checks.wrong_value(op, f"{side}_bias", f"[{weight.shape[0]}]", list(bias.shape))
    if softcap is not None and (isinstance(softcap, bool) or not isinstance(softcap, (int, float))):
        _checks.wrong_type(op, f"{side}_softcap", "a number or None", _checks.kind(softcap))
    if softcap is not None and not 0 < softcap < float("inf"):
        _checks.wrong_value(op, f"{side}_softcap", "a finite number > 0, or None", softcap)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        _checks.wrong_type(op, f"{side}_logit_scale", "a number", _checks.kind(scale))
    if not 0 < scale < float("inf"):
        _checks.wrong_value(op, f"{side}_logit_scale", "a finite number > 0", scale)
    if hidden.dtype != torch.float64 and _checks.is_autocast(hidden):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    elif _shards.is_dtensor(weight) and not _shards.is_dtensor(hidden):
        # fully_shard keeps parameters in their own dtype and casts what it gathers.
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    for argument, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            _checks.wrong_type(op, f"{side}_{argument}", f"the hidden states' dtype {hidden.dtype}", x.dtype)
        if x is not None and x.device != hidden.device:
            _checks.wrong_value(op, f"{side}_{argument}", f"the hidden states' device {hidden.device}", x.device)
    return Head(hidden, weight, bias, 0.0 if softcap is None else float(softcap), float(scale))
