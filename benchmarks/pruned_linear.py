"""Layers of which a part lives, forward and backward: sliced, masked, with kdfast, and physically smaller.

`python benchmarks/pruned_linear.py [--output folder]`. `prefix`: a feed-forward product of BERT-base at a part of its
width, gradients added up over sub-networks: `F.linear(x, w[:o, :i])` (`slices`), `kdfast.prefix_linear`, and a layer of
that size (`small`). `heads`: queries, keys, values, attention and output of BERT-base with half of the heads: all heads,
times a mask (`masked`), `index_select` of the weights (`select`), `kdfast.nn.SelectedLinear`, whose weights are packed
anew for every step, and layers of that size (`small`); gradients added up, or fresh. Measured in turn in one process,
once their gradients are seen to agree.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import kdfast
from kdfast.bench import harness

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
WIDTH, INNER, HEADS, BATCH = 768, 3072, 12, 8
WIDTHS = (0.25, 0.5, 0.75)
ROWS, LENGTHS = (64, 512), (16, 128)
STEPS = 4
KEPT = (0, 2, 3, 7, 8, 11)  # heads
BARS = {"prefix 64": {"slices": 1.5, "small": 0.95}, "prefix 512": {"slices": 1.15, "small": 0.95}}
BARS |= {"heads 128": {"masked": 1.6, "small": 0.9}}
Forward = Callable[[], Tensor]


class Way:
    """A forward, its input and its weights: a call is `STEPS` steps, so that what another way left in the caches
    matters little; gradients added up or fresh."""

    def __init__(self, forward: Callable[[Tensor], Tensor], x: Tensor, weights: Sequence[Tensor], grad: Tensor) -> None:
        self.forward, self.x, self.weights, self.grad, self.fresh = forward, x, weights, grad, False

    def __call__(self) -> None:
        for _ in range(STEPS):
            self.step()

    def step(self) -> None:
        self.x.grad = None
        if self.fresh:
            for weight in self.weights:
                weight.grad = None
        self.forward(self.x).backward(self.grad)

    def gradients(self) -> list[Tensor]:
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)
        self.step()
        return [t.grad.float() for t in (self.x, *self.weights)]  # type: ignore[union-attr]


def made(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device=DEVICE)).to(dtype)


def trained(weight: Tensor) -> Tensor:
    return weight.detach().clone().requires_grad_()


def prefix(dtype: torch.dtype, rows: int, width: float, shape: tuple[int, int]) -> dict[str, Way]:
    """One of the two products of a feed-forward layer, whose inner width is the elastic one."""
    wide = shape[0] > shape[1]
    o, i = (int(width * shape[0]), shape[1]) if wide else (shape[0], int(width * shape[1]))
    x, grad = made(rows, i, dtype=dtype).requires_grad_(), made(rows, o, dtype=dtype)
    weight = made(*shape, dtype=dtype, scale=0.02)
    sliced, ours, small = trained(weight), trained(weight), trained(weight[:o, :i])
    ways: dict[str, tuple[Any, Tensor]] = {
        "slices": (lambda x: F.linear(x, sliced[:o, :i]), sliced),
        "kdfast": (lambda x: kdfast.prefix_linear(x, ours, in_features=i, out_features=o), ours),
        "small": (lambda x: F.linear(x, small), small),
    }
    made_ways = {name: Way(forward, trained(x), [w], grad) for name, (forward, w) in ways.items()}
    agree(made_ways, lambda gradients: [gradients[0], gradients[1][:o, :i]])
    return made_ways


class Attention:
    """Self-attention of some heads, `linears` for queries, keys, values and output."""

    def __init__(self, linears: Sequence[Callable[[Tensor], Tensor]], mask: Tensor | None = None) -> None:
        self.linears, self.mask = linears, mask

    def __call__(self, x: Tensor) -> Tensor:
        heads = (linear(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for linear in self.linears[:3])
        context = F.scaled_dot_product_attention(*heads)
        if self.mask is not None:
            context = context * self.mask
        return self.linears[3](context.transpose(1, 2).flatten(2))


def heads(dtype: torch.dtype, length: int) -> dict[str, Way]:
    kept = torch.tensor(KEPT, device=DEVICE)
    live = (kept[:, None] * (WIDTH // HEADS) + torch.arange(WIDTH // HEADS, device=DEVICE)).flatten()
    mask = torch.zeros(HEADS, 1, 1, device=DEVICE, dtype=dtype).index_fill_(0, kept, 1)
    x, grad = (made(BATCH, length, WIDTH, dtype=dtype) for _ in range(2))
    weights = [made(WIDTH, WIDTH, dtype=dtype, scale=0.02) for _ in range(4)]
    masked, selected, ours = ([trained(w) for w in weights] for _ in range(3))
    small = [*(trained(w[live]) for w in weights[:3]), trained(weights[3][:, live])]
    layers = []
    for i, w in enumerate(ours):
        linear = nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype, device=DEVICE)
        linear.weight = nn.Parameter(w)
        part = {"rows": live} if i < 3 else {"columns": live}
        layers.append(kdfast.nn.SelectedLinear.from_linear(linear, **part))
    dense = lambda ws: [lambda x, w=w: F.linear(x, w) for w in ws]  # noqa: E731
    packed = [lambda x, w=w: F.linear(x, w.index_select(0, live)) for w in selected[:3]]
    packed.append(lambda x: F.linear(x, selected[3].index_select(1, live)))
    ways = {
        "masked": (Attention(dense(masked), mask), masked),
        "select": (Attention(packed), selected),
        "kdfast": (Attention(layers), [layer.weight for layer in layers]),
        "small": (Attention(dense(small)), small),
    }
    made_ways = {name: Way(forward, trained(x), ws, grad) for name, (forward, ws) in ways.items()}

    def parts(gradients: list[Tensor]) -> list[Tensor]:
        full = gradients[1].shape[0] == WIDTH
        return [
            *gradients[:1],
            *(g[live] if full else g for g in gradients[1:4]),
            gradients[4][:, live] if full else gradients[4],
        ]

    agree(made_ways, parts)
    return made_ways


def agree(ways: dict[str, Way], parts: Callable[[list[Tensor]], list[Tensor]]) -> None:
    """Live parts of gradients, against the small layer's: what is wrong is not timed."""
    exact = parts(ways["small"].gradients())
    for name, way in ways.items():
        for ours, theirs in zip(parts(way.gradients()), exact, strict=True):
            error = float((ours - theirs).norm() / theirs.norm())
            if not error < 8 * torch.finfo(way.x.dtype).eps:  # sums in another order, through three layers
                raise AssertionError(f"{name}: a gradient differs by {error:.1e}: not worth timing")


