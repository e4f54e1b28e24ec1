"""Structured pruning: masks of heads, neurons and layers, models that compute only what lives, smaller models of them.
May import `ops`, `nn`, `data`, `models`."""

import importlib
from typing import Any

from kdfast.prune.apply import apply, remove
from kdfast.prune.blocks import keep_blocks
from kdfast.prune.compact import compact
from kdfast.prune.costs import Costs, Flops, Parameters
from kdfast.prune.genetic import genetic_search
from kdfast.prune.importance import Importance, importance
from kdfast.prune.latency import LatencyTable, latency_table
from kdfast.prune.layers import Adapter, register
from kdfast.prune.masks import Masks
from kdfast.prune.report import Cost, Report, advice, report
from kdfast.prune.rewire import rewire
from kdfast.prune.scores import Scores
from kdfast.prune.select import select, select_blocks
from kdfast.prune.sensitivity import Sensitivity, sensitivity

__all__ = [
    "Adapter",
    "Cost",
    "Costs",
    "Flops",
    "Importance",
    "LatencyTable",
    "Masks",
    "Parameters",
    "Report",
    "Scores",
    "Sensitivity",
    "advice",
    "apply",
    "compact",
    "genetic_search",
    "importance",
    "keep_blocks",
    "latency_table",
    "register",
    "remove",
    "report",
    "rewire",
    "select",
    "select_blocks",
    "sensitivity",
]

_ROOMS = ("criteria", "schedules")  # over this one, which they import


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"kdfast.prune.{name}")
    raise AttributeError(f"module 'kdfast.prune' has no attribute '{name}'")
