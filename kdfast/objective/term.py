"""What every term of an objective has: a weight, a mean, and a count of what the mean is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from kdfast.models.inputs import TEACHER
from kdfast.objective._protocol import Missing
from kdfast.objective.schedules import NOT_NEGATIVE, Weight, check_weight

Inputs = Mapping[str, Any]


class Stored:
    """A teacher of which only columns of the batch are there: `teacher_logits`, `teacher_cls_<state>`,
    `teacher_hidden_<state>`, as `kdfast.teacher_cache` stores them; or what a model without hidden states returned."""

    def __init__(self, outputs: Any, inputs: Inputs) -> None:
        self.outputs, self._inputs = outputs, inputs

    @property
    def logits(self) -> Tensor | None:
        return self.output("logits")

    def output(self, name: str) -> Tensor | None:
        found: Tensor | None = getattr(self.outputs, name, self._inputs.get(TEACHER + name))
        return found

    def state(self, kind: str, number: int) -> Tensor | None:
        return self.output(f"{kind}_{number}")

    def has(self, kind: str) -> bool:
        return any(name.startswith(f"{TEACHER}{kind}_") for name in self._inputs)


class Term(nn.Module):
    """One weighted term of `kdfast.objective.Terms`.

    A subclass gives `forward(student, teacher, inputs)`, the mean over what `count(inputs)` counts, without the weight;
    `student` and `teacher` have `.logits`, and what `needs` asks for.
    A column `sample_weight` is the subclass's to read.

    Args:
        weight: a number, or a schedule: a function of the share of the training that is done.

    Raises:
        TypeError, ValueError: a weight that is no number, or negative, at any time of the training.

    Attributes:
        needs: "" for logits, "hidden" for hidden states too, "attention" for queries, keys and values too
            (`kdfast.hf.Features`), "branches" for the logits of every layer's classifier (`kdfast.early_exit`).
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

    def for_models(self, student: Any, teacher: Any) -> None:
        """Makes what depends on both models, such as a projection between their widths. The teacher may be None."""

    def count(self, inputs: Inputs) -> Tensor:
        """Rows, unless a subclass counts something else; a scalar."""
        return torch.tensor(rows_of(inputs))

    def output(self, side: Any, name: str, *, teacher: bool = False, instead: str = "") -> Tensor:
        """What a model returned by this name, such as "logits". `instead`:
        what to use where a model has no such output."""
        found = side.output(name) if isinstance(side, Stored) else getattr(side, name, None)
        holder = getattr(side, "outputs", side)
        found = getattr(holder, name, None) if found is None else found
        if isinstance(found, Tensor):
            return found
        who = type(self).__name__
        if teacher and (holder is None or hasattr(holder, name)):
            raise Missing(f"{who}: teacher: expected one, or rows with a {TEACHER}{name} column, got neither")
        got = type(holder).__name__ + (f" of {', '.join(holder)}" if isinstance(holder, Mapping) else "")
        whose = "teacher" if teacher else "student"
        raise ValueError(f"{who}: outputs: expected a {whose}'s with .{name}{instead}, got {got}")

    def refuse(self, argument: str, expected: str, got: Any, error: type[Exception] = ValueError) -> NoReturn:
        raise error(f"{type(self).__name__}: {argument}: expected {expected}, got {got!r}")

    def extra_repr(self) -> str:
        shown = {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "training"}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def any_column(inputs: Inputs) -> Tensor:
    names = ("input_ids", "inputs_embeds", "labels", *inputs)
    columns = (inputs[name] for name in names if name in inputs)
    for column in columns:
        if isinstance(column, Tensor) and column.dim():
            return column
    raise ValueError(f"objective: inputs: expected a batch with columns of tensors, got {', '.join(inputs) or 'none'}")


def rows_of(inputs: Inputs) -> int:
    """B."""
    return len(any_column(inputs))


def check_per_row(who: str, inputs: Inputs) -> None:
    """A negative number is refused on the CPU; on a device, where that would wait, it is taken as it is."""
    for column in ("sample_weight", "sample_temperature"):
        if column not in inputs:
            continue
        values, rows = inputs[column], rows_of(inputs)
        if values.shape != (rows,):
            raise ValueError(f"{who}: {column}: expected shape [{rows}], a number per row, got {list(values.shape)}")
        if values.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((values >= 0).all()):
            raise ValueError(f"{who}: {column}: expected numbers that are not negative, got {values.min().item()}")


def check_aligned(who: str, inputs: Inputs) -> None:
    """That a teacher with a tokenizer of its own read as many tokens of every row,
    as what is compared token by token needs.

    Masks on a device, where it would wait, are not compared.
    """
    own, its = (inputs.get(f"{side}input_ids") for side in ("", TEACHER))
    if own is None or its is None:
        return
    expected = (
        "the tokens of input_ids, one by one (of other tokens: terms of whole sequences, such as Logits() and CLS; of "
        "language models: ULD and GOLD)"
    )
    if own.shape != its.shape:
        raise ValueError(f"{who}: {TEACHER}input_ids: expected {expected}, {list(own.shape)}, got {list(its.shape)}")
    masks = [inputs.get(f"{side}attention_mask") for side in ("", TEACHER)]
    lengths = [None if mask is None else mask.bool().sum(-1) for mask in masks]
    counts = [torch.full_like(own[:, 0], own.shape[1]) if n is None else n for n in lengths]
    if own.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.equal(*counts):
        got = [n.tolist() for n in counts]
        raise ValueError(f"{who}: {TEACHER}input_ids: expected {expected}, {got[0]} of each row, got {got[1]}")


def token_mask(inputs: Inputs, shape: Sequence[int] | None = None) -> Tensor:
    """[B, L], True where a token is no padding.

    Args:
        inputs: the batch. Without an `attention_mask` all tokens count.
        shape: (B, L) of the hidden states, which a batch of images says nothing about.

    Raises:
        ValueError: an `attention_mask` of another shape, as models of sound that shorten their inputs have it.
    """
    if "attention_mask" in inputs:
        mask: Tensor = inputs["attention_mask"].bool()
        if shape is not None and mask.shape != torch.Size(shape):
            expected = f"the hidden states' {list(shape)}, a number for each token"
            raise ValueError(f"kdfast.objective: attention_mask: expected {expected}, got {list(mask.shape)}")
        return mask
    ids = any_column(inputs)
    return torch.ones(*(ids.shape[:2] if shape is None else shape), dtype=torch.bool, device=ids.device)


def divisor(items: Tensor | float) -> Tensor:
    """The divisor of a sum over items, of which there may be less than one: the trainer averages their number over
    processes. Where there are none, the sum is 0, and so is what is divided."""
    return torch.as_tensor(items).clamp(min=1e-6)


def tokens_of_rows(inputs: Inputs, masked: bool = True) -> Tensor:
    """[B]: how many tokens of each row count, with padding where not `masked`.

    1 where the batch does not tell, as of images, rows of which have equally many tokens: their shares are the same.
    """
    if masked and "attention_mask" in inputs:
        counts: Tensor = inputs["attention_mask"].bool().sum(-1)
        return counts
    columns = [inputs[name] for name in ("attention_mask", "input_ids", "inputs_embeds") if name in inputs]
    length, rows = columns[0].shape[1] if columns else 1, any_column(inputs)
    return torch.full((len(rows),), length, device=rows.device)
