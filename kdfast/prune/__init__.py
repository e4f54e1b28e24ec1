"""Structured pruning: masks of heads, neurons and layers, models that compute only what lives, smaller models of them.
May import `ops`, `nn`, `data`, `models`."""

from kdfast.prune.report import Cost, Report, advice, report

__all__ = ["Cost", "Report", "advice", "report"]
