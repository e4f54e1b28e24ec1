"""An objective's parameters: trained with the student, saved and resumed beside it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer

from kdfast.train.step import without

OBJECTIVE = "distillation"  # the student's name for the objective while it is trained, and of its file in a checkpoint


class ObjectiveTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose `objective` is a part of the student while that is trained, and of no file of its weights."""

    objective: Any
    _objective_trained = False
    _objective_start: dict[str, Tensor] | None = None  # what `model_init` goes back to

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.objective, nn.Module) or not any(True for _ in self.objective.parameters()):
            return super().train(*args, **kwargs)
        self.model.add_module(OBJECTIVE, self.objective)
        self._objective_trained = True
        try:
            return super().train(*args, **kwargs)
        finally:
            self._objective_trained = False
            delattr(self.model, OBJECTIVE)

    def call_model_init(self, trial: Any = None) -> Any:
        """The Trainer's; the objective starts anew with the model, and goes with it while that is trained."""
        defaults = [x.default is not x.empty for x in inspect.signature(self.model_init).parameters.values()]
        # The Trainer gives a trial, None without a search, to whatever takes an argument.
        model = self.model_init() if trial is None and all(defaults) else super().call_model_init(trial)
        if self._objective_start is not None:
            self.objective.load_state_dict(self._objective_start)
        if self._objective_trained:
            delattr(self.model, OBJECTIVE)
            model.add_module(OBJECTIVE, self.objective)
        return model

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if OBJECTIVE not in self.model._modules:
            super()._save(output_dir, state_dict)
            return
        every = self.model.state_dict() if state_dict is None else state_dict
        of_student = {name: value for name, value in every.items() if not name.startswith(f"{OBJECTIVE}.")}
        super()._save(output_dir, of_student)
        if self.args.should_save:
            self.save_objective(Path(output_dir or self.args.output_dir))

    def save_objective(self, folder: Path) -> None:
        """Writes the objective's parameters, where it has any, into a folder beside the student's weights."""
        # Not those of state_dict: projections that terms share would be there twice.
        if own := {name: value.detach().contiguous() for name, value in self._parameters_of_objective().items()}:
            save_file(own, folder / f"{OBJECTIVE}.safetensors")

    def load_objective(self, folder: Path) -> None:
        """The other way round, where the parameters there are of the same names and shapes; else nothing."""
        path, own = folder / f"{OBJECTIVE}.safetensors", self._parameters_of_objective()
        saved = load_file(path) if path.exists() else {}
        if own and {k: x.shape for k, x in saved.items()} == {k: x.shape for k, x in own.items()}:
            self.objective.load_state_dict(saved, strict=False)

    def _parameters_of_objective(self) -> dict[str, Tensor]:
        return dict(self.objective.named_parameters()) if isinstance(self.objective, nn.Module) else {}

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
                f"DistillationTrainer: objective: expected the parameters that {path} has, {sorted(saved)}, got "
                f"{sorted(own)}"
            )
        self.objective.load_state_dict(saved, strict=False)  # projections that terms share are there once
