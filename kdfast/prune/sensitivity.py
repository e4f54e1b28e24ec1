"""Which layers bear pruning: the quality of a model of which one layer at a time is pruned (Li et al., 2017)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from kdfast.ops import _checks
from kdfast.prune.apply import apply, remove
from kdfast.prune.masks import Masks
from kdfast.prune.queues import drop, queues
from kdfast.prune.scores import Scores
from kdfast.prune.select import live_masks

__all__ = ["Sensitivity", "sensitivity"]

_OP = "kdfast.prune.sensitivity"


@dataclass(frozen=True)
class Sensitivity:
    """The quality of the whole model, and of the model without some units of one layer.

    whole: of the model as it was. shares: which share of the live units was gone, ascending. found: by kind of unit and
    name of the layer ("layers" has one entry by layer, at the share 1), the quality at each share.
    """

    whole: float
    shares: tuple[float, ...]
    found: dict[str, dict[str, tuple[float, ...]]]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        """What `to_json` wrote.

        Raises:
            ValueError: other text.
        """
        try:
            given = json.loads(text)
            found = {kind: {name: tuple(x) for name, x in of.items()} for kind, of in given["found"].items()}
            return cls(float(given["whole"]), tuple(given["shares"]), found)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            got = f"{type(error).__name__}: {error}"
            _checks.wrong_value("kdfast.prune.Sensitivity.from_json", "text", "what to_json writes", got)


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    scores: Scores | Sequence[Scores],
    quality: Callable[[Any], float],
    *,
    shares: Sequence[float] = (0.25, 0.5, 0.75),
) -> Sensitivity:
    """Takes from one layer after another the units of the lowest scores, and asks for the quality each time; then the
    model is as it was.

        found = kdfast.prune.sensitivity(model, scores, lambda model: accuracy(model, rows))
        kdfast.results.plots.plot_sensitivity(path, found, "accuracy")

    Args:
        model: of the scores, masked or not.
        scores: of heads, groups, neurons or layers; of "layers" each layer goes as a whole.
        quality: of the masked model, the larger the better.
        shares: of a layer's live units that go, above 0 and below 1: rounded to a number, of which one at least goes and
            one at least stays. Layers with a single unit are left out.

    Raises:
        TypeError, ValueError: scores as in `kdfast.prune.select`; no shares, or one out of range.
    """
    given = [scores] if isinstance(scores, Scores) else list(scores)
    for share in shares or (0.0,):
        if not 0 < share < 1:
            _checks.wrong_value(_OP, "shares", "some above 0 and below 1", list(shares))
    ordered, before = tuple(sorted(shares)), live_masks(model)
    masked = before != Masks.full(model)

    def without(queue: Any, count: int) -> float:
        masks = before.copy()
        drop(masks, queue, queue.units[:count])
        apply(model, masks)
        return float(quality(model))

    found: dict[str, dict[str, tuple[float, ...]]] = {}
    try:
        whole = float(quality(model))
        for each in given:
            names, of_kind = [*each.values], found.setdefault(each.of, {})
            for queue in queues(before, each, 1, False):
                if queue.kind == "layers":
                    for unit in sorted(queue.units.tolist()):
                        queue.units = torch.tensor([unit])
                        of_kind[names[unit]] = (without(queue, 1),)
                elif len(queue.units) > 1:
                    counts = [min(max(1, round(share * len(queue.units))), len(queue.units) - 1) for share in ordered]
                    of_kind[names[queue.layer]] = tuple(without(queue, count) for count in counts)
    finally:
        apply(model, before)
        if not masked:
            remove(model)
    return Sensitivity(whole, ordered, found)
