"""Runs of recipes of language models in their folders: what they have in common."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from rich.console import Console
from torch import Tensor
from transformers import Trainer, TrainerCallback

from kdfast.data import files
from kdfast.models import pairing
from kdfast.models.loading import device, load_tokenizer, pretrained
from kdfast.objective import LanguageModel
from kdfast.recipes.base import Recipe
from kdfast.results import measure, plots, progress, tables
from kdfast.runs import stages
from kdfast.teacher_cache._identity import tokenizer_sha256

# Files that would be read as if they were prose, or not at all.
NO_TEXT = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".gz", ".bz2", ".xz", ".zst", ".zip")


class PeakMemory(TrainerCallback):  # type: ignore[misc]
    """Adds what training needed at most to its history, models and optimizer included."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident
        state.log_history.append({"step": state.global_step, "peak_memory_mb": peak / 1e6})


@torch.inference_mode()
def per_token(
    models: Mapping[str, Any],
    rows: Sequence[Any],
    collate: Callable[[Any], Mapping[str, Tensor]],
    vocabulary: int | None = None,
) -> dict[str, measure.Metrics]:
    """Perplexity of the tokens that count, and mean KL(teacher ‖ model) at temperature 1 in nats,
    of each of the models.

    One of them is named "teacher". vocabulary: the tokens that all have, where some have embeddings of more.
    """
    halves = LanguageModel(alpha=0.5, temperature=1.0, vocab_size=vocabulary)
    sums = {name: {"kd": 0.0, "ce": 0.0} for name in models}
    tokens = 0
    starts = range(0, len(rows), 4)
    for start in progress.bar("held-out text", len(starts), starts):
        batch = {k: v.to(models["teacher"].device) for k, v in collate(rows[start : start + 4]).items()}
        count = int(halves.num_items(batch))
        outputs = {name: halves.run(model, batch) for name, model in models.items()}
        for name, output in outputs.items():
            terms = halves(output, outputs["teacher"], batch)
            for term in sums[name]:
                sums[name][term] += 2 * count * terms[term].item()
        tokens += count
    return {
        name: {"perplexity": math.exp(total["ce"] / tokens), "kl_to_teacher": total["kd"] / tokens}
        for name, total in sums.items()
    }


def common_vocabulary(teacher: Any, student: Any) -> int | None:
    """The tokens that both have, where one has embeddings of more; None where they have the same."""
    known = {model.get_output_embeddings().weight.shape[0] for model in (teacher, student)}
    return min(known) if len(known) > 1 else None


