"""The quality of logits by the labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdfast.data.glue import GLUE
from kdfast.data.labels import mismatch

METRICS = {"classification": "accuracy", "multi_label": "micro_f1", "regression": "pearson"}


def metrics(metric: str, logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The quality of logits [N, C] (regression: [N] or [N, 1]) by the labels [N] (multi-label: [N, C] of 0 and 1).

    Args:
        metric: of a `Task`. "accuracy"; "f1", of class 1, with accuracy; "matthews", over all classes, with accuracy;
            "pearson" with spearman (equal values share the mean of their ranks); "micro_f1", of all rows' classes taken
            together, with exact_match, the fraction of rows with all classes right;
            a class counts where its logit is > 0.

    Returns:
        The number that was asked for, then its companion. 0 where a quotient is 0/0.

    Raises:
        TaskError: a metric that is not known.
    """
    logits = logits.detach()
    if metric == "pearson":
        values = (logits.flatten().double(), labels.flatten().double())
        return {"pearson": _correlation(*values), "spearman": _correlation(*map(_ranks, values))}
    if metric == "micro_f1":
        predicted, right = logits > 0, labels > 0.5
        return {"micro_f1": _f1(predicted, right), "exact_match": (predicted == right).all(-1).double().mean().item()}
    predicted = logits.argmax(-1)
    accuracy = {"accuracy": (predicted == labels).double().mean().item()}
    if metric == "f1":
        return {"f1": _f1(predicted == 1, labels == 1), **accuracy}
    if metric == "matthews":
        return {"matthews": _matthews(predicted, labels, logits.shape[-1]), **accuracy}
    if metric != "accuracy":
        raise mismatch("metric", f"one of {', '.join(sorted({*GLUE.values(), *METRICS.values()}))}", repr(metric))
    return accuracy


def _f1(predicted: Tensor, right: Tensor) -> float:
    """2·TP / (2·TP + FP + FN)."""
    positives = int(predicted.sum() + right.sum())
    return 2 * int((predicted & right).sum()) / positives if positives else 0.0


def _matthews(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """Correlation of the one-hot predictions and labels, which for two classes is Matthews' (Gorodkin 2004)."""
    x, y = (torch.nn.functional.one_hot(ids.long(), classes).double() for ids in (predicted, labels))
    return _correlation(x, y)


def _correlation(x: Tensor, y: Tensor) -> float:
    """Σ(x - x̄)(y - ȳ) / √(Σ(x - x̄)²·Σ(y - ȳ)²) of [N], or of [N, C] with the means [C] of the columns."""
    x, y = x - x.mean(0), y - y.mean(0)
    scale = math.sqrt(float(x.square().sum() * y.square().sum()))
    return float((x * y).sum()) / scale if scale else 0.0


def _ranks(values: Tensor) -> Tensor:
    """Ranks [N] from 1; equal values share the mean of theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    means: Tensor = counts.cumsum(0) - (counts - 1).double() / 2
    return means[inverse]
