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
    advice,
    compact,
    latency_table,
    schedules,
    select,
    sensitivity,
)
from kdfast.prune.criteria import CRITERIA, known, score, track
from kdfast.prune.select import live_masks
from kdfast.recipes.classifier import Stage
from kdfast.recipes.prune import Recipe
from kdfast.results import plots, tables
from kdfast.results.disk import saving
from kdfast.results.measure import LATENCY_ROWS, Metrics, length, predict_logits
from kdfast.results.progress import bar
from kdfast.runs import stages
from kdfast.runs.classifier import ClassifierRun
from kdfast.runs.unlabeled import drawn
from kdfast.train.trainer import DistillationTrainer

MASKS, LATENCY, SENSITIVITY = "masks.json", "latency.json", "sensitivity.json"
BATCH = 32  # rows of a batch that scores read


class _Keep(TrainerCallback):  # type: ignore[misc]
    """Leaves the masks beside the model that they are of, after the callback that prunes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        with saving(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / MASKS).write_text(live_masks(model).to_json())


class _Asked(TrainerCallback):  # type: ignore[misc]
    """Scores of a model, asked anew only after a step: one answer does for all that looks at them before the training."""

    def __init__(self, ask: Callable[[Any], list[Scores]]) -> None:
        self.ask = ask
        self.found: list[Scores] | None = None

    def __call__(self, model: Any) -> list[Scores]:
        if self.found is None:
            self.found = self.ask(model)
        return self.found

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:  # resumed, with other weights
            self.found = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.found = None


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
        yield partial(DistillationTrainer, callbacks=[*callbacks, pruning, _Keep(self.folder / stage.folder)])

    # ---- what goes ----
    def _scores(self, student: Any) -> tuple[Callable[[Any], list[Scores]], list[Any]]:
        """Asked of the model, and what a criterion needs around every step of its training."""
        r = self.recipe
        kinds: Any = r.units
        try:
            if CRITERIA[r.criterion].needs == "training":
                tracker = track(student, r.criterion, kinds)
                return (lambda model: [tracker.scores(of) for of in kinds]), [schedules.Tracking(tracker)]
            own: Any = {"seed": r.seed} if "seed" in CRITERIA[r.criterion].settings else {}
            batches = self._batches()
            asked = _Asked(lambda model: [score(model, r.criterion, of, batches, **own) for of in kinds])
            asked(student)  # which refuses kinds that the criterion or the model has not
        except (TypeError, ValueError) as error:
            raise ValueError(f"criterion: {error}") from None
        return asked, [asked]

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
        chosen: dict[str, Any] = {"scope": r.scope, "multiple": multiple}
        steps = r.epochs * -(-len(self.train) // r.batch_size)
        begin, end = int(r.begin * steps), int(r.end * steps)
        if r.schedule == "soft":
            return schedules.SoftPruning(scores, keep=share, **chosen)
        if r.schedule == "surgery":
            of: Any = r.units
            return schedules.Surgery(of, keep=share, until=max(end, 1), seed=r.seed, **chosen)
        if r.schedule == "play-and-prune":
            return self._bounded(student, scores, begin=begin, until=end, allow_empty=r.allow_empty, **chosen)
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

    def _bounded(self, student: Any, scores: Any, **chosen: Any) -> Any:
        """Takes units while the quality allows. The student is the teacher as yet, of which the bound is."""
        r, metric = self.recipe, self.task.metric
        rows = self.test[: self.curve]
        logits = predict_logits(student, rows, self.tokenizer, "quality of the whole model")
        labels = torch.tensor([row["labels"] for row in rows])
        whole, final = metrics.metrics(metric, logits, labels)[metric], 1 - r.goal[1]
        # Twice as much at once as all rounds would have to, as not all of them take that much.
        step = min(2 * final / r.rounds, final)
        bound: Any = {"metric": f"eval_{metric}", "bound": whole - r.bound, "slack": r.bound}
        return schedules.PlayAndPrune(scores, final=final, step=step, **bound, **chosen)

    def _arguments(self, stage: Stage, rows: int) -> Any:
        made, r = super()._arguments(stage, rows), self.recipe
        if stage.folder == "masked" and r.schedule == "play-and-prune":
            steps = r.epochs * -(-rows // r.batch_size)
            made.eval_steps = max(1, int((r.end - r.begin) * steps) // r.rounds)
        return made

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
        before, after = (tables.cost_of(results[name]) for name in ("teacher", "student"))
        told = advice(before, after)
        self.console.print(
            f"Kept: {kept['heads']} of {heads} heads, {kept['neurons']:,} of {neurons:,} neurons, "
            f"{int(masks.layers.sum())} of {len(masks.layers)} layers. {before.ms / after.ms:.2f} times as fast with "
            f"{LATENCY_ROWS[-1]} rows{'' if told is None else f': {told}'}"
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
