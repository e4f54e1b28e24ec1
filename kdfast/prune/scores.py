"""What a criterion says of a model's units: a number of each, of which the larger matters more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

__all__ = ["KINDS", "Kind", "Scores"]

Kind = Literal["heads", "groups", "neurons", "layers", "blocks"]
KINDS: tuple[Kind, ...] = ("heads", "groups", "neurons", "layers", "blocks")


@dataclass(frozen=True, eq=False)
class Scores:
    """Numbers of which the larger matters more; -inf of what is dead already.

    of: what they are of: "heads", "groups" (of keys and values, with all heads that read them), "neurons", "layers", or
    "blocks" of weights. values: by the name of the layer, [units], of "layers" [1]; of "blocks" by the name of the
    linear map, [out / block[0], in / block[1]]. In float32, or float64 for such a model.
    """

    of: Kind
    values: dict[str, Tensor]
    block: tuple[int, int] | None = None

    def __len__(self) -> int:
        """How many units."""
        return sum(x.numel() for x in self.values.values())

    def normalised(self) -> Scores:
        """The scores of every layer divided by their L2 norm, for layers to be compared (Molchanov et al., 2017); those
        of "layers" by the norm of all."""
        if self.of == "layers":
            norm = _norm(torch.cat(list(self.values.values())))
            return replace(self, values={name: x / norm for name, x in self.values.items()})
        return replace(self, values={name: x / _norm(x) for name, x in self.values.items()})


def _norm(x: Tensor) -> Tensor:
    norm = torch.where(x.isfinite(), x, 0).norm()
    return torch.where(norm > 0, norm, 1)
