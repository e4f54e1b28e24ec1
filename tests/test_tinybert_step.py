"""The benchmark of a TinyBERT step compares like with like: both ways make the same loss and gradients."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import tinybert_step as benchmark

LENGTH = 70
PADDED = pytest.mark.parametrize("padded", [False, True])


@pytest.fixture(scope="module")
def steps() -> dict[str, Any]:
    torch.manual_seed(0)
    small = {"vocab_size": 60, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 32}
    config = transformers.BertConfig(**small, num_hidden_layers=6, initializer_range=0.2)
    teacher = transformers.BertModel(config, add_pooling_layer=False).double()
    return {way: benchmark.Step(way, teacher) for way in benchmark.WAYS}


def batch_of(padded: bool) -> dict[str, Tensor]:
    batch = {"input_ids": torch.randint(60, (3, LENGTH), generator=torch.Generator().manual_seed(1))}
    lengths = torch.tensor([LENGTH, LENGTH - 21, 5])
    return batch | ({"attention_mask": (torch.arange(LENGTH) < lengths[:, None]).long()} if padded else {})


@PADDED
def test_both_ways_agree(steps: dict[str, Any], padded: bool) -> None:
    published, ours = (step(batch_of(padded)) for step in steps.values())
    assert len(published) == 1 + len(steps["kdfast"].parameters)
    assert benchmark.difference(published, ours) < 1e-10
    assert benchmark.difference(ours, published) < 1e-10  # so that neither side is zero


@PADDED
def test_losses_alone_agree(steps: dict[str, Any], padded: bool) -> None:
    published, ours = (step.losses_alone(batch_of(padded))() for step in steps.values())
    assert len(published) == benchmark.SHARED + 3  # scores
    assert len(ours) == benchmark.SHARED + 3 + 3  # queries, keys
    assert benchmark.difference(published[: benchmark.SHARED], ours[: benchmark.SHARED]) < 1e-10
    assert all(gradient.any() for gradient in published + ours)


def test_padding_counts(steps: dict[str, Any]) -> None:
    whole, padded = (steps["kdfast"](batch_of(padded)) for padded in (False, True))
    assert benchmark.difference(whole, padded) > 1e-3


@pytest.mark.parametrize("at", [0, 1, 5])
def test_zero_gradient_fails(steps: dict[str, Any], at: int) -> None:
    published, ours = (step(batch_of(False)) for step in steps.values())
    ours[at] = torch.zeros_like(ours[at])
    assert not benchmark.difference(published, ours) < 0.5
    published[at] = torch.zeros_like(published[at])
    assert not benchmark.difference(published, ours) < 0.5
