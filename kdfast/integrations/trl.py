"""TRL's distillation trainers with kdfast's operators: the loss, the gradients and the logged metrics stay.

Of trl 1.16: `DistillationTrainer` and `trl.experimental.gkd.GKDTrainer`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kdfast import js_div, linear_kd_loss
from kdfast.data.text import OFF
from kdfast.objective import LanguageModel
from kdfast.ops import _checks

OF_HIDDEN = "_chunked_divergence_loss"  # what DistillationTrainer's loss calls with hidden states and output embeddings
Trainer = TypeVar("Trainer")


def use_kdfast(trainer: Trainer) -> Trainer:
    """Makes this trainer of TRL compute its loss by kdfast; call it before `train()`.

        trainer = use_kdfast(DistillationTrainer(model, teacher_model=teacher, args=args, train_dataset=rows))

    The generalised Jensen-Shannon divergence of TRL is `kdfast.js_div`, with the same beta. In `DistillationTrainer`
    `kdfast.linear_kd_loss` takes the place of a chunked loss of eight matrix products (six for beta 0 and 1), which
    projects again for the mixture and in the backward: here it is four, and the metric `entropy`, the student's, is of
    the same. `GKDTrainer` makes all logits, several times; here none, but in evaluations that ask for predictions.
    Everything else (sampling, teachers, what is logged and saved) is TRL's.

    Returns:
        The trainer itself.

    Raises:
        TypeError: another trainer, or one whose class has a loss of its own.
    """
    from trl.trainer import distillation_trainer as distillation

    gkd = sys.modules.get("trl.experimental.gkd.gkd_trainer")  # importing it warns; it is there where a trainer is
    if isinstance(trainer, distillation.DistillationTrainer):
        own = _own(trainer, "_compute_loss", distillation.DistillationTrainer)
        # TRL's method with one name in it standing for another function: in this trainer alone.
        code = FunctionType(
            own.__code__, {**own.__globals__, OF_HIDDEN: _of_hidden}, own.__name__, own.__defaults__, own.__closure__
        )
        trainer._compute_loss = MethodType(code, trainer)
    elif gkd is not None and isinstance(trainer, gkd.GKDTrainer):
        of_outputs = MethodType(_own(trainer, "compute_loss", gkd.GKDTrainer), trainer)
        trainer.generalized_jsd_loss = _of_logits
        trainer.compute_loss = partial(_gkd_loss, trainer, of_outputs)
    else:
        expected = "a trl.DistillationTrainer or a trl.experimental.gkd.GKDTrainer"
        _checks.wrong_type("use_kdfast", "trainer", expected, type(trainer).__name__)
    return trainer


def _own(trainer: Any, method: str, base: type) -> Any:
    """The base's method, if the trainer's class has it from there."""
    own, theirs = getattr(type(trainer), method), getattr(base, method)
    if own is not theirs:
        got = f"{type(trainer).__name__}, which has its own"
        _checks.wrong_type("use_kdfast", "trainer", f"one with the {method} of trl's {base.__name__}", got)
    return theirs


def _of_hidden(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | float | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """TRL's `_chunked_divergence_loss`: the loss, the sum of the student's entropies and the number of tokens."""
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    student = student_hidden_states, student_lm_head_weight, student_lm_head_bias
    teacher = teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias
    # DeepSpeed's ZeRO-3 has the weights' shards; gradients are made in the forward, which alone needs the whole.
    with maybe_gather_lm_head_ctx(*student[1:]), maybe_gather_lm_head_ctx(*teacher[1:]):
        (hidden, weight, bias), (t_hidden, t_weight, t_bias) = _head(*student), _head(*teacher)
        counted = completion_mask != 0
        of = linear_kd_loss(
            *(hidden, weight, t_hidden, t_weight),
            student_bias=bias,
            teacher_bias=t_bias,
            student_softcap=student_final_logit_softcapping,
            teacher_softcap=teacher_final_logit_softcapping,
            student_logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            alpha=1.0,
            divergence="js_div",
            beta=beta,
            temperature=temperature,
            mask=counted,
            num_items=num_items_in_batch,
            return_entropy=True,
        )
    return of.loss / temperature**2, of.entropy.sum(), counted.sum()


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states and output embeddings in one dtype, whole."""
    whole = (None if x is None else x.full_tensor() if hasattr(x, "full_tensor") else x for x in (weight, bias))
    weight, bias = (None if x is None else x.to(hidden.dtype) for x in whole)  # type: ignore[assignment]
    return hidden, weight, bias


def _of_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    beta: float,
    num_items_in_batch: Tensor | float | None,
) -> Tensor:
    """TRL's `GKDTrainer.generalized_jsd_loss`, as its `compute_loss` calls it: at temperature 1."""
    return js_div(student_logits, teacher_logits, beta=beta, mask=labels != OFF, num_items=num_items_in_batch)


def _gkd_loss(
    trainer: Any,
    of_outputs: Callable[..., Any],
    model: nn.Module,
    inputs: dict[str, Any],
    return_outputs: bool = False,
    num_items_in_batch: Tensor | float | None = None,
) -> Any:
    """`GKDTrainer.compute_loss`, from hidden states where nobody asks for logits. TRL's is at temperature 1."""
    if return_outputs:
        return of_outputs(model, inputs, True, num_items_in_batch)
    objective = LanguageModel(alpha=1.0, divergence="js_div", beta=trainer.beta)
    tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    student = objective.run(model, tokens)
    trainer.teacher_model.eval()
    with torch.no_grad():
        teacher = objective.run(trainer.teacher_model, tokens)
    # Without the attention mask: the labels alone say what counts, as in TRL.
    columns = {name: inputs[name] for name in ("input_ids", "labels")}
    if num_items_in_batch is not None:
        columns["num_items"] = num_items_in_batch
    return objective(student, teacher, columns)["kd"]
