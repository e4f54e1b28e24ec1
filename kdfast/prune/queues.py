"""Units in the order that they go, layer by layer: what selection takes from until it has enough."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast.prune.masks import Masks
from kdfast.prune.scores import Kind, Scores


@dataclass
class Queue:
    """Live units of one layer, or of "layers" of the model, in the order that they go.

    of: how many units there were, dead ones too. units: their numbers; scores: theirs, ascending. steps: how many go
    together, one after the other; what these leave must stay.
    """

    kind: Kind
    layer: int
    of: int
    units: Tensor
    scores: Tensor
    steps: list[int]
    gone: int = 0
    taken: int = 0

    @property
    def more(self) -> bool:
        return self.taken < len(self.steps)

    @property
    def next(self) -> Tensor:
        """The units that go next."""
        return self.units[self.gone : self.gone + self.steps[self.taken]]

    @property
    def score(self) -> float:
        """The mean of theirs."""
        return float(self.scores[self.gone : self.gone + self.steps[self.taken]].mean())

    @property
    def least(self) -> int:
        """How many must stay."""
        return len(self.units) - sum(self.steps)

    def take(self, masks: Masks) -> None:
        """The next units go."""
        drop(masks, self, self.next)
        self.gone, self.taken = self.gone + len(self.next), self.taken + 1


def drop(masks: Masks, queue: Queue, units: Tensor) -> None:
    """These units live no more."""
    if queue.kind == "layers":
        masks.layers[units] = False
    elif queue.kind == "groups":
        for group in units.tolist():
            masks.drop_group(queue.layer, group)
    else:
        (masks.heads if queue.kind == "heads" else masks.neurons)[queue.layer][units] = False


def living(masks: Masks, kind: Kind, layer: int) -> Tensor:
    """Which units live, of "layers" whatever `layer` is."""
    if kind == "layers":
        return masks.layers
    mask = masks.neurons[layer] if kind == "neurons" else masks.heads[layer]
    if kind == "groups":
        groups = masks.groups[layer]
        count = int(groups.max()) + 1 if len(groups) else 0
        mask = torch.zeros(count, dtype=torch.int64).index_add_(0, groups, mask.long()) > 0
    return mask & masks.layers[layer]


def queues(masks: Masks, scores: Scores, multiple: int, allow_empty: bool) -> Iterator[Queue]:
    """One for each layer; of "layers" one, of which one unit stays."""
    values = [x.cpu() for x in scores.values.values()]
    if scores.of == "layers":
        values, multiple, allow_empty = [torch.cat(values)], 1, False
    for i, found in enumerate(values):
        units = (living(masks, scores.of, i) & (found > -torch.inf)).nonzero().flatten()
        units = units[found[units].argsort(stable=True)]
        steps = _steps(len(units), multiple, allow_empty)
        yield Queue(scores.of, i, len(found), units, found[units], steps)


def _steps(count: int, multiple: int, allow_empty: bool) -> list[int]:
    """Sizes of steps after each of which a multiple is left."""
    first = count % multiple
    steps = ([first] if first else []) + [multiple] * (count // multiple)
    return steps if allow_empty else steps[:-1]
