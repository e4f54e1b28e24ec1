"""The table of criteria, and how one is asked: `score`, or `track` where a criterion goes through a training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from kdfast.ops import _checks
from kdfast.prune.criteria.results import by_group, scores_of
from kdfast.prune.criteria.streams import Streams
from kdfast.prune.criteria.tracker import Tracker
from kdfast.prune.passes import Loss
from kdfast.prune.scores import KINDS, Kind, Scores

_OP = "kdfast.prune.criteria.score"
Needs = Literal["nothing", "batches", "labels", "training"]
Named = TypeVar("Named", bound=Callable[..., Any])


@dataclass(frozen=True)
class Criterion:
    """function: of `Streams` and settings, gives [units] of every place; of one that needs training the class of a
    `Tracker`. needs: "nothing" but the weights, "batches", batches with "labels" (or a loss), or "training". of: which
    units. settings: keyword arguments of the function."""

    name: str
    function: Callable[..., Any]
    needs: Needs
    of: tuple[Kind, ...]

    @property
    def settings(self) -> tuple[str, ...]:
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


CRITERIA: dict[str, Criterion] = {}


def criterion(needs: Needs, of: Sequence[Kind] = KINDS, name: str | None = None) -> Callable[[Named], Named]:
    """Puts a function or a `Tracker` into `CRITERIA`, by its name."""

    def register(function: Named) -> Named:
        its = name or function.__name__
        CRITERIA[its] = Criterion(its, function, needs, tuple(of))
        return function

    return register


@torch.no_grad()
def score(
    model: nn.Module,
    criterion: str,
    of: Kind,
    batches: Iterable[Any] | None = None,
    *,
    loss: Loss | None = None,
    block: tuple[int, int] = (32, 32),
    **settings: Any,
) -> Scores:
    """How much each unit of a model matters, by a criterion of `CRITERIA`.

        scores = kdfast.prune.criteria.score(model, "taylor", "neurons", batches)
        masks = kdfast.prune.select(model, scores, keep=0.5)

    Batches are read one at a time, in evaluation mode, and the model stays as it was. Units that a mask holds dead get
    -inf. Criteria of heads give a group of keys and values the sum over its heads. Where a process group is initialised,
    all ranks call it, each with its own batches (some may have none), and get the same scores, of all batches.

    Args:
        model: of transformers, masked or not.
        criterion: a name in `CRITERIA`; its function's docstring has the formula.
        of: "heads", "groups", "neurons", "layers", or "blocks" of the weights of linear maps.
        batches: where the criterion needs some. Padding is left out by their `attention_mask`.
        loss: of the model and a batch, the mean over rows. None: the model's own, with labels.
        block: rows and columns of the blocks; the matrices' sizes must be multiples.
        settings: the criterion's own.

    Raises:
        TypeError, ValueError: a model as in `layers_of`, or with linear maps that are more than that; an unknown
            criterion or setting, one that does not go with `of`, one that needs training; no batches where it needs
            them; batches and losses as in `importance`; blocks that do not fit.
        ImportError: a criterion that needs scikit-learn, without it.
    """
    found = known(criterion, of, settings)
    if found.needs == "training":
        expected = "one that needs no training (for this one: kdfast.prune.criteria.track)"
        _checks.wrong_value(_OP, "criterion", expected, repr(criterion))
    if found.needs != "nothing" and batches is None:
        _checks.wrong_value(_OP, "batches", f"some, as {criterion!r} reads them", "None")
    by_head = of == "groups" and "groups" not in found.of
    streams = Streams(model, "heads" if by_head else of, batches or (), loss, block)
    values: list[Tensor] = found.function(streams, **settings)
    if by_head:
        values = [by_group(layer, x) for layer, x in zip(streams.layers, values, strict=True)]
    return scores_of(streams, of, values)


def track(model: nn.Module, criterion: str, of: Sequence[Kind] = ("heads", "neurons"), **settings: Any) -> Tracker:
    """Begins a criterion that goes through a training: gates that are trained beside the weights, or a rule for these.

        tracker = kdfast.prune.criteria.track(model, "hard_concrete", weight=0.1)
        for batch in batches:
            model(**batch).loss.backward()
            tracker.before_step()
            optimizer.step()
            tracker.after_step(learning_rate)
            optimizer.zero_grad()
        scores = tracker.scores("neurons")
        tracker.close()

    Raises:
        TypeError, ValueError: a model as in `score`; an unknown criterion or setting, or one that needs no training.
    """
    op = "kdfast.prune.criteria.track"
    if not of:
        _checks.wrong_value(op, "of", "at least one kind of unit", "none")
    for kind in of:
        found = known(criterion, kind, settings, op)
    if found.needs != "training":
        expected = "one that needs training (for this one: kdfast.prune.criteria.score)"
        _checks.wrong_value(op, "criterion", expected, repr(criterion))
    made: Tracker = found.function(model, of, **settings)
    return made


def known(name: str, of: Kind, settings: Collection[str] = (), op: str = _OP) -> Criterion:
    """The criterion of a name, which can say how much units of a kind matter.

    Raises:
        ValueError: no such one, or with other settings.
    """
    if name not in CRITERIA:
        _checks.wrong_value(op, "criterion", f"one of {', '.join(sorted(CRITERIA))}", repr(name))
    found = CRITERIA[name]
    allowed = (*found.of, "groups") if "heads" in found.of and found.needs != "training" else found.of
    if of not in allowed:
        _checks.wrong_value(op, "of", f"one of {', '.join(dict.fromkeys(allowed))} with {name!r}", repr(of))
    for setting in settings:
        if setting not in found.settings:
            own = ", ".join(found.settings) or "none"
            _checks.wrong_value(op, "settings", f"those of {name!r}: {own}", setting)
    return found
