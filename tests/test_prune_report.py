"""What pruning brought: numbers of models before and after, a table, and why nothing got faster."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import pytest
import tiny_models
import torch

from kdfast import prune
from kdfast.bench import timing
from kdfast.models import cost
from kdfast.models.cost import Cost
from kdfast.prune.report import BUSY, FASTER, Report, advice

BEFORE = Cost(100, 4.0, 10.0, (10.0, 10.0, 10.5))


@pytest.fixture
def milliseconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """What passes take, in place of what they do."""
    times = {"before": [8.0, 10.0, 11.0], "after": [5.0, 4.0, 4.5]}
    monkeypatch.setattr(cost, "latencies_ms", lambda models, batch, device, repeats: times)
    return times


def without_layers(model: Any) -> Any:
    smaller = copy.deepcopy(model)
    del smaller.base_model.encoder.layer[1:]
    return smaller


def test_numbers_and_table(milliseconds: dict[str, list[float]]) -> None:
    model = tiny_models.make("bert")
    smaller, batch = without_layers(model), tiny_models.batch(model)
    found = prune.report(model, smaller, {**batch, "labels": torch.zeros(3, dtype=torch.long)})
    for of, measured in ((model, found.before), (smaller, found.after)):
        assert measured.parameters == sum(p.numel() for p in of.parameters())
        assert measured.megabytes == pytest.approx(8e-6 * measured.parameters)
        assert measured.gflop == cost.flops(of, batch) / 1e9
    assert (found.before.ms, found.after.ms, found.advice) == (10.0, 4.5, None)
    assert found.faster == pytest.approx(2.222, abs=1e-3)
    assert (found.tokens, found.device, found.threads) == ((3, 7), "cpu", torch.get_num_threads())
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["before", "after"]
    assert lines[4].split() == ["ms", "10.0", "4.5", "2.22", "×", "as", "fast"]
    assert lines[5].split() == ["fastest–slowest", "8.0–11.0", "4.0–5.0"]
    assert "3 × 7 tokens" in lines[-1]


def test_what_is_no_faster_is_told(milliseconds: dict[str, list[float]]) -> None:
    milliseconds["after"] = milliseconds["before"]
    model = tiny_models.make("bert")
    with pytest.warns(UserWarning, match=r"^kdfast\.prune\.report: nothing got faster \(1\.00 × as fast\)") as caught:
        prune.report(model, copy.deepcopy(model), tiny_models.batch(model))
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("ignore:kdfast.prune.report")  # whichever is faster
def test_models_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward passes of both, as many as asked for, and models that are as they were."""
    monkeypatch.setattr(timing, "interleaved", inspect.unwrap(timing.interleaved))  # against tests/conftest.py
    model = tiny_models.make("llama").train()
    other, calls = copy.deepcopy(model), []
    other.register_forward_hook(lambda *_: calls.append(0))
    found = prune.report(model, torch.nn.DataParallel(other), tiny_models.batch(model), repeats=3)
    assert len(found.before.milliseconds) == len(found.after.milliseconds) == 3
    assert len(calls) == 2 + 3 + 1  # to warm up, timed, counted
    assert found.before.gflop == found.after.gflop > 0
    assert all(module.training for of in (model, other) for module in of.modules())


@pytest.mark.filterwarnings("ignore:kdfast.prune.report")
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "modernbert"])
def test_masked_and_smaller_models_compute_as_little(name: str) -> None:
    """Also where heads, neurons or all of a layer are gone; and the masked one is trained on as if it had not been
    measured."""
    model = tiny_models.make(name)
    masked, masks = copy.deepcopy(model), prune.Masks.full(model)
    masks.heads[0][[0, 4]] = False
    masks.heads[1][:] = False
    masks.neurons[0][7:] = False
    masks.neurons[2][:] = False
    prune.apply(masked, masks)
    batch = {**tiny_models.batch(model), "labels": torch.ones(3, dtype=torch.long)}
    if name in tiny_models.CAUSAL:
        batch["labels"] = batch["input_ids"]
    of_masked = prune.report(model, masked, batch, repeats=1)
    of_smaller = prune.report(model, prune.compact(model, masks), batch, repeats=1)
    assert 0 < of_masked.after.gflop == of_smaller.after.gflop < of_masked.before.gflop
    assert of_masked.after.parameters == of_masked.before.parameters > of_smaller.after.parameters
    masked(**batch).loss.backward()
    assert masked.get_input_embeddings().weight.grad.any()


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (Cost(100, 4.0, 10.0, (9.9, 10.0)), "(1.01 × as fast): both compute as much"),
        (Cost(50, 2.0, 5.0, (6.0, 10.0, 22.0)), "passes of one model took 6.0–22.0 ms"),
        (Cost(100, 4.0, 5.0, (9.9, 10.0)), "weights that are all there: kdfast.prune.compact(model, masks)"),
        (Cost(50, 2.0, 5.0, (9.9, 10.0)), "50 % of the arithmetic is gone, but for so few tokens"),
        (Cost(50, 2.0, 5.0, (19.9, 20.0)), "(0.50 × as fast)"),
    ],
)
def test_reasons(after: Cost, expected: str) -> None:
    told = advice(BEFORE, after)
    assert told is not None
    assert expected in told
    assert Report(BEFORE, after, (1, 8), "cpu", 2).advice == told


def test_no_advice_where_it_is_faster() -> None:
    assert advice(BEFORE, Cost(100, 4.0, 10.0, (10.0 / FASTER - 1e-9,))) is None
    assert BEFORE.ms == 10.0 < BUSY * min(BEFORE.milliseconds)


def test_what_cannot_be_reported() -> None:
    model = tiny_models.make("bert")
    other, batch = copy.deepcopy(model), tiny_models.batch(model)
    for before, after, given, expected in (
        (model, torch.compile(model), batch, "after: expected another model than before, got the same one; apply"),
        (model, other.to("meta"), batch, "after: expected a model on cpu as before, got one on meta"),
        (model, copy.deepcopy(model), {"input_ids": batch["input_ids"].to("meta")}, "expected input_ids on cpu"),
        (
            model,
            copy.deepcopy(model),
            {"labels": batch["input_ids"]},
            "expected input_ids or inputs_embeds, got ['labels']",
        ),
    ):
        with pytest.raises(ValueError, match=f"^kdfast.prune.report: .*{re.escape(expected)}"):
            prune.report(before, after, given)
    with pytest.raises(ValueError, match=r"^kdfast\.prune\.report: repeats: expected at least 1, got 0$"):
        prune.report(model, copy.deepcopy(model), batch, repeats=0)
