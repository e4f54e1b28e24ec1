"""The live part of a weight, packed once for many calls."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.ops import _live_linear
from kdfast.ops._selection import Selection
from kdfast.ops._transforms import transformable

_SAMPLED = 64  # weights


class _Kept(NamedTuple):
    """A packed part, and what it was packed of."""

    part: Tensor
    weight: weakref.ref[Tensor]
    version: int
    memory: int
    recorded: bool
    sample: Tensor | None  # of its numbers at `_places`; None: not on the CPU


class Packed(Selection):
    """`selected_linear` of one weight, for many calls: indices are checked once, and the live weights are packed once
    for as long as they stay.

    `packed(x, weight, bias)` looks at no argument but the width of x. What is packed is kept until

    - another weight or dtype comes, or calls begin or cease to record gradients;
    - the weight is written to, or a backward has reached it: optimizers write after it, some by `.data`, of which torch
      keeps no count, no more than of what `fully_shard` gathers;
    - on the CPU, a sample of the weights has changed, which shows other writes of that kind, but for those to a few
      weights alone: after these, `forget`. Elsewhere nothing is kept between calls that record no gradients.

    Nothing is kept under `torch.compile` and dispatch modes. Other indices are another Packed, which is cheap to make; a
    backward uses those of its forward.

    Args:
        shape: of the weight, [out, in].
        rows, columns: as of `kdfast.selected_linear`; they follow the weight to its device.
        op: the name in errors.

    Raises:
        ValueError, TypeError: as of `kdfast.selected_linear`.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        rows: Tensor | None = None,
        columns: Tensor | None = None,
        *,
        op: str = "selected_linear",
    ) -> None:
        super().__init__(op, shape, rows, columns)
        self._kept: _Kept | None = None
        self._places: Tensor = torch.empty(0)  # of the sample in a weight on the CPU; made when there is one

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.shape[-1] != self.inputs:
            _live_linear.check_width(self.op, x, self.inputs)
        return selected_linear(self, x, weight, bias)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_kept": None}

    def forget(self) -> None:
        """The next call packs anew."""
        self._kept = None

    used = forget

    def part(self, weight: Tensor, dtype: torch.dtype, recorded: bool) -> Tensor:
        kept = self._kept
        if (
            kept is not None
            and kept.weight() is weight
            and kept.part.dtype is dtype
            and kept.recorded is recorded
            and kept.memory == weight.data_ptr()
            and kept.version == weight._version
            and not torch._C._len_torch_dispatch_stack()
            and (kept.sample is None or torch.equal(kept.sample, weight.take(self._places)))
        ):
            return kept.part
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():  # or no later call could save it for its backward
                return self._packed(weight, dtype, recorded)
        return self._packed(weight, dtype, recorded)

    def _packed(self, weight: Tensor, dtype: torch.dtype, recorded: bool) -> Tensor:
        part = super().part(weight, dtype, recorded)
        self._kept = self._keep(part, weight, recorded) if _is_kept(weight, recorded) else None
        return part

    def _keep(self, part: Tensor, weight: Tensor, recorded: bool) -> _Kept:
        sample = None
        if weight.is_cpu:
            if self._places.dtype is not torch.int64:
                self._places = self._sampled()
            sample = weight.detach().take(self._places)
        return _Kept(part, weakref.ref(weight), weight._version, weight.data_ptr(), recorded, sample)

    def _sampled(self) -> Tensor:
        """Places of live weights in the flat weight, over all live rows and columns."""
        rows, columns = (
            torch.arange(count) if live is None else live
            for count, live in zip(self.shape, (self.rows, self.columns), strict=True)
        )
        steps = torch.arange(_SAMPLED if len(rows) and len(columns) else 0)
        row, column = (x[steps * len(x) // _SAMPLED] for x in (rows, columns))
        return row * self.shape[1] + column


def _is_kept(weight: Tensor, recorded: bool) -> bool:
    """Whether a change of the weight would be seen, and the part is not that of a tracer."""
    watched = torch._C._len_torch_dispatch_stack() > 0
    return (weight.is_cpu or recorded) and weight.is_leaf and not weight.is_inference() and not watched


@transformable
def selected_linear(packed: Packed, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A call of it, under the operator's name."""
    return _live_linear.run(packed, x, weight, bias)
