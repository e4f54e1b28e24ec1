"""From scores to masks: exact counts, floors, multiples, shares of cost; tables of latency."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from kdfast import prune
from kdfast.models import cost
from kdfast.prune import criteria
from kdfast.prune.layers import layers_of
from kdfast.prune.select import live_masks

EVERY = pytest.mark.parametrize("name", tiny_models.NAMES)
OF: list[Any] = ["heads", "groups", "neurons", "layers"]
SIZES = {"n_embd": 48, "n_inner": 40}


def scores_of(model: Any, of: Any, seed: int = 0) -> prune.Scores:
    return criteria.score(model, "random", of, seed=seed)


def kept(masks: prune.Masks, of: str) -> list[int]:
    if of == "layers":
        return [int(masks.layers.sum())]
    if of == "groups":
        return [len(groups[heads].unique()) for groups, heads in zip(masks.groups, masks.heads, strict=True)]
    return [int(live.sum()) for live in (masks.heads if of == "heads" else masks.neurons)]


# ---- counts ----
@EVERY
@pytest.mark.parametrize("of", OF)
def test_counts_are_exact(name: str, of: Any) -> None:
    model = tiny_models.make(name)
    if name == "albert" and of == "layers":
        return
    scores = scores_of(model, of)
    keep: Any
    for keep in (0.5, 0.8, len(scores) - 1):
        masks = prune.select(model, scores, keep=keep)
        masks.check(model)
        wanted = keep if isinstance(keep, int) else round(keep * len(scores))
        assert sum(kept(masks, of)) == wanted
        assert min(kept(masks, of)) >= 1
        for other in {"heads", "neurons", "layers"} - {of, *(["heads"] if of == "groups" else [])}:
            assert sum(kept(masks, other)) == sum(kept(prune.Masks.full(model), other))


def test_the_highest_stay() -> None:
    """Of a layer by its scores; of all layers by scores over the layer's norm."""
    model = tiny_models.make("bert")
    scores = scores_of(model, "neurons")
    local = prune.select(model, scores, keep=0.3, scope="local")
    for live, x in zip(local.neurons, scores.values.values(), strict=True):
        assert int(live.sum()) == round(0.3 * 37)
        assert float(x[live].min()) > float(x[~live].max())
    scaled = prune.Scores("neurons", {n: x * 10**i for i, (n, x) in enumerate(scores.values.items())})
    assert prune.select(model, scaled, keep=0.3) == prune.select(model, scores, keep=0.3)
    normed = [x / x.norm() for x in scores.values.values()]
    threshold = torch.cat(normed).sort().values[-round(0.3 * 111)]
    for live, x in zip(prune.select(model, scores, keep=0.3).neurons, normed, strict=True):
        assert torch.equal(live, x >= threshold)


def test_at_least_one_of_each_layer() -> None:
    model = tiny_models.make("bert")
    values = {x.name: torch.ones(6) * (10.0 if i else 1e-3) for i, x in enumerate(layers_of(model))}
    values[layers_of(model)[0].name][1:] = 0.0
    scores = prune.Scores("heads", {n: x + torch.arange(6) * 1e-6 for n, x in values.items()})
    assert kept(prune.select(model, scores, keep=3), "heads") == [1, 1, 1]
    for keep in (2, 0.1):
        with pytest.raises(ValueError, match=r"select: keep: expected 3 to 18 of heads, .*, got 2"):
            prune.select(model, scores, keep=keep)
    assert sum(kept(prune.select(model, scores, keep=2, allow_empty=True), "heads")) == 2
    assert kept(prune.select(model, scores, threshold=100.0), "heads") == [1, 1, 1]
    empty = prune.select(model, scores, threshold=100.0, allow_empty=True)
    assert kept(empty, "heads") == [0, 0, 0]
    prune.compact(model, empty)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_multiples(name: str) -> None:
    model = tiny_models.make(name, **({"n_inner": 40} if name == "gpt2" else {"intermediate_size": 40}))
    scores = scores_of(model, "neurons")
    for keep in (0.3, 0.45, 0.8):
        masks = prune.select(model, scores, keep=keep, multiple=8)
        assert all(count % 8 == 0 for count in kept(masks, "neurons"))
        assert sum(kept(masks, "neurons")) == 8 * math.ceil(round(keep * 120) / 8)
        masks = prune.select(model, scores, keep=keep, multiple=8, scope="local")
        assert kept(masks, "neurons") == [8 * math.ceil(round(keep * 40) / 8)] * 3
    assert sum(kept(prune.select(model, scores, keep=64, multiple=8), "neurons")) == 64
    with pytest.raises(ValueError, match=r"keep: expected a number that multiples add up to, as 72, got 65"):
        prune.select(model, scores, keep=65, multiple=8)
    heads = scores_of(model, "heads")
    masks = prune.select(model, [heads, scores], keep=0.5, multiple={"neurons": 16})
    assert all(count % 16 == 0 or count == 40 for count in kept(masks, "neurons"))
    assert sum(kept(masks, "heads")) == 9


