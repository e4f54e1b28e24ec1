"""Resumable training stages: what a recipe's run folder needs beyond the trainer.

A stage trains one model into one folder. While it runs, `checkpoints/` inside holds the last complete checkpoint; when
it ends, the model, the tokenizer and, last, `stage.json` with the log history are written and the checkpoints removed.
So `stage.json` marks a finished stage, and an interrupted one goes on from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from kdfast.recipes.base import Recipe
from kdfast.recipes.paths import CONFIG, PATHS, absolute, each, located, moved, run_settings
from kdfast.results.disk import check_output, saving
from kdfast.results.progress import bar
from kdfast.runs import arguments
from kdfast.train.objective_trainer import ObjectiveTrainer

History = list[dict[str, float]]


class StageInterrupted(KeyboardInterrupt):
    """Training was stopped by a signal, and a checkpoint was saved."""


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`; the remains of one that was cut short are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)
    for checkpoint in found:
        try:  # the Trainer writes this file last
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
        else:
            return checkpoint
    return None


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """In its `with` block, Ctrl-C or SIGTERM lets the step end, saves a checkpoint and stops; twice stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():  # Python refuses handlers elsewhere
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not print: a handler must not enter a buffered writer that it may have interrupted.
        os.write(2, b"\nStopping after this step and saving a checkpoint (once more: stop at once) ...\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.requested:
            control.should_save = True
            control.should_training_stop = True


class StageProgress(ProgressCallback):  # type: ignore[misc]
    """One titled progress bar per stage, with the time left and the loss and its terms,
    instead of a line per log event."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training_bar = bar(self.title, state.max_steps)
        self.current_step = 0
        if state.global_step:  # resumed: steps done earlier must not count towards the speed
            self.training_bar.initial = self.training_bar.n = self.current_step = state.global_step
            self.training_bar.refresh()

    def close(self) -> None:
        """Before anything else is told: a bar that is still open draws itself once more at the end."""
        if self.training_bar is not None:
            self.training_bar.close()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pass  # a second bar for a few seconds of evaluation would only flicker

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            others = ("grad_norm", "learning_rate", "epoch", "num_input_tokens_seen")
            terms = {name: f"{value:.3f}" for name, value in logs.items() if name not in others}
            self.training_bar.set_postfix(terms, refresh=False)


def seconds(history: History) -> float:
    """Seconds of a stage's training, as `Seconds` left them; 0 where it did not."""
    return next((event["seconds"] for event in reversed(history) if "seconds" in event), 0.0)


class Seconds(TrainerCallback):  # type: ignore[misc]
    """Leaves the seconds of training so far in the log history, those before an interruption too."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter() - seconds(state.log_history)

    def _tell(self, state: Any) -> None:
        state.log_history.append({"step": state.global_step, "seconds": time.perf_counter() - self._since})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self._tell(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell(state)


def write_json(path: Path, value: Any) -> None:
    """Writes beside `path` and renames, so that the file is whole whenever it is there."""
    partial = path.with_suffix(".partial")
    with saving(path):
        partial.write_text(json.dumps(value, indent=1))
        partial.replace(path)


def begin(recipe: Recipe, folder: Path, console: Any) -> None:
    """What every run does first: refuses what cannot become one, and tells what it was made of and is elsewhere now.

    Raises:
        ValueError: as `check_run_folder`, or a precision that this machine has not.
    """
    arguments.chosen(recipe.precision)
    check_run_folder(folder, recipe)
    for line in moved(run_settings(folder) or {}, folder):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def check_run_folder(folder: Path, recipe: Recipe) -> None:
    """A run's folder may be new, or hold a run with the same settings; one of before a setting came has its default.

    Raises:
        ValueError: the folder holds a run with other settings, or something that is not a run, or it cannot be written.
    """
    if os.path.exists(folder) and not folder.is_dir():  # False where that may not be known
        raise ValueError(f"output {folder}: expected a folder, got a file")
    check_output(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"output {folder}: expected an empty folder or one with a run, got other files; choose another"
        )
    defaults = {field.name: absolute(field.name, field.default) for field in dataclasses.fields(recipe)}
    stored = defaults | yaml.safe_load((folder / CONFIG).read_text())
    for name, value in recipe.as_dict().items():
        if located(name, stored.get(name), folder) != located(name, value, folder):
            keep = f" (with --teacher {folder / 'teacher'}: its own)" if finished(folder / "teacher") else ""
            raise ValueError(
                f"{name}: expected {stored.get(name)}, as the run in the output folder {folder} has, got {value}; "
                f"choose another{keep}, or --fresh to start over"
            )


@contextmanager
def anew(folder: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Within the block the folder is empty. The run that it held is removed once the new one has written its settings;
    where that is refused before, it is back.

    Raises:
        ValueError: the new run is made of what lies in the folder.
    """
    for name in PATHS:
        for value in each(settings.get(name)):
            if value is not None and Path(value).resolve().is_relative_to(folder.resolve()):
                raise ValueError(
                    f"{name} {value}: expected a place outside of the output folder {folder}, which would be removed, "
                    "got one inside; choose another"
                )
    held = (folder / CONFIG).is_file()
    if held:
        shutil.rmtree(_aside(folder), ignore_errors=True)
        folder.rename(_aside(folder))
    try:
        yield
    finally:
        if held and _aside(folder).is_dir():
            shutil.rmtree(folder, ignore_errors=True)
            _aside(folder).rename(folder)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.earlier")


def write_config(folder: Path, settings: Mapping[str, Any]) -> None:
    """The settings of a run, of which `kdfast distill --config` makes another. With them it has begun."""
    partial = folder / f"{CONFIG}.partial"
    with saving(folder / CONFIG):
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
        partial.replace(folder / CONFIG)
    shutil.rmtree(_aside(folder), ignore_errors=True)


def finished(folder: Path) -> History | None:
    """The log history of a finished stage, or None."""
    marker = folder / "stage.json"
    return json.loads(marker.read_text())["history"] if marker.is_file() else None


def trained_in(folder: Path) -> str | None:
    """The precision of a finished stage's training; None where `folder` has none that tells."""
    marker = folder / "stage.json"
    return json.loads(marker.read_text()).get("precision") if marker.is_file() else None


def train_stage(trainer: ObjectiveTrainer, folder: Path, title: str, dtype: str = "float32") -> History:
    """Trains until done, from the checkpoint in `trainer.args.output_dir` if there is one; the model goes to `folder`,
    its weights in `dtype`, adapters merged into them, and beside it the objective's parameters.

    Raises:
        StageInterrupted: stopped by Ctrl-C or SIGTERM; a checkpoint was saved.
        OSError: model or checkpoint cannot be written; the last whole checkpoint is still there.
    """
    checkpoints = Path(trainer.args.output_dir)
    checkpoint = last_checkpoint(checkpoints)
    for replaced in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(replaced)
    progress = StageProgress(title)
    trainer.add_callback(progress)
    with StopOnSignal() as stop, closing(progress), saving(folder):
        trainer.add_callback(stop)
        trainer.add_callback(Seconds())  # after what may ask for a checkpoint
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.requested:
        raise StageInterrupted
    history: History = trainer.state.log_history
    with saving(folder):
        merged = trainer.model.merge_and_unload() if hasattr(trainer.model, "merge_and_unload") else trainer.model
        merged.to(getattr(torch, dtype)).save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        trainer.save_objective(folder)
    write_json(folder / "stage.json", {"history": history, "precision": arguments.precision_of(trainer.args)})
    shutil.rmtree(checkpoints)
    return history
