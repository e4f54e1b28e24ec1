"""Runs the recipe of FastBERT in its folder. What is finished is not repeated."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, DataCollatorWithPadding

from kdfast.data import files, tasks
from kdfast.models import pairing
from kdfast.models.early_exit import EarlyExit, saved_in
from kdfast.models.loading import classifier, device, named, pretrained
from kdfast.recipes.classifier import Stage, labels_only
from kdfast.recipes.fastbert import Recipe
from kdfast.results import plots, speed_curve
from kdfast.results.measure import Metrics
from kdfast.runs import stages
from kdfast.runs.classifier import ClassifierRun

SPEEDS = tuple(i / 10 for i in range(11))


class FastBERTRun(ClassifierRun):
    """The folder has `teacher/`, where that was trained here, and `student/`, both for `EarlyExit.from_pretrained`; in
    place of learning curves, `speed_accuracy.png`."""

    recipe: Recipe
    loader = "kdfast.early_exit.EarlyExit"

    # ---- before anything is trained ----
    def _task(self) -> tasks.Task:
        task = super()._task()
        self.recipe.stages(1, 2, task.kind)  # refuses other kinds than classes
        return task

    # ---- models ----
    def _load(self, argument: str, source: str | Path) -> Any:
        """Of a saved one its own branches, of an encoder new ones; attention without dropout, as in other runs."""
        if Path(source).is_dir() and saved_in(source):
            model = pretrained(EarlyExit, argument, source, dtype=torch.float32)
            model.config.attention_probs_dropout_prob = 0.0
            pairing.pad_alike(named(argument, source), model, self.tokenizer)
            return model
        config = pretrained(AutoConfig, argument, source)
        options: dict[str, Any] = {"dtype": torch.float32} | self.task.head
        if hasattr(config, "attention_probs_dropout_prob"):
            options["attention_probs_dropout_prob"] = 0.0
        transformers.set_seed(self.recipe.seed)  # for the branches' initial weights
        pairing.check_names(named(argument, source), config, self.task.names)
        return self._with_branches(argument, source, pretrained(AutoModel, argument, source, **options))

    def _given_teacher(self, source: str) -> Any:
        """A classifier with its own head as the last; or one with branches, which are trained on."""
        model = classifier(self.task, "teacher", source)
        if isinstance(model, EarlyExit):
            model.speed = 0.0
            pairing.pad_alike(named("teacher", source), model, self.tokenizer)
            return model
        transformers.set_seed(self.recipe.seed)
        return self._with_branches("teacher", source, model)

    def _with_branches(self, argument: str, source: str | Path, model: Any) -> EarlyExit:
        r = self.recipe
        pairing.pad_alike(named(argument, source), model, self.tokenizer)
        try:
            return EarlyExit(model, width=r.branch_width, heads=r.branch_heads, strict=r.strict)
        except ValueError as error:
            raise ValueError(f"{named(argument, source)}: {error}") from None

    def _teacher(self, source: str | Path) -> Any:
        r, folder = self.recipe, self.folder / "teacher"
        if r.teacher is not None:
            return self._given_teacher(r.teacher)
        if stages.finished(folder) is None:
            rates: Any = {"epochs": r.teacher_epochs, "learning_rate": r.teacher_rate}
            stage = Stage("teacher", "teacher", labels_only(self.task.kind), measured=False, **rates)
            self._train(stage, self._frozen(self._load("base", source).train_backbone()), None, None)
        return self._load("teacher", folder)

    def _student(self, model: Any, layers: tuple[int, ...]) -> Any:
        student = copy.deepcopy(model)
        student.speed, student.strict = self.recipe.speed, self.recipe.strict
        return student.train_branches(self.recipe.frozen_dropout)

    def _start(self, stage: Stage, model: Any, layers: tuple[int, ...]) -> Any:
        return self._student(model, layers)

    # ---- training ----
    def _cache(self, teacher: Any, cls_layers: list[int]) -> tuple[Any, Any]:
        """All text without labels; and the test rows with the teacher's logits, which training does not need: it makes
        them beside the branches', of the same states."""
        self.collate = DataCollatorWithPadding(self.tokenizer)
        cache = self._stored("test", self.test, teacher, [])
        texts = [{name: value for name, value in row.items() if name != "labels"} for row in self.train]
        return [texts, cache.beside(self.test)], cache.collator(self.collate)

    def _rows_of(self, stage: Stage, teacher: Any, cached: tuple[Any, Any]) -> tuple[Any, Any]:
        """All of them: the branches learn from the last classifier, which every text has."""
        return cached

    # ---- results ----
    def _measure(self, titles: dict[str, str], histories: dict[str, stages.History], cache: Any) -> dict[str, Metrics]:
        results = super()._measure(titles, histories, cache)
        student = self._load("student", self.folder / "student").to(device())
        speeds = sorted({*SPEEDS, self.recipe.speed})
        curve = speed_curve.measured(student, self.test, self.tokenizer, self.task.metric, speeds)
        self.more = {"curve": curve}
        # Of one batch the time is chance: it depends on where its rows leave.
        at = next(point for point in curve if point["speed"] == self.recipe.speed)
        own = {name: value for name, value in results["student"].items() if not name.startswith("latency")}
        results["student"] = own | {name: value for name, value in at.items() if name in speed_curve.OF_MODEL}
        return results

    def _plot(self, titles: dict[str, str], histories: dict[str, stages.History], known: dict[str, Any]) -> str:
        curve = known["curve"]
        self.console.print(speed_curve.table(curve, self.task.metric))
        title = f"FastBERT on {files.shown_name(self.task.name)}"
        plots.plot_speeds(self.folder / "speed_accuracy.png", [curve], self.task.metric, title)
        return "speed_accuracy.png"
