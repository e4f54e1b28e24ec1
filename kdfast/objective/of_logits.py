"""Terms of logits: the teacher's, and the labels."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from kdfast.data.text import OFF
from kdfast.objective._protocol import Missing
from kdfast.objective.schedules import Weight
from kdfast.objective.term import Inputs, Term, check_aligned, token_mask, tokens_of_rows
from kdfast.ops import _checks
from kdfast.ops._divergence import check_divergence

TASKS = ("classification", "multi_label", "regression", "tokens", "next_tokens", "spans")
POSITIONS = ("start_positions", "end_positions")
SPANS = " (of question answering: kdfast.objective.Spans, and Labels('spans'))"


class _Soft(Term):
    """A divergence between softened logits, times T²."""

    known: tuple[str, ...] = ("vocab_size", "beta", "skew")  # settings of divergences

    def __init__(
        self, divergence: str, weight: Weight, temperature: float, t_squared: bool, settings: dict[str, Any], names: str
    ) -> None:
        super().__init__(weight)
        who = type(self).__name__
        check_divergence(who, divergence)
        _checks.check_temperature_number(who, temperature)
        takes = inspect.signature(getattr(kdfast, divergence)).parameters
        own = [name for name in self.known if name in takes]
        for name, value in settings.items():
            if name not in own:
                self.refuse("arguments", f"some of {', '.join([names, *own])} beside {divergence!r}", name, TypeError)
            if name != "vocab_size":
                _checks.check_fraction(who, name, value, below_one=name == "skew")
        self.divergence, self.temperature, self.t_squared, self.settings = divergence, temperature, t_squared, settings

    def distance(self, student: Tensor, teacher: Tensor, inputs: Inputs, mask: Tensor | None) -> Tensor:
        """T² · D of logits [B, ..., C], with the temperatures and weights that rows have of their own."""
        options, factor = self.of_rows(student, inputs, self.temperature)
        loss: Tensor = getattr(kdfast, self.divergence)(student, teacher, mask=mask, **options, **self.settings)
        return loss * factor

    def of_rows(self, student: Tensor, inputs: Inputs, temperature: float) -> tuple[dict[str, Any], float]:
        """Temperature and weights for a divergence of logits [B, ..., C], T² among them where rows have
        temperatures of their own, and what to multiply its result by."""
        own, weight = inputs.get("sample_temperature", temperature), inputs.get("sample_weight")
        factor = own**2 if self.t_squared else 1.0
        if isinstance(factor, Tensor):
            weight, factor = factor if weight is None else factor * weight, 1.0
        rows, dtype = (-1, *[1] * (student.dim() - 2)), _checks.loss_dtype(student)
        options = {
            "temperature": own.to(dtype).view(rows) if isinstance(own, Tensor) else own,
            "weight": None if weight is None else weight.to(dtype).view(rows),
        }
        return options, factor


class Logits(_Soft):
    """T² · D(student, teacher): a divergence of kdfast between softened logits [B, C], or [B, L, V] of tokens.

    Args:
        divergence: "kl_div" (teacher ‖ student) or another of kdfast's.
        weight: a number or a schedule.
        temperature: T. A column `sample_temperature` [B] of the batch takes its place row by row.
        t_squared: multiply by T², which keeps the gradient's size when T changes (Hinton et al., 2015; TinyBERT's and
            TextBrewer's code do not).
        per_class: divide by the number of classes too, as torch's `KLDivLoss(reduction="mean")` in Patient-KD's code
            and the prediction loss of TinyBERT's do.
        tokens: None for logits [B, C]; "all" for tokens that are no padding,
            "labels" for those whose label is not -100.
        **settings: of the divergence: `vocab_size`, of `js_div` also `beta`, of the skewed ones `skew`.

    A column `sample_weight` [B] of the batch multiplies every row's loss; it stays out of the divisor.

    Raises:
        TypeError: an argument that neither this class nor the divergence has.
        ValueError: a setting out of range, a batch without a teacher's logits,
            or logits of another form than `tokens` says.
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
        names = "weight, temperature, t_squared, per_class, tokens"
        super().__init__(divergence, weight, temperature, t_squared, settings, names)
        if tokens not in (None, "all", "labels"):
            self.refuse("tokens", "None, 'all' or 'labels'", tokens)
        self.per_class, self.tokens = per_class, tokens

    def count(self, inputs: Inputs) -> Tensor:
        if self.tokens is None or (self.tokens == "labels" and "labels" not in inputs):
            return super().count(inputs)
        return tokens_of_rows(inputs).sum() if self.tokens == "all" else (inputs["labels"] != OFF).sum()

    def forward(self, student: Any, teacher: Any, inputs: Inputs) -> Tensor:
        s, t = self.output(student, "logits", instead=SPANS), self.output(teacher, "logits", teacher=True)
        dims = 2 if self.tokens is None else 3
        if s.dim() != dims:
            expected = "[batch, classes]" if dims == 2 else "[batch, length, vocabulary]"
            self.refuse("logits", f"{expected} with tokens={self.tokens!r}", list(s.shape))
        if s.shape[-1] == 1 and self.divergence != "logit_mse":  # a softmax of one number is 1, whatever it is
            self.refuse("logits", "two classes or more (of a regression: Logits('logit_mse'))", list(s.shape))
        if self.tokens is not None:
            check_aligned(type(self).__name__, inputs)
        loss = self.distance(s, t, inputs, self._mask(inputs, s))
        return loss / (self.settings.get("vocab_size") or s.shape[-1]) if self.per_class else loss

    def _mask(self, inputs: Inputs, logits: Tensor) -> Tensor | None:
        if self.tokens is None:
            return None
        if self.tokens == "all":
            return token_mask(inputs, logits.shape[:2])
        if "labels" not in inputs:
            raise Missing(f"Logits: inputs: expected rows with labels for tokens='labels', got {', '.join(inputs)}")
        counted: Tensor = inputs["labels"] != OFF
        return counted


