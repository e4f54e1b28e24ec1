"""Pruning while a model is trained: rates over steps, and callbacks of `transformers.Trainer` beside any objective. May
import `ops`, `models`, `prune`, `prune/criteria`."""

from kdfast.prune.schedules.costs import CostPruning
from kdfast.prune.schedules.lottery import tickets
from kdfast.prune.schedules.pruning import PlayAndPrune, Pruning, Tracking
from kdfast.prune.schedules.rates import Cubic, Iterative, OneShot
from kdfast.prune.schedules.soft import SoftPruning, Surgery

__all__ = [
    "CostPruning",
    "Cubic",
    "Iterative",
    "OneShot",
    "PlayAndPrune",
    "Pruning",
    "SoftPruning",
    "Surgery",
    "Tracking",
    "tickets",
]
