"""The benchmark of a pruned encoder compares like with like: masked and smaller models compute the same, another thing
than the whole one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers import BertConfig, BertModel

from kdfast import prune

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import pruned_encoder as benchmark


def tiny() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 32}
    return BertModel(BertConfig(**sizes, initializer_range=0.2))


def test_ways_agree() -> None:
    models = benchmark.ways(tiny().eval())
    batch = {"input_ids": torch.randint(1000, 2000, (3, 9), generator=torch.Generator().manual_seed(1))}
    assert benchmark.difference(models, batch) < 1e-5
    models["masked"] = models["smaller"] = models["whole"]  # of which nothing is gone
    assert not benchmark.difference(models, batch) < benchmark.TOLERANCE
    models["masked"] = tiny().eval()
    assert not benchmark.difference(models, batch) < benchmark.TOLERANCE


def test_half_lives() -> None:
    masks = benchmark.half(tiny())
    assert [int(mask.sum()) for mask in masks.heads + masks.neurons] == [2, 2, 16, 16]
    assert bool(masks.layers.all())


def test_the_more_important_half_lives() -> None:
    model = tiny_models.make("bert")
    batch = {**tiny_models.batch(model), "labels": torch.tensor([0, 1, 1])}
    masks, found = benchmark.important_half(model, [batch]), prune.importance(model, [batch])
    for living, scores in ((masks.heads, found.heads), (masks.neurons, found.neurons)):
        for mask, of in zip(living, scores, strict=True):
            assert int(mask.sum()) == len(mask) - len(mask) // 2
            assert of[mask].min() >= of[~mask].max() > 0


def test_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "ENCODERS", {"tiny": tiny})
    results = benchmark.measure(1, ((2, 8), (1, 4)))
    assert [row["way"] for row in results] == [*benchmark.WAYS] * 2
    header, *lines = benchmark.table(results)
    assert header == benchmark.HEADER
    assert [line[0] for line in lines] == ["tiny, 2 × 8", "tiny, 1 × 4"]
    assert all(len(line) == len(header) for line in lines)
    whole, masked, smaller = results[:3]
    assert lines[0][-2:] == tuple(f"{whole['ms'] / of['ms']:.2f}" for of in (masked, smaller))
    whole["accuracy"] = {"whole": 86.0, "pruned": 70.04, "trained": 85.25}
    assert [line[-1] for line in benchmark.table(results)] == [benchmark.ACCURACY, "86.0 → 70.0 → 85.2", "–"]
    assert whole["parameters"] == masked["parameters"] > smaller["parameters"]
    assert whole["gflop"] > masked["gflop"] == smaller["gflop"] > 0
