"""Soft targets on inputs that are perturbed so that the student is wrong about them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.models.inputs import TEACHER, unwrapped
from kdfast.objective._protocol import Missing
from kdfast.objective.of_logits import Labels, Logits
from kdfast.objective.schedules import Weight, check_weight
from kdfast.objective.term import Inputs, Stored, Term, token_mask
from kdfast.objective.terms import Terms

NORMS = ("sign", "l2")
STEP = 2.5  # of PGD, times epsilon over the number of steps: far enough to reach the border (Madry et al., 2018)


class Ran:
    """What a model returned for a batch, and how to run it again, in the same precision, with other embeddings."""

    def __init__(self, outputs: Any, objective: Any, model: nn.Module, inputs: Inputs) -> None:
        self.outputs, self._objective, self._model, self._inputs = outputs, objective, model, inputs
        self._device = next(model.parameters()).device.type
        self._autocast = torch.is_autocast_enabled(self._device), torch.get_autocast_dtype(self._device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["outputs"], name)

    @property
    def embeddings(self) -> Any:
        return unwrapped(self._model).get_input_embeddings()

    def shape(self) -> tuple[int, int, int]:
        """[B, L, D] of the input embeddings."""
        ids = self._inputs["input_ids"]
        return (*ids.shape, self.embeddings.weight.shape[-1])

    def again(self, delta: Tensor) -> Any:
        """The outputs with delta [B, L, D] added to what the model's input embeddings return."""
        enabled, dtype = self._autocast
        config = getattr(unwrapped(self._model), "config", None)
        # XLNet turns a batch before it embeds it.
        delta = delta.transpose(0, 1) if getattr(config, "model_type", "") == "xlnet" else delta
        with added(self.embeddings, delta), torch.autocast(self._device, dtype=dtype, enabled=enabled):
            return self._objective(self._model, self._inputs)


@contextmanager
def added(embeddings: nn.Module, delta: Tensor) -> Iterator[None]:
    """Within the block, a module returns delta [B, L, D] more. Positions and types are added to that by the model."""
    handle = embeddings.register_forward_hook(lambda module, inputs, output: output + delta.to(output.dtype))
    try:
        yield
    finally:
        handle.remove()


