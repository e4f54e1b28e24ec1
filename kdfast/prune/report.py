"""What pruning brought: size, arithmetic and time of a model before and after."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.models import cost
from kdfast.models.cost import Cost
from kdfast.models.inputs import model_inputs, unwrapped

__all__ = ["Cost", "Report", "advice", "report"]

FASTER = 1.05  # less may be chance
BUSY = 1.25  # times the fastest pass: a median in which something else had a part


@dataclass(frozen=True)
class Report:
    """What two models cost for the same batch; printed, a table.

    tokens: rows and tokens of the batch. device: "cpu" or "cuda". threads: of the CPU.
    """

    before: Cost
    after: Cost
    tokens: tuple[int, ...]
    device: str
    threads: int

    @property
    def faster(self) -> float:
        """The medians' ratio: 2.0 is twice as fast."""
        return self.before.ms / self.after.ms

    @property
    def advice(self) -> str | None:
        """What `advice` says of it."""
        return advice(self.before, self.after)

    def __str__(self) -> str:
        old, new = self.before, self.after
        lines = [
            ("", "before", "after", ""),
            _numbers("parameters, M", old.parameters / 1e6, new.parameters / 1e6),
            _numbers("weights, MB", old.megabytes, new.megabytes),
            _numbers("GFLOP", old.gflop, new.gflop),
            ("ms", f"{old.ms:.1f}", f"{new.ms:.1f}", f"{self.faster:.2f} × as fast"),
            ("  fastest–slowest", _spread(old), _spread(new), ""),
        ]
        table = [f"{name:<20}{a:>16}{b:>16}   {ratio}".rstrip() for name, a, b, ratio in lines]
        where = f"{self.threads} threads of the CPU" if self.device == "cpu" else f"the device {self.device}"
        shape = " × ".join(map(str, self.tokens))
        table.append(f"ms: median of {len(old.milliseconds)} forward passes in turn, {shape} tokens, on {where}")
        return "\n".join(table)


def _numbers(name: str, old: float, new: float) -> tuple[str, str, str, str]:
    digits = 1 if old >= 99.95 else 3
    return name, f"{old:.{digits}f}", f"{new:.{digits}f}", f"{new / old:.2f} ×" if old else ""


def _spread(of: Cost) -> str:
    return f"{min(of.milliseconds):.1f}–{max(of.milliseconds):.1f}"


def report(before: nn.Module, after: nn.Module, batch: Mapping[str, Any], *, repeats: int = 15) -> Report:
    """Measures a model before and after pruning: masked (`apply`), or smaller (`compact`).

        before = copy.deepcopy(model)
        kdfast.prune.apply(model, masks)
        print(kdfast.prune.report(before, model, batch))

    Models run in evaluation mode without gradients, in turn, two rounds to warm up and then `repeats`; afterwards they
    are in their own modes again.

    Args:
        before, after: two models of transformers, on the same device, compiled or not.
        batch: what both take: `input_ids` [rows, tokens] on that device, and the like; labels are left out. Take as many
            rows and tokens as the model will get when it is used: small batches are bound by calls, not by arithmetic.
        repeats: forward passes of each.

    Warns:
        UserWarning: it is less than 1.05 times as fast; with the likeliest reason and what to do.

    Raises:
        ValueError: one model given twice, models on two devices, a batch on another, or one without tokens, no repeats.
    """
    if repeats < 1:
        raise ValueError(f"kdfast.prune.report: repeats: expected at least 1, got {repeats}")
    device, tokens = _checked(before, after, batch)
    costs = cost.measured({"before": before, "after": after}, model_inputs(before, batch), device, repeats)
    made = Report(costs["before"], costs["after"], tokens, device, torch.get_num_threads())
    if made.advice is not None:
        warnings.warn(f"kdfast.prune.report: {made.advice}", stacklevel=2)
    return made


def _checked(before: nn.Module, after: nn.Module, batch: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    """The kind of device, and the batch's rows and tokens."""
    if unwrapped(before) is unwrapped(after):
        raise ValueError(
            "kdfast.prune.report: after: expected another model than before, got the same one; apply changes a model in "
            "place: keep copy.deepcopy(model) from before it"
        )
    device = next(before.parameters()).device
    if (found := next(after.parameters()).device) != device:
        raise ValueError(f"kdfast.prune.report: after: expected a model on {device} as before, got one on {found}")
    for name, x in batch.items():
        if isinstance(x, Tensor) and x.device != device:
            raise ValueError(f"kdfast.prune.report: batch: expected {name} on {device}, got {x.device}")
    text = batch.get("input_ids", batch.get("inputs_embeds"))
    if text is None:
        raise ValueError(f"kdfast.prune.report: batch: expected input_ids or inputs_embeds, got {sorted(batch)}")
    return device.type, tuple(text.shape[:2])


def advice(before: Cost, after: Cost) -> str | None:
    """Where `after` is less than 1.05 times as fast: the likeliest reason, and what to do about it."""
    if (faster := before.ms / after.ms) >= FASTER:
        return None
    slowest = max((before, after), key=lambda of: of.ms / min(of.milliseconds))
    if after.gflop > before.gflop / FASTER:
        why = (
            "both compute as much, as weights that are zero are multiplied like all others: kdfast.prune.apply(model, "
            "masks) computes what lives alone, kdfast.prune.compact(model, masks) leaves the rest out"
        )
    elif slowest.ms > BUSY * min(slowest.milliseconds):
        why = (
            f"passes of one model took {_spread(slowest)} ms, so that something else was running: measure again when it "
            "is not"
        )
    elif after.parameters == before.parameters:
        why = (
            "the masked model picks what lives out of weights that are all there: "
            "kdfast.prune.compact(model, masks) makes a smaller one, which need not"
        )
    else:
        why = (
            f"{100 * (1 - after.gflop / before.gflop):.0f} % of the arithmetic is gone, but for so few tokens it takes "
            "less time than starting the operations: measure batches as large as those to come, or drop whole layers "
            "(masks.layers)"
        )
    return f"nothing got faster ({faster:.2f} × as fast): {why}"
