"""Which tokens of two tokenizers belong together, without a loop over rows or tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NO_BORDER = 2**62  # which a float has exactly, as F.pad takes it


class Places(NamedTuple):
    """Tokens [n] by their rows and their places there."""

    rows: Tensor
    tokens: Tensor


class Side(NamedTuple):
    """One side's tokens of spans: the first, or the last, of each [n]; all others [m], and which span each is of."""

    chosen: Places
    rest: Places
    span: Tensor

    @property
    def spans(self) -> int:
        """n."""
        return len(self.chosen.rows)


def pairs(own: Tensor, its: Tensor) -> tuple[Places, Places]:
    """Of the tokens that count, [B, L] and [B, L'] bool, the i-th of a row with the i-th of the same row of the other,
    as far as both go."""
    counts = torch.minimum(own.sum(-1), its.sum(-1))[:, None]
    return _places(own & (own.cumsum(-1) <= counts)), _places(its & (its.cumsum(-1) <= counts))


def spans(own: Tensor, own_ends: Tensor, its: Tensor, its_ends: Tensor, last: bool) -> tuple[Side, Side]:
    """The shortest pieces of text at whose ends both have a token's end. What is behind the last of a row is in none.

    Args:
        own, its: [B, L] and [B, L'] bool, which tokens count.
        own_ends, its_ends: [B, L] and [B, L'] int64, where in the text each token ends, in the order of the text. Tokens
            that end at 0 or before are of no text, and in no span.
        last: choose the last token of each span; else the first.
    """
    own, its = own & (own_ends > 0), its & (its_ends > 0)
    borders = _borders(torch.where(own, own_ends, 0), torch.where(its, its_ends, NO_BORDER))
    return _side(own, own_ends, borders, last), _side(its, its_ends, borders, last)


def _borders(own: Tensor, its: Tensor) -> Tensor:
    """[B, L]: ends that both have, sorted, some more than once; behind them `NO_BORDER`."""
    its = its.sort(-1).values
    at = torch.searchsorted(its, own).clamp(max=its.shape[-1] - 1)
    return torch.where((its.gather(-1, at) == own) & (own > 0), own, NO_BORDER).sort(-1).values


def _side(on: Tensor, ends: Tensor, borders: Tensor, last: bool) -> Side:
    # A span's number in its row is its border's: the first that is not before the token's end.
    border = torch.searchsorted(borders, ends.contiguous()).clamp(max=borders.shape[-1] - 1)
    inside = on & (borders.gather(-1, border) < NO_BORDER)
    before = torch.where(inside, border, -1).cummax(-1).values
    first = inside & (border > F.pad(before[:, :-1], (1, 0), value=-1))
    after = torch.where(inside, border, NO_BORDER).flip(-1).cummin(-1).values.flip(-1)
    chosen = inside & (border < F.pad(after[:, 1:], (0, 1), value=NO_BORDER)) if last else first
    rest = inside & ~chosen
    span = first.flatten().cumsum(0).view_as(border) - 1
    return Side(_places(chosen), _places(rest), span[rest])


def _places(on: Tensor) -> Places:
    return Places(*on.nonzero(as_tuple=True))