def test_sizes_that_are_no_multiple() -> None:
    """All 37 neurons, or a multiple of 8."""
    model = tiny_models.make("bert")
    masks = prune.select(model, scores_of(model, "neurons"), keep=0.6, multiple=8)
    assert all(count % 8 == 0 or count == 37 for count in kept(masks, "neurons"))
    assert round(0.6 * 111) <= sum(kept(masks, "neurons")) < round(0.6 * 111) + 8


# ---- what is dead stays so ----
def test_again_and_again() -> None:
    model = tiny_models.make("llama")
    before = prune.Masks.full(model)
    for keep in (0.8, 0.6, 0.3):
        masks = prune.select(model, [scores_of(model, "heads", 1), scores_of(model, "neurons", 2)], keep=keep)
        for now, was in zip((*masks.heads, *masks.neurons), (*before.heads, *before.neurons), strict=True):
            assert not bool((now & ~was).any())
        assert sum(kept(masks, "neurons")) == round(keep * 111)
        assert sum(kept(masks, "heads")) == round(keep * 18)
        prune.apply(model, masks)
        before = masks
    with pytest.raises(ValueError, match=r"keep: expected one that removes something, got 0.3"):
        prune.select(model, scores_of(model, "heads", 1), keep=0.33)


# ---- thresholds ----
def test_threshold() -> None:
    model = tiny_models.make("bert")
    scores = scores_of(model, "neurons")
    masks = prune.select(model, scores, threshold=0.5)
    for live, x in zip(masks.neurons, scores.values.values(), strict=True):
        assert torch.equal(live, x > 0.5)
    with pytest.raises(ValueError, match=r"threshold: expected one that removes something, got -1"):
        prune.select(model, scores, threshold=-1.0)
    rounded = prune.select(model, scores, threshold=0.5, multiple=8)
    for live, exact in zip(rounded.neurons, masks.neurons, strict=True):
        assert int(live.sum()) % 8 == 0 or int(live.sum()) == 37
        assert 0 <= int(live.sum()) - int(exact.sum()) < 8


# ---- costs ----
COSTS: dict[str, Callable[[Any, Any], prune.Costs]] = {
    "parameters": lambda model, batch: prune.Parameters(model),
    "flops": prune.Flops,
}


def measured(kind: str, model: Any, batch: Any) -> float:
    return float(cost.parameters(model) if kind == "parameters" else cost.flops(model, batch))


@EVERY
@pytest.mark.parametrize("kind", COSTS)
def test_costs_are_those_of_smaller_models(name: str, kind: str) -> None:
    model = tiny_models.make(name)
    batch = {"input_ids": torch.randint(3, 90, (2, 4))}
    costs = COSTS[kind](model, batch)
    assert costs.of(prune.Masks.full(model)) == measured(kind, model, batch)
    scores = [scores_of(model, "heads", 1), scores_of(model, "neurons", 2)]
    if name != "albert":
        scores.append(scores_of(model, "layers", 3))
    for keep in (0.8, 0.5):
        masks = prune.select(model, scores, keep=keep)
        if name == "modernbert":
            masks.layers[:] = True  # the first is made without a norm, which the next one then has more
        smaller = prune.compact(model, masks)
        assert costs.of(masks) == measured(kind, smaller, batch)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.parametrize("share", [0.8, 0.55])
def test_target(name: str, kind: str, share: float) -> None:
    """The cost is below the target, and by no more than one unit."""
    model = tiny_models.make(name)
    batch = tiny_models.batch(model)
    costs = COSTS[kind](model, batch)
    whole = costs.of(prune.Masks.full(model))
    share = 1 - (1 - share) * (1 - costs.rest / whole)
    masks = prune.select(
        model, [scores_of(model, "heads", 1), scores_of(model, "neurons", 2)], target=share, cost=costs
    )
    now = costs.of(masks)
    most = max(
        costs.of_layer(i, prune.Masks.full(model)) / min(len(masks.heads[i]), len(masks.neurons[i])) for i in range(3)
    )
    assert share * whole - most < now <= share * whole
    assert sum(kept(masks, "heads")) < 18
    assert sum(kept(masks, "neurons")) < 111


def test_what_costs_more_goes_first() -> None:
    """Of equal scores the heads, each of which costs as much as four neurons and more."""
    model = tiny_models.make("bert")
    heads, neurons = (
        prune.Scores(of, {x.name: torch.arange(n) * 1e-9 + 1.0 for x in layers_of(model)})  # type: ignore[arg-type]
        for of, n in (("heads", 6), ("neurons", 37))
    )
    neurons.values[layers_of(model)[0].name][0] = heads.values[layers_of(model)[0].name][0] = 0.0
    masks = prune.select(model, [heads, neurons], target=0.9, cost=prune.Parameters(model))
    assert sum(kept(masks, "heads")) < 18 - 3
    assert sum(kept(masks, "neurons")) >= 110


