"""What models cost: counted as formulas and saved files say."""

from __future__ import annotations

import inspect
import io
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from rich.console import Console
from torch import nn

from kdfast.bench import timing
from kdfast.models import cost
from kdfast.results import measure, tables

ROWS, LENGTH = 3, 7


@pytest.fixture(autouse=True)
def every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against tests/conftest.py."""
    monkeypatch.setattr(timing, "interleaved", inspect.unwrap(timing.interleaved))


def by_hand(config: Any, causal: bool) -> int:
    """Twice the multiplications of a Llama, or of a BERT with its pooler and classifier."""
    width, neurons, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads = config.num_attention_heads
    groups, size = getattr(config, "num_key_value_heads", heads), getattr(config, "head_dim", width // heads)
    of_token = width * size * (2 * heads + 2 * groups) + (3 if causal else 2) * width * neurons
    attention = 2 * heads * LENGTH * LENGTH * size
    layer = ROWS * (LENGTH * of_token + attention)
    head = ROWS * (LENGTH * width * config.vocab_size if causal else width * width + width * config.num_labels)
    return 2 * (layers * layer + head)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", ["bert", "qwen3"])
def test_flops_are_those_of_the_formula(name: str, padded: bool, attention: str) -> None:
    """Fused attention counts as much as eager; groups of keys are no extra; padding makes nothing less."""
    model = tiny_models.make(name, attn_implementation=attention).float()
    batch = tiny_models.batch(model, rows=ROWS, length=LENGTH)
    if not padded:
        del batch["attention_mask"]
    assert cost.flops(model, batch) == by_hand(model.config, name in tiny_models.CAUSAL)


def test_compiled_models_are_counted_as_they_are_without() -> None:
    model = tiny_models.make("bert")
    batch = tiny_models.batch(model)
    assert cost.flops(torch.compile(model), batch) == cost.flops(model, batch) > 0


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_bytes_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    """Without the header; GPT-2 embeds words by the same weights that it predicts them by, which are saved once."""
    model = tiny_models.make(name).float()
    model.save_pretrained(tmp_path)
    stored = (tmp_path / "model.safetensors").read_bytes()
    header = int.from_bytes(stored[:8], "little")
    assert json.loads(stored[8 : 8 + header])
    assert cost.megabytes(model) * 1e6 == pytest.approx(len(stored) - 8 - header)
    assert cost.megabytes(torch.compile(model)) == cost.megabytes(model)
    assert cost.parameters(model) * 4e-6 == pytest.approx(cost.megabytes(model))


def test_modules_are_in_their_own_modes_again() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout())).train()
    model[1].eval()
    seen = []
    model[0].register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_inference_mode_enabled())))
    times = cost.latencies_ms({"it": model}, {"input": torch.ones(2)}, "cpu", repeats=3)
    assert seen == [(False, True)] * 5  # two to warm up
    assert [len(values) for values in times.values()] == [3]
    assert all(value > 0 for value in times["it"])
    assert [module.training for module in model.modules()] == [True, True, False, False]
    with pytest.raises(ZeroDivisionError), cost.evaluating(model):
        _ = 1 / 0
    assert [module.training for module in model.modules()] == [True, True, False, False]


def test_tokens_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median's; the spread is shown of what a busy machine disturbed."""
    milliseconds = {"calm": [2.0, 2.2, 2.0], "disturbed": [1.0, 2.0, 40.0]}
    monkeypatch.setattr(cost, "latencies_ms", lambda models, batch, device, repeats, seconds: milliseconds)
    rows = measure.speeds({}, {"attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])})
    assert rows["disturbed"] == {
        "tokens_per_second": 2000.0,
        "tokens_per_second_fastest": 4000.0,
        "tokens_per_second_slowest": 100.0,
    }
    rows = {name: row | {"megabytes": size} for (name, row), size in zip(rows.items(), (0.416, 31.6), strict=True)}
    console = Console(file=io.StringIO(), width=100)
    console.print(tables.language_table(rows, "Perplexity"))
    shown = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    at = next(i for i, line in enumerate(shown) if "calm" in line)
    assert [line.split() for line in shown[at : at + 3]] == [
        ["calm", "0.42", "2000"],
        ["disturbed", "32", "2000"],
        ["4000–100"],
    ]
    caption = "Tokens per second: median forward pass; below it fastest–slowest, where far apart"
    assert caption in " ".join(" ".join(shown).split())


def test_calls_take_turns() -> None:
    order: list[str] = []
    times = timing.interleaved({name: lambda name=name: order.append(name) for name in "ab"}, "cpu", rounds=9)
    rounds = [order[i : i + 2] for i in range(0, len(order), 2)]
    assert len(rounds) == 10
    assert {tuple(both) for both in rounds} == {("a", "b"), ("b", "a")}
    assert [len(values) for values in times.values()] == [9, 9]
