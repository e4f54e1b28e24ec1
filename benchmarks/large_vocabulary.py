"""Distillation over large vocabularies: time and peak memory of `kdfast.linear_kd_loss`, loss and gradients of hidden
states and weight, beside

- plain torch: both logits whole, log-softmaxes, F.kl_div and F.cross_entropy;
- the same four matrix products alone, in the same chunks: what the arithmetic takes at least;
- torch's chunked `linear_cross_entropy` where it has one: the student and its labels alone, three products, no teacher.

    python benchmarks/large_vocabulary.py --output benchmarks/results
"""

from __future__ import annotations

import argparse
import gc
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

import kdfast
from kdfast.bench import harness
from kdfast.ops import _chunks, _heads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
WIDTH, BUDGET = (4096, "auto") if DEVICE == "cuda" else (512, 256 << 20)
VOCABULARIES = (32000, 49152, 128256, 151936)
ROWS = (1024, 4096, 8192) if DEVICE == "cuda" else (256, 512, 1024)
USUAL = (ROWS[-1], VOCABULARIES[-1])
CASES = [(USUAL[0], vocabulary) for vocabulary in VOCABULARIES] + [(n, USUAL[1]) for n in ROWS if n != USUAL[0]]
WAYS = ("kdfast", "plain torch", "products alone", "linear_cross_entropy")


class Case:
    def __init__(self, rows: int, vocabulary: int) -> None:
        generator = torch.Generator(DEVICE).manual_seed(0)

        def head() -> tuple[Tensor, Tensor]:
            hidden, weight = (
                torch.randn(n, WIDTH, generator=generator, device=DEVICE).to(DTYPE) for n in (rows, vocabulary)
            )
            return hidden, weight.mul_(3 * WIDTH**-0.5)

        (self.hidden, self.weight), (self.teacher_hidden, self.teacher_weight) = head(), head()
        self.hidden.requires_grad_()
        self.weight.requires_grad_()
        self.labels = torch.randint(vocabulary, (rows,), generator=generator, device=DEVICE)

    @property
    def ways(self) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
        calls = (self.kdfast, self.plain, self.products, self.cross_entropy)
        ways = dict(zip(WAYS, calls, strict=True))
        if not hasattr(F, "linear_cross_entropy") or self.labels.shape[0] != USUAL[0]:  # minutes, on two cores
            del ways["linear_cross_entropy"]
        return ways

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.weight))

    def kdfast(self) -> tuple[Tensor, ...]:
        teacher = self.teacher_hidden, self.teacher_weight
        loss = kdfast.linear_kd_loss(self.hidden, self.weight, *teacher, self.labels, memory_budget=BUDGET)
        return self.gradients(loss)

    def plain(self) -> tuple[Tensor, ...]:
        s, t = (self.hidden @ self.weight.T).float(), (self.teacher_hidden @ self.teacher_weight.T).float()
        soft = F.kl_div(F.log_softmax(s / 2, -1), F.softmax(t / 2, -1), reduction="batchmean")
        return self.gradients(0.5 * 4 * soft + 0.5 * F.cross_entropy(s, self.labels))

    def cross_entropy(self) -> tuple[Tensor, ...]:
        options = torch.nn.LinearCrossEntropyOptions()
        return self.gradients(F.linear_cross_entropy(self.hidden, self.weight, self.labels, options=options))

    @torch.no_grad()
    def products(self) -> tuple[Tensor, ...]:
        rows, vocabulary = self.labels.shape[0], self.weight.shape[0]
        chunks = [_chunks.Chunk(0, rows)]
        if isinstance(BUDGET, int):
            fits = (BUDGET - _heads.WORKSPACE) // (4 * vocabulary)
            chunks = [chunk for slab in _chunks.plan(rows, fits, 1, False, False).slabs for chunk in slab]
        s, t = (self.hidden.new_empty(chunks[0].end, vocabulary) for _ in range(2))
        of_hidden, of_weight = torch.empty_like(self.hidden), torch.empty_like(self.weight)
        for begin, end in chunks:
            n, hidden = end - begin, self.hidden[begin:end]
            torch.mm(hidden, self.weight.T, out=s[:n])
            torch.mm(self.teacher_hidden[begin:end], self.teacher_weight.T, out=t[:n])
            torch.mm(s[:n], self.weight, out=of_hidden[begin:end])
            torch.addmm(of_weight, s[:n].T, hidden, beta=float(begin > 0), out=of_weight)
        return of_hidden, of_weight

    def check(self) -> float:
        """How far apart kdfast's gradients are from plain torch's."""
        pairs = zip(self.kdfast(), self.plain(), strict=True)
        apart = max(float((a - b).float().norm() / b.float().norm()) for a, b in pairs)
        if not apart < (2e-2 if torch.bfloat16 == DTYPE else 1e-5):
            raise AssertionError(f"gradients differ by {apart}: not worth timing")
        return apart


