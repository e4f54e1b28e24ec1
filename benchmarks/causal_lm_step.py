"""20 steps of distilling SmolLM2 on real text: with all logits in plain torch, and with kdfast, which makes none.

`python benchmarks/causal_lm_step.py [--output folder]`. Teacher: SmolLM2-135M-Instruct, float32; student: every third
of its 30 layers, no dropout; rows of packed news, every token counts. Loss: alpha · T² · KL(teacher ‖ student)
+ (1 - alpha) · CE, AdamW. Both ways start from the same student and take turns, step by step, in one process; the largest
difference of their losses, relative to the loss, is the first result. Memory is that of one step beyond models and
optimizer: of a step in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from kdfast import students
from kdfast.bench import harness, timing
from kdfast.data import demo, text
from kdfast.objective import LanguageModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OBJECTIVE = LanguageModel(alpha=0.5, temperature=2.0, memory_budget=128 * 10**6)  # "auto" is three times that here
RATE = 1e-4
TOLERANCE = 1e-5  # of a loss, relative

Batch = dict[str, Tensor]


def plain_loss(student: Any, teacher: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        t = teacher(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].flatten(0, 1)
    s = student(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].flatten(0, 1)
    labels, temperature = batch["labels"][:, 1:].flatten(), OBJECTIVE.temperature
    soft = F.kl_div(F.log_softmax(s / temperature, -1), F.softmax(t / temperature, -1), reduction="batchmean")
    return OBJECTIVE.alpha * temperature**2 * soft + (1 - OBJECTIVE.alpha) * F.cross_entropy(s, labels)


def kdfast_loss(student: Any, teacher: Any, batch: Batch) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "labels")}
    with torch.no_grad():
        t = OBJECTIVE.run(teacher, inputs)
    terms = OBJECTIVE(OBJECTIVE.run(student, inputs), t, inputs)
    return terms["kd"] + terms["ce"]


WAYS: dict[str, Callable[[Any, Any, Batch], Tensor]] = {"plain torch": plain_loss, "kdfast": kdfast_loss}


class Run:
    """A student on its way, in one of `WAYS`."""

    def __init__(self, way: str, student: Any, teacher: Any) -> None:
        self.loss_of, self.student, self.teacher = WAYS[way], student.train(), teacher
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=RATE)

    def step(self, batch: Batch) -> float:
        loss = self.loss_of(self.student, self.teacher, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def runs() -> dict[str, Run]:
    logging.disable_progress_bar()
    folder = demo.fetch(demo.SMOLLM2)
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval().to(DEVICE)
    student = students.from_layers(teacher, range(0, teacher.config.num_hidden_layers, 3))
    return {way: Run(way, copy.deepcopy(student), teacher) for way in WAYS}


def batches(rows: int, length: int, count: int) -> list[Batch]:
    tokenizer = AutoTokenizer.from_pretrained(demo.fetch(demo.SMOLLM2), local_files_only=True)
    train, _ = demo.articles(demo.fetch(demo.ARTICLES))
    packed = text.packed(train, tokenizer, length)
    collate = text.Collator(tokenizer.eos_token_id)
    made = [collate(packed[i * rows : (i + 1) * rows]) for i in range(count)]
    return [{name: tensor.to(DEVICE) for name, tensor in batch.items()} for batch in made]


def peaks(rows: int, length: int) -> dict[str, float]:
    """MB of a step of every way, after a first one that makes the optimizer's state. In a process of its own, where all
    larger tensors are new memory, no reserve's."""
    if DEVICE == "cpu":
        ctypes.CDLL(None).mallopt(-3, 128 * 1024)  # M_MMAP_THRESHOLD
    first, second = batches(rows, length, 2)
    found = {}
    for way, run in runs().items():
        run.step(first)
        found[way] = harness.peak_memory(lambda run=run: run.step(second), DEVICE)  # type: ignore[misc]
    return found


def measure(rows: int, length: int, steps: int) -> dict[str, Any]:
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        memory = process.submit(peaks, rows, length).result()
    both = runs()
    losses: dict[str, list[float]] = {way: [] for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for batch in batches(rows, length, steps):
        for way, run in both.items():
            timing.synchronize(DEVICE)
            start = time.perf_counter()
            losses[way].append(run.step(batch))
            timing.synchronize(DEVICE)
            times[way].append(time.perf_counter() - start)
    apart = max(abs(a - b) / a for a, b in zip(*losses.values(), strict=True))
    if not apart < TOLERANCE:
        raise AssertionError(f"losses differ by {apart:.1e}, {losses}: not worth timing")
    ways = {
        way: {"step_s": statistics.median(times[way]), "step_peak_mb": memory[way], "losses": losses[way]}
        for way in WAYS
    }
    return {"rows": rows, "length": length, "steps": steps, "difference": apart, "ways": ways}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, help="folder for the results as JSON")
    parser.add_argument("--rows", type=int, default=4, help="of a batch (default 4)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (default 512)")
    parser.add_argument("--steps", type=int, default=20, help="default 20")
    options = parser.parse_args()
    facts = harness.environment(DEVICE)
    result = measure(options.rows, options.length, options.steps)
    title = (
        f"{options.rows} × {options.length} tokens, {options.steps} steps: losses differ by {result['difference']:.1e}"
    )
    table = Table("way", "first loss", "last loss", "step s", "step peak MB", title=title)
    for way, found in result["ways"].items():
        ends = (f"{found['losses'][i]:.6f}" for i in (0, -1))
        table.add_row(way, *ends, f"{found['step_s']:.2f}", f"{found['step_peak_mb']:.0f}")
    Console().print(table)
    if options.output is not None:
        print(harness.write([result], facts, harness.results_path(facts, options.output, "causal-lm-step")))


if __name__ == "__main__":
    main()
