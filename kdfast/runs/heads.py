"""Runs of given teachers with a head for each token: rows, students and training that they have in common."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import datasets
import transformers
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig

from kdfast.data import files, tasks
from kdfast.data.labels import of_setting
from kdfast.models import pairing, students
from kdfast.models.loading import load_tokenizer, named, pretrained
from kdfast.objective import Objective
from kdfast.recipes.heads import HeadRecipe
from kdfast.results.compare import LABELS_ONLY
from kdfast.results.measure import length
from kdfast.runs import arguments
from kdfast.runs.language import LanguageRun, PeakMemory
from kdfast.train.trainer import DistillationTrainer

CURVE = 500  # of the test rows, for the points of the learning curve; the table is measured on all


class HeadRun(LanguageRun):
    """One run in its folder, as `LanguageRun` has it.

    Attributes:
        kind_of_rows: what `data` has.
        collate: makes batches.
        labelled_rows: those of `train` with the labels that the data have.
        rows_of_a_pass: without a backward.
    """

    titles: ClassVar = {**LanguageRun.titles, LABELS_ONLY: "student, labels alone"}
    losses: ClassVar = {"kl": "teacher's term", "ce": "labels' term"}
    kind_of_rows: ClassVar[str] = "labelled rows"
    collate: Any
    rows_of_a_pass = 32

    def __init__(self, recipe: HeadRecipe, folder: Path, console: Console) -> None:
        super().__init__(recipe, folder, console)
        self.students = (LABELS_ONLY,) * recipe.baseline + ("student",)

    # ---- a task's own ----
    def flat(self, part: Any) -> Any:
        """A dataset as the task reads it, of one that may be nested."""
        return part

    @abstractmethod
    def labelled(self, part: Any) -> bool:
        """Whether rows of a dataset have labels."""

    @abstractmethod
    def rows(self, part: Any, test: bool) -> list[Any]:
        """Rows of a dataset, to train on or to test."""

    # ---- models and rows ----
    def read_teacher(self, quantised: bool) -> None:
        """The teacher, which may be quantised or not, and what depends on it alone."""
        r = self.recipe
        needed = {
            "data": f"{self.kind_of_rows}, a file, a folder or a Hub name",
            "teacher": f"{self.kind}, a folder or Hub name",
        }
        absent = "; ".join(
            f"{name}: expected {of}, got none" for name, of in needed.items() if getattr(r, name) is None
        )
        if absent:
            raise ValueError(absent)
        datasets.disable_progress_bars()
        self.teacher = self.load_teacher(r.teacher, quantised=quantised)
        self._check_task(f"teacher {r.teacher}", self.teacher)

    def _check_task(self, who: str, model: Any) -> None:
        saved_as = model.config.architectures or []
        tasks_of = {name.partition("For")[2] for name in (*saved_as, type(model).__name__)}
        if len(tasks_of - {""}) > 1:  # another task's head may have the same names
            raise ValueError(f"{who}: expected {self.kind}, got {', '.join(saved_as)}")

    def read_test(self, recipe: HeadRecipe) -> None:
        """The test rows alone, those of a recipe that has the same teacher: for models that are there already."""
        self.recipe = recipe
        self.test = sorted(self.rows(self._parts()[1], test=True), key=length)
        pairing.check_ids(f"teacher {self.recipe.teacher}", self.teacher, self.test)

    def load_beside(self, name: str, source: str | Path) -> Any:
        """A model to be measured beside the teacher.

        Raises:
            ValueError: it cannot be loaded, is of another task, or has other tokens or classes.
        """
        who, theirs = named(name, source), self.teacher.config
        pairing.check_tokens(who, load_tokenizer(name, source), self.tokenizer)
        model = self._load(name, source, quantised=True)
        self._check_task(who, model)
        if model.config.num_labels != theirs.num_labels:
            expected = f"{theirs.num_labels} classes, as the teacher has"
            raise ValueError(f"{who}: expected {expected}, got {model.config.num_labels}")
        pairing.check_same_classes(who, model, theirs)
        return model

    def prepare(self) -> None:
        r = self.recipe
        self.read_teacher(quantised=r.student is not None)
        transformers.set_seed(r.seed)  # for a new head
        self.start = self.student_of_layers() if r.student is None else self.own_student()
        train, test = self._parts()
        self.labelled_rows, self.test = self.rows(train, test=False), sorted(self.rows(test, test=True), key=length)
        self.train = self.labelled_rows
        for who, model in self.both():
            pairing.pad_alike(who, model, self.tokenizer)
            pairing.check_ids(who, model, [*self.train, *self.test])

    def student_of_layers(self) -> Any:
        layers = self.recipe.student_layers or range(0, self.teacher.config.num_hidden_layers, 2)
        return students.from_layers(self.teacher, layers, dropout=0.0)

    def own_student(self) -> Any:
        source, theirs = self.recipe.student, self.teacher.config
        student = self.load_student(source, new_head=True, id2label=theirs.id2label, label2id=theirs.label2id)
        pairing.take_order(student, pretrained(AutoConfig, "student", source), theirs)
        return student

    def both(self) -> tuple[tuple[str, Any], tuple[str, Any]]:
        """Teacher and student, and what messages call them."""
        return (f"teacher {self.recipe.teacher}", self.teacher), (f"student {self.recipe.student}", self.start)

    def _parts(self) -> tuple[Any, Any]:
        """To train on, and to test: a split with labels, or a tenth of the training rows."""
        r = self.recipe
        read = files.read(r.data, lambda expected, got: ValueError(f"data: expected {expected}, got {got}"))
        parts = {name: self.flat(part) for name, part in read.items()}
        if "train" not in parts:
            raise ValueError(f"data {r.data}: expected a split train, got {', '.join(parts)}")
        tests = [parts[name] for name in tasks.TEST_SPLITS if name in parts and self.labelled(parts[name])]
        try:
            train, test = (parts["train"], tests[0]) if tests else tasks.hold_out(parts["train"], r.data)
        except tasks.TaskError as error:
            raise of_setting(error, "data") from None
        return tasks.first(train, r.train_rows), tasks.first(test, r.test_rows)

    # ---- training ----
    def trained(self) -> Any:
        """A copy of the student's start, of which what is to be trained is."""
        return copy.deepcopy(self.start)

    def objective(self, alone: bool) -> Objective:
        """What a student is trained on; `alone`: without the teacher."""
        its: Objective = self.recipe.labels_only() if alone else self.recipe.objective()
        return its

    def trainer(self, folder: Path) -> DistillationTrainer:
        r, alone = self.recipe, folder.name == LABELS_ONLY
        steps = -(-len(self.train) // r.batch_size) * r.epochs
        settings = arguments.training(
            r,
            folder,
            num_train_epochs=r.epochs,
            per_device_eval_batch_size=self.rows_of_a_pass,
            learning_rate=r.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=r.warmup,
            weight_decay=0.01,
            eval_strategy="steps",
            eval_steps=-(-steps // 8),
            prediction_loss_only=True,
            include_num_input_tokens_seen="non_padding",
            save_steps=250,
            logging_steps=max(1, steps // 60),
        )
        return DistillationTrainer(
            self.trained(),
            settings,
            teacher=None if alone else self.teacher,
            objective=self.objective(alone),
            train_dataset=self.labelled_rows if alone else self.train,
            eval_dataset=self.test[:CURVE],
            data_collator=self.collate,
            processing_class=self.tokenizer,
            callbacks=[PeakMemory()],
        )

    # ---- results ----
    def timed_batch(self) -> Mapping[str, Tensor]:
        """A batch of median length."""
        batch: Mapping[str, Tensor] = self.collate(self.test[len(self.test) // 2 :][: self.rows_of_a_pass])
        return batch

    def facts(self) -> dict[str, Any]:
        task = {"data": self.recipe.data, "metric": self.metric, "test": tasks.fingerprint(self.test)}
        models = ("teacher", "start", *self.students)
        return {"task": {**task, "titles": {name: self.titles[name] for name in models}}}
