"""`DistillationTrainer`: transformers' Trainer with a teacher and an objective, and nothing else changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdfast.data import LengthGroupedSampler
from kdfast.objective import Objective

try:
    import accelerate  # noqa: F401  (transformers asks for it only when training starts)
    from transformers import Trainer, TrainingArguments
    from transformers.utils import ModelOutput
except ModuleNotFoundError as error:
    raise ImportError(
        f"kdfast.DistillationTrainer needs {error.name}, which is not installed: pip install kdfast[train]"
    ) from error


PREFIX = "teacher_"  # of columns that hold a teacher's outputs


def _without_teacher(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if not name.startswith(PREFIX)}


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """Trains `model` on an objective of its outputs and a teacher's.

    Args:
        model: the student.
        args: the usual `TrainingArguments`. `train_sampling_strategy="group_by_length"` uses
            `kdfast.data.LengthGroupedSampler`, whose order survives a resume within an epoch.
        teacher: a module that is run on every batch, without gradient. It is frozen, put into eval mode and moved to
            the student's device, in place. With None, rows may carry its outputs as columns whose names begin with
            `teacher_`, as those of `kdfast.teacher_cache` do; neither model gets them.
        objective: a `kdfast.objective.Objective`. Its terms are averaged between two log events and logged by name.
        **kwargs: as for `transformers.Trainer`, except `compute_loss_func`: the objective is the loss.

    Terms are means over rows, so gradient accumulation divides their sum by the number of micro-batches: as exact as
    one large batch where these are equally large. An objective that counts its items (`LanguageModel`) is exact always.

    Raises:
        ValueError: teacher and student are the same module, or a setting that the objective replaces
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
        super().__init__(model, args, **kwargs)
        # Whether the Trainer takes the loss as already divided by the number of items of the accumulated batch.
        self.model_accepts_loss_kwargs = hasattr(objective, "num_items")
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval().to(self.args.device)
        self.objective = objective
        self._term_sums: dict[str, Tensor] = {}
        self._term_steps = 0.0

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum of the objective's terms for one micro-batch; with `return_outputs`, also the student's outputs."""
        if num_items_in_batch is not None:
            inputs = {**inputs, "num_items": num_items_in_batch}
        outputs = self._student_outputs(model, inputs)
        terms = self.objective(outputs, self._teacher_outputs(inputs), inputs)
        if model.training:
            part = 1 / getattr(self, "current_gradient_accumulation_steps", 1)  # there is one once training starts
            for name, value in terms.items():
                value = value.detach() * (part if num_items_in_batch is None else 1.0)
                self._term_sums[name] = self._term_sums.get(name, 0) + value
            self._term_steps += part
        loss = torch.stack(list(terms.values())).sum()
        return (loss, outputs) if return_outputs else loss

    def _student_outputs(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        if hasattr(self.objective, "run"):
            return self.objective.run(model, inputs)
        return model(**_without_teacher(inputs))

    def _teacher_outputs(self, inputs: dict[str, Any]) -> Any:
        if self.teacher is None:
            return ModelOutput(logits=inputs["teacher_logits"]) if "teacher_logits" in inputs else None
        with torch.no_grad(), self.accelerator.autocast():
            if hasattr(self.objective, "run"):
                return self.objective.run(self.teacher, inputs)
            return self.teacher(**{k: v for k, v in _without_teacher(inputs).items() if k != "labels"})

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        if not batch_samples or not hasattr(self.objective, "num_items"):
            return None
        counted = torch.stack([self.objective.num_items(batch) for batch in batch_samples]).sum().to(device)
        # The mean over processes, as the gradient is one too.
        mean: Tensor = self.accelerator.reduce(counted.float(), reduction="mean")
        return mean

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each term since the last log event to the Trainer's training log."""
        if "loss" in logs and self._term_steps:
            for name, total in self._term_sums.items():
                mean = self.accelerator.reduce(total / self._term_steps, reduction="mean")
                logs[name] = round(mean.item(), 6)
            self._term_sums, self._term_steps = {}, 0.0
        super().log(logs, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        # The Trainer drops columns that the model's forward does not name.
        first_time = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if first_time:
            row = self.train_dataset[0] if hasattr(self.train_dataset, "__getitem__") else {}
            of_teacher = (name for name in row if name.startswith(PREFIX))
            self._signature_columns.extend(dict.fromkeys(("teacher_logits", *of_teacher)))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        column = self.args.length_column_name
        first = dataset[0]
        key = column if column in first else "input_ids"
        lengths = [row[key] if key == column else len(row[key]) for row in dataset]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(lengths, batch_size, seed)
