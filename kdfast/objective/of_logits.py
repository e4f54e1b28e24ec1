"""Terms of logits: the teacher's, and the labels."""

from __future__ import annotations

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import kdfast
from kdfast.objective.schedules import Weight
from kdfast.objective.term import Inputs, Term, token_mask
from kdfast.ops import _checks
from kdfast.ops._divergence import check_divergence

TASKS = ("classification", "multi_label", "regression", "tokens")


class Logits(Term):
    """T² · D(student, teacher): a divergence of kdfast between softened logits [B, C], or [B, L, V] of tokens.

    Args:
        divergence: "kl_div" (teacher ‖ student) or another of kdfast's.
        weight: a number or a schedule.
        temperature: T. A column `sample_temperature` [B] of the batch takes its place row by row.
        t_squared: multiply by T², which keeps the gradient's size when T changes (Hinton et al., 2015; TinyBERT's and
            TextBrewer's code do not).
        per_class: divide by the number of classes too, as torch's `KLDivLoss(reduction="mean")` in Patient-KD's code and
            the prediction loss of TinyBERT's do.
        tokens: None for logits [B, C]; "all" for tokens that are no padding, "labels" for those whose label is not -100.
        **settings: of the divergence: `vocab_size`, of `js_div` also `beta`, of the skewed ones `skew`.

    A column `sample_weight` [B] of the batch multiplies every row's loss; it stays out of the divisor.

    Raises:
        TypeError: an argument that neither this class nor the divergence has.
        ValueError: a setting out of range, a batch without a teacher's logits, or logits of another form than `tokens` says.
    """

    def __init__(
        self,
        divergence: str = "kl_div",
        *,
        weight: Weight = 1.0,
        temperature: float = 1.0,
        t_squared: bool = True,
        per_class: bool = False,
        tokens: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(weight)
        who = type(self).__name__
        check_divergence(who, divergence)
        _checks.check_temperature_number(who, temperature)
        if tokens not in (None, "all", "labels"):
            self.refuse("tokens", "None, 'all' or 'labels'", tokens)
        takes = inspect.signature(getattr(kdfast, divergence)).parameters
        own = [name for name in ("vocab_size", "beta", "skew") if name in takes]
        for name, value in settings.items():
            if name not in own:
                known = ", ".join(["weight, temperature, t_squared, per_class, tokens", *own])
                self.refuse("arguments", f"some of {known} beside {divergence!r}", name, TypeError)
            if name != "vocab_size":
                _checks.check_fraction(who, name, value, below_one=name == "skew")
        self.divergence, self.temperature, self.t_squared = divergence, temperature, t_squared
        self.per_class, self.tokens, self.settings = per_class, tokens, settings

    def count(self, inputs: Inputs) -> Tensor:
        if self.tokens == "labels" and "labels" not in inputs:
            return super().count(inputs)
        mask = self._mask(inputs)
        return super().count(inputs) if mask is None else mask.sum()

    def forward(self, student: Any, teacher: Any, inputs: Inputs) -> Tensor:
        if teacher.logits is None:
            raise ValueError("Logits: needs a teacher, or rows with a teacher_logits column")
        dims = 2 if self.tokens is None else 3
        if student.logits.dim() != dims:
            expected = "[batch, classes]" if dims == 2 else "[batch, length, vocabulary]"
            self.refuse("logits", f"{expected} with tokens={self.tokens!r}", list(student.logits.shape))
        temperature, weight = inputs.get("sample_temperature", self.temperature), inputs.get("sample_weight")
        factor = temperature**2 if self.t_squared else 1.0
        if isinstance(factor, Tensor):
            weight, factor = factor if weight is None else factor * weight, 1.0
        rows = (-1, *[1] * (dims - 2))
        loss: Tensor = getattr(kdfast, self.divergence)(
            student.logits,
            teacher.logits,
            temperature=temperature.float().view(rows) if isinstance(temperature, Tensor) else temperature,
            mask=self._mask(inputs),
            weight=None if weight is None else weight.float().view(rows),
            **self.settings,
        )
        classes = self.settings.get("vocab_size") or student.logits.shape[-1]
        return loss * (factor / classes if self.per_class else factor)

    def _mask(self, inputs: Inputs) -> Tensor | None:
        if self.tokens is None:
            return None
        if self.tokens == "all":
            return token_mask(inputs)
        if "labels" not in inputs:
            raise ValueError("Logits: needs rows with labels with tokens='labels'")
        counted: Tensor = inputs["labels"] != -100
        return counted


class Labels(Term):
    """The loss of the student against the labels of the batch.

    Args:
        task: "classification": cross-entropy of logits [B, C] with class numbers [B]; "multi_label": binary cross-entropy
            with labels [B, C], mean over classes; "regression": squared error of logits [B] or [B, 1] with numbers [B], or
            of logits and labels [B, C], mean over C; "tokens": cross-entropy of logits [B, L, V] with labels [B, L], of masked language models: nothing is shifted.
        weight: a number or a schedule.
        label_smoothing: of the cross-entropies.

    Rows or tokens with the label -100 do not count. A column `sample_weight` [B] of the batch multiplies every row's loss; it
    stays out of the divisor.

    Raises:
        TypeError: class numbers that are not int64.
        ValueError: a setting out of range, a batch without labels, logits or labels of another form than `task` says, or
            class numbers out of range (seen on the CPU only: on a device, where that would wait, torch's cross-entropy
            stops the program).
    """

    def __init__(self, task: str = "classification", *, weight: Weight = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__(weight)
        if task not in TASKS:
            self.refuse("task", f"one of {', '.join(TASKS)}", task)
        _checks.check_fraction(type(self).__name__, "label_smoothing", label_smoothing)
        self.task, self.label_smoothing = task, label_smoothing

    def count(self, inputs: Inputs) -> Tensor:
        if self.task in ("classification", "tokens") and "labels" in inputs:
            counted: Tensor = (inputs["labels"] != -100).sum()
            return counted
        return super().count(inputs)

    def forward(self, student: Any, teacher: Any, inputs: Inputs) -> Tensor:
        if "labels" not in inputs:
            raise ValueError("Labels: needs rows with labels")
        labels, logits, weight = inputs["labels"], student.logits, inputs.get("sample_weight")
        self._check_shapes(logits, labels)
        dtype = _checks.loss_dtype(logits)
        if self.task in ("classification", "tokens"):
            _checks.check_labels(type(self).__name__, labels, None, logits, logits.shape[-1], -100)
            counted = labels != -100
            if weight is not None:
                weight = weight.view(-1, *[1] * (labels.dim() - 1)).expand_as(labels)[counted]
            # Of the logits of a vocabulary, only the rows that count.
            losses = F.cross_entropy(
                logits[counted].to(dtype), labels[counted], reduction="none", label_smoothing=self.label_smoothing
            )
        elif self.task == "multi_label":
            losses = F.binary_cross_entropy_with_logits(logits.to(dtype), labels.to(dtype), reduction="none").mean(-1)
        else:
            losses = (logits.to(dtype).view(labels.shape) - labels.to(dtype)) ** 2
            losses = losses.flatten(1).mean(1) if losses.dim() > 1 else losses  # one of each row, as weights are
        total = losses.sum() if weight is None else (weight * losses).sum()
        return total / max(losses.numel(), 1)

    def _check_shapes(self, logits: Tensor, labels: Tensor) -> None:
        shape = logits.shape
        if self.task == "regression":
            expected = shape[:1] if logits.numel() == shape[0] else shape
            fits = labels.shape[:1] == shape[:1] and labels.numel() == logits.numel()
        else:
            form = "[batch, length, vocabulary]" if self.task == "tokens" else "[batch, classes]"
            if logits.dim() != form.count(",") + 1:
                self.refuse("logits", f"{form} for task {self.task!r}", list(shape))
            expected = shape if self.task == "multi_label" else shape[:-1]
            fits = labels.shape == expected
        if not fits:
            of = f"shape {list(expected)} for task {self.task!r} with logits of shape {list(shape)}"
            self.refuse("labels", of, list(labels.shape))
