"""Weights that change during training, as functions of the share of it that is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

Weight = float | Callable[[float], float]  # a constant, or a schedule
NOT_NEGATIVE = "a number that is not negative"


def check_weight(who: str, argument: str, weight: Any, expected: str = NOT_NEGATIVE) -> None:
    message = f"{who}: {argument}: expected {expected}, got {weight!r}"
    if isinstance(weight, bool) or not isinstance(weight, Real):
        raise TypeError(message)
    if not 0 <= weight < float("inf"):  # type: ignore[operator]
        raise ValueError(message)


@dataclass(frozen=True)
class LinearSchedule:
    """start + (end - start)·p, p from 0 to 1 over the training.

    Raises:
        TypeError, ValueError: start or end is no number, or negative.
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        check_weight("LinearSchedule", "start", self.start)
        check_weight("LinearSchedule", "end", self.end)

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class ExponentialSchedule:
    """start·(end / start)^p: the same factor every step.

    Raises:
        TypeError, ValueError: start or end is no number, or not positive.
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        check_weight("ExponentialSchedule", "start", self.start)
        check_weight("ExponentialSchedule", "end", self.end)
        if not (self.start > 0 and self.end > 0):
            raise ValueError(
                f"ExponentialSchedule: start, end: expected positive numbers, got {self.start}, {self.end}"
            )

    def __call__(self, progress: float) -> float:
        return float(self.start * (self.end / self.start) ** progress)


@dataclass(frozen=True)
class StageSchedule:
    """A weight per stage: `{0.0: 1.0, 0.6: 0.0}` is 1 for the first 60 % of the training, then 0.

    Raises:
        TypeError, ValueError: stages that do not begin at 0, or begin outside [0,
            1); a weight that is no number, or negative.
    """

    stages: Mapping[float, float]

    def __post_init__(self) -> None:
        if not isinstance(self.stages, Mapping):
            expected = "a dict of beginnings to weights, such as {0.0: 1.0, 0.6: 0.0}"
            raise TypeError(f"StageSchedule: stages: expected {expected}, got {self.stages!r}")
        for weight in self.stages.values():
            check_weight("StageSchedule", "stages", weight)
        numbers = all(isinstance(start, Real) for start in self.stages)
        if not numbers or 0.0 not in self.stages or any(not 0 <= start < 1 for start in self.stages):
            raise ValueError(
                f"StageSchedule: stages: expected beginnings from 0.0 on, below 1, got {list(self.stages)}"
            )

    def __call__(self, progress: float) -> float:
        return self.stages[max(start for start in self.stages if start <= progress)]
