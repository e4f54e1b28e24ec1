"""`Terms`: an objective put together from named terms; and `Hinton`, the first of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdfast.data.distances import COMPARED
from kdfast.models.inputs import model_inputs, parameters_of, unwrapped
from kdfast.models.router import warn_of_router_loss
from kdfast.objective._protocol import Missing
from kdfast.objective.of_layers import Attention
from kdfast.objective.of_logits import Labels, Logits
from kdfast.objective.term import Inputs, Stored, Term, any_column, check_per_row, divisor
from kdfast.ops._checks import check_fraction, check_temperature_number

NEEDS = ("", "hidden", "attention", "branches")
RESERVED = (  # what the Trainer and its evaluation log: a term of such a name would take its place, or be lost
    *("loss", "grad_norm", "learning_rate", "epoch", "step", "num_input_tokens_seen", *COMPARED),
    *("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "seconds"),
)


class Terms(nn.Module):
    """A weighted sum of terms, by the names that they are logged by.

        Terms(kl=Logits(temperature=10, weight=0.7), ce=Labels(weight=0.3), pt=CLS("skip", weight=500))

    Terms of weight 0 are left out, and need neither teacher nor labels then. The trainer sets `progress`, the share of
    the training that is done, which schedules of weights go by.

    Gradient accumulation and several processes give what one large batch would, whatever the sizes of the
    micro-batches: each term's mean is taken over all that it counts (rows or tokens) in all of them (`num_items`).
    Terms with `masked=False` count padding too, of which batches of other sizes have another share.

    A teacher that was run before is read from columns of the batch: `teacher_logits`, `teacher_cls_3`,
    `teacher_hidden_3` (of hidden state 3), as `kdfast.teacher_cache` gives them. The columns `sample_weight` and
    `sample_temperature`, both [B], weigh rows and give them temperatures of their own. None of these goes into a model.
    Negative ones are refused on the CPU; on a device, where that would wait, they are not seen.

    Raises:
        TypeError: a term without a name, or something that is no `Term`.
        ValueError: no terms, or none whose weight is not 0; a name that the Trainer logs something else by; what a term
            needs is not there; a term that is no scalar.
    """

    def __init__(self, *unnamed: Any, **terms: Term) -> None:
        super().__init__()
        if unnamed:
            got = type(unnamed[0]).__name__
            raise TypeError(
                f"{type(self).__name__}: terms: expected some by name, such as Terms(kl=Logits()), got {got} alone"
            )
        if not terms:
            raise ValueError(f"{type(self).__name__}: terms: expected at least one, got none")
        self.terms = nn.ModuleDict()
        self.progress = 0.0
        for name, term in terms.items():
            self._check(name, term)
            self.terms[name] = term

    def _check(self, name: str, term: Any) -> None:
        who = f"{type(self).__name__}: {name}"
        if name in RESERVED or "." in name or hasattr(self.terms, name):
            taken = f"without a dot, that is none of nn.ModuleDict nor of the Trainer's log ({', '.join(RESERVED)})"
            raise ValueError(f"{type(self).__name__}: name: expected one {taken}, got {name!r}")
        if not isinstance(term, Term):
            got = f"the class {term.__name__}" if isinstance(term, type) else type(term).__name__
            raise TypeError(f"{who}: expected a kdfast.objective.Term, got {got}")
        if not hasattr(term, "weight"):
            raise TypeError(
                f"{who}: expected a term whose __init__ calls super().__init__(weight), got {type(term).__name__}"
            )
        if term.needs not in NEEDS:
            term.refuse("needs", f"one of {', '.join(map(repr, NEEDS))}", term.needs)

    def for_student(self, model: nn.Module) -> Terms:
        """This objective, which counts the scores of a causal student's attention as such from now on."""
        from kdfast.models import reader  # imports transformers, which logits do not need

        for term in self.terms.values():
            if isinstance(term, Attention):
                term.causal = reader.adapter_of(model).causal
        return self

    def for_models(self, student: nn.Module, teacher: nn.Module | None) -> Terms:
        """This objective, whose terms have what they make of both models: projections that are functions of widths.
        A teacher whose outputs are stored is None."""
        for term in self.terms.values():
            term.for_models(student, teacher)  # type: ignore[operator]
        return self

    def run(self, model: nn.Module, inputs: Inputs) -> Any:
        """The student or the teacher on a batch: its outputs, or where a term needs more, `kdfast.hf.Features`."""
        own = model_inputs(model, inputs)
        needs = {term.needs for term in self.terms.values()}
        if "branches" in needs:
            self._check_branches(model)
            own["branches"] = True
        if not needs & {"hidden", "attention"}:
            return model(**own)
        from kdfast.models import reader  # imports transformers, which logits do not need

        if "attention" in needs:
            return reader.Reader.of(model)(**own)
        try:
            return reader.read_hidden(model, **own)
        except TypeError as error:
            if "output_hidden_states" not in str(error):
                raise
            raise TypeError(
                f"{type(self).__name__}: model: expected one whose forward takes output_hidden_states, as those of "
                f"transformers do, got {type(unwrapped(model)).__name__}"
            ) from error

    def _check_branches(self, model: nn.Module) -> None:
        if "branches" not in parameters_of(model):
            got = type(unwrapped(model)).__name__
            raise TypeError(f"{type(self).__name__}: model: expected a kdfast.early_exit.EarlyExit, got {got}")

    def num_items(self, inputs: Inputs) -> Tensor:
        """What each term is a mean of, [terms]."""
        device, terms = any_column(inputs).device, self.terms.values()
        return torch.stack([term.count(inputs).to(device) for term in terms])  # type: ignore[operator]

    def forward(self, student_outputs: Any, teacher_outputs: Any, inputs: Inputs) -> dict[str, Tensor]:
        """The terms, weighted."""
        warn_of_router_loss(type(self).__name__, getattr(student_outputs, "outputs", student_outputs))
        values, missing = self.possible(student_outputs, teacher_outputs, inputs)
        for error in missing.values():
            raise error
        if not values:
            raise ValueError(
                f"{type(self).__name__}: terms: expected one whose weight is not 0 at {self.progress:.0%}, got none"
            )
        if "num_items" not in inputs:
            return values
        shares = self.num_items(inputs) / divisor(inputs["num_items"])
        of_terms = dict(zip(self.terms, shares, strict=True))
        return {name: value * of_terms[name].to(value.device) for name, value in values.items()}

    def possible(
        self, student_outputs: Any, teacher_outputs: Any, inputs: Inputs
    ) -> tuple[dict[str, Tensor], dict[str, Missing]]:
        """The terms, weighted, that have what they need, and what the others lack; means of this batch alone."""
        check_per_row(type(self).__name__, inputs)
        teacher = teacher_outputs if hasattr(teacher_outputs, "hidden") else Stored(teacher_outputs, inputs)
        values: dict[str, Tensor] = {}
        missing: dict[str, Missing] = {}
        for name, term in self.terms.items():
            weight = term.weight_at(self.progress)  # type: ignore[operator]
            try:
                if weight:
                    values[name] = weight * self._value(term, student_outputs, teacher, inputs)
            except Missing as error:
                missing[name] = error
        return values, missing

    @staticmethod
    def _value(term: Any, student: Any, teacher: Any, inputs: Inputs) -> Tensor:
        try:
            value: Tensor = term(student, teacher, inputs)
        except AttributeError as error:
            if error.name not in ("hidden", "q", "k", "v") or not (error.obj is student or error.obj is teacher):
                raise
            if not term.needs:
                term.refuse("needs", f"'hidden' or 'attention' where the term reads .{error.name}", "")
            side = "teacher" if error.obj is teacher else "student"
            found = error.obj.outputs if isinstance(error.obj, Stored) else error.obj
            lacking = error.obj is teacher and found is None
            got = "none" if found is None else type(found).__name__
            expected = f"outputs with .{error.name}, what objective.run({side}, inputs) returns"
            message = f"{type(term).__name__}: {side}: expected {expected}, got {got}"
            raise (Missing if lacking else ValueError)(message) from error
        if not isinstance(value, Tensor):
            term.refuse("forward", "a scalar tensor", type(value).__name__, TypeError)
        if value.dim():
            term.refuse("forward", "a scalar, the mean over what count(inputs) counts", list(value.shape))
        return value


class Hinton(Terms):
    """Hinton, Vinyals and Dean (2015): soft targets of the teacher beside the labels.

        loss = alpha · T² · KL(softmax(z_t/T) ‖ softmax(z_s/T)) + (1 - alpha) · CE(z_s, label)

    `alpha` weighs the **soft** term (some implementations weigh the hard one with it). T² stands here, on the soft
    term, and keeps its gradient comparable when T changes; `kdfast.kl_div` itself never multiplies by T². A term of
    weight 0 is left out: alpha = 0 is plain training on the labels and needs no teacher, alpha = 1 needs no labels.

    For classification: logits `[B, C]`, labels `[B]`. Language models: `LanguageModel`.

    Its terms are `kl` and `ce`.

    Raises:
        TypeError: alpha or temperature is no number.
        ValueError: alpha outside [0, 1], a temperature that is not positive, logits that are not
            `[batch, classes]`, or a batch that lacks what a term needs.
    """

    def __init__(self, alpha: float = 0.9, temperature: float = 2.0) -> None:
        check_fraction("Hinton", "alpha", alpha)
        check_temperature_number("Hinton", temperature)
        super().__init__(kl=Logits(weight=alpha, temperature=temperature), ce=Labels(weight=1 - alpha))
