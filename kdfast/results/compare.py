"""Finished runs beside one another, from their metrics.json: a row per run and model, seeds taken together."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from kdfast.data.files import shown_name
from kdfast.recipes import RECIPES, causal_lm
from kdfast.recipes.classifier import ClassifierRecipe
from kdfast.recipes.paths import METRICS, MODELS, located, run_settings

LABELS_ONLY = "labels_only"
SOFT_TARGETS = ("hinton", "token-classification", "question-answering")  # of alpha · teacher + (1 - alpha) · labels


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: as it was given.
        family: "classifier", "causal-lm", "seq2seq" or "distilbert"; runs of one are measured alike.
        metric: the task's.
        test: the rows that it was measured on, a `kdfast.data.tasks.fingerprint`, where the run tells.
        tokenizer: of language models, where the run tells a sum of it.
        settings: of the recipe.
        models: metrics by the names of the models.
    """

    folder: Path
    family: str
    metric: str
    test: str | None
    tokenizer: str | None
    settings: dict[str, Any]
    models: dict[str, dict[str, float]]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """
        Raises:
            ValueError: no finished run, or one of an earlier version of kdfast.
        """
        if not folder.is_dir():
            raise ValueError(f"{folder}: expected the folder of a run, got no folder")
        if not (folder / METRICS).is_file():
            inside = sorted(path.parent.name for path in folder.glob(f"*/{METRICS}"))
            hint = f"; there are runs in it: {folder / inside[0]}" if inside else ""
            raise ValueError(f"{folder}: expected a finished run, got no {METRICS}{hint}")
        try:
            stored = json.loads((folder / METRICS).read_text())
            models, settings = dict(stored["models"]), dict(stored["settings"])
            language = all("perplexity" in row for row in models.values())
            family = settings.get("recipe", "causal-lm") if language else "classifier"
            task = stored.get("task", {"metric": "perplexity", "test": None}) if language else stored["task"]
            tokenizer = stored.get("tokenizer") if language else None
        except (ValueError, TypeError, KeyError) as error:
            expected = "what a run of this version of kdfast has"
            raise ValueError(f"{folder / METRICS}: expected {expected}, got {error!r}") from None
        return cls(folder, family, task["metric"], task["test"], tokenizer, settings, models)

    @property
    def seed(self) -> int:
        return int(self.settings.get("seed", 0))

    def _of(self, name: str) -> Any:
        """A setting, paths as they are now."""
        return located(name, self.settings.get(name), self.folder)

    @property
    def recipe(self) -> str:
        return str(self.settings.get("recipe", self.family))

    @property
    def measured_on(self) -> dict[str, Any]:
        if self.test is not None:
            return {"test": self.test}
        of_family = next((recipe for recipe in RECIPES if recipe.name == self.family), causal_lm.Recipe)
        rows = {name: self._of(name) for name in of_family.measured_on}
        if self.family == "causal-lm":  # which makes prompts of packed text, that do not count
            prompted = bool(self.settings.get("on_policy")) and not str(rows["data"]).endswith(".jsonl")
            rows["on_policy"] = "above 0" if prompted else 0.0
        return rows

    @property
    def teacher(self) -> str:
        """Where it is."""
        if (given := self.settings.get("teacher")) is not None:
            return str(located("teacher", given, self.folder))
        if self.family == "causal-lm":
            return "the demonstration's"
        return self.own_teacher

    @property
    def own_teacher(self) -> str:
        """Where it is, or would be, if the run trains it."""
        return str(self.folder.resolve() / "teacher")

    @property
    def alone(self) -> str:
        """Equal of runs whose students are the same where they are trained on the labels alone."""
        wanted = {name: self._of(name) for name in ClassifierRecipe.alone}
        if wanted["student"] is None and wanted["student_start"] == "base":
            wanted["base"] = self._of("base")
        return json.dumps({**wanted, "teacher": self.teacher}, sort_keys=True, default=str)

    @property
    def but_for_the_seed(self) -> dict[str, Any]:
        return _but_for_the_seed(self.settings, self.folder)


