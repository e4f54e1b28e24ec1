"""How long layers with fewer heads and neurons take on this machine: measured once, kept as JSON, asked by selection."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.models import cost
from kdfast.models.inputs import model_inputs, unwrapped
from kdfast.ops import _checks
from kdfast.prune.compact import compact
from kdfast.prune.costs import Costs, calls
from kdfast.prune.layers import layers_of
from kdfast.prune.masks import Masks

__all__ = ["LatencyTable", "latency_table"]

_OP = "kdfast.prune.latency_table"
_STEPS = 8  # sizes of the feed-forward network that are measured, unless others are asked for


@dataclass(frozen=True)
class LatencyTable(Costs):
    """Milliseconds of one layer's attention with so many heads, and of its feed-forward network with so many neurons,
    between which it takes straight lines, of a batch of rows · tokens; `rest` is what remains of the model.

    calls: how often each layer runs, 1 but in ALBERT. device: "cpu" or "cuda"; threads: of the CPU. More rows or tokens are another table.
    """

    heads: dict[int, float]
    neurons: dict[int, float]
    rest: float
    calls: tuple[int, ...]
    rows: int
    tokens: int
    device: str
    threads: int

    unit = "ms"

    def layer(self, i: int, heads: Tensor, neurons: Tensor) -> float:
        return self.calls[i] * (_between(self.heads, int(heads.sum())) + _between(self.neurons, int(neurons.sum())))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """What `to_json` wrote.

        Raises:
            ValueError: other text.
        """
        try:
            given = json.loads(text)
            for name in ("heads", "neurons"):
                given[name] = {int(count): float(ms) for count, ms in given[name].items()}
            return cls(**{**given, "calls": tuple(given["calls"])})
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            got = f"{type(error).__name__}: {error}"
            _checks.wrong_value("kdfast.prune.LatencyTable.from_json", "text", "what to_json writes", got)


def latency_table(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    heads: Sequence[int] | None = None,
    neurons: Sequence[int] | None = None,
    repeats: int = 15,
) -> LatencyTable:
    """Measures layers of several sizes on this machine, in turn.

        table = kdfast.prune.latency_table(model, batch)
        Path("latency.json").write_text(table.to_json())
        masks = kdfast.prune.select(model, scores, target=0.5, cost=table)

    Of the model's first layer alone, without what is around the layers: the median of its forward passes with so many
    heads and no neurons, or so many neurons and no heads, less that with neither. What comes out is made to grow with the
    size, as fewer never takes longer but by chance. `rest` is the whole model's time less that of its layers.

    Args:
        model: of transformers, whose layers are of one shape, without masks.
        batch: of the rows and tokens that the model will get, on its device.
        heads, neurons: the numbers that are measured; None: all numbers of heads, and eighths of the neurons.
        repeats: forward passes of each.

    Raises:
        TypeError, ValueError: model as in `compact`; layers of different shapes; numbers of heads or neurons that a
            layer does not have; a batch without `input_ids`.
    """
    layers, inner = layers_of(model, _OP), unwrapped(model)
    shapes = {(layer.heads, layer.neurons) for layer in layers}
    if len(shapes) != 1:
        _checks.wrong_value(_OP, "model", "layers of one shape", f"(heads, neurons) of {sorted(shapes)}")
    if "input_ids" not in batch:
        _checks.wrong_value(_OP, "batch", "input_ids among its columns", sorted(batch))
    whole = layers[0]
    counts = {
        "heads": _numbers("heads", heads, range(1, whole.heads + 1), whole.heads),
        "neurons": _numbers("neurons", neurons, _eighths(whole.neurons), whole.neurons),
    }
    models: dict[str, nn.Module] = {"whole": inner, "none": _small(inner, 0, 0)}
    models |= {f"heads {n}": _small(inner, n, 0) for n in counts["heads"]}
    models |= {f"neurons {n}": _small(inner, 0, n) for n in counts["neurons"]}
    taken = cost.latencies_ms(models, model_inputs(inner, batch), inner.device.type, repeats)
    ms = {name: float(torch.tensor(of).median()) for name, of in taken.items()}
    called = calls(inner, layers)
    times = sum(called) if inner.config.model_type == "albert" else 1
    found = {
        kind: _growing({n: (ms[f"{kind} {n}"] - ms["none"]) / times for n in numbers})
        for kind, numbers in counts.items()
    }
    rest = ms["whole"] - sum(called) * (found["heads"][whole.heads] + found["neurons"][whole.neurons])
    rows, tokens = batch["input_ids"].shape
    return LatencyTable(
        **found,
        rest=max(rest, 0.0),
        calls=tuple(called),
        rows=rows,
        tokens=tokens,
        device=inner.device.type,
        threads=torch.get_num_threads(),
    )


def _small(model: Any, heads: int, neurons: int) -> nn.Module:
    """One layer with so many heads and neurons, of ALBERT all, without the model's head."""
    masks = Masks.full(model)
    masks.layers[1:] = model.config.model_type == "albert"
    for of_heads, of_neurons in zip(masks.heads, masks.neurons, strict=True):
        of_heads[heads:], of_neurons[neurons:] = False, False
    made: nn.Module = compact(model, masks).base_model
    return made


def _numbers(name: str, given: Sequence[int] | None, default: Sequence[int], most: int) -> list[int]:
    """Those to measure, the largest among them."""
    found = sorted({*(default if given is None else given), most})
    if found[0] < 1 or found[-1] > most:
        _checks.wrong_value(_OP, name, f"numbers from 1 to {most}", found)
    return found


def _eighths(neurons: int) -> list[int]:
    return [max(1, neurons * i // _STEPS) for i in range(1, _STEPS + 1)]


def _growing(ms: dict[int, float]) -> dict[int, float]:
    found, most = {0: 0.0}, 0.0
    for count, each in sorted(ms.items()):
        found[count] = most = max(most, each)
    return found


def _between(ms: dict[int, float], count: int) -> float:
    """On the straight line between its neighbours."""
    if count in ms:
        return ms[count]
    known = sorted(ms)
    place = min(bisect_left(known, count), len(known) - 1)
    low, high = known[place - 1], known[place]
    return ms[low] + (ms[high] - ms[low]) * (count - low) / (high - low)