class Spans(_Soft):
    """T² · (D(start) + D(end)) / 2: a divergence of kdfast between the softened start and end logits
    [B, L] of question answering.

    Padding, by the batch's `attention_mask`, is no position.

    Args:
        divergence, weight, temperature, t_squared: as of `Logits`, without "logit_mse".
        **settings: `beta` of `js_div`, `skew` of the skewed ones.

    The columns `sample_weight` and `sample_temperature` are as of `Logits`; `teacher_start_logits` and
    `teacher_end_logits` [B, L] stand for a teacher. The labels are the task "spans" of `Labels`.

    Raises:
        TypeError, ValueError: as `Logits`; a teacher whose tokens are not the student's.
    """

    known = ("beta", "skew")

    def __init__(
        self,
        divergence: str = "kl_div",
        *,
        weight: Weight = 1.0,
        temperature: float = 1.0,
        t_squared: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(divergence, weight, temperature, t_squared, settings, "weight, temperature, t_squared")
        if divergence == "logit_mse":
            self.refuse("divergence", "one of probabilities", divergence)

    def forward(self, student: Any, teacher: Any, inputs: Inputs) -> Tensor:
        check_aligned(type(self).__name__, inputs)

        def of(name: str) -> Tensor:
            sides = self.output(student, name), self.output(teacher, name, teacher=True)
            on = token_mask(inputs, sides[0].shape)
            # Columns that are -inf on both sides count for nothing.
            s, t = (x.masked_fill(~on, -torch.inf) for x in sides)
            return self.distance(s, t, inputs, on.any(-1))

        return (of("start_logits") + of("end_logits")) / 2


class Labels(Term):
    """The loss of the student against the labels of the batch.

    Args:
        task: "classification": cross-entropy of logits [B, C] with class numbers [B]; "multi_label": binary
            cross-entropy with labels [B, C], mean over classes; "regression": squared error of logits [B] or [B, 1]
            with numbers [B], or of logits and labels [B, C], mean over C; "tokens": cross-entropy of logits [B, L, V]
            with labels [B, L], of masked language models: nothing is shifted; "next_tokens": the same of causal ones,
            each place's logits with the next one's label (where no other term needs logits, `LanguageModel` has this
            without them); "spans": of question answering, mean cross-entropy of the start and end logits [B, L] with
            `start_positions` and `end_positions` [B], over positions that are no padding, as of `Spans` (transformers'
            own loss has padding among them, and so depends on the batch). Labels beyond a row's own positions do not
            count; negative ones are 0, as in transformers.
        weight: a number or a schedule.
        label_smoothing: of the cross-entropies.

    Rows or tokens with the label -100 do not count. A column `sample_weight` [B] of the batch multiplies every row's
    loss; it stays out of the divisor.

    Raises:
        TypeError: class numbers that are not int64.
        ValueError: a setting out of range, a batch without labels, logits or labels of another form than `task` says,
            or class numbers out of range (seen on the CPU only: on a device, where that would wait, torch's
            cross-entropy stops the program).
    """

    def __init__(self, task: str = "classification", *, weight: Weight = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__(weight)
        if task not in TASKS:
            self.refuse("task", f"one of {', '.join(TASKS)}", task)
        _checks.check_fraction(type(self).__name__, "label_smoothing", label_smoothing)
        self.task, self.label_smoothing = task, label_smoothing

    def count(self, inputs: Inputs) -> Tensor:
        if self.task == "spans" and all(name in inputs for name in POSITIONS):
            return (_positions(inputs, token_mask(inputs)) != OFF).sum()
        if self.task in ("classification", "tokens", "next_tokens") and "labels" in inputs:
            counted: Tensor = inputs["labels"] != OFF
            return (counted[:, 1:] if self.task == "next_tokens" else counted).sum()
        return super().count(inputs)

    def forward(self, student: Any, teacher: Any, inputs: Inputs) -> Tensor:
        logits, labels, weight = self._targets(student, inputs)
        self._check_shapes(logits, labels)
        dtype = _checks.loss_dtype(logits)
        if self.task not in ("multi_label", "regression"):
            if labels.is_floating_point():
                others = "numbers: Labels('regression'); a 0 or 1 for each class: Labels('multi_label')"
                self.refuse("labels", f"an int64 tensor of class indices ({others})", labels.dtype, TypeError)
            _checks.check_labels(type(self).__name__, labels, None, logits, logits.shape[-1], OFF)
            counted = labels != OFF
            if weight is not None:
                weight = weight.view(-1, *[1] * (labels.dim() - 1)).expand_as(labels)[counted]
            # Only the rows that count: logits of a vocabulary are wide.
            logits, labels = logits[counted].to(dtype), labels[counted]
            smoothing, spans = self.label_smoothing, self.task == "spans"
            losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.0 if spans else smoothing)
            if spans and smoothing:
                losses = (1 - smoothing) * losses + smoothing * _to_every_position(logits)
        elif self.task == "multi_label":
            losses = F.binary_cross_entropy_with_logits(logits.to(dtype), labels.to(dtype), reduction="none").mean(-1)
        else:
            losses = (logits.to(dtype).view(labels.shape) - labels.to(dtype)) ** 2
            losses = losses.flatten(1).mean(1) if losses.dim() > 1 else losses  # one of each row, as weights are
        total = losses.sum() if weight is None else (weight * losses).sum()
        return total / max(losses.numel(), 1)

    def _targets(self, student: Any, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits, labels and row weights; of spans, the starts with the ends below them."""
        names, weight = POSITIONS if self.task == "spans" else ("labels",), inputs.get("sample_weight")
        if lacking := [name for name in names if name not in inputs]:
            raise Missing(f"Labels: inputs: expected rows with {', '.join(lacking)}, got {', '.join(inputs)}")
        if self.task != "spans":
            logits, labels = self.output(student, "logits", instead=SPANS), inputs["labels"]
            if self.task == "next_tokens" and logits.dim() == 3 and labels.shape == logits.shape[:2]:
                return logits[:, :-1], labels[:, 1:], weight
            return logits, labels, weight
        both = [self.output(student, name) for name in ("start_logits", "end_logits")]
        on = token_mask(inputs, both[0].shape)
        logits = torch.cat([x.to(_checks.loss_dtype(x)) for x in both])  # before: autocast joins no float16 on a CPU
        logits = logits.masked_fill(~on.repeat(2, 1), -torch.inf)
        return logits, _positions(inputs, on), None if weight is None else weight.repeat(2)

    def _check_shapes(self, logits: Tensor, labels: Tensor) -> None:
        shape = logits.shape
        if self.task == "regression":
            expected = shape[:1] if logits.numel() == shape[0] else shape
            fits = labels.shape[:1] == shape[:1] and labels.numel() == logits.numel()
        else:
            form = "[batch, length, vocabulary]" if self.task in ("tokens", "next_tokens") else "[batch, classes]"
            if logits.dim() != form.count(",") + 1:
                self.refuse("logits", f"{form} for task {self.task!r}", list(shape))
            expected = shape if self.task == "multi_label" else shape[:-1]
            fits = labels.shape == expected
        if not fits:
            of = f"shape {list(expected)} for task {self.task!r} with logits of shape {list(shape)}"
            self.refuse("labels", of, list(labels.shape))


def _positions(inputs: Inputs, on: Tensor) -> Tensor:
    """The labels of spans, [2B], starts before ends; -100 where they are none of the positions that are on, [B, L]."""
    labels = torch.cat([inputs[name].flatten() for name in POSITIONS]).clamp(min=0)
    length = on.shape[1]
    there = on.repeat(2, 1).gather(1, labels.clamp(max=length - 1)[:, None])[:, 0]
    return torch.where(there & (labels < length), labels, OFF)


def _to_every_position(logits: Tensor) -> Tensor:
    """Cross-entropies [N] of logits [N, L] with equal chances for all positions, but for padding, which is -inf."""
    on = logits > -torch.inf
    return -logits.log_softmax(-1).masked_fill(~on, 0.0).sum(-1) / on.sum(-1)
