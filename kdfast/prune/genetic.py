"""A genetic search over how many heads and neurons each layer keeps, at a given cost."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from kdfast.ops import _checks
from kdfast.prune.apply import apply
from kdfast.prune.costs import Costs
from kdfast.prune.masks import Masks
from kdfast.prune.queues import Queue
from kdfast.prune.scores import Kind, Scores
from kdfast.prune.select import live_masks, queues_of, within

__all__ = ["genetic_search"]

_OP = "kdfast.prune.genetic_search"
_MUTATED = 0.2  # of a child's numbers
Genome = tuple[int, ...]  # how many steps each queue has gone


def genetic_search(
    model: nn.Module,
    scores: Scores | Sequence[Scores],
    quality: Callable[[nn.Module], float],
    *,
    target: float,
    cost: Costs,
    multiple: int | Mapping[Kind, int] = 1,
    generations: int = 20,
    population: int = 12,
    seed: int = 0,
) -> Masks:
    """Masks with the best quality found at a cost. Scores say which units of a layer go; how many of each layer is what is
    searched for (as of He et al., 2018, by rewards, and others by evolution).

        masks = kdfast.prune.genetic_search(
            model, [heads, neurons], lambda model: -model(**held_out).loss.item(), target=0.5, cost=table
        )

    The first generation is what `kdfast.prune.select` takes at this target, and variants of it. Then the better half has
    children: each layer's number is one parent's or the other's, some change by a few steps, and steps at random bring the
    cost below the target again, as near to it as one step allows. The best of all generations is the result; no
    candidate is asked twice.

    Args:
        model: of transformers; masked with each candidate in turn, in the end as it came.
        scores: of heads, groups, neurons or layers.
        quality: of the model with a candidate's masks: the larger the better. Put it in evaluation mode without gradients
            where it needs that.
        target, cost, multiple: as of `kdfast.prune.select`.
        generations, population: their product is the number of candidates at most.

    Raises:
        TypeError, ValueError: as `kdfast.prune.select`; fewer than 2 candidates in a population, no generations.
    """
    if population < 2 or generations < 1:
        name, got = ("population", population) if population < 2 else ("generations", generations)
        _checks.wrong_value(_OP, name, "at least 2" if population < 2 else "at least 1", got)
    search = _Search(model, scores, quality, target, cost, multiple, random.Random(seed))
    try:
        return search.run(generations, population)
    finally:
        apply(model, search.before)


class _Search:
    def __init__(
        self,
        model: nn.Module,
        scores: Scores | Sequence[Scores],
        quality: Callable[[nn.Module], float],
        target: float,
        cost: Costs,
        multiple: int | Mapping[Kind, int],
        chance: random.Random,
    ) -> None:
        self.model, self.quality, self.cost, self.chance = model, quality, cost, chance
        self.before = live_masks(model)
        by_kind = queues_of(model, self.before, scores, multiple, allow_empty=False, normalised=True)
        within(self.before.copy(), by_kind, target, cost)
        self.queues = [queue for each in by_kind for queue in each]
        self.first: Genome = tuple(queue.taken for queue in self.queues)
        self.limit = target * cost.of(Masks.full(model))
        self.known: dict[Genome, float] = {}

    def run(self, generations: int, population: int) -> Masks:
        living = [self.first] + [self.repaired(self.mutated(self.first)) for _ in range(population - 1)]
        for _ in range(generations):
            living = sorted(living, key=self.fitness, reverse=True)[: max(2, population // 2)]
            living += [self.repaired(self.mutated(self.crossed(living))) for _ in range(population - len(living))]
        return self.masks(max(living, key=self.fitness))

    def masks(self, genome: Genome) -> Masks:
        masks = self.before.copy()
        for queue, taken in zip(self.queues, genome, strict=True):
            queue.gone = queue.taken = 0
            for _ in range(taken):
                queue.take(masks)
        return masks

    def fitness(self, genome: Genome) -> float:
        if genome not in self.known:
            apply(self.model, self.masks(genome))
            self.known[genome] = self.quality(self.model)
        return self.known[genome]

    def crossed(self, parents: Sequence[Genome]) -> Genome:
        return tuple(self.chance.choice(pair) for pair in zip(*self.chance.sample(parents, 2), strict=True))

    def mutated(self, genome: Genome) -> Genome:
        def other(taken: int, queue: Queue) -> int:
            far = max(1, len(queue.steps) // 4)
            return min(max(taken + self.chance.randint(-far, far), 0), len(queue.steps))

        pairs = zip(genome, self.queues, strict=True)
        return tuple(other(n, queue) if self.chance.random() < _MUTATED else n for n, queue in pairs)

    def repaired(self, genome: Genome) -> Genome:
        """Below the limit, and above it were any queue that is drawn one step back."""
        taken = [*genome]
        while self.of(taken) > self.limit:
            taken[self.chance.choice([i for i, q in enumerate(self.queues) if taken[i] < len(q.steps)])] += 1
        for i in self.chance.sample(range(len(taken)), len(taken)):
            while taken[i] and self.of([n - (i == j) for j, n in enumerate(taken)]) <= self.limit:
                taken[i] -= 1
        return tuple(taken)

    def of(self, taken: Sequence[int]) -> Any:
        return self.cost.of(self.masks(tuple(taken)))
