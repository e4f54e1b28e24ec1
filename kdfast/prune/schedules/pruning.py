"""Callbacks of `transformers.Trainer` that take units out of a model step by step."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from kdfast.models.inputs import unwrapped
from kdfast.ops import _checks
from kdfast.prune.apply import apply
from kdfast.prune.criteria.tracker import Tracker
from kdfast.prune.masks import Masks
from kdfast.prune.optimizer import forget
from kdfast.prune.schedules.rates import Rate
from kdfast.prune.scores import Kind, Scores
from kdfast.prune.select import Scope, live_masks, queues_of, to_count

ScoresOf = Callable[[Any], Scores | Sequence[Scores]]  # of the model


class Stateful(TrainerCallback, ExportableState):  # type: ignore[misc]
    """A callback whose numbers stand in `trainer_state.json` of every checkpoint, and are read where a training is
    resumed. One of each class in a trainer."""

    def numbers(self) -> dict[str, Any]:
        """What JSON holds."""
        raise NotImplementedError

    def resume(self, numbers: dict[str, Any], model: nn.Module) -> None:
        """Goes on from there."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": self.numbers()}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        kept = (state.stateful_callbacks or {}).get(type(self).__name__)
        if state.global_step and kept is not None:
            self.resume(kept["attributes"], unwrapped(model))


class Pruning(Stateful):
    """Takes units out of the model as a rate says, every `every` steps, by scores asked anew.

        rate = kdfast.prune.schedules.Cubic(final=0.5, end=2000)
        scores = lambda model: [kdfast.prune.criteria.score(model, "taylor", of, batches) for of in ("heads", "neurons")]
        trainer = kdfast.DistillationTrainer(..., callbacks=[kdfast.prune.schedules.Pruning(rate, scores, every=100)])
        trainer.train()
        smaller = kdfast.prune.compact(trainer.model, callback.masks)

    Before a step at which the rate is above what is gone, units of every kind are selected so that 1 − rate of them stay,
    masked by `kdfast.prune.apply`, and the optimizer's moments of what is dead become zero. Checkpoints hold the whole
    weights and, in `trainer_state.json`, the masks: a training that is resumed is the same bit for bit.

    Args:
        rate: the share that is gone after so many steps: `OneShot`, `Iterative`, `Cubic` or a function.
        scores: of the model; with several ranks, the same on all.
        every: steps between two looks at the rate.
        scope, multiple, allow_empty: as of `kdfast.prune.select`.
    """

    def __init__(
        self,
        rate: Rate,
        scores: ScoresOf,
        *,
        every: int = 1,
        scope: Scope = "global",
        multiple: int | Mapping[Kind, int] = 1,
        allow_empty: bool = False,
    ) -> None:
        if every < 1:
            _checks.wrong_value(f"kdfast.prune.schedules.{type(self).__name__}", "every", "at least 1", every)
        self.rate, self.scores, self.every = rate, scores, every
        self.scope, self.multiple, self.allow_empty = scope, multiple, allow_empty
        self.gone = 0.0
        self.masks: Masks | None = None

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        if state.global_step % self.every == 0:
            self.prune_to(self.rate(state.global_step), unwrapped(model), optimizer)

    def prune_to(self, share: float, model: Any, optimizer: Any) -> None:
        """Takes out units until this share is gone, if it is more than before."""
        if share <= self.gone:
            return
        masks = live_masks(model)
        self.take(model, masks, share)
        apply(model, masks)
        if optimizer is not None:
            forget(optimizer, model, masks)
        self.gone, self.masks = share, masks

    def take(self, model: Any, masks: Masks, share: float) -> None:
        """Lets as many units of the masks die as makes this share."""
        by_kind = queues_of(model, masks, self.scores(model), self.multiple, self.allow_empty, self.scope == "global")
        to_count(masks, by_kind, 1.0 - share, self.scope)

    def numbers(self) -> dict[str, Any]:
        return {"gone": self.gone, "masks": None if self.masks is None else self.masks.to_json()}

    def resume(self, numbers: dict[str, Any], model: nn.Module) -> None:
        self.gone = numbers["gone"]
        if numbers["masks"] is not None:
            self.masks = Masks.from_json(numbers["masks"])
            apply(model, self.masks)


class PlayAndPrune(Pruning):
    """A quality bound steers the rate (play and prune, Singh et al., 2019): after each evaluation a share more goes, the
    larger the further the quality is above the bound; at or below it nothing, and training mends what was taken.

    share += step · min(1, (quality − bound) / slack), up to `final`.

    Args:
        scores: as of `Pruning`.
        metric: a name in the evaluation's metrics, as "eval_accuracy"; the larger the better.
        bound: what quality must not fall to.
        final: the share that is gone at most. step: the share that goes at once at most. slack: so far above the bound a
            whole step goes.
        begin, until: steps before and after which nothing goes.
        scope, multiple, allow_empty: as of `kdfast.prune.select`.
    """

    def __init__(
        self,
        scores: ScoresOf,
        *,
        metric: str,
        bound: float,
        final: float,
        step: float = 0.1,
        slack: float = 0.01,
        begin: int = 0,
        until: int | None = None,
        scope: Scope = "global",
        multiple: int | Mapping[Kind, int] = 1,
        allow_empty: bool = False,
    ) -> None:
        super().__init__(lambda _: 0.0, scores, scope=scope, multiple=multiple, allow_empty=allow_empty)
        for name, value in (("final", final), ("step", step)):
            if not 0 < value < 1:
                _checks.wrong_value("kdfast.prune.schedules.PlayAndPrune", name, "a share between 0 and 1", value)
        if slack <= 0:
            _checks.wrong_value("kdfast.prune.schedules.PlayAndPrune", "slack", "a number above 0", slack)
        self.metric, self.bound, self.final, self.step, self.slack = metric, bound, final, step, slack
        self.begin, self.until = begin, until

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        metrics: Any = None,
        **_: Any,
    ) -> None:
        if self.metric not in metrics:
            known = ", ".join(sorted(metrics))
            _checks.wrong_value("kdfast.prune.schedules.PlayAndPrune", "metric", f"one of {known}", repr(self.metric))
        if state.global_step < self.begin or (self.until is not None and state.global_step > self.until):
            return
        above = min((metrics[self.metric] - self.bound) / self.slack, 1.0)
        if above > 0:
            self.prune_to(min(self.gone + self.step * above, self.final), unwrapped(model), optimizer)


class Tracking(Stateful):
    """A criterion that goes through the training: calls a tracker (`kdfast.prune.criteria.track`) around each step, keeps
    its state in checkpoints, and in the end folds gates into the weights, so that the model is saved as it was trained.

        tracker = kdfast.prune.criteria.track(model, "movement")
        scores = lambda model: [tracker.scores(of) for of in ("heads", "neurons")]
        callbacks = [Tracking(tracker), Pruning(Cubic(final=0.5, end=2000), scores, every=100)]
    """

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tracker.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.tracker.after_step(optimizer.param_groups[0]["lr"])

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tracker.fold()

    def numbers(self) -> dict[str, Any]:
        file = io.BytesIO()
        torch.save(self.tracker.state_dict(), file)
        return {"tracker": base64.b64encode(file.getvalue()).decode()}

    def resume(self, numbers: dict[str, Any], model: nn.Module) -> None:
        file = io.BytesIO(base64.b64decode(numbers["tracker"]))
        self.tracker.load_state_dict(torch.load(file, map_location=model.device, weights_only=True))  # type: ignore[arg-type]
