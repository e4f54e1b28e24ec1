"""Which share of the units is gone after how many steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kdfast.ops import _checks

Rate = Callable[[int], float]  # of the steps that are done


def _check(name: str, final: float, begin: int, end: int) -> None:
    op = f"kdfast.prune.schedules.{name}"
    if not 0 < final < 1:
        _checks.wrong_value(op, "final", "a share between 0 and 1", final)
    if not 0 <= begin <= end:
        _checks.wrong_value(op, "begin", f"a step from 0 to the end, {end}", begin)


@dataclass(frozen=True)
class OneShot:
    """All at once, at step `at`; 0: before the first."""

    final: float
    at: int = 0

    def __post_init__(self) -> None:
        _check("OneShot", self.final, self.at, self.at)

    def __call__(self, step: int) -> float:
        return self.final if step >= self.at else 0.0


@dataclass(frozen=True)
class Iterative:
    """In `rounds` equal parts of the steps from begin to end: the same share goes at each, then the rest is trained (Han et
    al., 2015). The first part goes at `begin`, the last a part before `end`."""

    final: float
    end: int
    rounds: int
    begin: int = 0

    def __post_init__(self) -> None:
        _check("Iterative", self.final, self.begin, self.end)
        if not 1 <= self.rounds <= max(self.end - self.begin, 1):
            expected = f"1 to {self.end - self.begin}, the steps from begin to end"
            _checks.wrong_value("kdfast.prune.schedules.Iterative", "rounds", expected, self.rounds)

    def __call__(self, step: int) -> float:
        if step < self.begin:
            return 0.0
        part = (step - self.begin) * self.rounds // max(self.end - self.begin, 1)
        return self.final * min(part + 1, self.rounds) / self.rounds


@dataclass(frozen=True)
class Cubic:
    """Automated gradual pruning (Zhu & Gupta, 2017): s_t = s_f + (s_i − s_f)(1 − (t − begin) / (end − begin))³ from begin
    to end, s_i before and s_f after: fast at first, when there is much to spare, slowly in the end."""

    final: float
    end: int
    begin: int = 0
    initial: float = 0.0

    def __post_init__(self) -> None:
        _check("Cubic", self.final, self.begin, self.end)
        if not 0 <= self.initial <= self.final:
            _checks.wrong_value("kdfast.prune.schedules.Cubic", "initial", f"0 to {self.final}", self.initial)

    def __call__(self, step: int) -> float:
        if step < self.begin:
            return self.initial
        left = 1 - min((step - self.begin) / max(self.end - self.begin, 1), 1.0)
        return self.final + (self.initial - self.final) * left**3
