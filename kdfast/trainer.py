"""`DistillationTrainer`: transformers' Trainer with a teacher and an objective, and nothing else changed."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast._step import Means, agreement, inside_forward, without
from kdfast.data import LengthGroupedSampler
from kdfast.objective import Objective, Term, model_inputs
from kdfast.objective._protocol import SAMPLE, TEACHER
from kdfast.pairing import check_same_classes

try:
    import accelerate  # noqa: F401  (transformers asks for it only when training starts)
    from safetensors.torch import load_file, save_file
    from transformers import Trainer, TrainingArguments
    from transformers.utils import ModelOutput
except ModuleNotFoundError as error:
    raise ImportError(
        f"kdfast.DistillationTrainer needs {error.name}, which is not installed: pip install kdfast[train]"
    ) from error


OBJECTIVE = "distillation"  # the student's name for the objective while it is trained, and of its file in a checkpoint


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """Trains `model` on an objective of its outputs and a teacher's.

    Args:
        model: the student.
        args: the usual `TrainingArguments`. `train_sampling_strategy="group_by_length"` uses
            `kdfast.data.LengthGroupedSampler`, whose order survives a resume within an epoch.
        teacher: a module that is run on every batch, without gradient. It is frozen, put into eval mode and moved to
            the student's device, in place. With None, rows may carry its outputs as columns whose names begin with
            `teacher_`, as those of `kdfast.teacher_cache` do; neither model gets them.
        objective: a `kdfast.objective.Objective`. Its terms are averaged between two log events and logged by name. Where it
            is a module, its parameters are trained too; checkpoints keep them in a file of their own, the student has none.
        **kwargs: as for `transformers.Trainer`, except `compute_loss_func`: the objective is the loss.

    Evaluation reports the mean of every term (`eval_kl`), and of classifiers whose teacher's logits are there, how often the
    two agree and how far they are apart: `eval_agreement`, a share of rows, and `eval_kl_to_teacher`, KL(teacher ‖ student)
    at temperature 1 in nats; of several labels at once, both of each label alone; of regressors `eval_mse_to_teacher`.

    Gradient accumulation and several processes give what one large batch would where the objective counts its items, as
    `Terms` and `LanguageModel` do. Others are averaged over micro-batches: exact where these are equally large.

    Raises:
        TypeError: the objective is a term on its own, outside `Terms`.
        ValueError: teacher and student are the same module, name the same classes in another order, or a setting that the objective replaces
            (`compute_loss_func`, `label_smoothing_factor`) is given.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        teacher: nn.Module | None = None,
        objective: Objective,
        **kwargs: Any,
    ) -> None:
        if teacher is model:
            raise ValueError("DistillationTrainer: teacher and model are the same module; pass a copy as the teacher")
        if kwargs.get("compute_loss_func") is not None or (args is not None and args.label_smoothing_factor):
            raise ValueError(
                "DistillationTrainer: compute_loss_func and label_smoothing_factor have no effect here; "
                "the objective is the loss"
            )
        if isinstance(objective, Term):
            name = type(objective).__name__
            raise TypeError(
                f"DistillationTrainer: objective: expected named terms, such as Terms(it={name}()), got {name} alone"
            )
        check_same_classes("DistillationTrainer: model", model, teacher)
        super().__init__(model, args, **kwargs)
        # Whether the Trainer takes the loss as already divided by the number of items of the accumulated batch.
        self.model_accepts_loss_kwargs = hasattr(objective, "num_items")
        self.can_return_loss = True  # without labels, that is
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval().to(self.args.device)
        self.objective: Any = objective.to(self.args.device) if isinstance(objective, nn.Module) else objective
        self._trained, self._evaluated = Means(), Means()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum of the objective's terms for one micro-batch; with `return_outputs`, also the student's logits."""
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
            against = getattr(outputs, "logits", None), getattr(teacher_outputs, "logits", None)
            self._evaluated.add(terms | agreement(*against, self.model), len(next(iter(inputs.values()))))
        loss = torch.stack(list(terms.values())).sum()
        if not return_outputs:
            return loss
        logits = getattr(outputs, "logits", None)
        return loss, ModelOutput() if logits is None else ModelOutput(logits=logits)

    def _run(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        if hasattr(self.objective, "run"):
            return self.objective.run(model, inputs)
        return model(**model_inputs(model, inputs))

    def _teacher_outputs(self, inputs: dict[str, Any]) -> Any:
        if self.teacher is None:
            return ModelOutput(logits=inputs["teacher_logits"]) if "teacher_logits" in inputs else None
        with torch.no_grad(), self.accelerator.autocast():
            return self._run(self.teacher, inputs)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        if not batch_samples or not hasattr(self.objective, "num_items"):
            return None
        counted = torch.stack([self.objective.num_items(batch) for batch in batch_samples]).sum(0).to(device)
        # The mean over processes, as the gradient is one too.
        return self.accelerator.reduce(counted.float(), reduction="mean")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each term since the last log event to the Trainer's training log."""
        if "loss" in logs and self._trained.weight:
            logs |= self._trained.take(self.accelerator)
        super().log(logs, start_time)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, which would compute no loss where a model's labels are not there."""
        names: list[str] = vars(self)["label_names"]
        self.label_names = [name for name in names if inputs.get(name) is not None]
        try:
            loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
            return loss, logits, labels if self.label_names else None
        finally:
            self.label_names = names

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with the means of the terms and of the comparison with the teacher among its metrics."""
        self._evaluated = Means()
        output = super().evaluation_loop(*args, **kwargs)
        if self._evaluated.weight:
            prefix = kwargs.get("metric_key_prefix", "eval")
            means = {f"{prefix}_{name}": mean for name, mean in self._evaluated.take(self.accelerator).items()}
            output.metrics.update({name: mean for name, mean in means.items() if name not in output.metrics})
        return output

    # ---- an objective with parameters is a part of the student while that is trained, and of no file of its weights ----
    def train(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.objective, nn.Module) or not any(True for _ in self.objective.parameters()):
            return super().train(*args, **kwargs)
        self.model.add_module(OBJECTIVE, self.objective)
        try:
            return super().train(*args, **kwargs)
        finally:
            delattr(self.model, OBJECTIVE)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if OBJECTIVE not in self.model._modules:
            super()._save(output_dir, state_dict)
            return
        every = self.model.state_dict() if state_dict is None else state_dict
        of_student = {name: value for name, value in every.items() if not name.startswith(f"{OBJECTIVE}.")}
        super()._save(output_dir, of_student)
        if self.args.should_save:
            # Not those of state_dict: projections that terms share would be there twice.
            own = {name: value.detach().contiguous() for name, value in self.objective.named_parameters()}
            save_file(own, Path(output_dir or self.args.output_dir) / f"{OBJECTIVE}.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with without(self.model, OBJECTIVE):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_objective(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        with without(self.model, OBJECTIVE):
            super()._load_best_model()
        self._load_objective(self.state.best_model_checkpoint)

    def _load_objective(self, checkpoint: str) -> None:
        if OBJECTIVE not in self.model._modules:
            return
        path = Path(checkpoint) / f"{OBJECTIVE}.safetensors"
        saved, own = load_file(path) if path.exists() else {}, dict(self.objective.named_parameters())
        if saved.keys() != own.keys():
            raise ValueError(
                f"DistillationTrainer: objective: expected the parameters that {path} has, {sorted(saved)}, got {sorted(own)}"
            )
        self.objective.load_state_dict(saved, strict=False)  # projections that terms share are there once

    # ---- rows ----
    def _set_signature_columns_if_needed(self) -> None:
        # The Trainer drops columns that the model's forward does not name.
        first_time = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if first_time:
            sets = [self.train_dataset, *(e.values() if isinstance(e := self.eval_dataset, dict) else [e])]
            own = [name for data in sets for name in next(iter(data or ()), {}) if name.startswith((TEACHER, SAMPLE))]
            of_teacher = [] if self.teacher is None else inspect.signature(self.teacher.forward).parameters
            self._signature_columns.extend(dict.fromkeys(("teacher_logits", *own, *of_teacher)))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        column = self.args.length_column_name
        lengths = [row[column] if column in row else len(row["input_ids"]) for row in dataset]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(lengths, batch_size, seed)
