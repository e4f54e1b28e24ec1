"""Lottery tickets: training, pruning and going back, in rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from kdfast.models.inputs import unwrapped
from kdfast.ops import _checks
from kdfast.prune.apply import apply
from kdfast.prune.masks import Masks
from kdfast.prune.schedules.pruning import ScoresOf
from kdfast.prune.select import Scope, select


def tickets(
    model: nn.Module,
    train: Callable[[Any], object],
    scores: ScoresOf,
    *,
    keep: float,
    rounds: int,
    rewind: Mapping[str, Tensor],
    scope: Scope = "global",
) -> Iterator[Masks]:
    """The masks of each round of the lottery ticket hypothesis (Frankle & Carbin, 2019; rewound to step k, Frankle et al.,
    2020): train, take keep^(1/rounds) of the survivors by their scores, and give these the weights that they had.

        rewind = copy.deepcopy(model.state_dict())      # at the start, or after k steps
        scores = lambda model: kdfast.prune.criteria.score(model, "magnitude", "neurons")
        for masks in kdfast.prune.schedules.tickets(model, train, scores, keep=0.2, rounds=5, rewind=rewind):
            print(masks)
        train(model)                                    # the last ticket

    After each round the model has the weights of `rewind` and is masked.

    Args:
        train: trains the model in place, with a new optimizer each time.
        keep: the share of each kind that is left in the end.
        rewind: the model's state_dict of another time, in tensors of its own.

    Raises:
        ValueError: keep that is not between 0 and 1, no rounds; scores as of `kdfast.prune.select`.
    """
    op = "kdfast.prune.schedules.tickets"
    if not 0 < keep < 1:
        _checks.wrong_value(op, "keep", "a share between 0 and 1", keep)
    if rounds < 1:
        _checks.wrong_value(op, "rounds", "at least 1", rounds)
    for number in range(1, rounds + 1):
        train(model)
        masks = select(model, scores(model), keep=keep ** (number / rounds), scope=scope)
        unwrapped(model).load_state_dict(rewind)
        apply(model, masks)
        yield masks
