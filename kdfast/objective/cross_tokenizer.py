"""Terms between language models that cut text into other tokens, of other vocabularies."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from kdfast.data.text import OFF
from kdfast.data.two_tokenizers import ENDS
from kdfast.models.inputs import SAMPLE, TEACHER
from kdfast.objective import _alignment
from kdfast.objective._alignment import Places
from kdfast.objective._protocol import Missing
from kdfast.objective.schedules import Weight
from kdfast.objective.term import Inputs, Term
from kdfast.ops import _checks

MERGES = ("observed", "bayesian")
LEAST = -60.0  # a logarithm of what no sum of probabilities would miss


class ULD(Term):
    """mean Σ_i |p_s(i) - p_t(i)|, of probabilities sorted by size: the universal logit distillation loss, a Wasserstein
    distance between the two vocabularies (Boizard, El Haddad, Hudelot and Colombo, 2024, arXiv:2402.12030).

    The i-th token of a row that counts is compared with the i-th of the teacher's tokens that count, as far as both
    go; the smaller vocabulary is filled up with probabilities of 0. `GOLD` compares by the text instead.
    Sorting and softmax commute: it is twice `kdfast.total_variation` of sorted logits.

    A batch has the teacher's tokens in `teacher_input_ids` with `teacher_labels` where it has `labels`, as
    `kdfast.data.two_tokenizers` makes both; without them the teacher read the student's. A token counts whose label is
    not -100, without labels every one that is no padding. The cross-entropy is a term of its own:

        Terms(uld=ULD(weight=1.5), ce=Labels("next_tokens"))

    Args:
        weight: a number or a schedule.
        temperature: T of both softmaxes; there is no T² here. A column `sample_temperature` [B] takes its place row by
            row.
        causal: a place's logits are of the next token; False for encoder-decoders, of its own.
        shared: [n, 2] int64, the student's and the teacher's number of tokens that are the same in both vocabularies
            (`kdfast.data.two_tokenizers.shared_tokens`): these are compared one by one, only the others sorted.

    A column `sample_weight` [B] multiplies the loss of every token of a row; it stays out of the divisor. Beside the
    logits of the tokens that count, the sorted ones and their order are in memory, some 16 bytes each.

    Raises:
        TypeError: `shared` is no tensor of int64.
        ValueError: a temperature out of range; `shared` of another shape, or with a token twice; a batch without a
            teacher; labels or masks that are not of the logits' tokens.
    """

    def __init__(
        self,
        *,
        weight: Weight = 1.0,
        temperature: float = 1.0,
        causal: bool = True,
        shared: Tensor | None = None,
    ) -> None:
        super().__init__(weight)
        _checks.check_temperature_number(type(self).__name__, temperature)
        if shared is not None:
            self._check_shared(shared)
        self.temperature, self.causal = temperature, causal
        self.shared: Tensor | None
        self.register_buffer("shared", shared, persistent=False)

    def _check_shared(self, shared: Tensor) -> None:
        if not isinstance(shared, Tensor) or shared.dtype != torch.int64:
            _checks.wrong_type(type(self).__name__, "shared", "an int64 tensor [n, 2]", _checks.kind(shared))
        if shared.dim() != 2 or shared.shape[1] != 2:
            self.refuse("shared", "pairs of the student's and the teacher's tokens, [n, 2]", list(shared.shape))
        for side, tokens in zip(("student", "teacher"), shared.unbind(1), strict=True):
            if tokens.unique().numel() < tokens.numel():
                got = f"{int(tokens.mode().values)} twice"
                _checks.wrong_value(type(self).__name__, "shared", f"each of the {side}'s tokens once", got)

    def count(self, inputs: Inputs) -> Tensor:
        """Pairs of tokens, or spans."""
        try:
            return self._number(inputs)
        except Missing:  # told where the loss is asked for
            return super().count(inputs)

    def _number(self, inputs: Inputs) -> Tensor:
        own, its = (self._targets(inputs, teacher=teacher)[1] for teacher in (False, True))
        return torch.minimum(own.sum(-1), its.sum(-1)).sum()

    def forward(self, student: Any, teacher: Any, inputs: Inputs) -> Tensor:
        sides = self._logits(student, teacher, inputs)
        places = _alignment.pairs(*(self._targets(inputs, teacher=teacher)[1] for teacher in (False, True)))
        s, t = (self._ordered(self._at(z, of), i) for i, (z, of) in enumerate(zip(sides, places, strict=True)))
        options = {"temperature": self._temperature(inputs, places[0]), "weight": _of_rows(inputs, "weight", places[0])}
        return 2 * self._variation(s, t, options)

    def _logits(self, student: Any, teacher: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Checked, [B, L, V] and [B, L', V'], of the tokens that the batch has."""
        sides = self.output(student, "logits"), self.output(teacher, "logits", teacher=True)
        for i, (name, z) in enumerate(zip(("student", "teacher"), sides, strict=True)):
            tokens = self._targets(inputs, teacher=bool(i))[0]
            if z.dim() != 3 or z.shape[:2] != tokens.shape:
                expected = f"[batch, length, vocabulary] of the batch's {list(tokens.shape)} tokens"
                self.refuse(f"{name}'s logits", expected, list(z.shape))
            if self.shared is not None and self.shared.numel() and int(self.shared[:, i].max()) >= z.shape[-1]:
                got = int(self.shared[:, i].max())
                self.refuse("shared", f"tokens of the {name}'s {z.shape[-1]}", got)
        return sides

    def _targets(self, inputs: Inputs, teacher: bool) -> tuple[Tensor, Tensor]:
        """Tokens [B, L] of a side, and which of them are predicted and count."""
        own = any(f"{TEACHER}{name}" in inputs for name in ("input_ids", "labels"))
        prefix = TEACHER if teacher and own else ""
        labels, ids, mask = (inputs.get(f"{prefix}{name}") for name in ("labels", "input_ids", "attention_mask"))
        if labels is None and prefix and "labels" in inputs:
            raise Missing(
                f"{type(self).__name__}: inputs: expected teacher_labels beside labels, got {', '.join(inputs)}"
            )
        tokens = ids if labels is None else labels
        if tokens is None:
            raise Missing(f"{type(self).__name__}: inputs: expected {prefix}input_ids, got {', '.join(inputs)}")
        on = labels != OFF if labels is not None else torch.ones_like(tokens, dtype=torch.bool)
        if mask is not None and (labels is None or self.causal):
            if mask.shape != tokens.shape:
                self.refuse(f"{prefix}attention_mask", f"the tokens' shape {list(tokens.shape)}", list(mask.shape))
            on = on & mask.bool()
            if self.causal:  # what padding predicts counts for nothing
                on = on & F.pad(mask[:, :-1].bool(), (1, 0))
        if self.causal:
            on = on & (torch.arange(tokens.shape[1], device=tokens.device) > 0)
        return tokens, on

    def _at(self, logits: Tensor, places: Places) -> Tensor:
        """[n, V], those that tokens are predicted by."""
        return logits[places.rows, places.tokens - int(self.causal)]

    def _temperature(self, inputs: Inputs, places: Places) -> float | Tensor:
        own = _of_rows(inputs, "temperature", places)
        return self.temperature if own is None else own

    def _ordered(self, logits: Tensor, side: int) -> Tensor:
        """[n, V] with the shared tokens first, in their order, then the others by size."""
        if self.shared is None:
            return logits.sort(-1, descending=True).values
        others = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        others[self.shared[:, side]] = False
        rest = logits[:, others.nonzero()[:, 0]].sort(-1, descending=True).values
        return torch.cat((logits[:, self.shared[:, side]], rest), -1)

    @staticmethod
    def _variation(student: Tensor, teacher: Tensor, options: dict[str, Any]) -> Tensor:
        width = max(student.shape[-1], teacher.shape[-1])
        s, t = (F.pad(z, (0, width - z.shape[-1]), value=-torch.inf) for z in (student, teacher))
        return kdfast.total_variation(s, t, **options)


