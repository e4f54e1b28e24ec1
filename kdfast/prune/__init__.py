"""Structured pruning: masks of heads, neurons and layers, models that compute only what lives, smaller models of them.
May import `ops`, `nn`, `data`, `models`."""

from kdfast.prune.apply import apply, remove
from kdfast.prune.compact import compact
from kdfast.prune.layers import Adapter, register
from kdfast.prune.masks import Masks

__all__ = ["Adapter", "Masks", "apply", "compact", "register", "remove"]
