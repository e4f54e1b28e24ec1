"""Pruning to what a model may cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdfast.prune.costs import Costs
from kdfast.prune.masks import Masks
from kdfast.prune.schedules.pruning import Pruning, ScoresOf
from kdfast.prune.schedules.rates import Rate
from kdfast.prune.scores import Kind
from kdfast.prune.select import queues_of, within


class CostPruning(Pruning):
    """`Pruning` whose rate is the share that is gone of what the whole model costs: parameters, operations, measured
    milliseconds (`kdfast.prune.Costs`). Units go by their score for what they cost, those of all kinds together.

        cost = kdfast.prune.latency_table(model, batch)
        CostPruning(kdfast.prune.schedules.Cubic(final=0.5, end=2000), scores, cost, every=100)
    """

    def __init__(
        self,
        rate: Rate,
        scores: ScoresOf,
        cost: Costs,
        *,
        every: int = 1,
        multiple: int | Mapping[Kind, int] = 1,
        allow_empty: bool = False,
    ) -> None:
        super().__init__(rate, scores, every=every, multiple=multiple, allow_empty=allow_empty)
        self.cost = cost

    def take(self, model: Any, masks: Masks, share: float) -> None:
        by_kind = queues_of(model, masks, self.scores(model), self.multiple, self.allow_empty, True)
        within(masks, by_kind, 1.0 - share, self.cost)
