"""Runs the recipe of DynaBERT in its folder. What is finished is not repeated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from kdfast.data import files
from kdfast.elastic import Elastic, kept_layers
from kdfast.models import cost
from kdfast.models.loading import device, load_tokenizer, named, pretrained
from kdfast.prune import importance, rewire
from kdfast.recipes.classifier import Stage
from kdfast.recipes.dynabert import IMPORTANCE_BATCH, ElasticStage, Recipe, name_of
from kdfast.results import plots
from kdfast.results.disk import saving
from kdfast.results.measure import Candidate
from kdfast.results.progress import bar
from kdfast.runs import stages
from kdfast.runs.classifier import ClassifierRun
from kdfast.runs.unlabeled import drawn
from kdfast.train.subnetworks import SubnetworkTrainer


class DynaBERTRun(ClassifierRun):
    """The folder has `student/`, all sub-networks in one model, whose whole is the largest of them; what went before in
    `width/` and `depth/`; in place of learning curves, `sizes_accuracy.png`."""

    recipe: Recipe

    # ---- models ----
    def _elastic(self, model: Any, widths: Any, depths: Any = (1.0,)) -> Elastic:
        r = self.recipe
        try:
            return Elastic(model, widths, depths, keep_last=r.keep_last)
        except (TypeError, ValueError) as error:
            source = named("teacher", r.teacher) if r.teacher else named("base", r.base or "base")
            raise ValueError(f"{source}: {error}") from None

    def _given_teacher(self, source: str) -> Any:
        model = super()._given_teacher(source)
        if getattr(model.config, "quantization_config", None):
            raise ValueError(f"{named('teacher', source)}: expected a whole model, got one that kdfast made smaller")
        return model

    def _student(self, model: Any, layers: tuple[int, ...]) -> Any:
        student = super()._student(model, layers)
        self._elastic(student, self.recipe.widths, self.recipe.depths).close()  # refuses what cannot be one
        return student

    def _start(self, stage: Stage, model: Any, layers: tuple[int, ...]) -> Any:
        student = super()._start(stage, model, layers)
        if stage.start == "student":
            self._sort(student)
        return student

    def _sort(self, model: Any) -> None:
        """The best heads and neurons first."""
        r = self.recipe
        rows = drawn(self.train, r.importance_rows, r.seed)
        collate = DataCollatorWithPadding(self.tokenizer)

        def batches() -> Iterator[Any]:
            with bar("importance of heads and neurons", len(rows)) as shown:
                for start in range(0, len(rows), IMPORTANCE_BATCH):
                    some = rows[start : start + IMPORTANCE_BATCH]
                    yield collate(some)
                    shown.update(len(some))

        rewire(model.to(device()), *importance(model, batches(), accumulate=r.accumulate))

    # ---- training ----
    def _cache(self, teacher: Any, cls_layers: list[int]) -> tuple[Any, Any]:
        """Of the test rows alone, as the teacher runs beside the student in training."""
        self.collate = DataCollatorWithPadding(self.tokenizer)
        cache = self._stored("test", self.test, teacher, [])
        return (self.train, cache.beside(self.test)), cache.collator(self.collate)

    def _train(self, stage: Stage, student: Any, teacher: Any, cached: Any) -> None:
        if stage.teacher_of != "teacher":
            teacher = self._load("teacher", self.folder / stage.teacher_of)
        super()._train(stage, student, teacher, cached)

    @contextmanager
    def _trainer(self, stage: Stage, student: Any, teacher: Any) -> Iterator[Any]:
        if not isinstance(stage, ElasticStage):
            with super()._trainer(stage, student, teacher) as make:
                yield make
            return
        r, layers = self.recipe, student.config.num_hidden_layers

        def objective_of(width: float, depth: float) -> Any:
            states = [*kept_layers(layers, depth, r.keep_last), layers]
            return stage.of_states(states, width == depth == 1)

        of_teacher = self._elastic(teacher, r.widths) if stage.match else None
        with self._elastic(student, r.widths, stage.depths) as networks:
            yield partial(
                SubnetworkTrainer,
                networks=networks,
                objective_of=objective_of,
                teacher_networks=of_teacher,
                sandwich=r.sandwich,
                in_place=r.teacher_width == "in_place",
            )

    # ---- results ----
    def _titles(self, todo: list[Stage]) -> dict[str, str]:
        sizes = [(w, d) for d in sorted(self.recipe.depths)[::-1] for w in sorted(self.recipe.widths)[::-1]]
        return self._teachers() | {name_of(w, d): f"{w:g} wide, {d:g} deep" for w, d in sizes}

    def _candidates(self, titles: dict[str, str], of_teacher: Any) -> dict[str, Candidate]:
        """The teacher, and every sub-network as a model of its own."""
        r = self.recipe
        found = super()._candidates({"teacher": titles["teacher"]}, of_teacher)
        whole = self._load("student", self.folder / "student").to(device())
        with self._elastic(whole, r.widths, r.depths) as networks:
            for width, depth in networks.subnetworks:
                name = name_of(width, depth)
                if name != "student":
                    self.starts[name] = "student"  # all of them were trained at once
                model = whole if name == "student" else networks.export(width, depth)
                model.base_model.embeddings = whole.base_model.embeddings  # once, and not in every one
                found[name] = Candidate(f"test: {titles[name]}", model, self.folder / name, self.tokenizer, self.test)
        return found

    def _plot(self, titles: dict[str, str], histories: dict[str, stages.History], known: dict[str, Any]) -> str:
        title = f"DynaBERT on {files.shown_name(self.task.name)}"
        plots.plot_sizes(self.folder / "sizes_accuracy.png", [known["models"]], self.task.metric, title)
        return "sizes_accuracy.png; kdfast export writes any of the sizes as a model"


def save_size(recipe: Recipe, run: Path, output: Path, width: float, depth: float) -> int:
    """Writes a sub-network of a finished run as a model of its own, with the tokenizer; returns how many parameters it has.

    Raises:
        ValueError: the run's student cannot be loaded.
    """
    transformers.utils.logging.disable_progress_bar()
    whole = pretrained(AutoModelForSequenceClassification, "run", run / "student")
    with Elastic(whole, recipe.widths, recipe.depths, keep_last=recipe.keep_last) as networks:
        model = networks.export(width, depth)
    with saving(output):
        model.save_pretrained(output)
        load_tokenizer("run", run / "student").save_pretrained(output)
    return cost.parameters(model)
