"""Structured pruning: masks of heads, neurons and layers, models that compute only what lives, smaller models of them.
May import `ops`, `nn`, `data`, `models`."""

from kdfast.prune.importance import Importance, importance
from kdfast.prune.rewire import rewire

__all__ = ["Importance", "importance", "rewire"]