def test_a_target_that_cannot_be_reached() -> None:
    model = tiny_models.make("bert")
    with pytest.raises(ValueError, match=r"target: expected at least 0\.\d+, which is left where .*, got 0.01"):
        prune.select(model, scores_of(model, "neurons"), target=0.01, cost=prune.Parameters(model))


# ---- latency ----
def table() -> prune.LatencyTable:
    heads, neurons = {0: 0.0, 2: 1.0, 6: 2.0}, {0: 0.0, 16: 2.0, 37: 4.0}
    return prune.LatencyTable(heads, neurons, 2.0, (1,) * 3, rows=1, tokens=8, device="cpu", threads=1)


def test_a_table_of_latency() -> None:
    model = tiny_models.make("bert")
    found = table()
    masks = prune.Masks.full(model)
    assert found.of(masks) == 2 + 3 * 6
    masks.heads[0][4:], masks.neurons[1][8:], masks.layers[2] = False, False, False
    assert found.of(masks) == pytest.approx(2 + (1.5 + 4) + (2 + 1))
    assert prune.LatencyTable.from_json(found.to_json()) == found
    masks = prune.select(model, [scores_of(model, "heads"), scores_of(model, "neurons")], target=0.6, cost=found)
    assert 0.6 * 20 - 0.5 < found.of(masks) <= 0.6 * 20
    for text in ("", "[]", '{"heads": {}}', '{"heads": {"x": 1}, "neurons": {}}'):
        with pytest.raises(
            ValueError, match=r"^kdfast\.prune\.LatencyTable\.from_json: text: expected what to_json writes"
        ):
            prune.LatencyTable.from_json(text)


