"""The objective of causal language models, which makes no logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdfast import linear_kd_loss, linear_topk_kd_loss
from kdfast.last_hidden import LastHidden, last_hidden
from kdfast.objective._protocol import model_inputs
from kdfast.ops._divergence import KINDS, TAILS
from kdfast.ops.kd_loss import KDLossComponents
from kdfast.text import OFF


@dataclass(frozen=True)
class LanguageModel:
    """Distillation of a causal language model into one of the same vocabulary, without the logits of either.

        loss = alpha · T² · D(student, teacher) + (1 - alpha) · CE(student, next token)

    A teacher is run beside the student, or was run before: rows of `kdfast.teacher_cache` bring its top-k, of which D is
    `kdfast.topk_kl_div`, `kl_div` alone. The mean is over the tokens that count: those of `labels` that are not -100
    (completions only, where the collator leaves the prompts out), or where there are no labels every token but the first,
    padding aside. Labels are the inputs as they are: the shift is made here. `kdfast.linear_kd_loss` goes from the last hidden states to the loss in chunks; the logits
    are never there as a whole, and the hidden states of other tokens are dropped before.

    D is a divergence of kdfast: `kl_div` is KL(teacher ‖ student), as Hinton et al. have it; `reverse_kl_div`, as in MiniLLM
    (arXiv:2306.08543); `js_div` with `beta`, of GKD (Agarwal et al., 2024, arXiv:2306.13649; beta = 0 and 1 are `kl_div` and
    `reverse_kl_div`); the skewed ones of DistiLLM (arXiv:2402.03898) with `skew`.

    Args:
        alpha: weight of the teacher; the labels get 1 - alpha.
        temperature: of the divergence. T² is included.
        vocab_size: the tokens that both know, where one side's embeddings are padded wider.
        tail: of `kdfast.topk_kl_div`.
        memory_budget: of `kdfast.linear_kd_loss`.

    Returns the weighted terms `kd`, which carries the gradient of both, and `ce`: their sum is the loss.

    Raises:
        ValueError: alpha outside [0, 1], a temperature that is not positive, a batch without a teacher or, with
            alpha < 1, without labels; and where the loss is computed, whatever `kdfast.linear_kd_loss` raises.
    """

    alpha: float = 0.9
    temperature: float = 1.0
    divergence: str = "kl_div"
    beta: float = 0.5
    skew: float = 0.1
    vocab_size: int | None = None
    memory_budget: int | str = "auto"
    tail: str = "bucket"

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "skew"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"LanguageModel: {name} must be between 0 and 1, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"LanguageModel: temperature must be positive, got {self.temperature}")
        if self.divergence not in KINDS:
            raise ValueError(f"LanguageModel: divergence must be one of {', '.join(KINDS)}, got {self.divergence!r}")
        if self.tail not in TAILS:
            raise ValueError(f"LanguageModel: tail must be one of {', '.join(TAILS)}, got {self.tail!r}")

    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> LastHidden:
        """`model` on the inputs, up to its last hidden states."""
        return last_hidden(model, **model_inputs(model, inputs))

    def logits(self, outputs: LastHidden) -> Tensor:
        """[B, L, V], which the loss never makes: for metrics of predictions, in evaluation."""
        return outputs.logits()

    def num_items(self, inputs: Mapping[str, Any]) -> Tensor:
        """The number of tokens that count, an int64 scalar."""
        return self._counted(inputs).sum()

    def __call__(
        self, student_outputs: LastHidden, teacher_outputs: LastHidden | None, inputs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        if teacher_outputs is None and "teacher_topk_logprobs" not in inputs:
            raise ValueError("LanguageModel: needs a teacher, or rows with its top-k (kdfast.teacher_cache)")
        if teacher_outputs is not None and "teacher_topk_logprobs" in inputs:
            raise ValueError("LanguageModel: expected a teacher or rows with its top-k, got both")
        if self.alpha < 1 and "labels" not in inputs:
            raise ValueError("LanguageModel: alpha < 1 needs rows with labels")
        student = student_outputs.hidden[:, :-1], student_outputs.weight
        labels = inputs["labels"][:, 1:] if self.alpha < 1 else None
        settings: dict[str, Any] = {
            "student_bias": student_outputs.bias,
            "student_softcap": student_outputs.softcap,
            "memory_budget": self.memory_budget,
            "alpha": self.alpha,
            "temperature": self.temperature,
            "mask": self._counted(inputs),
            "vocab_size": self.vocab_size,
            "num_items": inputs.get("num_items"),
        }
        parts: KDLossComponents
        if teacher_outputs is None:
            self._check_cached(inputs, student_outputs)
            teacher = inputs["teacher_topk_logprobs"][:, :-1], inputs["teacher_topk_indices"][:, :-1]
            parts = linear_topk_kd_loss(*student, *teacher, labels, tail=self.tail, return_components=True, **settings)
        else:
            settings |= {"divergence": self.divergence, "beta": self.beta, "skew": self.skew}
            settings |= {"teacher_bias": teacher_outputs.bias, "teacher_softcap": teacher_outputs.softcap}
            teacher = teacher_outputs.hidden[:, :-1], teacher_outputs.weight
            parts = linear_kd_loss(*student, *teacher, labels, return_components=True, **settings)
        # The parts carry no gradient: the loss has that of both.
        hard = (1 - self.alpha) * parts.cross_entropy
        return {"kd": parts.loss - hard} | ({"ce": hard} if self.alpha < 1 else {})

    def _check_cached(self, inputs: Mapping[str, Any], student: LastHidden) -> None:
        if self.divergence != "kl_div":
            raise ValueError(f"LanguageModel: a teacher's top-k has kl_div alone, got {self.divergence!r}")
        temperature = inputs.get("teacher_temperature", self.temperature)
        if temperature != self.temperature:
            raise ValueError(f"LanguageModel: temperature: expected {temperature}, the cache's, got {self.temperature}")
        known = inputs.get("teacher_vocab_size", student.weight.shape[0])
        if self.vocab_size is None and known != student.weight.shape[0]:
            raise ValueError(
                f"LanguageModel: expected a student of the cache's {known} tokens (for padded vocabularies pass "
                f"vocab_size=, the tokens that count), got {student.weight.shape[0]}"
            )

    def _counted(self, inputs: Mapping[str, Any]) -> Tensor:
        """[B, L - 1], True where the next token counts."""
        if "labels" in inputs:
            counted: Tensor = inputs["labels"][:, 1:] != OFF
        elif "attention_mask" in inputs:
            counted = inputs["attention_mask"][:, 1:].bool()
        else:
            counted = torch.ones_like(inputs["input_ids"][:, 1:], dtype=torch.bool)
        if "teacher_token_mask" in inputs:  # where the teacher's are stored
            counted = counted & inputs["teacher_token_mask"][:, :-1]
        return counted
