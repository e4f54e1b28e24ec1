"""Runs a `ClassifierRecipe` in its folder: teacher, stored outputs, students, measurements. What is finished stays."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import nn
from torch.utils.data import Subset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    TrainingArguments,
)

from kdfast import teacher_cache
from kdfast.data import demo, files, metrics, tasks
from kdfast.models import pairing, students
from kdfast.models.early_exit import EarlyExit
from kdfast.models.first_token import shortcut
from kdfast.models.inputs import teacher_inputs
from kdfast.models.loading import classifier, device, load_tokenizer, named, pretrained
from kdfast.objective import CLS, Labels, Logits
from kdfast.recipes.classifier import ClassifierRecipe, Stage, labels_only
from kdfast.recipes.paths import absolute
from kdfast.results import libraries, measured_rows, plots, tables
from kdfast.results.measure import BATCH, Candidate, Metrics, length, measure, versions
from kdfast.results.progress import bar
from kdfast.runs import arguments, stages, unlabeled
from kdfast.runs.stage_rows import StageRows
from kdfast.train.teacher import run_where_it_is
from kdfast.train.trainer import DistillationTrainer

CURVE_ROWS = 500  # of the test rows, for the points of the learning curves; the table is measured on all


def _shortcut(model: Any, objective: Any) -> Any:
    """`shortcut` where the objective reads no other token of the last layer."""
    suffices = all(isinstance(term, (Logits, Labels, CLS)) for term in objective.terms.values())
    return shortcut(model) if suffices else nullcontext()


class ClassifierRun:
    """One run in its folder. `execute` does what is not done yet.

    The folder has a folder for `from_pretrained` per model (`teacher/`, `student/`, and what else the recipe's stages
    name), `teacher_outputs/`, `augmented/` where a stage has variants of the rows, `config.yaml`, `metrics.json` and
    `learning_curves.png`.
    """

    loader = "AutoModelForSequenceClassification"  # of the student

    def __init__(self, recipe: ClassifierRecipe, folder: Path, console: Console) -> None:
        self.recipe, self.folder, self.console = recipe, folder, console
        self.more: dict[str, Any] = {}  # in metrics.json beside the models'
        stages.begin(recipe, folder, console)

    def execute(self) -> dict[str, Metrics]:
        """Trains, measures and shows; returns the metrics of the models by their folders."""
        libraries.quiet()  # a new classification head is not worth a warning here
        r = self.recipe
        self.task = self._task()
        measured_rows.check(self.folder, self.task)
        source = self._source()
        self._check_tokenizers()
        self._make_rows()
        self._check(source)
        stages.write_config(self.folder, r.as_dict())

        teacher, base = self._teacher(source), None
        layers, todo = self._plan(teacher)
        self.starts = {stage.folder: stage.start for stage in todo if stage.start != "student"}
        cached = self._cache(teacher, sorted({layer for stage in todo for layer in stage.cls_layers}))
        histories: dict[str, stages.History] = {"teacher": stages.finished(self.folder / "teacher") or []}
        for stage in todo:
            if stages.finished(self.folder / stage.folder) is None:
                if base is None and (stage.teacher == "base" or r.student_start == "base"):
                    base = self._load("base", source)
                start = self._start(stage, base if r.student_start == "base" else teacher, layers)
                beside = {"live": teacher, "base": base}.get(stage.teacher or "")
                self._train(stage, start, beside, self._rows_of(stage, teacher, cached))
            histories[stage.folder] = stages.finished(self.folder / stage.folder) or []
        return self._finish(self._titles(todo), histories, cached)

    def _source(self) -> str | Path:
        """Where the pre-trained encoder is; and the tokenizer that rows are made by."""
        r = self.recipe
        source = r.base or r.teacher or demo.fetch(demo.MINILM)
        self.tokenizer = load_tokenizer("teacher" if r.teacher else "base", r.teacher or source)
        return source

    def _make_rows(self) -> None:
        train, test = self._tokenized(self.tokenizer)
        self.curve = len(test[:CURVE_ROWS])
        # Batches that are made in this order have hardly any padding; training has an order of its own.
        first, rest = range(self.curve), range(self.curve, len(test))
        self.order = _by_length(train, range(len(train))), [*_by_length(test, first), *_by_length(test, rest)]
        self.train, self.test = self._in_order(train, test)

    def _tokenized(self, tokenizer: Any) -> tuple[list[Any], list[Any]]:
        longest = self.recipe.max_length
        train, test = tasks.tokenize(self.task, tokenizer, longest)
        return train.to_list() + unlabeled.rows_of(self.texts, self.task, tokenizer, longest), test.to_list()

    def _in_order(self, *parts: list[Any]) -> tuple[list[Any], list[Any]]:
        train, test = ([part[i] for i in order] for part, order in zip(parts, self.order, strict=True))
        return train, test

    def _titles(self, todo: list[Stage]) -> dict[str, str]:
        """Of all models in the result, by their folders."""
        return self._teachers() | {stage.folder: stage.title for stage in todo if stage.measured}

    def _teachers(self) -> dict[str, str]:
        """Titles of the teachers in the result, by their folders."""
        return {"teacher": "teacher"}

    def _task(self) -> tasks.Task:
        r = self.recipe
        task = measured_rows.load(r, train_rows=r.train_rows)
        held_out = ", held out of the file's" if task.held_out else ""
        rows = f"{len(task.train):,} training rows, {len(task.test):,} test rows{held_out}"
        self.console.print(f"{files.shown_name(task.name)}: {rows}; {task.described}")
        for note in task.notes:
            self.console.print(note, markup=False)
        self.texts = unlabeled.texts_of(r, task, self.console)
        return task

    def _plan(self, teacher: Any) -> tuple[tuple[int, ...], list[Stage]]:
        """The student's layers, and all that is trained after the teacher."""
        r, depth = self.recipe, teacher.config.num_hidden_layers
        layers = r.student_layers or r.student_default(depth)
        count = len(layers) if r.student is None else pretrained(AutoConfig, "student", r.student).num_hidden_layers
        return layers, r.all_stages(count, depth, self.task.kind)

    def _check_tokenizers(self) -> None:
        """Rows are made by one tokenizer, the teacher's."""
        r = self.recipe
        for name, source in (("base", r.base if r.teacher else None), ("student", r.student)):
            if source is not None:
                own = load_tokenizer(name, source)
                pairing.check_tokens(named(name, source), own, self.tokenizer, pairing.OF_OTHER_TOKENS)

    def _check(self, source: str | Path) -> None:
        """Tries every stage on two rows, with models that are like the later ones,
        before the first is trained for long."""
        r = self.recipe
        teacher = self._load("base", source) if r.teacher is None else self._given_teacher(r.teacher)
        base = self._load("base", r.base) if r.teacher and r.base else teacher
        layers, todo = self._plan(teacher)
        self.rows = StageRows(self.folder, self.task, self.tokenizer, r.max_length, source, todo)
        for told in self.rows.notes:
            self.console.print(told, markup=False)
        student = self._student(base if r.student_start == "base" else teacher, layers)
        titles = {"teacher": (r.teacher, teacher), "base": (r.base, base), "student": (r.student, student)}
        for name, (given, model) in titles.items():
            pairing.check_length(named(name, given or name), model, r.max_length)
            pairing.check_ids(named(name, given or name), model, (*self.train, *self.test))
        if r.teacher and r.student:
            own = pretrained(AutoConfig, "student", r.student)  # whose classes `_load` names anew
            pairing.check_same_classes(named("student", r.student), own, teacher)
        if r.teacher and (note := pairing.matched_by_number("the teacher", teacher.config, self.task.names)):
            self.console.print(note, markup=False)
        rows = DataCollatorWithPadding(self.tokenizer)([self.train[i] for i in unlabeled.labelled(self.train)[:2]])
        for stage in todo:
            beside = None if stage.teacher is None else base if stage.teacher == "base" else teacher
            self._try(stage, student, beside, rows)

    def _try(self, stage: Stage, student: Any, teacher: Any, rows: Any) -> None:
        terms: Any = stage.objective
        with torch.no_grad():
            try:
                terms = terms.for_models(student, teacher) if hasattr(terms, "for_models") else terms
                own = None if teacher is None else teacher_inputs(teacher, rows)
                terms(terms.run(student, rows), own and run_where_it_is(terms.run, teacher, own, student.device), rows)
            except ValueError as error:
                raise ValueError(f"{self.recipe.name}, {stage.title}: {error}") from None

    # ---- models ----
    def _load(self, argument: str, source: str | Path) -> Any:
        """A classifier of the task. PyTorch's fused attention has no dropout on the CPU;
        the rest of the dropout stays."""
        config = pretrained(AutoConfig, argument, source)
        options: dict[str, Any] = {"ignore_mismatched_sizes": True, "output_loading_info": True} | self.task.head
        options["dtype"] = torch.float32  # however it is stored: small steps are lost on weights of 16 bits
        options["quantised"] = self.recipe.only_run(source)
        if hasattr(config, "attention_probs_dropout_prob"):
            options["attention_probs_dropout_prob"] = 0.0
        transformers.set_seed(self.recipe.seed)  # for the classifier's initial weights
        pairing.check_names(named(argument, source), config, self.task.names)
        model, loading = pretrained(AutoModelForSequenceClassification, argument, source, **options)
        if unlike := sorted(name for name, *_ in loading["mismatched_keys"]):
            raise ValueError(
                f"{named(argument, source)}: expected weights of {self.task.described}, as the data, got others: "
                f"{', '.join(unlike)}"
            )
        pairing.pad_alike(named(argument, source), model, self.tokenizer)
        return model

    def _given_teacher(self, source: str) -> Any:
        model = classifier(self.task, "teacher", source, quantised=self.recipe.only_run(source))
        if isinstance(model, EarlyExit):
            raise ValueError(
                f"{named('teacher', source)}: expected a classifier, got one with branches (early_exit.json); "
                "fastbert goes on with it"
            )
        pairing.pad_alike(named("teacher", source), model, self.tokenizer)
        return model

    def _teacher(self, source: str | Path) -> Any:
        r, folder = self.recipe, self.folder / "teacher"
        if r.teacher is not None:
            return self._given_teacher(r.teacher)
        if stages.finished(folder) is None:
            self._train(self._of_teacher("teacher"), self._frozen(self._load("base", source)), None, None)
        return self._load("teacher", folder)

    def _of_teacher(self, folder: str, title: str = "teacher", seed: int = 0) -> Stage:
        """The fine-tuning of a teacher."""
        r = self.recipe
        rates: Any = {"epochs": r.teacher_epochs, "learning_rate": r.teacher_learning_rate, "seed": seed}
        return Stage(folder, title, labels_only(self.task.kind), measured=False, **rates)

    def _start(self, stage: Stage, model: Any, layers: tuple[int, ...]) -> Any:
        """The student before a stage."""
        if stage.start != "student":
            return self._frozen(self._load("student", self.folder / stage.start))
        return self._frozen(self._student(model, layers))

    def _student(self, model: Any, layers: tuple[int, ...]) -> Any:
        r = self.recipe
        if r.student is not None:
            student = self._load("student", r.student)
        elif r.student_config is None:
            # The teacher's logits are made without dropout: a student without any comes closer to the same function.
            student = students.from_layers(model, layers, dropout=0.0)
        else:
            transformers.set_seed(r.seed)  # for the weights that do not fit
            student = students.narrower(model, layers=layers, dropout=0.0, **r.config_changes()).model
        return student

    def _frozen(self, model: Any) -> Any:
        embeddings: nn.Module = getattr(model.base_model, "embeddings", model.get_input_embeddings())
        fresh = "hidden_size" in (self.recipe.student_config or "")
        embeddings.requires_grad_(fresh or not self.recipe.freeze_embeddings)
        return model

    # ---- training ----
    def _cache(self, teacher: Any, cls_layers: list[int]) -> tuple[Any, Any]:
        """The rows with the teacher's outputs beside them, which are computed once, and their collator."""
        self.collate = DataCollatorWithPadding(self.tokenizer)
        parts = {"train": self.train, "test": self.test}
        caches = [self._stored(part, rows, teacher, cls_layers) for part, rows in parts.items()]
        beside = [cache.beside(rows) for cache, rows in zip(caches, parts.values(), strict=True)]
        return beside, caches[0].collator(self.collate)

    def _stored(self, part: str, rows: list[dict[str, Any]], teacher: Any, cls_layers: list[int]) -> Any:
        with bar(f"teacher's outputs, {part}", len(rows)) as shown, shortcut(teacher):

            def progress(done: int, tokens: int) -> None:
                shown.update(done - shown.n)

            return teacher_cache.write(
                teacher,
                rows,
                self.folder / "teacher_outputs" / part,
                tokenizer=self.tokenizer,
                outputs=("logits", "cls") if cls_layers else ("logits",),
                layers=cls_layers,
                batch_size=BATCH,
                device=device(),
                progress=progress,
            )

    def _rows_of(self, stage: Stage, teacher: Any, cached: tuple[Any, Any]) -> tuple[Any, Any]:
        """What a stage is trained and evaluated on, and the collator."""
        (train, test), collate = cached
        if stage.teacher is None:
            train = unlabeled.labelled_of(train, self.train)
        if stage.rows is not None:
            train = self.rows.of(stage.rows, unlabeled.without_label(self.train), self.console)
            if stage.teacher == "stored":
                train = self._stored("augmented", train, teacher, sorted(stage.cls_layers)).beside(train)
        return (train, test), collate

    def _train(self, stage: Stage, student: Any, teacher: Any, cached: tuple[Any, Any] | None) -> None:
        train, test = unlabeled.labelled_of(self.train, self.train), None
        collate: Any = DataCollatorWithPadding(self.tokenizer)
        if cached is not None:
            (train, test), collate = cached
        with self._trainer(stage, student, teacher) as kind, _shortcut(student, stage.objective):
            trainer = kind(
                student,
                self._arguments(stage, len(train)),
                teacher=teacher,
                objective=stage.objective,
                train_dataset=train,
                eval_dataset=None if test is None else Subset(test, range(self.curve)),
                data_collator=collate,
                processing_class=self.tokenizer,
                compute_metrics=self._quality,
            )
            if stage.start != "student":
                trainer.load_objective(self.folder / stage.start)
            dtype = self.recipe.save_dtype if stage.measured else "float32"
            stages.train_stage(trainer, self.folder / stage.folder, stage.title, dtype)

    def _trainer(self, stage: Stage, student: Any, teacher: Any) -> AbstractContextManager[Any]:
        """Within it, what makes the trainer of a stage."""
        return nullcontext(DistillationTrainer)

    def _quality(self, prediction: Any) -> Metrics:
        logits, labels = torch.from_numpy(prediction.predictions), torch.from_numpy(prediction.label_ids)
        return metrics.metrics(self.task.metric, logits, labels)

    def _arguments(self, stage: Stage, rows: int) -> TrainingArguments:
        r = self.recipe
        return arguments.training(
            r,
            self.folder / stage.folder,
            num_train_epochs=stage.epochs or r.epochs,
            per_device_eval_batch_size=BATCH,
            learning_rate=stage.learning_rate or r.learning_rate,
            seed=r.seed + stage.seed,
            lr_scheduler_type=stage.schedule,
            warmup_steps=r.warmup if stage.schedule == "linear" else 0,
            weight_decay=0.01,
            eval_strategy="steps" if stage.measured else "no",
            eval_steps=max(1, rows // (2 * r.batch_size)),
            save_steps=250,  # a minute or two of work, and hardly any time for writing
            logging_steps=10,
        )

    # ---- results ----
    def _finish(
        self, titles: dict[str, str], histories: dict[str, stages.History], cached: tuple[Any, Any]
    ) -> dict[str, Metrics]:
        stored = self.folder / "metrics.json"
        if not stored.is_file():
            measured = self._measure(titles, histories, cached[0][1])
            facts = {
                "data": absolute("data", self.task.name),
                "kind": self.task.kind,
                "metric": self.task.metric,
                "test": tasks.fingerprint(self.task.test),
                "titles": titles,
            }
            trained = {name: stages.trained_in(self.folder / name) for name in titles}
            settings = {"settings": self.recipe.as_dict(), "versions": versions(), "precision": trained}
            stages.write_json(stored, {**settings, "task": facts, "models": measured, **self.more})
        known = json.loads(stored.read_text())
        results: dict[str, Metrics] = known["models"]
        shown = tables.results_table(results, titles, files.shown_name(self.task.name), self.task.metric)
        self.console.print(shown, *tables.gain(results, self.task.metric), sep="\n")
        plot = self._plot(titles, histories, known)
        self.console.print(f"In {self.folder}: student/ ({self.loader} loads it), metrics.json, {plot}")
        return results

    def _plot(self, titles: dict[str, str], histories: dict[str, stages.History], known: dict[str, Any]) -> str:
        """Leaves an image of what metrics.json knows; its name."""
        plots.plot_learning_curves(
            self.folder / "learning_curves.png",
            {title: histories[folder] for folder, title in titles.items() if folder not in self._teachers()},
            self.task.metric,
            known["models"]["teacher"][self.task.metric],
            (self.curve, len(self.test)),
        )
        return "learning_curves.png"

    def _measure(self, titles: dict[str, str], histories: dict[str, stages.History], test: Any) -> dict[str, Metrics]:
        """On all test rows, which are here with what the teacher made of them."""
        of_teacher = torch.stack([test.cache[i]["logits"] for i in range(len(test))])
        results = measure(self._candidates(titles, of_teacher), self.task, "teacher")
        for name in titles:
            if seconds := self._seconds(name, histories):
                results[name]["training_seconds"] = seconds
        return results

    def _candidates(self, titles: dict[str, str], of_teacher: Any) -> dict[str, Candidate]:
        """The models to measure; the teacher's logits are known."""
        candidates = {}
        for name, title in titles.items():
            folder = self.recipe.teacher or self.folder / name if name == "teacher" else self.folder / name
            model, known = self._load(name, folder).to(device()), of_teacher if name == "teacher" else None
            candidates[name] = Candidate(f"test: {title}", model, folder, self.tokenizer, self.test, known)
        return candidates

    def _seconds(self, name: str, histories: dict[str, stages.History]) -> float:
        """Seconds of a model's training, and of the stages that it started from."""
        before = self.starts.get(name)
        return stages.seconds(histories.get(name, [])) + (0.0 if before is None else self._seconds(before, histories))


def _by_length(rows: list[Any], numbers: range) -> list[int]:
    return sorted(numbers, key=lambda number: length(rows[number]))
