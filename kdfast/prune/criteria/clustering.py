"""Neurons that answer alike, merged: one of each cluster is kept, with the output weights of all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdfast.models.inputs import unwrapped
from kdfast.ops import _checks
from kdfast.prune.criteria.extras import scikit_learn
from kdfast.prune.geometry import views
from kdfast.prune.layers import Layer, layers_of
from kdfast.prune.masks import Masks
from kdfast.prune.rewire import linear_maps

_OP = "kdfast.prune.criteria.merge_clusters"


@torch.no_grad()
def merge_clusters(model: nn.Module, keep: float, *, seed: int = 0) -> Masks:
    """Spectral clustering of every layer's neurons by what they read; one of each cluster, the nearest to its mean, is
    kept, and its output weights become the cluster's sum, in place (after the subspace clustering of Wang et al., 2018).

        masks = kdfast.prune.criteria.merge_clusters(model, keep=0.5)
        smaller = kdfast.prune.compact(model, masks)

    The affinity of two neurons is max(0, cos) of their weights and biases of the maps that expand, of which copies of
    one neuron have 1: merging these changes nothing, merging others is what training has to mend. By scikit-learn.

    Args:
        model: of transformers, without masks; its output weights of neurons change.
        keep: the share of neurons that is kept, round(keep · neurons) of every layer, at least one.
        seed: of the clustering.

    Returns:
        Masks in which only those neurons live.

    Raises:
        TypeError, ValueError: a model as in `score`; keep that is not between 0 and 1, or merges nothing.
        ImportError: no scikit-learn.
    """
    if not 0 < keep < 1:
        _checks.wrong_value(_OP, "keep", "a number between 0 and 1", keep)
    masks, layers = Masks.full(model), layers_of(unwrapped(model), _OP)
    for layer in layers:
        linear_maps(_OP, layer)  # which refuses before anything changes
    clustering = scikit_learn("sklearn.cluster").SpectralClustering
    counts = [max(1, round(keep * layer.neurons)) for layer in layers]
    if all(count >= layer.neurons for count, layer in zip(counts, layers, strict=True)):
        _checks.wrong_value(_OP, "keep", "fewer neurons than there are", keep)
    for i, (layer, count) in enumerate(zip(layers, counts, strict=True)):
        if count < layer.neurons:
            affinity = _affinity(layer)
            found = clustering(count, affinity="precomputed", random_state=seed, assign_labels="cluster_qr")
            labels = torch.as_tensor(found.fit_predict(affinity.cpu().numpy())).long()
            masks.neurons[i] = _merge(layer, labels, affinity.cpu())
    return masks


def _affinity(layer: Layer) -> Tensor:
    """max(0, cos), [neurons, neurons], of what they read."""
    expanding = torch.cat([view.flatten(1) for view in views(layer, "neurons")[:-1]], 1).double()
    directions = nn.functional.normalize(expanding, dim=1)
    return (directions @ directions.mT).clamp(0, 1)


def _merge(layer: Layer, labels: Tensor, affinity: Tensor) -> Tensor:
    """Sums the output weights of each cluster into its representative; returns which neurons these are."""
    columns = views(layer, "neurons")[-1]
    same = labels[:, None] == labels
    nearness = (affinity * same).sum(1)  # to the cluster's mean, of unit vectors
    kept = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        its = (labels == label).nonzero().flatten()
        best = its[nearness[its].argmax()]
        columns[best] = columns[its.to(columns.device)].sum(0)
        kept[best] = True
    return kept
