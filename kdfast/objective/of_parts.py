"""Terms of parts of the teacher's distribution: the labelled class and the others apart, and its largest classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import kdfast
from kdfast.data.text import OFF
from kdfast.objective._protocol import Missing
from kdfast.objective.of_logits import Logits
from kdfast.objective.schedules import Weight, check_weight
from kdfast.objective.term import Inputs
from kdfast.ops import _checks
from kdfast.ops._divergence import check_tail


def _log_probabilities(logits: Tensor, temperature: float | Tensor, columns: int | None) -> Tensor:
    """log softmax(z / T) of logits [B, ..., C], T one number or [B, 1, ...]."""
    z = logits[..., :columns].detach().to(_checks.loss_dtype(logits))
    return (z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)).log_softmax(-1)


class _Parts(Logits):
    """Terms that look at some columns before an operator does."""

    known = ("vocab_size",)

    def _columns(self, student: Tensor, teacher: Tensor) -> int:
        """How many count."""
        _checks.check_logits(type(self).__name__, student, teacher)
        return _checks.check_vocab_size(type(self).__name__, student, teacher, self.settings.get("vocab_size"))


class DecoupledLogits(_Parts):
    """alpha · T² · KL(b_t ‖ b_s) + beta · T² · KL(q_t ‖ q_s): decoupled knowledge distillation (DKD; Zhao, Cui, Song,
    Qiu and Liang, 2022, arXiv:2203.08679), of logits [B, C] or of tokens [B, L, V], with a label y for each.

        b = (p_y, 1 - p_y),  p = softmax(z / T)            how sure of the labelled class (the paper's TCKD)
        q = softmax(z / T without column y)                the others among themselves (NCKD)

    KL(p_t ‖ p_s) is the first plus (1 - p_t,y) times the second: where the teacher is sure of the label it hardly
    teaches how the other classes compare, and here it does. Of two classes the second part is 0.

    Args:
        weight, t_squared: as of `Logits`.
        temperature: T.
        target_temperature: another T for the first part; None: the same. A column `sample_temperature` [B] takes the
            place of both, row by row.
        alpha, beta: weights of the two parts; the paper's beta is from 1 to 8 on CIFAR-100, and 0.5 with T = 1 on
            ImageNet. Its code raises the term's weight from 0 over the first epochs: a `LinearSchedule` does.
        tokens: None for logits [B, C] with labels [B]; "labels" for tokens with labels [B, L], of which nothing is
            shifted.
        vocab_size: the columns that count, where one side is padded.

    Rows or tokens with the label -100 do not count. A column `sample_weight` [B] multiplies every row's loss; it stays
    out of the divisor.

    Raises:
        TypeError, ValueError: as `Logits`; a negative alpha or beta, labels that are no class numbers, or a batch
            without labels.
    """

    def __init__(
        self,
        *,
        weight: Weight = 1.0,
        temperature: float = 4.0,
        target_temperature: float | None = None,
        alpha: float = 1.0,
        beta: float = 8.0,
        t_squared: bool = True,
        tokens: str | None = None,
        **settings: Any,
    ) -> None:
        if tokens not in (None, "labels"):
            self.refuse("tokens", "None or 'labels': every row has a label", tokens)
        super().__init__(weight=weight, temperature=temperature, t_squared=t_squared, tokens=tokens, **settings)
        for name, value in (("alpha", alpha), ("beta", beta)):
            check_weight(type(self).__name__, name, value)
        if target_temperature is not None:
            check_weight(type(self).__name__, "target_temperature", target_temperature, "a number > 0")
            if target_temperature == 0:
                self.refuse("target_temperature", "a number > 0", target_temperature)
        self.alpha, self.beta = alpha, beta
        self.target_temperature = temperature if target_temperature is None else target_temperature

    def count(self, inputs: Inputs) -> Tensor:
        return (inputs["labels"] != OFF).sum() if "labels" in inputs else super().count(inputs)

    def distance(self, student: Tensor, teacher: Tensor, inputs: Inputs, mask: Tensor | None) -> Tensor:
        if "labels" not in inputs:
            raise Missing(f"DecoupledLogits: inputs: expected rows with labels, got {', '.join(inputs)}")
        labels, columns = inputs["labels"], self._columns(student, teacher)
        mask = _checks.check_labels(type(self).__name__, labels, mask, student, columns, OFF)
        target = labels.clamp(min=0)[..., None]
        of_target, of_others = (self.of_rows(student, inputs, t) for t in (self.target_temperature, self.temperature))
        sure = _log_probabilities(teacher, of_target[0]["temperature"], columns).gather(-1, target)
        first = kdfast.topk_kl_div(student, sure, target, mask=mask, **of_target[0], **self.settings)
        # What is -inf on both sides counts for nothing.
        s, t = (z.scatter(-1, target, -torch.inf) for z in (student, teacher))
        second = kdfast.kl_div(s, t, mask=mask, **of_others[0], **self.settings)
        return self.alpha * of_target[1] * first + self.beta * of_others[1] * second


class TopLogits(_Parts):
    """T² · KL from the teacher's k largest classes at temperature T, `kdfast.topk_kl_div`: of logits [B, C], or
    [B, L, V] of tokens.

    At a high temperature the many classes of which the teacher knows nothing hold most of its probability, and their
    noise most of the loss; here only the first k are told apart. With k = 1 and tail="bucket" it is the first part of
    `DecoupledLogits`, of the teacher's own choice for the label.

    Args:
        k: classes; as many as there are is `Logits()`.
        tail: what becomes of the others: "bucket" makes them one class; "renormalize" draws the student away from all
            of them (Peng et al., 2024, arXiv:2410.16215, distil so in pre-training); "drop" leaves them out.
        weight, temperature, t_squared, tokens, vocab_size: as of `Logits`, and so the columns of the batch.

    Raises:
        TypeError, ValueError: as `Logits`; k below 1 or above the number of classes, or another tail.
    """

    def __init__(
        self,
        k: int,
        *,
        tail: str = "bucket",
        weight: Weight = 1.0,
        temperature: float = 1.0,
        t_squared: bool = True,
        tokens: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(weight=weight, temperature=temperature, t_squared=t_squared, tokens=tokens, **settings)
        _checks.check_int(type(self).__name__, "k", k)
        if k < 1:
            self.refuse("k", "1 or more", k)
        check_tail(type(self).__name__, tail)
        self.k, self.tail = k, tail

    def distance(self, student: Tensor, teacher: Tensor, inputs: Inputs, mask: Tensor | None) -> Tensor:
        columns = self._columns(student, teacher)
        if self.k > columns:
            self.refuse("k", f"at most {columns}, the classes that there are", self.k)
        options, factor = self.of_rows(student, inputs, self.temperature)
        top = _log_probabilities(teacher, options["temperature"], columns).topk(self.k)
        loss = kdfast.topk_kl_div(
            student, top.values, top.indices, tail=self.tail, mask=mask, **options, **self.settings
        )
        return loss * factor
