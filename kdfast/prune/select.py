"""From scores to masks: how many units stay, and of which layers."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kdfast.ops import _checks
from kdfast.prune.apply import masks_of
from kdfast.prune.costs import Costs
from kdfast.prune.layers import layers_of
from kdfast.prune.masks import Masks
from kdfast.prune.queues import Queue, drop, queues
from kdfast.prune.scores import Kind, Scores

__all__ = ["select", "select_blocks"]

_OP = "kdfast.prune.select"
Scope = Literal["global", "local"]


def select(
    model: nn.Module,
    scores: Scores | Sequence[Scores],
    *,
    keep: float | int | None = None,
    threshold: float | None = None,
    target: float | None = None,
    cost: Costs | None = None,
    scope: Scope = "global",
    multiple: int | Mapping[Kind, int] = 1,
    allow_empty: bool = False,
) -> Masks:
    """Masks in which the units of the highest scores live. One of three rules says how many:

        select(model, scores, keep=0.5)                            # of each kind half, wherever they are
        select(model, scores, keep=64, scope="local")              # 64 in every layer
        select(model, [heads, neurons], target=0.5, cost=kdfast.prune.Parameters(model))
        select(model, scores, threshold=0.0)                       # those above it

    keep: a share (float) of all units there were, dead ones too, or a number of units (int); by `scope` of all layers
    together, whose scores are then divided by the L2 norm of each layer, or of every layer by itself. target: the share
    of the whole model's cost that is left at most; the units that matter least for what they cost go first, of all kinds
    together, until it is reached. threshold: units with scores that are not above it go.

    Units that are dead (-inf, or by the model's masks) stay so. A layer keeps `multiple` units of each kind, or one, or
    none with `allow_empty`; of "layers" one stays.

    Args:
        model: the model of the scores, masked or not.
        scores: of one kind or several, not of blocks.
        cost: `kdfast.prune.Parameters`, `kdfast.prune.Flops`, or what `kdfast.prune.latency_table` measured.
        multiple: the number of units that stays in a layer is a multiple of it, or all of them; by kind, or for all
            kinds but "layers". A share is then rounded up to what can be reached; a number must be reached.

    Raises:
        TypeError, ValueError: a model as in `layers_of`; scores of another model, or NaN; none or several of keep,
            threshold and target; one that is out of range, that removes nothing or that cannot be reached.
    """
    name, rule = _rule(keep=keep, threshold=threshold, target=target)
    if (target is None) != (cost is None):
        _checks.wrong_value(_OP, "cost", "costs beside target, and only there", cost)
    masks = live_masks(model)
    before = masks.copy()
    between_layers = target is not None or (keep is not None and scope == "global")
    by_kind = queues_of(model, masks, scores, multiple, allow_empty, between_layers)
    if keep is not None:
        to_count(masks, by_kind, keep, scope)
    elif threshold is not None:
        _below(masks, by_kind, threshold)
    elif target is not None and cost is not None:
        within(masks, by_kind, target, cost)
    if masks == before:
        _checks.wrong_value(_OP, name, "one that removes something", rule)
    return masks


def select_blocks(scores: Scores, keep: float, *, scope: Scope = "global") -> dict[str, Tensor]:
    """Bool masks [rows of blocks, columns of blocks] by the name of the linear map, True where a block lives: the
    round(keep · blocks) of the highest scores, of all maps after a division by the L2 norm of each, or of every map.

    Raises:
        TypeError, ValueError: scores that are not of blocks; keep that is not between 0 and 1, or removes nothing; a map
            that would lose all of its blocks.
    """
    op = "kdfast.prune.select_blocks"
    if scores.of != "blocks":
        _checks.wrong_value(op, "scores", "those of blocks", f"those of {scores.of}")
    if not isinstance(keep, float) or not 0 < keep < 1:
        _checks.wrong_value(op, "keep", "a number between 0 and 1", keep)
    values = (scores.normalised() if scope == "global" else scores).values
    flat = {name: x.flatten() for name, x in values.items()}
    parts = [torch.cat([*flat.values()])] if scope == "global" else [*flat.values()]
    found = torch.cat([_highest(x, round(keep * len(x))) for x in parts])
    if bool(found.all()):
        _checks.wrong_value(op, "keep", "one that removes something", keep)
    sizes = [len(x) for x in flat.values()]
    masks = {name: x.view(values[name].shape) for name, x in zip(flat, found.split(sizes), strict=True)}
    for name, mask in masks.items():
        if not bool(mask.any()):
            _checks.wrong_value(op, "keep", f"one that leaves a block of {name}", keep)
    return masks


def _highest(x: Tensor, count: int) -> Tensor:
    order = x.argsort(descending=True, stable=True)
    return torch.zeros(len(x), dtype=torch.bool, device=x.device).index_fill_(0, order[:count], True)


def live_masks(model: nn.Module) -> Masks:
    """What lives of a model, by the masks it has."""
    masks = Masks.full(model)
    for i, layer in enumerate(layers_of(model, _OP)):
        masks.heads[i], masks.neurons[i], masks.layers[i] = masks_of(layer)
    return masks


def queues_of(
    model: nn.Module,
    masks: Masks,
    scores: Scores | Sequence[Scores],
    multiple: int | Mapping[Kind, int],
    allow_empty: bool,
    normalised: bool,
) -> list[list[Queue]]:
    """By kind of unit, what may go, in the order that it goes.

    Raises:
        TypeError, ValueError: scores as of `select`.
    """
    given = [scores] if isinstance(scores, Scores) else list(scores)
    _check_scores(model, given)
    step = {x.of: multiple if isinstance(multiple, int) else multiple.get(x.of, 1) for x in given}
    return [[*queues(masks, x.normalised() if normalised else x, step[x.of], allow_empty)] for x in given]


# ---- rules ----
def to_count(masks: Masks, by_kind: list[list[Queue]], keep: float, scope: Scope) -> None:
    """So many units of each kind stay, of all layers together or of each."""
    for each in by_kind:
        for part in [each] if scope == "global" else [[queue] for queue in each]:
            _to_count(masks, part, keep, scope)


def _to_count(masks: Masks, part: list[Queue], keep: float, scope: Scope) -> None:
    """So many units of these queues stay."""
    least, live, whole = (sum(of) for of in zip(*((q.least, len(q.units), q.of) for q in part), strict=True))
    wanted = keep if isinstance(keep, int) else round(keep * whole)
    if scope == "local" and isinstance(keep, float):
        wanted = max(wanted, least)
    if wanted < least or (isinstance(keep, int) and wanted > live):
        where = f"of {part[0].kind}" + ("" if scope == "global" else f" in layer {part[0].layer}")
        _checks.wrong_value(_OP, "keep", f"{least} to {live} {where}, as one or a multiple of each layer stays", wanted)
    too_many = live - wanted
    for queue in _ascending(part, lambda queue: queue.score):
        if len(queue.next) <= too_many:
            too_many -= len(queue.next)
            queue.take(masks)
        else:
            queue.steps = queue.steps[: queue.taken]  # smaller steps of other layers may still fit
    if too_many > 0 and isinstance(keep, int):
        near = wanted + too_many
        _checks.wrong_value(_OP, "keep", f"a number that multiples add up to, as {near}", wanted)


def _below(masks: Masks, by_kind: list[list[Queue]], threshold: float) -> None:
    """Units go as long as the highest score of the next step is not above the threshold."""
    for queue in (queue for each in by_kind for queue in each):
        while queue.more and float(queue.scores[queue.gone + len(queue.next) - 1]) <= threshold:
            queue.take(masks)


def within(masks: Masks, by_kind: list[list[Queue]], target: float, cost: Costs) -> None:
    """Units go, by score for what they cost, until the target is reached."""
    whole, now = cost.of(masks.everything()), cost.of(masks)
    for each in by_kind:  # of each kind from 0 on: what is below would matter the less the cheaper it is
        lowest = min((float(queue.scores[0]) for queue in each if len(queue.units)), default=0.0)
        for queue in each:
            queue.scores = queue.scores - lowest

    def saving(queue: Queue) -> float:
        after, touched = masks.copy(), queue.next.tolist() if queue.kind == "layers" else [queue.layer]
        drop(after, queue, queue.next)
        return sum(cost.of_layer(i, masks) - cost.of_layer(i, after) for i in touched)

    def for_its_cost(queue: Queue) -> float:
        return queue.score / max(saving(queue), 1e-12 * whole)

    for queue in _ascending([queue for each in by_kind for queue in each], for_its_cost):
        if now <= target * whole:
            break
        now -= saving(queue)
        queue.take(masks)
    if now > target * whole * (1 + 1e-9):
        expected = f"at least {now / whole:.4f}, which is left where each layer keeps what it must"
        _checks.wrong_value(_OP, "target", expected, target)


def _ascending(part: list[Queue], key: Callable[[Queue], float]) -> Iterator[Queue]:
    """Queues by what comes next in them; the caller takes it, or ends the queue."""
    heap = [(key(queue), i) for i, queue in enumerate(part) if queue.more]
    heapq.heapify(heap)
    while heap:
        _, i = heapq.heappop(heap)
        yield part[i]
        if part[i].more:
            heapq.heappush(heap, (key(part[i]), i))


# ---- checks ----
def _rule(**rules: float | None) -> tuple[str, float]:
    """The one that is given."""
    given = [(name, value) for name, value in rules.items() if value is not None]
    if len(given) != 1:
        names = ", ".join(name for name, _ in given) or "none"
        _checks.wrong_value(_OP, "keep", "one of keep, threshold and target", names)
    name, value = given[0]
    if name != "threshold" and not isinstance(value, int) and not 0 < value < 1:
        _checks.wrong_value(
            _OP, name, "a share between 0 and 1" + (", or a number of units" if name == "keep" else ""), value
        )
    return name, value


def _check_scores(model: nn.Module, scores: Sequence[Scores]) -> None:
    layers = layers_of(model, _OP)
    if not scores:
        _checks.wrong_value(_OP, "scores", "at least one", "none")
    for each in scores:
        if not isinstance(each, Scores):
            _checks.wrong_type(_OP, "scores", "kdfast.prune.Scores", _checks.kind(each))
        if each.of == "blocks":
            _checks.wrong_value(
                _OP, "scores", "of heads, groups, neurons or layers (blocks: select_blocks)", "of blocks"
            )
        counts = {"heads": "heads", "groups": "groups", "neurons": "neurons"}
        expected = {x.name: [getattr(x, counts[each.of]) if each.of in counts else 1] for x in layers}
        if (got := {name: list(x.shape) for name, x in each.values.items()}) != expected:
            _checks.wrong_value(_OP, f"scores of {each.of}", f"the model's, {expected}", got)
        for name, x in each.values.items():
            if bool(x.isnan().any()):
                _checks.wrong_value(_OP, f"scores of {each.of}", "numbers", f"NaN in {name}")