class LanguageRun:
    """One run in its folder: a teacher, and a student that is measured before and after.
    `execute` does what is not done yet.

    The folder has `student/` for `from_pretrained`, `config.yaml`, `metrics.json` and `learning_curve.png`.

    Args:
        recipe: what to do.
        folder: where everything is kept.
        console: receives the table.

    Attributes:
        titles: of the models, by which `execute` names its results.
        students: those that are trained, the last one "student".
        metric: one of what `quality` gives.
        losses: names of the loss in the training's history, with what the plot calls them.
        caption: of the table.
        auto: class that loads teacher and student.
        kind: what that is.
        other_tokens: what to do with a student of other tokens than the teacher's, for the end of the message.
        data_files: what `data` may be, and those endings of `NO_TEXT` that it may have.
        teacher, start, tokenizer: what `prepare` leaves; `start` is the student before it is trained.
        train, test: so does it the rows, to train on and held out.
        notes: and what to tell of them.
    """

    titles: ClassVar[Mapping[str, str]] = {
        "teacher": "teacher",
        "start": "student, before",
        "student": "student, distilled",
    }
    students: tuple[str, ...] = ("student",)
    metric: str = "perplexity"
    losses: ClassVar[Mapping[str, str]]
    caption: ClassVar[str]
    auto: ClassVar[Any]
    kind: ClassVar[str]
    other_tokens: ClassVar[str] = ""
    data_files: ClassVar[tuple[str, tuple[str, ...]]]
    teacher: Any
    start: Any
    tokenizer: Any
    train: Any
    test: Any
    notes: Sequence[str] = ()

    def __init__(self, recipe: Recipe, folder: Path, console: Console) -> None:
        self.recipe: Any = recipe
        self.folder, self.console = folder, console

    # ---- a recipe's own ----
    def prepare(self) -> None:
        """Loads models and rows, and writes nothing.

        Raises:
            ValueError: data, teacher or the student's layers cannot be used.
            kdfast.data.demo.AssetError: model or data cannot be fetched.
        """
        raise NotImplementedError

    def train_teacher(self) -> None:
        """Where the teacher is not ready, makes it, and the student's start anew."""

    def trainer(self, folder: Path) -> Trainer:
        """The training of the student in this folder, with its checkpoints in a folder `checkpoints` there."""
        raise NotImplementedError

    def quality(self, models: Mapping[str, Any]) -> dict[str, measure.Metrics]:
        """Metrics of the models on the held-out rows."""
        raise NotImplementedError

    def timed_batch(self) -> Mapping[str, Tensor]:
        """A batch that shows the models' speed."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What metrics.json has beside what all runs have there."""
        return {}

    # ---- what `prepare` is made of ----
    def load_teacher(self, source: str | Path, new_head: bool = False, **options: Any) -> Any:
        """The teacher, and its tokenizer, which becomes the run's.

        Args:
            source: folder or Hub name.
            new_head: whether weights may be missing, which are random then.
            options: of its configuration, and `quantised`, of `kdfast.models.loading.pretrained`.

        Raises:
            ValueError: it cannot be loaded, lacks weights or a tokenizer, or has fewer positions than `max_length`.
        """
        transformers.utils.logging.set_verbosity_error()  # missing weights are wanted, or an error here
        self.tokenizer = load_tokenizer("teacher", source)
        return self._load("teacher", source, new_head, **options)

    def load_student(self, source: str | Path, new_head: bool = False, **options: Any) -> Any:
        """A student of one's own; arguments as of `load_teacher`.

        Raises:
            ValueError: as `load_teacher`, or it has other tokens than the teacher.
        """
        own = load_tokenizer("student", source)
        pairing.check_tokens(f"student {source}", own, self.tokenizer, self.other_tokens)
        return self._load("student", source, new_head, **options)

    def _load(self, argument: str, source: str | Path, new_head: bool = False, **options: Any) -> Any:
        options |= {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, loading = pretrained(self.auto, argument, source, **options)
        if (lacking := sorted(loading["missing_keys"])) and not new_head:
            names = ", ".join(lacking[:4]) + (f" and {len(lacking) - 4} more" if len(lacking) > 4 else "")
            raise ValueError(f"{argument} {source}: expected {self.kind}, got a model without {names}")
        if unlike := sorted(loading["mismatched_keys"]):
            name, found, wanted = unlike[0]
            classes = f", for the teacher's {model.config.num_labels} classes" if "id2label" in options else ""
            raise ValueError(f"{argument} {source}: expected {name} of {list(wanted)}{classes}, got {list(found)}")
        pairing.check_length(f"{argument} {source}", model, self.recipe.max_length)
        return model.eval().to(device())

    def data_file(self) -> Path:
        """What `data` names.

        Raises:
            ValueError: that is no file, or by its name none of text.
        """
        path, (expected, known) = Path(self.recipe.data), self.data_files
        if not path.is_file():
            raise ValueError(f"data {path}: expected {expected}, got no file")
        if path.suffix.lower() in NO_TEXT and path.suffix.lower() not in known:
            raise ValueError(f"data {path}: expected {expected}, got a file that ends in {path.suffix}")
        return path

    def read(self, reader: Callable[..., Any], *arguments: Any) -> Any:
        """What a reader of `kdfast.data.text` makes of the file.

        Raises:
            ValueError: it cannot be read, or holds something else.
        """
        path = self.data_file()
        try:
            return reader(path, *arguments)
        except OSError as error:
            raise ValueError(
                f"data {path}: expected a file that can be read, got {str(error.strerror).lower()}"
            ) from None
        except ValueError as error:  # which begins with the path
            raise ValueError(f"data {error}") from None

    # ---- all recipes' ----
    def execute(self) -> dict[str, measure.Metrics]:
        """Trains, measures and shows; returns the metrics of the models, by the names of `titles`.

        Raises:
            ValueError: as `prepare`; or the folder holds a run with other settings, or something that is not a run.
            kdfast.runs.stages.StageInterrupted: stopped by a signal, with the state saved.
        """
        stages.begin(self.recipe, self.folder, self.console)
        transformers.utils.logging.disable_progress_bar()
        self.prepare()
        source = files.shown_name(self.recipe.data or "demonstration")
        self.console.print(f"{source}: {len(self.train):,} training rows, {len(self.test):,} held out")
        for note in self.notes:
            self.console.print(note, markup=False)
        stages.write_config(self.folder, self.recipe.as_dict())
        self.train_teacher()
        students = {name: self._finished(name) for name in self.students}
        history = stages.finished(self.folder / "student") or []
        results = self._measured({"teacher": self.teacher, "start": self.start, **students}, history)
        plots.plot_losses(self.folder / "learning_curve.png", history, self.losses)
        self.console.print(
            tables.language_table({self.titles[name]: row for name, row in results.items()}, self.caption),
            *tables.gain(results, self.metric),
            sep="\n",
        )
        saved = f"student/ ({self.auto.__name__} loads it), metrics.json, learning_curve.png"
        self.console.print(f"In {self.folder}: {saved}")
        return results

    def _finished(self, name: str) -> Any:
        folder = self.folder / name
        if stages.finished(folder) is None:
            stages.train_stage(self.trainer(folder), folder, self.titles[name], self.recipe.save_dtype)
        return self.auto.from_pretrained(folder, dtype=torch.float32, local_files_only=True).to(device())

    def _measured(self, models: dict[str, Any], history: stages.History) -> dict[str, measure.Metrics]:
        stored = self.folder / "metrics.json"
        if not stored.is_file():
            for model in models.values():
                model.eval()
            results = self.quality(models)
            batch = {k: v.to(device()) for k, v in self.timed_batch().items() if k != "labels"}
            speeds_of = measure.speeds(models, batch)
            for name, model in models.items():
                own = name != "teacher" or self.recipe.teacher is None
                folder = self.folder / name if own else Path(self.recipe.teacher)
                results[name] |= measure.size(model, folder) | speeds_of[name]
            speeds = [event["train_tokens_per_second"] for event in history if "train_tokens_per_second" in event]
            training = {
                "precision": stages.trained_in(self.folder / "student"),
                "tokens_per_second": speeds[-1],  # since it was last continued, its evaluations included
                "peak_memory_mb": next(event["peak_memory_mb"] for event in history if "peak_memory_mb" in event),
            }
            facts = {"settings": self.recipe.as_dict(), "versions": measure.versions(), "training": training}
            facts["tokenizer"] = tokenizer_sha256(self.tokenizer)[:12]
            stages.write_json(stored, {**facts, **self.facts(), "models": results})
        measured: dict[str, measure.Metrics] = json.loads(stored.read_text())["models"]
        return measured
