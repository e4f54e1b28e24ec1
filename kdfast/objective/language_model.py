"""The objective of language models that predict the next token, causal ones and encoder-decoders;
it makes no logits."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdfast import linear_kd_loss, linear_topk_kd_loss
from kdfast.data.text import OFF
from kdfast.models.inputs import model_inputs, unwrapped
from kdfast.models.last_hidden import LastHidden, language_model, last_hidden
from kdfast.objective._own_heads import of_own_heads
from kdfast.objective._protocol import Missing
from kdfast.objective.term import check_aligned, divisor, token_mask
from kdfast.ops import _checks
from kdfast.ops._divergence import check_divergence, check_tail
from kdfast.ops.kd_loss import KDLossComponents
from kdfast.ops.linear import check_budget


@dataclass(frozen=True)
class LanguageModel:
    """Distillation of a language model into one of the same vocabulary, without the logits of either.

        loss = alpha · T² · D(student, teacher) + (1 - alpha) · CE(student, next token) [+ aux]

    A teacher is run beside the student, or was run before: rows of `kdfast.teacher_cache` bring its top-k, of which D
    is `kdfast.topk_kl_div`, `kl_div` alone. `kdfast.linear_kd_loss` goes from the last hidden states to the loss in
    chunks; the logits are never there as a whole, and the hidden states of other tokens are dropped before.

    Of causal models the labels are the inputs as they are: the shift is made here. A token counts where neither it nor
    the one before it, which predicts it, is padding (`attention_mask`), and where there are labels, its own is not -100
    (completions only, where the collator leaves the prompts out). Of encoder-decoders (T5, BART) nothing is shifted;
    their `decoder_input_ids` are made of the labels where a batch has none, and a token counts whose label is not -100,
    without labels every one of `decoder_attention_mask`. The mean is over the tokens that count.

    Output embeddings with an adapter (LoRA), quantised or with a forward of their own are used as they are, of student
    and teacher: the gradient reaches all that they are made of. Their logits are made some rows at a time, and twice.

    D is a divergence of kdfast: `kl_div` is KL(teacher ‖ student), as Hinton et al. have it; `reverse_kl_div`, as in
    MiniLLM (arXiv:2306.08543); `js_div` with `beta`, of GKD (Agarwal et al., 2024, arXiv:2306.13649; beta = 0 and 1 are
    `kl_div` and `reverse_kl_div`); the skewed ones of DistiLLM (arXiv:2402.03898) with `skew`.

    Args:
        alpha: weight of the teacher; the labels get 1 - alpha. With 0 there need be no teacher.
        temperature: of the divergence. T² is included.
        vocab_size: the tokens that both know, where one side's embeddings are padded wider.
        tail: of `kdfast.topk_kl_div`.
        memory_budget: of `kdfast.linear_kd_loss`.

    Returns the weighted terms `kd`, which carries the gradient of both, and `ce`; `aux` for a mixture of experts that
    computes a loss of its own (`config.output_router_logits`), weighted as in transformers. Their sum is the loss.

    Raises:
        TypeError: an argument of another type; where it is run, a model that is no language model.
        ValueError: an argument out of range; a masked language model; a batch without a teacher or, with alpha < 1,
            without labels; hidden states of other tokens than the batch's; and where the loss is computed, whatever
            `kdfast.linear_kd_loss` raises.
    """

    alpha: float = 0.9
    temperature: float = 1.0
    divergence: str = "kl_div"
    beta: float = 0.5
    skew: float = 0.1
    vocab_size: int | None = None
    memory_budget: int | str = "auto"
    tail: str = "bucket"
    _aligned: bool | None = field(default=None, repr=False, kw_only=True)  # of `for_student`

    def __post_init__(self) -> None:
        who = type(self).__name__
        for name in ("alpha", "beta", "skew"):
            _checks.check_fraction(who, name, getattr(self, name), below_one=name == "skew")
        _checks.check_temperature_number(who, self.temperature)
        check_divergence(who, self.divergence)
        check_tail(who, self.tail)
        check_budget(who, self.memory_budget)
        if self.vocab_size is not None:
            _checks.check_int(who, "vocab_size", self.vocab_size)
            if self.vocab_size < 1:
                _checks.wrong_value(who, "vocab_size", "1 or more, or None", self.vocab_size)

    def for_student(self, model: nn.Module) -> LanguageModel:
        """The same objective, which knows before the student is run whether it is an encoder-decoder: tokens are
        counted first, and a batch does not always tell."""
        return replace(self, _aligned=_is_encoder_decoder(_checked("student", model)))

    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> LastHidden:
        """`model` on the inputs, up to its last hidden states."""
        side = "student or teacher" if self._aligned is None else "teacher"  # the student was checked before
        inner, own = _checked(side, model), model_inputs(model, inputs)
        if _is_encoder_decoder(inner) and not {"decoder_input_ids", "decoder_inputs_embeds"} & {*own}:
            if "labels" not in inputs or not hasattr(inner, "prepare_decoder_input_ids_from_labels"):
                expected = "it in the batches of an encoder-decoder, or labels of which the model makes it"
                _checks.wrong_value("LanguageModel", "decoder_input_ids", expected, f"{', '.join(inputs)}")
            own["decoder_input_ids"] = inner.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
        return last_hidden(model, **own)

    def logits(self, outputs: LastHidden) -> Tensor:
        """[B, L, V], which the loss never makes: for metrics of predictions, in evaluation."""
        return outputs.make_logits()

    def num_items(self, inputs: Mapping[str, Any]) -> Tensor:
        """The number of tokens that count, an int64 scalar."""
        aligned = self._aligned
        if aligned is None:
            ids, labels = inputs.get("input_ids"), inputs.get("labels")
            aligned = "decoder_input_ids" in inputs or (
                ids is not None and labels is not None and ids.shape != labels.shape
            )
        return _counted(inputs, aligned).sum()

    def __call__(
        self, student_outputs: LastHidden, teacher_outputs: LastHidden | None, inputs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        self._check(student_outputs, teacher_outputs, inputs)
        counted = _counted(inputs, student_outputs.aligned)
        labels = None
        if self.alpha < 1:
            labels = inputs["labels"] if student_outputs.aligned else inputs["labels"][:, 1:]
        if teacher_outputs is None and self.alpha > 0:
            self._check_cached(inputs, student_outputs)
        parts = self._parts(student_outputs, teacher_outputs, inputs, labels, counted)
        # The parts carry no gradient: the loss has that of both.
        hard = (1 - self.alpha) * parts.cross_entropy
        terms = {"kd": parts.loss - hard} | ({"ce": hard} if self.alpha < 1 else {})
        if student_outputs.router_loss is not None:
            own = counted.sum()
            items = divisor(inputs.get("num_items", own)).to(own.device)  # of several micro-batches
            terms["aux"] = student_outputs.router_loss * (own / items)
        return terms

    def possible(
        self, student_outputs: LastHidden, teacher_outputs: LastHidden | None, inputs: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Missing]]:
        """For evaluations: the terms that have what they need, and what the others lack."""
        missing = self._missing(teacher_outputs, inputs)
        if not missing:
            return self(student_outputs, teacher_outputs, inputs), {}
        if len(missing) == 2:
            return {}, missing
        taught = "kd" not in missing
        terms = replace(self, alpha=float(taught))(student_outputs, teacher_outputs, inputs)
        weight = self.alpha if taught else 1 - self.alpha
        return {n: x if n == "aux" else weight * x for n, x in terms.items() if n not in missing}, missing

    def _missing(self, teacher: LastHidden | None, inputs: Mapping[str, Any]) -> dict[str, Missing]:
        missing = {}
        if self.alpha > 0 and teacher is None and _checks.TOPK[0] not in inputs:
            expected = "one, or rows with its top-k (kdfast.teacher_cache)"
            missing["kd"] = Missing(f"LanguageModel: teacher: expected {expected}, got neither")
        if self.alpha < 1 and "labels" not in inputs:
            expected = "rows with labels, as alpha < 1"
            missing["ce"] = Missing(f"LanguageModel: inputs: expected {expected}, got {', '.join(inputs)}")
        return missing

    def _parts(
        self,
        student: LastHidden,
        teacher: LastHidden | None,
        inputs: Mapping[str, Any],
        labels: Tensor | None,
        counted: Tensor,
    ) -> KDLossComponents:
        length = counted.shape[1]
        columns: dict[str, Tensor] = {"student": student.hidden[:, :length]}
        settings: dict[str, Any] = {
            "alpha": self.alpha,
            "temperature": self.temperature,
            "vocab_size": self.vocab_size,
            "num_items": inputs.get("num_items"),
        }
        if teacher is None and self.alpha > 0:
            columns |= {name.removeprefix("teacher_"): inputs[name][:, :length] for name in _checks.TOPK}
            settings["tail"] = self.tail
        elif teacher is not None:
            columns["teacher"] = teacher.hidden[:, :length]
            settings |= {"divergence": self.divergence, "beta": self.beta, "skew": self.skew}
        if student.head is not None or (teacher is not None and teacher.head is not None):
            rows = columns if labels is None else columns | {"labels": labels}
            rows = {name: column[counted] for name, column in rows.items()}
            if settings["num_items"] is None:
                settings["num_items"] = max(len(rows["student"]), 1)
            budget = check_budget("LanguageModel", self.memory_budget)
            return of_own_heads(student, teacher, rows, settings, budget)
        settings |= {"mask": counted, "memory_budget": self.memory_budget}
        settings |= {"student_bias": student.bias, "student_softcap": student.softcap}
        hidden, weight = columns["student"], student.weight
        assert weight is not None
        if "topk_indices" in columns:
            topk = columns["topk_logprobs"], columns["topk_indices"]
            return linear_topk_kd_loss(hidden, weight, *topk, labels, return_components=True, **settings)
        if teacher is not None:
            settings |= {"teacher_hidden": columns["teacher"], "teacher_weight": teacher.weight}
            settings |= {"teacher_bias": teacher.bias, "teacher_softcap": teacher.softcap}
        return linear_kd_loss(hidden, weight, labels=labels, return_components=True, **settings)

    def _check(self, student: LastHidden, teacher: LastHidden | None, inputs: Mapping[str, Any]) -> None:
        if teacher is not None and _checks.TOPK[0] in inputs:
            raise ValueError("LanguageModel: teacher: expected one, or rows with its top-k, got both")
        for error in self._missing(teacher, inputs).values():
            raise error
        check_aligned("LanguageModel", inputs)
        tokens = _tokens(inputs, student.aligned)
        for side, outputs in (("student", student), ("teacher", teacher)):
            if outputs is not None and outputs.hidden.shape[:2] != tokens.shape:
                expected = f"hidden states of the batch's {list(tokens.shape)} tokens"
                _checks.wrong_value("LanguageModel", side, expected, list(outputs.hidden.shape))
            if outputs is not None and outputs.aligned != student.aligned:
                kinds = "an encoder-decoder", "a causal model"
                expected, got = kinds if student.aligned else kinds[::-1]
                _checks.wrong_value("LanguageModel", side, f"{expected}, as the student is", got)

    def _check_cached(self, inputs: Mapping[str, Any], student: LastHidden) -> None:
        if self.divergence != "kl_div":
            raise ValueError(
                f"LanguageModel: divergence: expected 'kl_div' with a teacher's top-k, got {self.divergence!r}"
            )
        temperature = inputs.get("teacher_temperature", self.temperature)
        if temperature != self.temperature:
            raise ValueError(f"LanguageModel: temperature: expected {temperature}, the cache's, got {self.temperature}")
        known = inputs.get("teacher_vocab_size", student.vocabulary)
        if self.vocab_size is None and known != student.vocabulary:
            raise ValueError(
                f"LanguageModel: student: expected one of the cache's {known} tokens, got {student.vocabulary}; for "
                "padded vocabularies pass vocab_size=, the tokens that count"
            )


def _tokens(inputs: Mapping[str, Any], aligned: bool) -> Tensor:
    """[B, L], True where a token of the decoder's inputs is no padding."""
    if not aligned:
        return token_mask(inputs)
    if "decoder_attention_mask" in inputs:
        mask: Tensor = inputs["decoder_attention_mask"].bool()
        return mask
    like = next(inputs[name] for name in ("labels", "decoder_input_ids", "decoder_inputs_embeds") if name in inputs)
    return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)


