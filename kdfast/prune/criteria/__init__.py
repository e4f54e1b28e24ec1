"""Which units of a model matter: the criteria of the literature, each a few lines over the same streams of weights,
activations and values times gradients. May import `ops`, `models`, `prune`.

    scores = kdfast.prune.criteria.score(model, "taylor", "neurons", batches)
    masks = kdfast.prune.select(model, scores, keep=0.5)
"""

from kdfast.prune.criteria import activations, collaborative, gates, gradients, penalties, reconstruction, weights
from kdfast.prune.criteria.clustering import merge_clusters
from kdfast.prune.criteria.compensation import compensate
from kdfast.prune.criteria.registry import CRITERIA, Criterion, criterion, known, score, track
from kdfast.prune.criteria.streams import Streams
from kdfast.prune.criteria.tracker import Tracker

__all__ = [
    "CRITERIA",
    "Criterion",
    "Streams",
    "Tracker",
    "activations",
    "collaborative",
    "compensate",
    "criterion",
    "gates",
    "gradients",
    "known",
    "merge_clusters",
    "penalties",
    "reconstruction",
    "score",
    "track",
    "weights",
]
