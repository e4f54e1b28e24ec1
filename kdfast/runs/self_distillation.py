"""Runs the recipe of generations in its folder. What is finished is not repeated."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdfast.recipes.classifier import Stage
from kdfast.recipes.self_distillation import Recipe
from kdfast.runs.classifier import ClassifierRun


class SelfDistillationRun(ClassifierRun):
    """The folder has `generation_1/` and so on, the last of them `student/`; in `teacher_outputs/`, beside the
    teacher's, those of each generation that has taught another."""

    recipe: Recipe

    def _source(self) -> str | Path:
        self.source = super()._source()
        return self.source

    def _start(self, stage: Stage, model: Any, layers: tuple[int, ...]) -> Any:
        if self.recipe.student_start == "base":  # whose classifier is new, by the seed
            one = copy.copy(self)
            one.recipe = replace(self.recipe, seed=self.recipe.seed + stage.seed)
            model = one._load("base", self.source)
        return super()._start(stage, model, layers)

    def _train(self, stage: Stage, student: Any, teacher: Any, cached: tuple[Any, Any] | None) -> None:
        if stage.teacher_of != "teacher":
            before = self._load("teacher", self.folder / stage.teacher_of)
            parts = {"train": self.train, "test": self.test}
            caches = [self._stored(f"{stage.teacher_of}/{part}", rows, before, []) for part, rows in parts.items()]
            beside = [cache.beside(rows) for cache, rows in zip(caches, parts.values(), strict=True)]
            cached = beside, caches[0].collator(self.collate)
        super()._train(stage, student, teacher, cached)
