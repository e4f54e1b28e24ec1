"""Pruning that can be taken back until the end: soft filter pruning and dynamic network surgery.

A unit is off where the columns by which its output is read are zero. What it makes is still computed, so these columns have
gradients and may come back; zeroing what makes it too would leave it without any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.models.inputs import unwrapped
from kdfast.ops import _checks
from kdfast.prune.apply import apply
from kdfast.prune.geometry import output_columns
from kdfast.prune.layers import layers_of
from kdfast.prune.masks import Masks
from kdfast.prune.schedules.pruning import ScoresOf, Stateful
from kdfast.prune.scores import Kind, Scores
from kdfast.prune.select import Scope, live_masks, queues_of, to_count

_KINDS: tuple[Kind, ...] = ("heads", "neurons")


class SoftPruning(Stateful):
    """Soft filter pruning (He et al., 2018): after each epoch the output columns of the units of the lowest scores are set to
    zero, and trained on; after the last the model is masked, in `masks`. A checkpoint of an epoch's last step may have
    been written before: columns become zero when it is resumed.

    Args:
        scores: of the model, of heads, neurons or both; the authors' are "l2".
        keep: the share of each kind that stays.
        scope, multiple: as of `kdfast.prune.select`.
    """

    def __init__(
        self, scores: ScoresOf, *, keep: float, scope: Scope = "global", multiple: int | Mapping[Kind, int] = 1
    ) -> None:
        if not 0 < keep < 1:
            _checks.wrong_value("kdfast.prune.schedules.SoftPruning", "keep", "a share between 0 and 1", keep)
        self.scores, self.keep, self.scope, self.multiple = scores, keep, scope, multiple
        self.masks: Masks | None = None
        self.epochs = 0.0  # after which columns became zero

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._zero(model, state.epoch)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.epoch > self.epochs and state.epoch == int(state.epoch):
            self._zero(model, state.epoch)

    @torch.no_grad()
    def _zero(self, model: Any, epochs: float) -> None:
        self.epochs = epochs
        self.masks = live_masks(model)
        scores = self.scores(unwrapped(model))
        to_count(
            self.masks,
            queues_of(model, self.masks, scores, self.multiple, False, self.scope == "global"),
            self.keep,
            self.scope,
        )
        for columns, live in _columns(model, self.masks):
            columns[~live.to(columns.device)] = 0

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.masks is not None:
            apply(model, self.masks)

    def numbers(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "masks": None if self.masks is None else self.masks.to_json()}

    def resume(self, numbers: dict[str, Any], model: nn.Module) -> None:
        self.epochs = numbers["epochs"]
        self.masks = None if numbers["masks"] is None else Masks.from_json(numbers["masks"])


class Surgery(Stateful):
    """Dynamic network surgery (Guo et al., 2016), of units: forward and backward with those output columns W ∘ T, and the
    gradient goes to all of W.

    Before a step, with probability (1 + decay · step)⁻¹ and up to step `until`: T ← 0 for units with ‖W_i‖ < a, 1 with
    ‖W_i‖ ≥ b, others as they are, with a = 0.9 (μ + cσ), b = 1.1 (μ + cσ) of the norms of the layer; one unit of a
    layer stays. After the last step the model is masked, in `masks`. Checkpoints, and evaluations on the way, have the
    whole W.

    With `keep`, thresholds are at the norm that so many units of the layer are above, q, and the gap between them closes:
    a = (1 − 0.1 r) q, b = (1 + 0.1 r) q, r = 1 − step / until. Before step `until`, or after the last one, exactly that
    share of the units is selected by their norms, and stays.

    Args:
        of: "heads", "neurons" or both.
        c: the larger, the more goes: of normal norms 0 takes about half.
        keep: the share of each kind that stays, instead of what c makes.
        decay, until: of the probability. seed: of its chances.
        scope, multiple: as of `kdfast.prune.select`, of what `keep` selects.

    Raises:
        ValueError: other units, a share that is none; keep without until.
    """

    def __init__(
        self,
        of: tuple[Kind, ...] = _KINDS,
        *,
        c: float = 0.0,
        keep: float | None = None,
        decay: float = 1e-3,
        until: int | None = None,
        seed: int = 0,
        scope: Scope = "global",
        multiple: int | Mapping[Kind, int] = 1,
    ) -> None:
        op = "kdfast.prune.schedules.Surgery"
        if not {*of} <= {*_KINDS} or not of:
            _checks.wrong_value(op, "of", "heads, neurons or both", of)
        if keep is not None and not 0 < keep < 1:
            _checks.wrong_value(op, "keep", "a share between 0 and 1", keep)
        if keep is not None and (until is None or until < 1):
            _checks.wrong_value(op, "until", "a step from 1 on, beside keep", until)
        self.of, self.c, self.keep, self.decay, self.until, self.seed = of, c, keep, decay, until, seed
        self.scope, self.multiple = scope, multiple
        self.masks: Masks | None = None
        self._whole: list[tuple[Tensor, Tensor, Tensor]] = []  # columns, which are off, what they were

    @torch.no_grad()
    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.masks = live_masks(model) if self.masks is None else self.masks
        step = state.global_step
        chance = torch.Generator().manual_seed(self.seed + step)  # resumed, the same
        operates = float(torch.rand((), generator=chance)) < 1 / (1 + self.decay * step)
        if self.keep is not None and step == self.until:
            self._select(model, self.keep)
        elif operates and (self.until is None or step < self.until):
            self._operate(model, 0.1 if self.keep is None else 0.1 * (1 - step / self.until))  # type: ignore[operator]
        for columns, live in _columns(model, self.masks):
            off = (~live).nonzero().flatten().to(columns.device)
            self._whole.append((columns, off, columns[off]))
            columns[off] = 0

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for columns, off, were in self._whole:
            columns[off] = were
        self._whole = []

    @torch.no_grad()
    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.masks is None:
            return
        if self.keep is not None and state.global_step <= self.until:  # type: ignore[operator]
            self._select(model, self.keep)
        apply(model, self.masks)

    def _norms(self, model: nn.Module, kind: Kind) -> dict[str, Tensor]:
        """Of each unit's output columns, by layer."""
        return {
            layer.name: output_columns(layer, kind).flatten(1).float().norm(dim=1).cpu() for layer in layers_of(model)
        }

    def _operate(self, model: nn.Module, gap: float) -> None:
        assert self.masks is not None
        for kind in self.of:
            masks = self.masks.heads if kind == "heads" else self.masks.neurons
            for norms, live in zip(self._norms(model, kind).values(), masks, strict=True):
                if len(live) < 2:
                    continue
                middle = norms.mean() + self.c * norms.std() if self.keep is None else norms.quantile(1 - self.keep)
                live[norms < (1 - gap) * middle] = False
                live[norms >= (1 + gap) * middle] = True
                live[norms.argmax()] = True

    def _select(self, model: nn.Module, keep: float) -> None:
        self.masks = live_masks(model)
        scores = [Scores(kind, self._norms(model, kind)) for kind in self.of]
        by_kind = queues_of(model, self.masks, scores, self.multiple, False, self.scope == "global")
        to_count(self.masks, by_kind, keep, self.scope)

    def numbers(self) -> dict[str, Any]:
        return {"masks": None if self.masks is None else self.masks.to_json()}

    def resume(self, numbers: dict[str, Any], model: nn.Module) -> None:
        self.masks = None if numbers["masks"] is None else Masks.from_json(numbers["masks"])


def _columns(model: nn.Module, masks: Masks) -> list[tuple[Tensor, Tensor]]:
    """The output columns of all heads and neurons, and which of these live."""
    return [
        (output_columns(layer, kind), live[i])
        for i, layer in enumerate(layers_of(model))
        for kind, live in zip(_KINDS, (masks.heads, masks.neurons), strict=True)
        if len(live[i])
    ]