@dataclass
class Row:
    """A model of a run, or of several that differ in the seed.

    Attributes:
        group: what its runs are called.
        model: its folder's name in the runs.
        values: of every metric, in the order of the runs.
        differences: of the metric, to the same student trained on the labels alone with the same seed.
    """

    group: str
    model: str
    runs: list[Run] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    differences: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.group}/{self.model}" if self.group else self.model

    def as_dict(self) -> dict[str, Any]:
        def of(values: list[float]) -> dict[str, float | int | None]:
            return {"mean": fmean(values), "standard_error": standard_error(values), "n": len(values)}

        return {
            "name": self.name,
            "runs": [str(run.folder) for run in self.runs],
            "seeds": [run.seed for run in self.runs],
            "n": len(self.runs),
            "metrics": {name: of(values) for name, values in self.values.items()},
            "difference_to_labels_only": of(self.differences) if self.differences else None,
        }


@dataclass(frozen=True)
class Comparison:
    """Rows, what they are measured on, and the metric that they are compared by."""

    rows: list[Row]
    metric: str
    family: str
    data: str | None
    measured_on: dict[str, Any]

    @property
    def title(self) -> str:
        data = self.data or {"classifier": "movie reviews"}.get(self.family, f"{self.family}'s own text")
        return shown_name(data)

    def as_dict(self) -> dict[str, Any]:
        facts = {"family": self.family, "metric": self.metric, "data": self.data, "measured_on": self.measured_on}
        return {**facts, "rows": [row.as_dict() for row in self.rows]}


def standard_error(values: Sequence[float]) -> float | None:
    """The mean's: the standard deviation with n - 1, over √n. None of a single value."""
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else None


def compare(folders: Sequence[Path], metric: str | None = None) -> Comparison:
    """The rows of runs, in their order.

    Args:
        folders: of finished runs; one that is there twice counts once.
        metric: None: the task's.

    Raises:
        ValueError: something is no finished run; runs of different tasks, test rows or tokenizers; two with the same
            settings and seed; a metric that no model has.
    """
    runs = [Run.read(folder) for folder in {folder.resolve(): folder for folder in folders}.values()]
    _check_families(runs)
    _check_tokenizers(runs)  # before the rows, which are of tokens
    _check_rows(runs)
    metric = metric or runs[0].metric
    known = {name for run in runs for row in run.models.values() for name in row}
    if metric not in known:
        raise ValueError(f"metric: expected one of {', '.join(sorted(known))}, got {metric}")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        group = groups.setdefault(json.dumps(run.but_for_the_seed, sort_keys=True, default=str), [])
        if same := [other for other in group if other.seed == run.seed]:
            expected = f"other settings or another seed than {same[0].folder}"
            raise ValueError(f"{run.folder}: expected {expected}, got the same and seed {run.seed}")
        group.append(run)
    rows = list(_rows(dict(zip(_names(list(groups.values())), groups.values(), strict=True)), metric))
    teachers = [row for row in rows if row.model == "teacher"]
    if len(teachers) == 1:
        teachers[0].group = ""  # of all
    return Comparison(rows, metric, runs[0].family, runs[0]._of("data"), runs[0].measured_on)


def _rows(groups: dict[str, list[Run]], metric: str) -> Iterator[Row]:
    runs = [run for group in groups.values() for run in group]
    # A teacher is shown with the run that trained it, or the first that has it.
    shown: dict[str, Run] = {}
    for run in runs:
        if run.teacher not in shown or run.teacher == run.own_teacher:
            shown[run.teacher] = run
    baselines = {run.alone: _trained_alone(run)[metric] for run in runs if metric in _trained_alone(run)}
    for name, group in groups.items():
        models = dict.fromkeys(model for run in group for model in run.models)
        for model in models:
            row = Row(name, model)
            for run in group:
                if model not in run.models or (model == "teacher" and shown[run.teacher] is not run):
                    continue
                measured = run.models[model]
                row.runs.append(run)
                for key, value in measured.items():
                    row.values.setdefault(key, []).append(value)
                if model not in ("teacher", "start", LABELS_ONLY) and measured is not _trained_alone(run):
                    baseline = run.models.get(LABELS_ONLY, {}).get(metric, baselines.get(run.alone))
                    if baseline is not None and metric in measured:
                        row.differences.append(measured[metric] - baseline)
            if row.runs:
                yield row


