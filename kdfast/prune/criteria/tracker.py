"""What criteria that go through a training share: the calls around an optimizer's step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kdfast.prune.criteria.results import scores_of
from kdfast.prune.criteria.streams import Streams
from kdfast.prune.scores import Kind, Scores


class Tracker:
    """Begun by `kdfast.prune.criteria.track`. Its numbers are by kind of unit, then by layer.

    `before_step` is called when gradients are there, `after_step` when the optimizer has made its step and they still
    are; `scores` says what was found so far, and `close` takes from the model what was put on it. `state_dict` and
    `load_state_dict` continue a training.
    """

    def __init__(self, model: nn.Module, of: Sequence[Kind], block: tuple[int, int] = (32, 32)) -> None:
        self.streams = {kind: Streams(model, kind, block=block, op="kdfast.prune.criteria.track") for kind in of}

    def before_step(self) -> None:
        """Between the backward and the optimizer's step."""

    def after_step(self, learning_rate: float) -> None:
        """After the optimizer's step."""

    def values(self, of: Kind) -> list[Tensor]:
        """[units] of every layer; the larger matters more."""
        raise NotImplementedError

    def scores(self, of: Kind) -> Scores:
        """The scores so far."""
        return scores_of(self.streams[of], of, self.values(of))

    def state_dict(self) -> dict[str, Any]:
        """What it knows beyond the model's weights."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""

    def fold(self) -> None:
        """The end: what was put on the model goes into its weights, with which it computes what it did."""
        self.close()

    def close(self) -> None:
        """The model without what was put on it."""
