"""A linear layer of which some blocks live: with the whole weight, with torch's means, with kdfast.

`python benchmarks/block_sparse.py [--output folder]`. The products of a feed-forward layer of BERT-base, random blocks,
forward and backward with gradients of the input, the weight and the bias: `F.linear` of the whole weight (`dense`), a
gather of inputs with a product for each block row through autograd (`gather`), and `kdfast.block_sparse_linear`. And the
forward alone, beside torch's block-sparse rows, which have no backward: `F.linear` of such a weight (`bsr linear`), and its
product with x transposed (`bsr product`), in float32 and of the fewer rows only, as they are slow. Measured in turn in
one process, once results are seen to agree. AMX changes its speed by itself, by a factor of two, for seconds: of
bfloat16 there only rounds count in which the dense product was fast.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import kdfast
from kdfast import _C, BlockLayout
from kdfast.bench import harness, timing

DTYPES = (torch.float32, torch.bfloat16)
WIDTH, INNER = 768, 3072
ROWS = (512, 2048)
BLOCKS = (64, 32)
DENSITIES = (1.0, 0.5, 0.25, 0.1)
# A dense step's time over kdfast's, by block and density; and a forward's of torch's block-sparse rows over kdfast's.
BARS = {64: {1.0: 0.85, 0.5: 1.5, 0.25: 2.7, 0.1: 5.3}, 32: {0.5: 1.4, 0.25: 2.1, 0.1: 4.2}}
AMX_BARS = {64: {0.5: 1.6, 0.25: 2.2, 0.1: 4.0}}  # of bfloat16, with AMX at its fast speed
BSR_BAR = 10
FAST = 1.2  # times the dense product's least time
Call = Callable[[], list[Tensor]]


def random_layout(outputs: int, inputs: int, block: int, density: float) -> BlockLayout:
    count = (outputs // block) * (inputs // block)
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=torch.Generator().manual_seed(0))[: round(density * count)]] = True
    return BlockLayout(mask.view(outputs // block, -1), (block, block))


class Case:
    """The ways to make one product; each returns what it computes."""

    def __init__(self, dtype: torch.dtype, rows: int, block: int, density: float, outputs: int, inputs: int) -> None:
        self.layout = random_layout(outputs, inputs, block, density)
        self.x, self.grad = (torch.randn(rows, n).to(dtype) for n in (inputs, outputs))
        self.values = torch.randn(self.layout.count, block, block).mul_(inputs**-0.5).to(dtype)
        self.bias, self.weight = torch.randn(outputs).to(dtype), self.layout.dense(self.values)
        counts = self.layout.rows.begin.diff().tolist()
        places = torch.arange(inputs).view(-1, block)
        self.columns = [places[at].flatten() for at in self.layout.rows.index.split(counts)]
        self.parts = [part.transpose(0, 1).reshape(block, -1) for part in self.values.split(counts)]

    def steps(self) -> dict[str, Call]:
        """Forward and backward; gradients of x and the bias, then of the weight."""
        x, values, bias, weight = (t.detach().requires_grad_() for t in (self.x, self.values, self.bias, self.weight))
        parts = [part.detach().requires_grad_() for part in self.parts]

        def step(forward: Callable[[], Tensor], *weights: Tensor) -> Call:
            return lambda: list(torch.autograd.grad(forward(), (x, bias, *weights), self.grad))

        return {
            "dense": step(lambda: F.linear(x, weight, bias), weight),
            "gather": step(lambda: self.gathered(x, parts, bias), *parts),
            "kdfast": step(lambda: kdfast.block_sparse_linear(x, values, self.layout, bias), values),
        }

    def forwards(self) -> dict[str, Call]:
        ways = {
            "dense": lambda: F.linear(self.x, self.weight),
            "kdfast": lambda: kdfast.block_sparse_linear(self.x, self.values, self.layout),
        }
        if self.x.dtype is torch.float32 and self.layout.density < 1 and len(self.x) <= ROWS[0]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that they are in beta
                rows = self.weight.to_sparse_bsr(self.layout.block)
            ways |= {"bsr linear": lambda: F.linear(self.x, rows), "bsr product": lambda: (rows @ self.x.t()).t()}
        return {name: lambda way=way: [way()] for name, way in ways.items()}  # type: ignore[misc]

    def gathered(self, x: Tensor, parts: list[Tensor], bias: Tensor) -> Tensor:
        made = (x.index_select(1, at) @ part.t() for at, part in zip(self.columns, parts, strict=True))
        return torch.cat([*made], 1) + bias

    def check(self) -> None:
        """What is wrong is not timed: against the whole weight."""
        allowed = max(4 * torch.finfo(self.x.dtype).eps, 1e-5)  # torch's block-sparse rows are less exact in float32
        for ways in (self.steps(), self.forwards()):
            wanted = ways["dense"]()
            for name, way in ways.items():
                for mine, whole in zip(way()[:2], wanted[:2], strict=True):
                    error = float((mine.float() - whole.float()).norm() / whole.float().norm())
                    if not error < allowed:
                        raise AssertionError(f"{name}: a result differs by {error:.1e}: not worth timing")
        whole, ours = (self.steps()[name]()[2].float() for name in ("dense", "kdfast"))
        error = float((self.layout.values_of(whole) - ours).norm() / ours.norm())
        if not error < allowed:
            raise AssertionError(f"kdfast: the weight's gradient differs by {error:.1e}: not worth timing")


def timed(ways: dict[str, Call], seconds: float, fast: bool) -> dict[str, Any]:
    """Medians in milliseconds, and of the ratios to kdfast of calls that follow one another. `fast`: of the rounds in
    which the dense product was."""
    times = timing.interleaved(ways, "cpu", seconds=seconds)
    if fast:
        most = FAST * min(times["dense"])
        chosen = [i for i, ms in enumerate(times["dense"]) if ms <= most]
        times = {name: [all_of[i] for i in chosen] for name, all_of in times.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(all_of, times["kdfast"], strict=True))
        for name, all_of in times.items()
    }
    return {"ms": {name: statistics.median(all_of) for name, all_of in times.items()}, "ratios": ratios}


def has_amx(dtype: str) -> bool:
    return dtype == "bfloat16" and _C.cpu_variant() == "amx"


def measure(seconds: float) -> list[dict[str, Any]]:
    """Every case, as `timed` tells."""
    results = []
    shapes = ((INNER, WIDTH), (WIDTH, INNER))
    for dtype, block, rows, shape, density in itertools.product(DTYPES, BLOCKS, ROWS, shapes, DENSITIES):
        case = Case(dtype, rows, block, density, *shape)
        case.check()
        name = str(dtype).removeprefix("torch.")
        facts = {"dtype": name, "block": block, "rows": rows, "shape": shape, "density": density}
        for what, ways in (("step", case.steps()), ("forward", case.forwards())):
            results.append({"what": what, **facts, **timed(ways, seconds, has_amx(name))})
    return results


def verdict(result: dict[str, Any]) -> str:
    ratios = result["ratios"]
    if result["what"] == "forward":
        ratio, bar = min((r for name, r in ratios.items() if "bsr" in name), default=None), BSR_BAR
    else:
        bars = BARS if result["dtype"] == "float32" else AMX_BARS if has_amx(result["dtype"]) else {}
        ratio, bar = ratios["dense"], bars.get(result["block"], {}).get(result["density"])
    if ratio is None or bar is None:
        return ""
    return "met" if ratio >= bar else f"below {bar}"


def table(results: list[dict[str, Any]]) -> Table:
    others = ("dense", "gather", "bsr linear", "bsr product")
    made = Table("layer", "dtype", "block", "density", "kdfast ms", *(f"× {name}" for name in others), "bar")
    for r in results:
        ratios = (f"{r['ratios'][name]:.2f}" if name in r["ratios"] else "" for name in others)
        layer = f"{r['what']} {r['rows']} × {r['shape'][1]}→{r['shape'][0]}"
        numbers = (r["dtype"], f"{r['block']}", f"{r['density']}", f"{r['ms']['kdfast']:.2f}")
        made.add_row(layer, *numbers, *ratios, verdict(r))
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, help="folder for the results as JSON")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each timing (default 2)")
    options = parser.parse_args()
    torch.manual_seed(0)
    facts = harness.environment("cpu")
    with harness.reused_memory():
        results = measure(options.seconds)
    Console(width=140).print(table(results))
    if options.output is not None:
        print(harness.write(results, facts, harness.results_path(facts, options.output, "block-sparse")))


if __name__ == "__main__":
    main()
