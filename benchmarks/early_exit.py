"""What asking branches costs where no row leaves: an `EarlyExit` against its plain classifier.

`python benchmarks/early_exit.py [--output folder]`. Random weights of MiniLM's sizes (6 layers, 384) and of BERT-base's
(12 layers, 768), float32; a forward pass of each way in turn in one process, so that a slow moment hits all alike. At
speed 0 no branch is asked. At the smallest speed above 0 every branch is, and no row leaves: that is the most that
early exits can cost. Logits are compared first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertForSequenceClassification

from kdfast.bench import harness, timing
from kdfast.early_exit import EarlyExit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {
    "MiniLM": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "BERT-base": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
}
SMALLEST = 1e-9  # a speed that no random branch's uncertainty reaches
BATCHES = ((1, 64), (1, 128), (32, 64), (32, 128))  # rows, tokens


def ways(model: Any, early: EarlyExit, inputs: dict[str, torch.Tensor]) -> dict[str, Callable[[], Any]]:
    return {
        "plain": lambda: model(**inputs),
        "speed 0": lambda: early(**inputs, speed=0.0),
        "every branch": lambda: early(**inputs, speed=SMALLEST),
    }


def check(calls: dict[str, Callable[[], Any]], depth: int) -> None:
    outputs = {name: call() for name, call in calls.items()}
    for name, output in outputs.items():
        torch.testing.assert_close(output.logits, outputs["plain"].logits, rtol=0, atol=0)
        if name != "plain" and output.layers.tolist() != [depth] * len(output.logits):
            raise AssertionError(f"{name}: rows left early: not worth timing")


@torch.inference_mode()
def measure(size: str, rows: int, length: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    config = BertConfig(**SIZES[size], num_attention_heads=12, num_labels=2)
    model = BertForSequenceClassification(config).eval().to(DEVICE)
    early = EarlyExit(model)
    ids = torch.randint(5, config.vocab_size, (rows, length), device=DEVICE)
    lengths = torch.linspace(length, length // 2, rows, device=DEVICE).long()
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(length, device=DEVICE) < lengths[:, None]).long()}
    calls = ways(model, early, inputs)
    check(calls, early.depth)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-3, rounds):
        for name, call in calls.items():
            timing.synchronize(DEVICE)
            start = time.perf_counter()
            call()
            timing.synchronize(DEVICE)
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    # Of neighbours in time, which a busy machine slows alike.
    over = {name: [100 * (a / b - 1) for a, b in zip(of, times["plain"], strict=True)] for name, of in times.items()}
    found = {
        name: {"ms": median(of), "percent_slower": median(over[name]), "quartiles": quantiles(over[name])[::2]}
        for name, of in times.items()
    }
    flops = early.flops(length)
    return {
        "size": size,
        "rows": rows,
        "length": length,
        "rounds": rounds,
        "ways": found,
        "flops": [flops[0], flops[-1]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for the results as JSON")
    parser.add_argument("--rounds", type=int, default=60, help="forward passes of each way (default 60)")
    parser.add_argument("--only", default=",".join(SIZES), help="of these sizes, with commas")
    options = parser.parse_args()
    facts = harness.environment(DEVICE)
    table = Table("model", "rows", "tokens", "plain ms", "speed 0", "every branch", "operations", title="Slower by")
    results = []
    for size in options.only.split(","):
        for rows, length in BATCHES:
            result = measure(size, rows, length, options.rounds if rows == 1 else max(10, options.rounds // 4))
            results.append(result)
            ways = result["ways"]
            slower = (
                f"{ways[name]['percent_slower']:+.1f} % ({ways[name]['quartiles'][0]:+.1f} to {ways[name]['quartiles'][1]:+.1f})"
                for name in ("speed 0", "every branch")
            )
            more = 100 * (result["flops"][1] / result["flops"][0] - 1)
            table.add_row(size, str(rows), str(length), f"{ways['plain']['ms']:.1f}", *slower, f"{more:+.1f} %")
    Console().print(table)
    if options.output is not None:
        print(harness.write(results, facts, harness.results_path(facts, options.output, "early-exit")))


if __name__ == "__main__":
    main()
