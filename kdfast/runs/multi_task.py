"""Runs the recipe of several tasks in its folder. What is finished is not repeated."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.utils.data import ConcatDataset, Dataset

from kdfast.data.sampler import TaskSampler
from kdfast.models import pairing
from kdfast.models.first_token import shortcut
from kdfast.models.loading import named
from kdfast.models.shared_encoder import SharedEncoder
from kdfast.objective import Tasks
from kdfast.objective.of_tasks import COLUMN
from kdfast.recipes.classifier import Stage
from kdfast.recipes.multi_task import OfTask, Recipe
from kdfast.results.disk import saving
from kdfast.results.measure import Metrics, length
from kdfast.runs import arguments, stages
from kdfast.runs.classifier import ClassifierRun
from kdfast.train.trainer import DistillationTrainer


class TaskRun(ClassifierRun):
    """A task's own part: all but its student, which is `ready` with its rows where it is to be trained with the
    others."""

    recipe: OfTask
    ready: tuple[Stage, Any, tuple[Any, Any]] | None = None
    begun: Callable[[], None]  # before anything is written

    def _check(self, source: str | Path) -> None:
        super()._check(source)
        self.begun()

    def _train(self, stage: Stage, student: Any, teacher: Any, cached: tuple[Any, Any] | None) -> None:
        if stage.folder == "student" and cached is not None:
            self.ready = stage, student, cached
        else:
            super()._train(stage, student, teacher, cached)

    def _finish(self, titles: dict[str, str], histories: Any, cached: tuple[Any, Any]) -> dict[str, Metrics]:
        return {} if self.ready else super()._finish(titles, histories, cached)


class MultiTaskRun:
    """One run in its folder. `execute` does what is not done yet.

    The folder has `config.yaml`, and of each task a folder `task_sst2/` that is like a run's of that task alone:
    `teacher/`, `student/`, `metrics.json` and so on. `kdfast evaluate` and `kdfast compare` take that. While the
    students are trained together, and until each is in its place, they are in `shared/`.
    """

    def __init__(self, recipe: Recipe, folder: Path, console: Console) -> None:
        self.recipe, self.folder, self.console = recipe, folder, console
        stages.begin(recipe, folder, console)

    def execute(self) -> dict[str, Metrics]:
        """Trains, measures and shows; returns the metrics of all models by task and folder."""
        runs = {name: self._of(recipe, name) for name, recipe in self.recipe.parts().items()}
        results = {name: run.execute() for name, run in runs.items()}
        if any(run.ready for run in runs.values()):
            self._check(runs)
            if stages.finished(self.folder / "shared") is None:
                self._train(runs)
            for name, run in runs.items():
                if run.ready:
                    self._put_in_place(name, run)
                    results[name] = self._of(run.recipe, name).execute()
        shutil.rmtree(self.folder / "shared", ignore_errors=True)
        return {f"{name}/{model}": row for name, of in results.items() for model, row in of.items()}

    def _of(self, recipe: OfTask, name: str) -> TaskRun:
        run = TaskRun(recipe, self.folder / f"task_{name}", self.console)
        run.begun = lambda: stages.write_config(self.folder, self.recipe.as_dict())
        return run

    def _check(self, runs: Mapping[str, TaskRun]) -> None:
        """Rows of all tasks go into one encoder."""
        first = next(iter(runs.values()))
        for name, run in runs.items():
            pairing.check_tokens(named("teacher", run.recipe.teacher or name), run.tokenizer, first.tokenizer)

    def _train(self, runs: Mapping[str, TaskRun]) -> None:
        r, folder = self.recipe, self.folder / "shared"
        ready = {name: run.ready for name, run in runs.items() if run.ready}
        if lacking := [name for name in runs if name not in ready]:
            raise ValueError(
                f"output {self.folder}: expected students of all tasks to be trained together, got "
                f"{', '.join(lacking)} trained before; --fresh starts over"
            )
        weights = {name: r.of("weight", k) for k, name in enumerate(runs)}
        objectives: dict[str, Any] = {name: stage.objective for name, (stage, _, _) in ready.items()}
        trainer = TaskTrainer(
            SharedEncoder({name: student for name, (_, student, _) in ready.items()}),
            arguments.training(
                r,
                folder,
                num_train_epochs=r.epochs,
                learning_rate=r.learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=r.warmup,
                weight_decay=0.01,
                save_steps=250,
                logging_steps=10,
                remove_unused_columns=False,  # by a forward that names none
            ),
            objective=Tasks(objectives, weights),
            train_dataset=TaskRows({name: cached[0][0] for name, (_, _, cached) in ready.items()}),
            data_collator=TaskCollator({name: cached[1] for name, (_, _, cached) in ready.items()}),
            processing_class=next(iter(runs.values())).tokenizer,
        )
        trainer.tau = r.tau
        with shortcut(next(iter(trainer.model.models.values()))):
            stages.train_stage(trainer, folder, "students, shared encoder", r.save_dtype)

    def _put_in_place(self, name: str, run: TaskRun) -> None:
        """A task's student as a run of its own has it; `stage.json` last."""
        place, history = run.folder / "student", stages.finished(self.folder / "shared")
        with saving(place):
            shutil.copytree(self.folder / "shared" / name, place, dirs_exist_ok=True)
            run.tokenizer.save_pretrained(place)
        precision = stages.trained_in(self.folder / "shared")
        stages.write_json(place / "stage.json", {"history": history, "precision": precision})


class TaskRows(ConcatDataset[dict[str, Any]]):
    """The rows of all tasks, one after another, each with its task's name."""

    def __init__(self, rows: Mapping[str, Dataset[dict[str, Any]]]) -> None:
        super().__init__(rows.values())
        self.names = [name for name, of in rows.items() for _ in range(len(of))]  # type: ignore[arg-type]

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**super().__getitem__(number), COLUMN: self.names[number]}


class TaskCollator:
    """Batches of one task, by its own collator."""

    def __init__(self, collators: Mapping[str, Any]) -> None:
        self.collators = collators

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        names = sorted({row[COLUMN] for row in rows})
        if len(names) > 1:
            raise ValueError(f"TaskCollator: rows: expected those of one task, got {', '.join(names)}")
        own = [{name: x for name, x in row.items() if name != COLUMN} for row in rows]
        return {**self.collators[names[0]](own), COLUMN: names[0]}


class TaskTrainer(DistillationTrainer):
    """Every micro-batch is of one task."""

    tau = 1.0

    def _get_train_sampler(self, train_dataset: Any = None) -> TaskSampler:
        parts = (self.train_dataset if train_dataset is None else train_dataset).datasets
        lengths = [[length(part.dataset[i]) for i in range(len(part))] for part in parts]  # of rows beside a cache
        return TaskSampler(lengths, self.args.train_batch_size, self.tau, self.args.seed)