class GOLD(ULD):
    """mean Σ_i |m_s(i) - m_t(i)|, of probabilities sorted by size, over spans of text that both tokenizers cut out: the
    alignment of general on-policy logit distillation (GOLD: "Unlocking On-Policy Distillation for Any Model Family",
    Hugging Face, 2025; `GOLDTrainer` of TRL with `use_extended_uld`).

    A span is the shortest piece of text at whose end both have a token's end. Where a side has several tokens x_0 … x_k
    there, what it gives the span is the chain rule's, with log-probabilities of all but one of them added up:

        observed:  m(i) = p(i | before) · Π_{j ≥ 1} p(x_j | before, x_0 … x_{j-1})
        bayesian:  m(i) = p(i | before, x_0 … x_{k-1}) · Π_{j < k} p(x_j | before, x_0 … x_{j-1})

    Either way the probability of the text as it stands is among them. The second are those of all texts that begin as
    it does up to the last token; the first take what follows for the same whatever i is. Where both sides have one token
    it is `ULD`. With `shared` tokens that are the same are compared one by one, and only the others sorted, all with the
    same weight (TRL's hybrid loss has weights, and a JSD, for the former).

    A batch has in `sample_ends` [B, L] and `teacher_ends` [B, L'] int64 where in the text each token ends, counted in
    characters from 1 on and in the same text, 0 for tokens of no text; `kdfast.data.two_tokenizers` makes them. Text
    behind the last end that both have, where a side was cut, does not count.

    Computed as twice `kdfast.total_variation`, of the probabilities with one more of what goes on otherwise, 1 - Σ m,
    minus the difference of these. A product below e^-60 is taken as that.

    Args:
        merge: "observed" or "bayesian", as in TRL (whose "observed" takes logits one place later than this).
        weight, temperature, causal, shared: as of `ULD`; and so other columns and errors. The mean is over spans.
    """

    def __init__(self, *, merge: str = "observed", **settings: Any) -> None:
        super().__init__(**settings)
        if merge not in MERGES:
            self.refuse("merge", " or ".join(map(repr, MERGES)), merge)
        self.merge = merge

    def _number(self, inputs: Inputs) -> Tensor:
        return torch.tensor(self._spans(inputs)[0].spans)

    def forward(self, student: Any, teacher: Any, inputs: Inputs) -> Tensor:
        spans, sides = self._spans(inputs), self._logits(student, teacher, inputs)
        both = []
        for i, (z, side) in enumerate(zip(sides, spans, strict=True)):
            rest = self._log_of_rest(z, side, inputs, teacher=bool(i))
            row = self._at(z, side.chosen).to(rest.dtype)
            temperature = self._temperature(inputs, side.chosen)
            other = self._otherwise(row, rest, side.span.unique(), temperature)
            both.append((torch.cat((other[:, None], self._ordered(row, i)), -1), rest.exp()))
        (s, of_s), (t, of_t) = both
        chosen = spans[0].chosen
        weight = _of_rows(inputs, "weight", chosen)
        of_rest = (of_s - of_t.detach()).abs() * (1 if weight is None else weight)
        options = {"temperature": self._temperature(inputs, chosen), "weight": weight}
        return 2 * self._variation(s, t, options) - of_rest.sum() / max(len(of_rest), 1)

    def _spans(self, inputs: Inputs) -> tuple[_alignment.Side, _alignment.Side]:
        if lacking := [name for name in ENDS if name not in inputs]:
            raise Missing(f"GOLD: inputs: expected rows with {', '.join(lacking)}, got {', '.join(inputs)}")
        (tokens, own), (its_tokens, its) = (self._targets(inputs, teacher=teacher) for teacher in (False, True))
        for name, of in zip(ENDS, (tokens, its_tokens), strict=True):
            if inputs[name].shape != of.shape or inputs[name].dtype != torch.int64:
                got = f"{inputs[name].dtype} {list(inputs[name].shape)}"
                self.refuse(name, f"int64 of the tokens' shape {list(of.shape)}", got)
        spans = _alignment.spans(own, inputs[ENDS[0]], its, inputs[ENDS[1]], self.merge == "bayesian")
        counts = [side.spans for side in spans]
        if counts[0] != counts[1]:
            self.refuse(", ".join(ENDS), "ends in the order of the text", f"{counts[0]} and {counts[1]} spans")
        return spans

    def _log_of_rest(self, logits: Tensor, side: _alignment.Side, inputs: Inputs, teacher: bool) -> Tensor:
        """[n]: the logarithm of Π p(x_j), 0 where a span is of one token."""
        tokens, _ = self._targets(inputs, teacher=teacher)
        temperature = self._temperature(inputs, side.rest)
        z = _over(self._at(logits, side.rest).to(_checks.loss_dtype(logits)), temperature)
        found = tokens[side.rest.rows, side.rest.tokens]
        _checks.check_labels("GOLD: teacher" if teacher else "GOLD: student", found, None, z, z.shape[-1], OFF)
        of_tokens = -F.cross_entropy(z, found, reduction="none")
        return z.new_zeros(side.spans).index_add(0, side.span, of_tokens).clamp(min=LEAST)

    @staticmethod
    def _otherwise(logits: Tensor, rest: Tensor, several: Tensor, temperature: float | Tensor) -> Tensor:
        """[n]: a further logit, of what is not Σ m; none where a span is of one token."""
        if isinstance(temperature, Tensor):
            temperature = temperature[several]
        log_rest = rest[several].clamp(max=-torch.finfo(rest.dtype).eps)  # whose complement is not 0
        odds = torch.log(-torch.expm1(log_rest)) - log_rest
        other = (_over(logits[several], temperature).logsumexp(-1) + odds) * temperature
        return torch.full_like(rest, -torch.inf).index_put((several,), other)


def _of_rows(inputs: Inputs, name: str, places: Places) -> Tensor | None:
    """What rows have of their own, `sample_weight` or `sample_temperature`, for each of some tokens."""
    column = inputs.get(f"{SAMPLE}{name}")
    return None if column is None else column.to(_checks.loss_dtype(column))[places.rows]


def _over(logits: Tensor, temperature: float | Tensor) -> Tensor:
    return logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