@pytest.mark.parametrize("name", ["bert", "llama", "mpnet", "albert"])
def test_measured_latency(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts parameters, the table is that of parameters."""

    def count(models: Any, batch: Any, device: str, repeats: int) -> dict[str, list[float]]:
        assert device == "cpu"
        assert repeats == 3
        assert not {"labels"} & batch.keys()
        for model in models.values():
            with torch.no_grad():
                model(**batch)
        return {n: [float(sum(p.numel() for p in model.base_model.parameters()))] * 3 for n, model in models.items()}

    model = tiny_models.make(name)
    monkeypatch.setattr(cost, "latencies_ms", count)
    batch = tiny_models.batch(model) | {"labels": torch.zeros(3)}
    found = prune.latency_table(model, batch, heads=[2, 4], neurons=[10], repeats=3)
    assert [*found.heads] == [0, 2, 4, 6]
    assert [*found.neurons] == [0, 10, 37]
    assert (found.rows, found.tokens, found.device) == (3, 7, "cpu")
    each = 48 * 3 if name == "llama" else 48 * 2 + 1
    shared = 0.5 if name == "albert" else 1.0  # two distinct layers, four calls
    assert found.neurons[37] - found.neurons[10] == 27 * each * shared
    assert found.of(prune.Masks.full(model)) == pytest.approx(sum(p.numel() for p in model.base_model.parameters()))


def test_really_measured_latency(tmp_path: Path) -> None:
    model = tiny_models.make("bert").float()
    found = prune.latency_table(model, tiny_models.batch(model), repeats=1)
    (tmp_path / "latency.json").write_text(found.to_json())
    assert prune.LatencyTable.from_json((tmp_path / "latency.json").read_text()) == found
    assert [*found.heads] == [*range(7)]
    assert len(found.neurons) == 9
    for of in (found.heads, found.neurons):
        assert sorted(of.values()) == [*of.values()]
    for given, message in [
        ({"heads": [7]}, r"heads: expected numbers from 1 to 6, got \[6, 7\]"),
        ({"neurons": [0]}, r"neurons: expected numbers from 1 to 37, got \[0, 37\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            prune.latency_table(model, tiny_models.batch(model), **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch: expected input_ids among its columns"):
        prune.latency_table(model, {})


# ---- blocks ----
def test_blocks() -> None:
    model = tiny_models.make("bert", intermediate_size=40)
    scores = criteria.score(model, "l1", "blocks", block=(8, 8))
    for scope in ("local", "global"):
        masks = prune.select_blocks(scores, 0.4, scope=scope)  # type: ignore[arg-type]
        assert masks.keys() == scores.values.keys()
        share = [x / x.norm() for x in scores.values.values()]
        threshold = torch.cat([x.flatten() for x in share]).sort().values[-round(0.4 * len(scores))]
        for (name, mask), x in zip(masks.items(), share, strict=True):
            assert mask.shape == scores.values[name].shape
            if scope == "global":
                assert torch.equal(mask, x >= threshold)
            else:
                assert int(mask.sum()) == round(0.4 * mask.numel())
                assert float(x[mask].min()) > float(x[~mask].max())
    for keep in (0.0, 1.0, 1):
        with pytest.raises(ValueError, match="keep: expected a number between 0 and 1"):
            prune.select_blocks(scores, keep)
    with pytest.raises(ValueError, match=r"keep: expected one that leaves a block of "):
        prune.select_blocks(scores, 0.001, scope="local")
    with pytest.raises(ValueError, match="scores: expected those of blocks, got those of heads"):
        prune.select_blocks(scores_of(model, "heads"), 0.5)


# ---- errors ----
def test_errors() -> None:
    model = tiny_models.make("bert")
    heads, blocks = scores_of(model, "heads"), criteria.score(model, "l1", "blocks", block=(1, 1))
    broken = prune.Scores("heads", {n: x / 0 - x / 0 for n, x in heads.values.items()})
    costs = prune.Parameters(model)
    given: Any
    for scores, given, message in [
        (heads, {}, r"keep: expected one of keep, threshold and target, got none"),
        (heads, {"keep": 0.5, "threshold": 1.0}, r"keep: expected one of .*, got keep, threshold"),
        (heads, {"keep": 1.0}, r"keep: expected a share between 0 and 1, or a number of units, got 1.0"),
        (heads, {"keep": 18}, r"keep: expected one that removes something, got 18"),
        (heads, {"keep": 19}, r"keep: expected 3 to 18 of heads, .*, got 19"),
        (heads, {"keep": 7, "scope": "local"}, r"keep: expected 1 to 6 of heads in layer 0, .*, got 7"),
        (heads, {"target": 0.5}, r"cost: expected costs beside target, and only there, got None"),
        (heads, {"keep": 0.5, "cost": costs}, r"cost: expected costs beside target, and only there"),
        (heads, {"target": 1.5, "cost": costs}, r"target: expected a share between 0 and 1, got 1.5"),
        (broken, {"keep": 0.5}, r"scores of heads: expected numbers, got NaN in bert\.encoder\.layer\.0"),
        (blocks, {"keep": 0.5}, r"scores: expected of heads, groups, neurons or layers \(blocks: select_blocks\)"),
        (scores_of(tiny_models.make("llama"), "heads"), {"keep": 0.5}, r"scores of heads: expected the model's"),
        ([], {"keep": 0.5}, r"scores: expected at least one, got none"),
    ]:
        with pytest.raises(ValueError, match=rf"^kdfast\.prune\.select: {message}"):
            prune.select(model, scores, **given)
    with pytest.raises(TypeError, match=r"scores: expected kdfast\.prune\.Scores, got torch.float32"):
        prune.select(model, [Tensor([1.0])], keep=0.5)  # type: ignore[list-item]


# ---- genetic search ----
def test_genetic_search_is_better_than_scores() -> None:
    """Scores prefer the wrong layers; quality says so, at the same cost, and what was best stays."""
    model = tiny_models.make("bert")
    neurons = prune.Scores(
        "neurons",
        {x.name: torch.linspace(0.1, 1, 37) ** (1 + 5 * i) for i, x in enumerate(layers_of(model))},
    )
    costs = prune.Parameters(model)
    asked = []

    def quality(masked: Any) -> float:
        masks = live_masks(masked)
        assert costs.of(masks) <= 0.9 * costs.of(prune.Masks.full(model))
        asked.append(tuple(map(tuple, (live.tolist() for live in masks.neurons))))
        return float(kept(masks, "neurons")[2] - kept(masks, "neurons")[0])

    def search(**settings: Any) -> prune.Masks:
        asked.clear()
        return prune.genetic_search(model, neurons, quality, target=0.9, cost=costs, **settings)

    def of(masks: prune.Masks) -> int:
        return kept(masks, "neurons")[2] - kept(masks, "neurons")[0]

    greedy = prune.select(model, neurons, target=0.9, cost=costs)
    found = search(generations=15, population=10, seed=1)
    assert len(asked) == len({*asked}) > 20
    assert of(found) > of(greedy) + 5
    assert found == search(generations=15, population=10, seed=1)
    assert live_masks(model) == prune.Masks.full(model)
    for live, x in zip(found.neurons, neurons.values.values(), strict=True):
        assert float(x[live].min()) > float(x[~live].max())
    for settings, message in [
        ({"population": 1}, r"genetic_search: population: expected at least 2, got 1"),
        ({"generations": 0}, r"genetic_search: generations: expected at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            search(**settings)
    with pytest.raises(ZeroDivisionError):
        prune.genetic_search(model, neurons, lambda _: 1 / 0, target=0.8, cost=costs)
    assert live_masks(model) == prune.Masks.full(model)
