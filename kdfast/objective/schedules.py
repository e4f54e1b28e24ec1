"""Weights that change during training, as functions of the share of it that is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Weight = float | Callable[[float], float]  # a constant, or a schedule


@dataclass(frozen=True)
class LinearSchedule:
    """start + (end - start)·p, p from 0 to 1 over the training."""

    start: float
    end: float

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class ExponentialSchedule:
    """start·(end / start)^p: the same factor every step.

    Raises:
        ValueError: start or end is not positive.
    """

    start: float
    end: float

    def __post_init__(self) -> None:
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
        ValueError: stages that do not begin at 0, or begin outside [0, 1).
    """

    stages: Mapping[float, float]

    def __post_init__(self) -> None:
        if 0.0 not in self.stages or any(not 0 <= start < 1 for start in self.stages):
            raise ValueError(
                f"StageSchedule: stages: expected beginnings from 0.0 on, below 1, got {list(self.stages)}"
            )

    def __call__(self, progress: float) -> float:
        return self.stages[max(start for start in self.stages if start <= progress)]
