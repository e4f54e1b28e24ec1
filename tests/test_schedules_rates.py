"""Rates of pruning over the steps, and lottery tickets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_models
import torch

from kdfast import prune
from kdfast.prune import criteria, schedules
from kdfast.prune.select import live_masks

KINDS: tuple[Any, ...] = ("heads", "neurons")


def l2(model: Any) -> list[prune.Scores]:
    return [criteria.score(model, "l2", of) for of in KINDS]


def counts(masks: prune.Masks) -> tuple[int, int]:
    return sum(int(x.sum()) for x in masks.heads), sum(int(x.sum()) for x in masks.neurons)


# ---- rates ----
def test_cubic() -> None:
    """SPEC's: after 0, 10, …, 100 %, then constant."""
    rate = schedules.Cubic(final=0.8, begin=50, end=150)
    expected = [0, 0.2168, 0.3904, 0.5256, 0.6272, 0.7, 0.7488, 0.7784, 0.7936, 0.7992, 0.8]
    assert [rate(50 + 10 * i) for i in range(11)] == pytest.approx(expected, abs=1e-12)
    assert rate(0) == rate(49) == 0
    assert rate(151) == rate(10_000) == 0.8
    assert schedules.Cubic(final=0.8, initial=0.2, end=10)(0) == pytest.approx(0.2)


def test_other_rates() -> None:
    shot = schedules.OneShot(0.5, at=3)
    assert [shot(step) for step in (0, 2, 3, 9)] == [0, 0, 0.5, 0.5]
    rounds = schedules.Iterative(0.6, begin=2, end=14, rounds=3)
    assert [rounds(step) for step in (0, 2, 5, 6, 9, 10, 14, 99)] == pytest.approx(
        [0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.6]
    )
    for make, message in [
        (lambda: schedules.OneShot(1.0), r"OneShot: final: expected a share between 0 and 1, got 1.0"),
        (lambda: schedules.Cubic(0.5, end=3, begin=4), r"Cubic: begin: expected a step from 0 to the end, 3, got 4"),
        (lambda: schedules.Cubic(0.5, end=3, initial=0.7), r"Cubic: initial: expected 0 to 0.5, got 0.7"),
        (lambda: schedules.Iterative(0.5, end=3, rounds=4), r"Iterative: rounds: expected 1 to 3, .*, got 4"),
    ]:
        with pytest.raises(ValueError, match=rf"^kdfast\.prune\.schedules\.{message}"):
            make()


# ---- lottery ----
def test_tickets() -> None:
    """Survivors of each round have the weights of the rewound step."""
    model = tiny_models.make("bert")
    rewind = copy.deepcopy(model.state_dict())
    rounds = []

    def train(given: Any) -> None:
        rounds.append(counts(live_masks(given)))
        optimizer = torch.optim.SGD(given.parameters(), lr=1e-2)
        given(**tiny_models.batch(given)).logits.square().sum().backward()
        optimizer.step()

    found = []
    for masks in schedules.tickets(model, train, l2, keep=0.25, rounds=2, rewind=rewind):
        found.append(counts(masks))
        assert live_masks(model) == masks
        assert all(torch.equal(x, rewind[n]) for n, x in model.state_dict().items())
    assert found == [(9, round(111 * 0.5)), (round(18 * 0.25), round(111 * 0.25))]
    assert rounds == [(18, 111), found[0]]
    for settings, message in [
        ({"keep": 1.0, "rounds": 2}, "tickets: keep: expected a share between 0 and 1, got 1.0"),
        ({"keep": 0.5, "rounds": 0}, "tickets: rounds: expected at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            next(iter(schedules.tickets(model, train, l2, rewind=rewind, **settings)))
