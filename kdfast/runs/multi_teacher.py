"""Runs the recipe of several teachers in its folder. What is finished is not repeated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding

from kdfast.data import demo, metrics
from kdfast.data.sampler import TeacherCollator
from kdfast.models import pairing
from kdfast.models.first_token import shortcut
from kdfast.models.inputs import TEACHER
from kdfast.models.loading import device, load_tokenizer, named
from kdfast.models.teachers import Teachers
from kdfast.objective.ensemble import combined
from kdfast.recipes.multi_teacher import Recipe
from kdfast.results.measure import Candidate, Metrics, against_teacher, measure, predict_logits
from kdfast.runs import stages
from kdfast.runs.classifier import ClassifierRun
from kdfast.teacher_cache._identity import tokenizer_sha256

Collate = Callable[[list[dict[str, Any]]], Any]


class MultiTeacherRun(ClassifierRun):
    """The folder has `teacher_0/` and so on, where they were trained here, and each one's outputs. In the result,
    `teacher` are all of them together: its size and its latency are sums."""

    recipe: Recipe
    ones: list[ClassifierRun]  # this run as each of the teachers has it: its seed, its tokenizer, its rows

    def _teachers(self) -> dict[str, str]:
        each = range(self.recipe.count)
        return {"teacher": "teachers together"} | {f"teacher_{k}": f"teacher {k}" for k in each}

    # ---- before anything is trained ----
    def _source(self) -> str | Path:
        r = self.recipe
        first = r.teacher[0] if r.teacher else None
        source = r.base or first or demo.fetch(demo.MINILM)
        named_so, whose = ("student", r.student) if r.student else ("base", source)
        if first and not r.student and r.student_start == "teacher":
            named_so, whose = "teacher", first
        self.tokenizer, self.ones = load_tokenizer(named_so, whose), []
        own = tokenizer_sha256(self.tokenizer)
        for k in range(r.count):
            one = copy.copy(self)
            one.recipe = replace(r, seed=r.seed + k)
            its = load_tokenizer(*(("teacher", r.teacher[k]) if r.teacher else ("base", source)))
            one.tokenizer = self.tokenizer if tokenizer_sha256(its) == own else its
            self.ones.append(one)
        return source

    def _check_tokenizers(self) -> None:
        """Each model reads rows of its own tokenizer."""

    def _make_rows(self) -> None:
        super()._make_rows()
        for one in self.ones:
            shared = one.tokenizer is self.tokenizer
            one.train, one.test = (self.train, self.test) if shared else self._in_order(*self._tokenized(one.tokenizer))

    def _check(self, source: str | Path) -> None:
        r = self.recipe
        if r.teacher:
            places = [named("teacher", of) for of in r.teacher]
            members = self._given(r.teacher)
        else:
            places, members = [named("base", r.base or "base")], [self.ones[0]._load("base", source)]
        for place, model, one in zip(places, members, self.ones, strict=False):
            pairing.check_length(place, model, r.max_length)
            pairing.check_ids(place, model, (*one.train, *one.test))
            if r.teacher and (note := pairing.matched_by_number(place, model.config, self.task.names)):
                self.console.print(note, markup=False)
        teacher = Teachers(members * (r.count if len(members) == 1 else 1))
        layers, todo = self._plan(teacher)
        student = self._student(self._load("base", source) if r.student_start == "base" else teacher, layers)
        pairing.check_length(named("student", r.student or "student"), student, r.max_length)
        pairing.check_ids(named("student", r.student or "student"), student, (*self.train, *self.test))
        for stage in todo:
            self._try(stage, student, teacher if stage.teacher else None, self._collator()(self._live("train")[:2]))

    # ---- models ----
    def _given(self, sources: Sequence[str]) -> list[Any]:
        return [one._given_teacher(source) for one, source in zip(self.ones, sources, strict=True)]

    def _teacher(self, source: str | Path) -> Any:
        if self.recipe.teacher:
            return Teachers(self._given(self.recipe.teacher))
        members = []
        for k, one in enumerate(self.ones):
            folder = self.folder / f"teacher_{k}"
            if stages.finished(folder) is None:
                one._train(
                    one._of_teacher(folder.name, f"teacher {k}"), one._frozen(one._load("base", source)), None, None
                )
            members.append(one._load("teacher", folder))
        return Teachers(members)

    def _student(self, model: Any, layers: tuple[int, ...]) -> Any:
        return super()._student(model.models[0] if isinstance(model, Teachers) else model, layers)

    # ---- rows ----
    def _live(self, part: str) -> list[dict[str, Any]]:
        """Rows with the tokens of teachers that have others than the student's."""
        rows = [dict(row) for row in getattr(self, part)]
        for k, one in enumerate(self.ones):
            if one.tokenizer is not self.tokenizer:
                for row, its in zip(rows, getattr(one, part), strict=True):
                    row |= {f"{TEACHER}{k}_{name}": x for name, x in its.items() if name != "labels"}
        return rows

    def _collator(self) -> Collate:
        collate: Collate = DataCollatorWithPadding(self.tokenizer)
        for k, one in enumerate(self.ones):
            if one.tokenizer is not self.tokenizer:
                collate = TeacherCollator(collate, one.tokenizer, number=k)
        return collate

    def _cache(self, teacher: Any, cls_layers: list[int]) -> tuple[Any, Any]:
        self.teacher = teacher
        self.of_test = self._ensemble("test")
        if not self.recipe.cached:
            return (self._live("train"), self._live("test")), self._collator()
        of_parts = {"train": self._ensemble("train"), "test": self.of_test}
        beside = [
            [
                {**row, "teacher_logits": together, "teacher_ensemble": each}
                for row, together, each in zip(getattr(self, part), self._together(of), of, strict=True)
            ]
            for part, of in of_parts.items()
        ]
        return tuple(beside), Beside(DataCollatorWithPadding(self.tokenizer))

    def _ensemble(self, part: str) -> Tensor:
        """Logits of all teachers, [rows, teachers, classes]; each one's are stored."""
        of_each = []
        for k, (one, model) in enumerate(zip(self.ones, self.teacher.models, strict=True)):
            cache = one._stored(f"{k}/{part}", getattr(one, part), model, [])
            of_each.append(torch.stack([cache[i]["logits"] for i in range(len(cache))]))
        return torch.stack(of_each, 1)

    def _together(self, ensemble: Tensor) -> Tensor:
        """Their logits in one, without the labels: what students are measured against."""
        return combined(ensemble, self.recipe.combine)

    # ---- results ----
    def _measure(self, titles: dict[str, str], histories: dict[str, stages.History], test: Any) -> dict[str, Metrics]:
        together = self._together(self.of_test)
        candidates, logits = {}, {}
        for k, (one, model) in enumerate(zip(self.ones, self.teacher.models, strict=True)):
            name = f"teacher_{k}"
            source = self.recipe.teacher[k] if self.recipe.teacher else self.folder / name
            histories[name] = stages.finished(self.folder / name) or []
            logits[name] = self.of_test[:, k]
            candidates[name] = Candidate("", model.to(device()), source, one.tokenizer, one.test, logits[name])
        for name in [name for name in titles if name not in self._teachers()]:
            model = self._load(name, self.folder / name).to(device())
            with shortcut(model):
                logits[name] = predict_logits(model, self.test, self.tokenizer, f"test: {titles[name]}")
            candidates[name] = Candidate("", model, self.folder / name, self.tokenizer, self.test, logits[name])
        results = measure(candidates, self.task)
        for name, of in results.items():
            of |= against_teacher(logits[name], together, self.task.kind)
            if seconds := self._seconds(name, histories):
                of["training_seconds"] = seconds
        labels = torch.tensor([row["labels"] for row in self.test])
        quality = metrics.metrics(self.task.metric, together, labels)
        of_each = [results[f"teacher_{k}"] for k in range(self.recipe.count)]
        told = {*quality, *against_teacher(together, together, self.task.kind)}
        sums = {name: sum(of[name] for of in of_each) for name in of_each[0] if name not in told}
        return {"teacher": quality | against_teacher(together, together, self.task.kind) | sums} | results


class Beside:
    """Batches of rows with what teachers made of each; `inner` makes the batch of the other columns."""

    def __init__(self, inner: Collate) -> None:
        self.inner = inner

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        own = [{name: x for name, x in row.items() if not name.startswith(TEACHER)} for row in rows]
        its = [name for name in rows[0] if name.startswith(TEACHER)]
        return {**self.inner(own), **{name: torch.stack([row[name] for row in rows]) for name in its}}