def _trained_alone(run: Run) -> dict[str, float]:
    """The metrics of a student trained on the labels alone: a baseline, or soft targets with nothing of the teacher."""
    if LABELS_ONLY in run.models:
        return run.models[LABELS_ONLY]
    alone = run.recipe in SOFT_TARGETS and run.settings.get("alpha") == 0
    return run.models.get("student", {}) if alone else {}


def _check_families(runs: list[Run]) -> None:
    """Numbers of different kinds are not to stand in one column."""
    first = runs[0]
    for run in runs[1:]:
        if run.family != first.family:
            raise ValueError(
                f"{run.folder}: expected a run of {_kind(first)}, as {first.folder} is, got one of {_kind(run)}; "
                "compare each kind alone"
            )


def _check_tokenizers(runs: list[Run]) -> None:
    """Perplexities are per token, and of fewer where the tokens are longer.
    Of earlier runs the tokenizer is not known."""
    known = [run for run in runs if run.tokenizer is not None]
    for run in known[1:]:
        if run.tokenizer != known[0].tokenizer:
            raise ValueError(
                f"{run.folder}: expected the tokenizer of {known[0].folder}, got another; what is measured per token "
                "does not compare"
            )


def _check_rows(runs: list[Run]) -> None:
    """Nor are those of different test rows."""
    first = runs[0]
    for run in runs[1:]:
        for name, value in first.measured_on.items():
            theirs = run.measured_on[name]
            if theirs == value:
                continue
            expected, got = f"rows of {first.folder}, {name} {value}", f"{name} {theirs}"
            if name == "test":  # a fingerprint: the number of rows, and a digest
                count, other = value.partition(",")[0], theirs.partition(",")[0]
                expected, got = f"test rows of {first.folder} ({count})", "as many others" if count == other else other
            raise ValueError(f"{run.folder}: expected a run measured on the {expected}, got {got}")


def _kind(run: Run) -> str:
    return "classifiers" if run.family == "classifier" else f"language models ({run.family})"


def _but_for_the_seed(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Settings without the seed; models of other runs are those runs' settings without the seed. What is None says
    nothing, as where an earlier version had no such setting."""
    told = {name: value for name, value in settings.items() if name != "seed" and value is not None}
    described = {name: located(name, value, folder) for name, value in told.items()}
    for name in MODELS:
        if isinstance(source := settings.get(name), str):
            place = Path(located(name, source, folder))
            described[name] = str(place)
            if place.is_absolute() and (theirs := run_settings(place.parent)) is not None:
                described[name] = {"model": place.name, **_but_for_the_seed(theirs, place.parent)}
    return described


def _names(groups: list[list[Run]]) -> list[str]:
    """What groups are called: what their folders' names begin with, or, where that does not tell them apart, the recipe
    with the settings that differ."""
    names = [_common([run.folder.resolve().name for run in group]) for group in groups]
    settings = [group[0].but_for_the_seed for group in groups]
    made = []
    for group, name, own in zip(groups, names, settings, strict=True):
        if not name or names.count(name) > 1:
            alike = [other for other in settings if other.get("recipe") == own.get("recipe")]
            differing = [key for key in own if any(other.get(key) != own[key] for other in alike)]
            name = " ".join([group[0].recipe, *(f"{key} {group[0].settings[key]}" for key in differing)])
        made.append(name)
    return made


def _common(names: list[str]) -> str:
    """run-seed0 and run-seed1: run."""
    if len(names) == 1:
        return names[0]
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return re.sub(r"[-_. ]*(seed|s)?[-_.= ]*$", "", "".join(letters[0] for letters in same))
