"""`DistillationTrainer`: transformers' Trainer with a teacher and an objective, and nothing else changed."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.data.sampler import LengthGroupedSampler
from kdfast.models.inputs import TARGETS, parameters_of, teacher_inputs
from kdfast.models.pairing import check_same_classes
from kdfast.objective import Missing, Objective, model_inputs
from kdfast.objective.term import rows_of
from kdfast.train.rows import Columns, first_rows, own_rows
from kdfast.train.step import Means, agreement, forget_evaluation, inside_forward

try:
    import accelerate  # noqa: F401  (transformers asks for it only when training starts)
    from transformers import TrainingArguments
    from transformers.utils import ModelOutput

    from kdfast.train.objective_trainer import ObjectiveTrainer
    from kdfast.train.teacher import check_apart, check_objective, check_teacher, has_float32, run_where_it_is, stays
except ModuleNotFoundError as error:
    raise ImportError(
        f"kdfast.DistillationTrainer needs {error.name}, which is not installed: pip install kdfast[train]"
    ) from error


class DistillationTrainer(ObjectiveTrainer):
    """Trains `model` on an objective of its outputs and a teacher's.

    Args:
        model: the student.
        args: the usual `TrainingArguments`. `train_sampling_strategy="group_by_length"` uses
            `kdfast.data.sampler.LengthGroupedSampler`, whose order survives a resume within an epoch.
        teacher: a module that is run on every batch, without gradient. It is frozen, put into eval mode and moved to
            the student's device, in place; one that is dispatched (`device_map`) or quantised stays where it is. Mixed
            precision is for those in float32. A column `teacher_input_ids`, or of another argument of its forward,
            takes the place of the student's (`kdfast.data.sampler.TeacherCollator` pads them). With None, rows may
            carry its outputs as columns whose names begin with `teacher_`, as those of `kdfast.teacher_cache` do;
            neither model gets them.
        objective: a `kdfast.objective.Objective`. Its terms are averaged between two log events and logged by name.
            Where it is a module, its parameters are trained too; checkpoints keep them in a file of their own,
            the student has none.
        **kwargs: as for `transformers.Trainer`, except `compute_loss_func`: the objective is the loss. With
            `model_init`, an objective's parameters start anew as the model does.

    Evaluation reports the mean of every term (`eval_kl`) over all that it counts, whatever the batches, and their sum
    (`eval_loss`). Some do depend on the batches: `Hidden` and `Embedding` with `masked=False`, to which a
    batch's padding counts, and a router's loss (`aux`), which is of a batch as a whole. There are also, of
    classifiers whose teacher's logits are there, how often the two agree and how far they are apart:
    `eval_agreement`, a share of rows, and `eval_kl_to_teacher`, KL(teacher ‖ student) at temperature 1 in nats, of
    several labels at once both of each label alone; of regressors `eval_mse_to_teacher`. What the outputs are is told
    by `Labels` of the objective, the student's `problem_type`, a softmax of `Logits`; where nothing tells, several
    outputs are not compared. A term whose labels or stored teacher the rows lack is left out with a warning; without
    any term there is no `eval_loss`. Predictions are the logits, of question answering those of starts and ends.

    Gradient accumulation and several processes give what one large batch would where the objective counts its items,
    as `Terms` and `LanguageModel` do, but for those terms. Others are averaged over micro-batches: exact where
    these are equally large.

    Raises:
        TypeError: the objective is a class, or a term on its own, outside `Terms`; the teacher is no module.
        ValueError: teacher and student share parameters, name the same classes in another order, or a setting that the
            objective replaces (`compute_loss_func`, `label_smoothing_factor`) is given.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        teacher: nn.Module | None = None,
        objective: Objective,
        **kwargs: Any,
    ) -> None:
        check_teacher(teacher)
        check_objective(objective)
        if kwargs.get("compute_loss_func") is not None or (args is not None and args.label_smoothing_factor):
            raise ValueError(
                "DistillationTrainer: compute_loss_func, label_smoothing_factor: expected neither, as the objective "
                "is the loss, got one"
            )
        super().__init__(model, args, **kwargs)
        check_apart(teacher, self.model)
        check_same_classes("DistillationTrainer: model", self.model, teacher)
        # Whether the Trainer takes the loss as already divided by the number of items of the accumulated batch.
        self.model_accepts_loss_kwargs = hasattr(objective, "num_items")
        # Those of the objective, where a model's forward names none.
        self.label_names: list[str] = vars(self)["label_names"] or ["labels"]
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()
        if self.teacher is not None and not stays(self.teacher):
            self.teacher.to(self.args.device)
        self.objective: Any = self._prepared(objective)
        if self.model_init is not None and isinstance(objective, nn.Module):
            self._objective_start = copy.deepcopy(objective.state_dict())
        self._trained, self._evaluated, self._compared = Means(), defaultdict[str, Means](Means), Means()

    def _prepared(self, objective: Any) -> Any:
        if hasattr(objective, "for_student"):
            objective = objective.for_student(self.model)
        if hasattr(objective, "for_models"):
            objective = objective.for_models(self.model, self.teacher)
        return objective.to(self.args.device) if isinstance(objective, nn.Module) else objective

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; over several processes also after an evaluation."""
        forget_evaluation(self)
        return super().train(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum of the objective's terms for one micro-batch; with `return_outputs`,
        also what the student returned."""
        if num_items_in_batch is not None:
            inputs = {**inputs, "num_items": num_items_in_batch}
        teacher_outputs, outputs = self._teacher_outputs(inputs), None

        def step(student: nn.Module) -> dict[str, Tensor]:
            nonlocal outputs
            outputs = self._run(student, inputs)
            terms: dict[str, Tensor] = self.objective(outputs, teacher_outputs, inputs)
            return terms

        if model.training:
            if hasattr(self.objective, "progress"):
                self.objective.progress = self.state.global_step / max(self.state.max_steps, 1)
            terms = inside_forward(model, step)
            part = 1 / getattr(self, "current_gradient_accumulation_steps", 1)  # there is one once training starts
            self._trained.add(terms, part, summed=num_items_in_batch is not None)
        else:
            terms = step(model)
        loss = torch.stack(list(terms.values())).sum()
        return (loss, outputs) if return_outputs else loss

    def _run(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        if hasattr(self.objective, "run"):
            return self.objective.run(model, inputs)
        return model(**model_inputs(model, inputs))

    def _teacher_outputs(self, inputs: dict[str, Any]) -> Any:
        if self.teacher is None:
            return ModelOutput(logits=inputs["teacher_logits"]) if "teacher_logits" in inputs else None
        own, device = teacher_inputs(self.teacher, inputs), self.args.device
        autocast = self.accelerator.autocast() if has_float32(self.teacher) else nullcontext()
        with torch.no_grad(), autocast:
            return run_where_it_is(self._run, self.teacher, own, device)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        if not batch_samples or not hasattr(self.objective, "num_items"):
            return None
        counted = torch.stack([self.objective.num_items(batch) for batch in batch_samples]).sum(0).to(device)
        # The mean over processes, as the gradient is one too.
        return self.accelerator.reduce(counted.float(), reduction="mean")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each term since the last log event to the Trainer's training log."""
        if "loss" in logs and self._trained.weight:
            logs |= {name: round(mean, 6) for name, mean in self._trained.take(self.accelerator).items()}
        super().log(logs, start_time)

    # ---- evaluation ----
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """One batch: its loss, its logits and its labels, each None where it is not there or not asked for."""
        inputs = self._prepare_inputs(inputs)
        rows = rows_of(inputs)
        own = own_rows(self.accelerator, rows)
        part = inputs if own == rows else first_rows(inputs, max(own, 1), rows)
        with torch.no_grad(), self.compute_loss_context_manager():
            teacher_outputs, outputs = self._teacher_outputs(part), self._run(model, part)
            terms = self._possible_terms(outputs, teacher_outputs, part)
            logits = () if prediction_loss_only else self._logits(outputs)
            own_logits, its_logits = (getattr(of, "logits", None) for of in (outputs, teacher_outputs))
            compared = agreement(own_logits, its_logits, self.objective, getattr(self.model, "config", None))
        for name, weight in self._counts(part, terms).items():
            self._evaluated[name].add({name: terms[name]}, weight if own else 0)
        self._compared.add(compared, own)
        loss = torch.stack(list(terms.values())).sum() if terms else None
        if prediction_loss_only:
            return loss, None, None
        # As many as the batch has, of which accelerate drops those that are not its own.
        filled = torch.arange(rows).clamp(max=max(own, 1) - 1)
        logits = tuple(x if own == rows else x[filled] for x in logits)
        labels = tuple(inputs[name] for name in self.label_names if inputs.get(name) is not None)
        return loss, *(x[0] if len(x) == 1 else x or None for x in (logits, labels))

    def _possible_terms(self, outputs: Any, teacher_outputs: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        missing: dict[str, Missing] = {}
        if hasattr(self.objective, "possible"):
            terms, missing = self.objective.possible(outputs, teacher_outputs, inputs)
        else:
            try:
                terms = self.objective(outputs, teacher_outputs, inputs)
            except Missing as error:
                missing[type(self.objective).__name__] = error
        for name, lacking in missing.items():
            warnings.warn(f"DistillationTrainer: evaluation without {name}: {lacking}", stacklevel=2)
        return terms

    def _counts(self, inputs: dict[str, Any], terms: dict[str, Tensor]) -> dict[str, Any]:
        """What the terms are means of."""
        if not hasattr(self.objective, "num_items"):
            return dict.fromkeys(terms, rows_of(inputs))
        counted = self.objective.num_items(inputs)
        every = dict(zip(self.objective.terms, counted, strict=True)) if counted.dim() else {}
        return {name: every.get(name, counted) for name in terms}

    def _logits(self, outputs: Any) -> tuple[Tensor, ...]:
        if hasattr(self.objective, "logits"):
            return (self.objective.logits(outputs),)
        model = getattr(outputs, "outputs", outputs)
        named = (getattr(model, name, None) for name in ("logits", "start_logits", "end_logits"))
        found = tuple(logits for logits in named if isinstance(logits, Tensor))
        if not found and self.compute_metrics is not None:
            raise ValueError(
                "DistillationTrainer: compute_metrics: expected a model or an objective (`logits(outputs)`) that gives "
                f"logits, got {type(model).__name__} from {type(self.objective).__name__}"
            )
        return found

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with the means of the terms and of the comparison with the teacher among its metrics."""
        self._evaluated.clear()
        self._compared = Means()
        output = super().evaluation_loop(*args, **kwargs)
        means = {name: mean.take(self.accelerator)[name] for name, mean in self._evaluated.items()}
        if means:
            means["loss"] = sum(means.values())
        means |= self._compared.take(self.accelerator)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": mean for name, mean in means.items()})
        return output

    # ---- rows ----
    def _set_signature_columns_if_needed(self) -> None:
        # The Trainer drops columns that the model's forward does not name.
        known = vars(self)["_signature_columns"]
        super()._set_signature_columns_if_needed()
        if known is None:
            of_teacher = () if self.teacher is None else parameters_of(self.teacher)
            self._signature_columns = Columns((*vars(self)["_signature_columns"], *TARGETS, *of_teacher))

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        self._set_signature_columns_if_needed()
        self._signature_columns.list_those_of(dataset.column_names)
        return super()._remove_unused_columns(dataset, description)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        column = self.args.length_column_name
        if len(dataset) and not {column, "input_ids"} & dataset[0].keys():
            raise ValueError(
                "DistillationTrainer: train_sampling_strategy: expected rows with input_ids or their lengths in a "
                f"column {column!r} for 'group_by_length', got {', '.join(dataset[0])}"
            )
        lengths = [row[column] if column in row else len(row["input_ids"]) for row in dataset]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(lengths, batch_size, seed)