def measure(seconds: float) -> list[dict[str, Any]]:
    results = []

    def time(what: str, ways: dict[str, Way], **facts: Any) -> None:
        for fresh in (False, True):
            for way in ways.values():
                way.fresh = fresh
            times = harness.interleaved(dict(ways), DEVICE, seconds)
            per_step = {name: ms / STEPS for name, ms in times.items()}
            results.append({"what": what, **facts, "fresh": fresh, "ms": per_step})

    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for shape in ((INNER, WIDTH), (WIDTH, INNER)):
            for rows in ROWS:
                for width in WIDTHS:
                    time(f"prefix {rows}", prefix(dtype, rows, width, shape), dtype=name, shape=shape, width=width)
        for length in LENGTHS:
            time(f"heads {length}", heads(dtype, length), dtype=name, shape=(WIDTH, WIDTH), width=0.5)
    return results


def table(results: list[dict[str, Any]]) -> Table:
    made = Table("layer", "dtype", "width", "gradients", "kdfast ms", "× slices or masked", "× small", "bars")
    for r in results:
        ms = r["ms"]
        ours, slow = ms["kdfast"], "masked" if "masked" in ms else "slices"
        ratios = {name: ms[name] / ours for name in (slow, "small")}
        bars = {} if r["fresh"] else BARS.get(r["what"], {})
        missed = [name for name, bar in bars.items() if ratios[name] < bar]
        of = f"{r['what']} {r['shape'][1]}→{r['shape'][0]}"
        verdict = "" if not bars else "below " + ", ".join(missed) if missed else "met"
        numbers = (f"{ours:.2f}", f"{ratios[slow]:.2f}", f"{ratios['small']:.2f}")
        made.add_row(of, r["dtype"], f"{r['width']}", "fresh" if r["fresh"] else "added", *numbers, verdict)
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, help="folder for the results as JSON")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each timing (default 2)")
    options = parser.parse_args()
    torch.manual_seed(0)
    facts = harness.environment(DEVICE)
    with harness.reused_memory():
        results = measure(options.seconds)
    Console(width=120).print(table(results))
    if options.output is not None:
        print(harness.write(results, facts, harness.results_path(facts, options.output, "pruned-linear")))


if __name__ == "__main__":
    main()
