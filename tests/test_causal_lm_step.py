"""The benchmark of a step of language models compares like with like: both ways make the same losses and weights."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from language_models import llama, same

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import causal_lm_step as benchmark


def test_both_ways_agree() -> None:
    teacher, student = llama(0, 3), llama(1, 2)
    runs = {way: benchmark.Run(way, copy.deepcopy(student), teacher) for way in benchmark.WAYS}
    ids = torch.randint(3, 301, (4, 9), generator=torch.Generator().manual_seed(1))
    losses = {way: [run.step({"input_ids": ids, "labels": ids}) for _ in range(3)] for way, run in runs.items()}
    torch.testing.assert_close(*losses.values(), rtol=benchmark.TOLERANCE, atol=0)
    plain, ours = (run.student for run in runs.values())
    same(plain, ours, 1e-5)
    assert any((a - b).abs().max() > 1e-5 for a, b in zip(ours.parameters(), student.parameters(), strict=True))