class Perturbed(Logits):
    """T² · D(student, teacher) of logits [B, C] on perturbed input embeddings, for `Adversarial`.

    The perturbation is made of the student alone, by its loss ℓ against the labels, on the tokens that are no padding:

        FGSM (steps 1, Goodfellow et al., 2015):  δ = epsilon · sign(∂ℓ/∂e), or epsilon · g/‖g‖ of a row's gradient g
        PGD (Madry et al., 2018), per step:       δ + step · sign(g), or step · g/‖g‖, brought back to where
                                                  |δ|, or ‖δ‖ of a row, is at most epsilon

    The loss has a gradient for the student's parameters, none for δ.

    Args:
        divergence, weight, temperature, t_squared, per_class, **settings: as of `Logits`.
        epsilon: how far, in the units of the embeddings.
        steps: 1 is FGSM.
        norm: "sign", where every number of δ is at most epsilon, or "l2", where a row's norm is (Miyato et al., 2017).
        step: of PGD; None: 2.5 · epsilon / steps.
        clean_teacher: the teacher's logits are of the input as it is, as in ARD (Goldblum et al., 2020), and may be
            stored; else the teacher reads the same δ, for which its embeddings must be as wide as the student's.
        task: of the labels, as of `Labels`.

    Raises:
        TypeError, ValueError: as `Logits`; epsilon, steps, step or norm out of range; a batch without `input_ids`; a
            teacher that is stored, of other tokens or of another width, without `clean_teacher`; or a term outside of
            `Adversarial`.
    """

    def __init__(
        self,
        divergence: str = "kl_div",
        *,
        weight: Weight = 1.0,
        epsilon: float = 0.01,
        steps: int = 1,
        norm: str = "sign",
        step: float | None = None,
        clean_teacher: bool = False,
        task: str = "classification",
        **settings: Any,
    ) -> None:
        super().__init__(divergence, weight=weight, **settings)
        if self.tokens is not None:
            self.refuse("tokens", "None: the loss is of whole rows", self.tokens)
        check_weight(type(self).__name__, "epsilon", epsilon)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            self.refuse("steps", "a whole number from 1 on", steps)
        if norm not in NORMS:
            self.refuse("norm", "'sign' or 'l2'", norm)
        if step is not None:
            check_weight(type(self).__name__, "step", step)
        if task not in ("classification", "multi_label", "regression"):
            self.refuse("task", "'classification', 'multi_label' or 'regression'", task)
        self.epsilon, self.steps, self.norm, self.clean_teacher, self.task = epsilon, steps, norm, clean_teacher, task
        self.step = step if step is not None else epsilon if steps == 1 else STEP * epsilon / steps

    def forward(self, student: Any, teacher: Any, inputs: Inputs) -> Tensor:
        teacher = teacher.outputs if isinstance(teacher, Stored) and isinstance(teacher.outputs, Ran) else teacher
        if not isinstance(student, Ran):
            self.refuse("student", "what Adversarial.run returns", type(student).__name__)
        if not self.clean_teacher:
            self._check_teacher(student, teacher, inputs)
        delta = self.perturbation(student, inputs)
        if self.clean_teacher:
            target = teacher
        else:
            with torch.no_grad():
                target = SimpleNamespace(logits=self.output(teacher.again(delta), "logits"))
        return super().forward(student.again(delta), target, inputs)

    def _check_teacher(self, student: Ran, teacher: Any, inputs: Inputs) -> None:
        possible = "; clean_teacher is possible, for which it reads the input as it is"
        if not isinstance(teacher, Ran):
            got = "stored logits" if f"{TEACHER}logits" in inputs else "none"
            raise Missing(f"Perturbed: teacher: expected one that runs, got {got}{possible}")
        if teacher.shape() != student.shape():
            expected = f"input embeddings {list(student.shape())} as the student's, to which the same is added"
            raise ValueError(f"Perturbed: teacher: expected {expected}, got {list(teacher.shape())}{possible}")

    def perturbation(self, student: Ran, inputs: Inputs) -> Tensor:
        """δ [B, L, D], without gradient; 0 where there is padding."""
        if "input_ids" not in inputs:
            raise ValueError(f"Perturbed: inputs: expected a batch with input_ids, got {', '.join(inputs)}")
        loss = Labels(self.task)
        labels = {name: inputs[name] for name in ("labels", "input_ids") if name in inputs}
        shape = student.shape()
        on = token_mask(inputs, shape[:2])[..., None]
        delta = torch.zeros(shape, device=on.device)
        for _ in range(self.steps):
            with torch.enable_grad():
                delta.requires_grad_()
                # A sum of rows: the gradient of one does not depend on the others.
                total = loss(student.again(delta), None, labels) * shape[0]
                (gradient,) = torch.autograd.grad(total, delta)
            delta = self._within(delta.detach() + self.step * self._direction(gradient * on))
        return delta.detach()

    def _direction(self, gradient: Tensor) -> Tensor:
        if self.norm == "sign":
            return gradient.sign()
        norms = gradient.flatten(1).norm(dim=1)[:, None, None]
        return torch.where(norms > 0, gradient / norms, 0.0)

    def _within(self, delta: Tensor) -> Tensor:
        if self.norm == "sign":
            return delta.clamp(-self.epsilon, self.epsilon)
        norms = delta.flatten(1).norm(dim=1)[:, None, None]
        return torch.where(norms > self.epsilon, delta * (self.epsilon / norms), delta)


class Adversarial(Terms):
    """`Terms` of which some are `Perturbed`; the others see the batch as it is.

        Adversarial(kl=Logits(weight=0.5), ce=Labels(weight=0.1), adversarial=Perturbed(weight=0.4, epsilon=0.01))

    A perturbed term runs the student once for each of its steps, once more on what comes out, and the teacher once.

    Raises:
        TypeError, ValueError: as `Terms`; none is `Perturbed`.
    """

    def __init__(self, *unnamed: Any, **terms: Term) -> None:
        super().__init__(*unnamed, **terms)
        if not any(isinstance(term, Perturbed) for term in self.terms.values()):
            raise ValueError(f"Adversarial: terms: expected one that is Perturbed, got {', '.join(self.terms)}")

    def run(self, model: nn.Module, inputs: Inputs) -> Ran:
        """The student or the teacher on a batch as it is, and what runs it again."""
        return Ran(super().run(model, inputs), super().run, model, inputs)
