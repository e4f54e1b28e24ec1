"""The sweep over single layers: each point is the quality of the model with just that masked, and the model stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from kdfast import prune
from kdfast.prune import criteria
from kdfast.prune.select import live_masks
from kdfast.results.plots import plot_sensitivity


def quality_of(model: Any) -> Any:
    """Something that every unit changes."""
    batch = tiny_models.batch(model)

    def quality(of: Any) -> float:
        with torch.no_grad():
            return -float(of(**batch).logits.double().square().sum())

    return quality


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_points(name: str) -> None:
    model = tiny_models.make(name)
    quality = quality_of(model)
    scores = [criteria.score(model, "l2", of) for of in ("heads", "neurons", "layers")]
    whole = quality(model)
    found = prune.sensitivity(model, scores, quality, shares=(0.75, 0.25))
    assert (found.whole, found.shares) == (whole, (0.25, 0.75))
    assert quality(model) == whole
    assert {*found.found} == {"heads", "neurons", "layers"}
    for kind, each in zip(("heads", "neurons"), scores, strict=False):
        for i, (layer, points) in enumerate(found.found[kind].items()):
            for share, point in zip(found.shares, points, strict=True):
                masks = prune.Masks.full(model)
                live = (masks.heads if kind == "heads" else masks.neurons)[i]
                count = min(max(1, round(share * len(live))), len(live) - 1)
                live[each.values[layer].argsort(stable=True)[:count]] = False
                prune.apply(model, masks)
                assert point == quality(model) != whole
                prune.remove(model)
    for i, (point,) in enumerate(found.found["layers"].values()):
        masks = prune.Masks.full(model)
        masks.layers[i] = False
        prune.apply(model, masks)
        assert point == quality(model)
        prune.remove(model)
    assert prune.Sensitivity.from_json(found.to_json()) == found


def test_masks_stay() -> None:
    model = tiny_models.make("bert")
    masks = prune.Masks.full(model)
    masks.neurons[0][:5] = False
    prune.apply(model, masks)
    quality = quality_of(model)
    found = prune.sensitivity(model, criteria.score(model, "l2", "neurons"), quality)
    assert live_masks(model) == masks
    assert quality(model) == found.whole


def test_plot(tmp_path: Path) -> None:
    model = tiny_models.make("bert")
    scores = [criteria.score(model, "l2", of) for of in ("heads", "layers")]
    plot_sensitivity(tmp_path / "plot.png", prune.sensitivity(model, scores, quality_of(model)), "quality")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_refused() -> None:
    model = tiny_models.make("bert")
    scores = criteria.score(model, "l2", "heads")
    for shares in ((), (0.5, 1.0), (0.0,)):
        with pytest.raises(
            ValueError, match=r"kdfast.prune.sensitivity: shares: expected some above 0 and below 1, got"
        ):
            prune.sensitivity(model, scores, quality_of(model), shares=shares)
    with pytest.raises(
        ValueError, match=r"kdfast.prune.Sensitivity.from_json: text: expected what to_json writes, got"
    ):
        prune.Sensitivity.from_json("{}")