def peak(rows: int, vocabulary: int, way: str) -> float:
    return harness.peak_memory(Case(rows, vocabulary).ways[way], DEVICE)


def measure(seconds: float) -> list[dict[str, Any]]:
    """Peaks in a process of their own each: nothing is there yet, no allocator's reserve, no library's workspace."""
    results = []
    for rows, vocabulary in CASES:
        case = Case(rows, vocabulary)
        apart, ways = case.check(), list(case.ways)
        times = harness.interleaved(dict(case.ways), DEVICE, seconds)
        del case
        gc.collect()
        for way in ways:
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                memory = process.submit(peak, rows, vocabulary, way).result()
            numbers = {"milliseconds": times[way], "megabytes": memory, "difference": apart}
            results.append({"rows": rows, "vocabulary": vocabulary, "width": WIDTH, "way": way, **numbers})
            print(results[-1], flush=True)
    return results


def table(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line per case; the products' memory is what they need here, not what a loss could do with."""
    lines = []
    for rows, vocabulary in CASES:
        of = {r["way"]: r for r in results if (r["rows"], r["vocabulary"]) == (rows, vocabulary)}
        ours, plain = of["kdfast"], of["plain torch"]
        gradients = (rows + vocabulary) * WIDTH * DTYPE.itemsize / 1e6
        lines.append(
            (
                f"{rows} × {vocabulary}",
                *(f"{of[way]['milliseconds']:.0f}" if way in of else "–" for way in WAYS),
                f"{ours['milliseconds'] / of['products alone']['milliseconds']:.2f}",
                *(f"{of[way]['megabytes'] - gradients:.0f}" for way in WAYS[:2]),
                f"{gradients:.0f}",
                f"{plain['megabytes'] / ours['megabytes']:.1f}",
            )
        )
    return lines


HEADER = (
    *("rows × vocabulary", "ms", "ms, plain torch", "ms, products alone", "ms, labels alone"),
    *("of the products", "MB", "MB, plain torch", "+ gradients", "× less memory"),
)


def plot(results: list[dict[str, Any]], facts: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(5.2, 6.4), layout="constrained", sharey="row")
    for row, (measured, unit) in enumerate((("milliseconds", 1e3), ("megabytes", 1e3))):
        for axes, (x, fixed, of) in zip(
            grid[row], (("vocabulary", "rows", USUAL[0]), ("rows", "vocabulary", USUAL[1])), strict=True
        ):
            for way, colour in zip(WAYS, ("C0", "C1", "C7", "C3"), strict=True):
                chosen = [r for r in results if r[fixed] == of and r["way"] == way]
                line = sorted((r[x], r[measured] / unit) for r in chosen)
                if line and not (measured == "megabytes" and way == "products alone"):
                    axes.plot(*zip(*line, strict=True), marker="o", markersize=4, color=colour, label=way)
            axes.set(xlabel=f"{x}\n({of} {fixed})" if fixed == "rows" else f"{x}\n(vocabulary {of})")
            axes.set(yscale="log") if measured == "milliseconds" else axes.set_ylim(bottom=0)
            axes.ticklabel_format(style="plain", axis="x")
            axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_yticks((0.5, 1, 2, 5, 10, 20), ("0.5", "1", "2", "5", "10", "20"))
    grid[0][0].set_ylabel("seconds")
    grid[1][0].set_ylabel("peak memory, GB,\ngradients included")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    title = f"{facts['device']}\ntorch {facts['torch']}, {facts['date']}; hidden size {WIDTH}"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)  # twice a phone's 390 pixels
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for JSON, table and plot")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each case, at least 5 rounds (default 20)")
    options = parser.parse_args()
    facts = harness.environment(DEVICE) | {"dtype": str(DTYPE).removeprefix("torch."), "memory_budget": BUDGET}
    results = measure(options.seconds)
    shown = Table(*HEADER)
    for line in table(results):
        shown.add_row(*line)
    Console(width=140).print(shown)
    if options.output is not None:
        path = harness.write(results, facts, harness.results_path(facts, options.output, "large-vocabulary"))
        rows = [HEADER, ("---", *("---:",) * (len(HEADER) - 1)), *table(results)]
        path.with_suffix(".md").write_text("\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n")
        plot(results, facts, path.with_suffix(".png"))
        print(path)


if __name__ == "__main__":
    main()