def _counted(inputs: Mapping[str, Any], aligned: bool) -> Tensor:
    """True where the token to be predicted counts: [B, L], or [B, L - 1] where that is the next one."""
    tokens, labels = _tokens(inputs, aligned), inputs.get("labels")
    counted = tokens if aligned else tokens[:, :-1] & tokens[:, 1:]
    if "teacher_token_mask" in inputs:  # where the teacher's are stored
        counted = counted & inputs["teacher_token_mask"][:, : counted.shape[1]]
    return counted if labels is None else counted & ((labels if aligned else labels[:, 1:]) != OFF)


def _is_encoder_decoder(inner: Any) -> bool:
    return bool(getattr(getattr(inner, "config", None), "is_encoder_decoder", False))


def _checked(side: str, model: nn.Module) -> Any:
    """The model inside its wrappers, if it predicts next tokens."""
    who = "LanguageModel"
    try:
        inner = language_model(model)
    except TypeError:
        others = "for classifiers: Hinton, or Terms(kl=Logits(), ce=Labels())"
        _checks.wrong_type(who, side, f"a language model with output embeddings ({others})", type(model).__name__)
    base = unwrapped(inner)  # of peft's models
    if "transformers" not in sys.modules or _is_encoder_decoder(base):
        return inner
    from transformers.models.auto import modeling_auto as auto

    masked, causal = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    name, config = type(base).__name__, getattr(base, "config", None)
    others = "for masked ones: Terms(kl=Logits(tokens='labels'), ce=Labels('tokens'))"
    got = f"{name}, which also sees the tokens after a place"
    if name in {*masked.values()} - {*causal.values()}:
        _checks.wrong_value(who, side, f"a causal language model or an encoder-decoder ({others})", got)
    # Only families of encoders need such a setting.
    decodes = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if name in causal.values() and getattr(config, "model_type", None) in masked and not decodes:
        _checks.wrong_value(who, side, f"one with config.is_decoder=True ({others})", got)
    return inner
