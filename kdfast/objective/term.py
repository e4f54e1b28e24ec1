"""What every term of an objective has: a weight, a mean, and a count of what the mean is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from kdfast.objective.schedules import NOT_NEGATIVE, Weight, check_weight

Inputs = Mapping[str, Any]


class Stored:
    """A teacher of which only columns of the batch are there: `teacher_logits`, `teacher_cls_<state>`, `teacher_hidden_<state>`,
    as `kdfast.teacher_cache` stores them; or what a model without hidden states returned."""

    def __init__(self, outputs: Any, inputs: Inputs) -> None:
        self._outputs, self._inputs = outputs, inputs

    @property
    def logits(self) -> Tensor | None:
        found: Tensor | None = getattr(self._outputs, "logits", self._inputs.get("teacher_logits"))
        return found

    def state(self, kind: str, number: int) -> Tensor | None:
        found: Tensor | None = self._inputs.get(f"teacher_{kind}_{number}")
        return found


class Term(nn.Module):
    """One weighted term of `kdfast.objective.Terms`.

    A subclass gives `forward(student, teacher, inputs)`, the mean over what `count(inputs)` counts, without the weight;
    `student` and `teacher` have `.logits`, and what `needs` asks for. A column `sample_weight` is the subclass's to read.

    Args:
        weight: a number, or a schedule: a function of the share of the training that is done.

    Raises:
        TypeError, ValueError: a weight that is no number, or negative, at any time of the training.

    Attributes:
        needs: "" for logits, "hidden" for hidden states too, "attention" for queries, keys and values too
            (`kdfast.hf.Features`).
    """

    needs = ""

    def __init__(self, weight: Weight = 1.0) -> None:
        super().__init__()
        self.weight = weight
        for progress in (0.0, 1.0):  # a schedule that goes wrong is told now, not when training gets there
            self.weight_at(progress)

    def weight_at(self, progress: float) -> float:
        weight = self.weight(progress) if callable(self.weight) else self.weight
        check_weight(type(self).__name__, "weight", weight, f"{NOT_NEGATIVE}, or a schedule of such numbers")
        return weight

    def count(self, inputs: Inputs) -> Tensor:
        """Rows, unless a subclass counts something else; a scalar."""
        return torch.tensor(len(_any_column(inputs)))

    def refuse(self, argument: str, expected: str, got: Any, error: type[Exception] = ValueError) -> NoReturn:
        raise error(f"{type(self).__name__}: {argument}: expected {expected}, got {got!r}")

    def extra_repr(self) -> str:
        shown = {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "training"}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def _any_column(inputs: Inputs) -> Tensor:
    column: Tensor = next(inputs[name] for name in ("input_ids", "inputs_embeds", "labels", *inputs) if name in inputs)
    return column


def check_per_row(who: str, inputs: Inputs) -> None:
    """A negative number is refused on the CPU; on a device, where that would wait, it is taken as it is."""
    for column in ("sample_weight", "sample_temperature"):
        if column not in inputs:
            continue
        values, rows = inputs[column], len(_any_column(inputs))
        if values.shape != (rows,):
            raise ValueError(f"{who}: {column}: expected shape [{rows}], a number per row, got {list(values.shape)}")
        if values.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((values >= 0).all()):
            raise ValueError(f"{who}: {column}: expected numbers that are not negative, got {values.min().item()}")


def token_mask(inputs: Inputs) -> Tensor:
    """[B, L], True where a token is no padding."""
    if "attention_mask" in inputs:
        mask: Tensor = inputs["attention_mask"].bool()
        return mask
    ids = _any_column(inputs)
    return torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
