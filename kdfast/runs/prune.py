"""Runs the recipe of pruning in its folder. What is finished is not repeated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import DataCollatorWithPadding, TrainerCallback

from kdfast.data import metrics
from kdfast.models.inputs import model_inputs
from kdfast.models.loading import device
from kdfast.prune import (
    Costs,
    Flops,
    LatencyTable,
    Masks,
    Parameters,
    Scores,
    compact,
    latency_table,
    schedules,
    select,
    sensitivity,
)
from kdfast.prune.criteria import CRITERIA, known, score, track
from kdfast.recipes.classifier import Stage
from kdfast.recipes.prune import Recipe
from kdfast.results import plots
from kdfast.results.disk import saving
from kdfast.results.measure import LATENCY_ROWS, Metrics, length
from kdfast.results.progress import bar
from kdfast.runs import stages
from kdfast.runs.classifier import ClassifierRun
from kdfast.runs.unlabeled import drawn
from kdfast.train.trainer import DistillationTrainer

MASKS, LATENCY, SENSITIVITY = "masks.json", "latency.json", "sensitivity.json"
BATCH = 32  # rows of a batch that scores read


class _Keep(TrainerCallback):  # type: ignore[misc]
    """Leaves the masks beside the model that they are of."""

    def __init__(self, pruning: Any, folder: Path) -> None:
        self.pruning, self.folder = pruning, folder

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with saving(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / MASKS).write_text(self.pruning.masks.to_json())


class _Asked:
    """Scores of a model, asked anew only when its weights have changed: one answer does for all that looks at them before
    the training."""

    def __init__(self, ask: Callable[[Any], list[Scores]]) -> None:
        self.ask = ask
        self.at: list[int] | None = None

    def __call__(self, model: Any) -> list[Scores]:
        now = [parameter._version for parameter in model.parameters()]
        if now != self.at:
            self.found, self.at = self.ask(model), now
        return self.found


class PruneRun(ClassifierRun):
    """The folder has `masked/`, the whole weights with masks.json, and `student/`, the smaller model; of a target of latency
    `latency.json`, what layers of several sizes take here."""

    recipe: Recipe

    def _titles(self, todo: list[Stage]) -> dict[str, str]:
        return self._teachers() | {"student": todo[-1].title}

    def _check(self, source: str | Path) -> None:
        super()._check(source)
        try:
            for of in self.recipe.units:
                known(self.recipe.criterion, of)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"units: {error}") from None

    @contextmanager
    def _trainer(self, stage: Stage, student: Any, teacher: Any) -> Iterator[Any]:
        if stage.folder != "masked":
            with super()._trainer(stage, student, teacher) as kind:
                yield kind
            return
        student.to(device())
        scores, callbacks = self._scores(student)
        if self.recipe.sensitivity and not (self.folder / SENSITIVITY).is_file():
            self._sweep(student, scores(student))
        pruning = self._pruning(student, scores)
        yield partial(DistillationTrainer, callbacks=[*callbacks, pruning, _Keep(pruning, self.folder / stage.folder)])

    # ---- what goes ----
    def _scores(self, student: Any) -> tuple[Callable[[Any], list[Scores]], list[Any]]:
        """Asked of the model, and what a criterion needs around every step of its training."""
        r = self.recipe
        kinds: Any = r.units
        try:
            if CRITERIA[r.criterion].needs == "training":
                tracker = track(student, r.criterion, kinds)
                return (lambda model: [tracker.scores(of) for of in kinds]), [schedules.Tracking(tracker)]
            own = {"seed": r.seed} if "seed" in CRITERIA[r.criterion].settings else {}
            asked = partial(score, batches=self._batches(), **own)
            made = _Asked(lambda model: [asked(model, r.criterion, of) for of in kinds])
            made(student)  # which refuses kinds that the criterion or the model has not
        except (TypeError, ValueError) as error:
            raise ValueError(f"criterion: {error}") from None
        return made, []

    def _sweep(self, student: Any, scores: list[Scores]) -> None:
        """Leaves the quality on the rows of the scores with each layer alone pruned, and its plot."""
        batches, metric = self._batches(), self.task.metric
        labels = torch.cat([batch["labels"].cpu() for batch in batches])
        sweeps = sum(len(each.values) * (1 if each.of == "layers" else 3) for each in scores)
        with bar("sensitivity of the layers", sweeps + 1) as shown:

            def quality(model: Any) -> float:
                shown.update()
                found = [model(**model_inputs(model, batch)).logits.float().cpu() for batch in batches]
                return metrics.metrics(metric, torch.cat(found), labels)[metric]

            found = sensitivity(student.eval(), scores, quality)
        plots.plot_sensitivity(self.folder / "sensitivity.png", found, f"{metric}, on training rows")
        with saving(self.folder):
            (self.folder / SENSITIVITY).write_text(found.to_json())

    def _batches(self) -> list[Any]:
        rows = drawn(self.train, self.recipe.score_rows, self.recipe.seed)
        collate = DataCollatorWithPadding(self.tokenizer)
        return [collate(rows[start : start + BATCH]).to(device()) for start in range(0, len(rows), BATCH)]

    def _pruning(self, student: Any, scores: Any) -> Any:
        r, (name, share) = self.recipe, self.recipe.goal
        multiple: Any = {"neurons": r.multiple}
        if r.schedule == "soft":
            return schedules.SoftPruning(scores, keep=share, scope=r.scope, multiple=multiple)  # type: ignore[arg-type]
        steps = r.epochs * -(-len(self.train) // r.batch_size)
        begin, end = int(r.begin * steps), int(r.end * steps)
        rate: Any = {
            "one-shot": lambda: schedules.OneShot(1 - share, begin),
            "iterative": lambda: schedules.Iterative(1 - share, end, min(r.rounds, max(end - begin, 1)), begin),
            "cubic": lambda: schedules.Cubic(1 - share, end, begin),
        }[r.schedule]()
        every = 1 if r.schedule == "one-shot" else max(1, (end - begin) // r.rounds)
        options: dict[str, Any] = {"every": every, "multiple": multiple, "allow_empty": r.allow_empty}
        if name == "keep":
            return schedules.Pruning(rate, scores, scope=r.scope, **options)  # type: ignore[arg-type]
        cost = self._cost(name, student)
        try:  # now, and not in the middle of the training
            select(student, scores(student), target=share, cost=cost, multiple=multiple, allow_empty=r.allow_empty)
        except ValueError as error:
            raise ValueError(f"target: {error}") from None
        return schedules.CostPruning(rate, scores, cost, **options)

    def _cost(self, name: str, student: Any) -> Costs:
        if name == "parameters":
            return Parameters(student)
        tokens = int(median(map(length, self.test)))
        rows = [{**row, "input_ids": row["input_ids"][:tokens]} for row in self.test if length(row) >= tokens]
        rows = (rows * LATENCY_ROWS[-1])[: LATENCY_ROWS[-1]]
        own = [{"input_ids": row["input_ids"]} for row in rows]
        batch = DataCollatorWithPadding(self.tokenizer)(own).to(device())
        if name == "flops":
            return Flops(student, batch)
        stored = self.folder / LATENCY
        if not stored.is_file():
            table = latency_table(student.eval(), batch)
            with saving(stored):
                stored.write_text(table.to_json())
        return LatencyTable.from_json(stored.read_text())

    # ---- what is left ----
    def _finish(self, titles: dict[str, str], histories: dict[str, stages.History], cached: Any) -> dict[str, Metrics]:
        histories["student"] = histories["masked"]
        masks = Masks.from_json((self.folder / "masked" / MASKS).read_text())
        if stages.finished(self.folder / "student") is None:
            self._make_smaller(masks)
        kept = {"heads": sum(int(x.sum()) for x in masks.heads), "neurons": sum(int(x.sum()) for x in masks.neurons)}
        self.more = {"kept": {**kept, "layers": int(masks.layers.sum())}}
        results = super()._finish(titles, histories, cached)
        heads, neurons = (sum(map(len, of)) for of in (masks.heads, masks.neurons))
        rows, column = LATENCY_ROWS[-1], f"latency_ms_batch_{LATENCY_ROWS[-1]}"
        faster = results["teacher"][column] / results["student"][column]
        slow = "; less than 1.05: take more, or whole layers" if faster < 1.05 else ""
        self.console.print(
            f"Kept: {kept['heads']} of {heads} heads, {kept['neurons']:,} of {neurons:,} neurons, "
            f"{int(masks.layers.sum())} of {len(masks.layers)} layers. {faster:.2f} times as fast with {rows} rows{slow}"
        )
        return results

    def _make_smaller(self, masks: Masks) -> None:
        masked, place = self.folder / "masked", self.folder / "student"
        model = compact(self._load("student", masked), masks)
        with saving(place):
            shutil.rmtree(place, ignore_errors=True)
            model.save_pretrained(place)
            self.tokenizer.save_pretrained(place)
            stages.write_json(place / "stage.json", json.loads((masked / "stage.json").read_text()))
