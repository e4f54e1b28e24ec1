"""Distillation of a causal language model on real text: SmolLM2 into a student with every third of its layers.

1. The student is made of the teacher's layers that the settings name; embeddings, which are tied to the output, and the
   last norm are copied.
2. It is trained on alpha · T² · D(student, teacher) + (1 - alpha) · CE over the tokens that count: all of a packed text, or
   the completions of rows with prompts. With probability `on_policy`, a batch's completions are samples of the student
   (GKD, Agarwal et al., 2024, arXiv:2306.13649).
3. Teacher and student, before and after, are measured on held-out rows.

Logits of the whole vocabulary are never there for more than a chunk of tokens (`kdfast.linear_kd_loss`).
"""

from __future__ import annotations

import copy
import json
import math
import random
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

import kdfast
from kdfast import data, report, stages, students, text
from kdfast.objective import LanguageModel
from kdfast.on_policy import OnPolicyTrainer

CURVE_ROWS = 8  # of the held-out rows, for the points of the learning curve; the table is measured on all
MODELS = {"teacher": "teacher", "start": "student, before", "student": "student, distilled"}


@dataclass(frozen=True)
class Settings:
    """What determines the result of a run; stored in its folder and compared when the run is continued.

    Attributes:
        data: a JSONL file of objects with `prompt` and `completion`, of which only completions count; or another file,
            whose texts are separated by empty lines and packed; None: news editorials and product reviews, packed.
        teacher: folder or Hub name of a causal language model; None: SmolLM2-135M-Instruct.
        student_layers: the teacher's layers that the student keeps, numbered from 0; None: every third.
        divergence, beta, skew, alpha, temperature: of `kdfast.objective.LanguageModel`.
        on_policy: share of the batches whose completions the student samples. Rows of packed text then have the first
            quarter as a prompt, and only the rest counts.
        max_new_tokens: the longest sample.
        max_length: tokens of a row; longer rows are cut.
        steps: updates of the student.
        learning_rate: peak of the cosine schedule.
        batch_size: rows per step.
        seed: of the order of rows and of samples.
        train_rows, test_rows: how many rows to use at most.

    Raises:
        ValueError: a value out of range.
    """

    data: str | None = None
    teacher: str | None = None
    student_layers: tuple[int, ...] | None = None
    divergence: str = "kl_div"
    beta: float = 0.5
    skew: float = 0.1
    alpha: float = 0.9
    temperature: float = 1.0
    on_policy: float = 0.0
    max_new_tokens: int = 64
    max_length: int = 256
    steps: int = 300
    learning_rate: float = 5e-4
    batch_size: int = 4
    seed: int = 0
    train_rows: int | None = None
    test_rows: int = 64

    def __post_init__(self) -> None:
        least = {"max_new_tokens": 1, "max_length": 8, "steps": 1, "batch_size": 1, "seed": 0, "test_rows": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate must be between 0 and 1, got {self.learning_rate}")
        if not 0 <= self.on_policy <= 1:
            raise ValueError(f"on_policy must be between 0 and 1, got {self.on_policy}")
        self.objective()  # checks the rest

    def objective(self) -> LanguageModel:
        return LanguageModel(self.alpha, self.temperature, self.divergence, self.beta, self.skew)


class _PeakMemory(TrainerCallback):  # type: ignore[misc]
    """Adds what training needed at most to its history, models and optimizer included."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident
        state.log_history.append({"step": state.global_step, "peak_memory_mb": peak / 1e6})


@torch.inference_mode()
def quality(models: dict[str, Any], rows: Sequence[text.Row], collate: text.Collator) -> dict[str, report.Metrics]:
    """Perplexity of the tokens that count, and mean KL(teacher ‖ model) at temperature 1 in nats, of each of the models.

    One of them is named "teacher".
    """
    halves = LanguageModel(alpha=0.5, temperature=1.0)
    sums = {name: {"kd": 0.0, "ce": 0.0} for name in models}
    tokens = 0
    for model in models.values():
        model.eval()
    starts = range(0, len(rows), 4)
    for start in stages.bar("held-out text", len(starts), starts):
        batch = {k: v.to(models["teacher"].device) for k, v in collate(rows[start : start + 4]).items()}
        count = int(halves.num_items(batch))
        outputs = {name: halves.run(model, batch) for name, model in models.items()}
        for name, output in outputs.items():
            for term, value in halves(output, outputs["teacher"], batch).items():
                sums[name][term] += 2 * count * value.item()
        tokens += count
    return {
        name: {"perplexity": math.exp(total["ce"] / tokens), "kl_to_teacher": total["kd"] / tokens}
        for name, total in sums.items()
    }


class CausalLMRun:
    """One run in its folder. `prepare` fetches and checks, `execute` does what is not done yet.

    Args:
        settings: what to do.
        folder: where everything is kept: `student/` for `from_pretrained`, `settings.json`, `metrics.json`,
            `learning_curve.png`.
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

    def prepare(self) -> None:
        """Loads the teacher and the rows.

        Raises:
            ValueError: the file of rows, the teacher or the student's layers cannot be used.
            kdfast.data.AssetError: model or data cannot be fetched.
        """
        transformers.utils.logging.disable_progress_bar()
        s = self.settings
        source = data.fetch(data.SMOLLM2) if s.teacher is None else s.teacher
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            teacher = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        except OSError as error:
            raise ValueError(f"teacher {source}: {str(error).splitlines()[0]}") from None
        self.teacher = teacher.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        layers = range(0, teacher.config.num_hidden_layers, 3) if s.student_layers is None else s.student_layers
        self.start = students.from_layers(self.teacher, layers)
        pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        self.collate = text.Collator(pad)
        train, test = self._rows()
        if s.on_policy > 0:
            train, test = self._prompted(train), self._prompted(test)
        self.train, self.test = train[: s.train_rows], test[: s.test_rows]
        if not self.train or not self.test:
            raise ValueError(f"too little text for rows of {s.max_length} tokens, to train on and to hold out")

    def execute(self) -> dict[str, report.Metrics]:
        """After `prepare`: trains, measures and shows; returns the metrics of the three models, named as in `MODELS`.

        Raises:
            kdfast.stages.StageInterrupted: stopped by a signal, with the state saved.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        stages.write_json(self.marker, asdict(self.settings))
        student, history = self._train()
        results = self._measure({"teacher": self.teacher, "start": self.start, "student": student}, history)
        report.plot_losses(self.folder / "learning_curve.png", history)
        self.console.print(report.language_table({MODELS[name]: row for name, row in results.items()}))
        saved = "student/ (AutoModelForCausalLM loads it), metrics.json, learning_curve.png"
        self.console.print(f"In {self.folder}: {saved}")
        return results

    def _rows(self) -> tuple[list[text.Row], list[text.Row]]:
        s = self.settings
        if s.data is None:
            train, test = data.articles(data.fetch(data.ARTICLES))
            return text.packed(train, self.tokenizer, s.max_length), text.packed(test, self.tokenizer, s.max_length)
        path = Path(s.data)
        if not path.is_file():
            raise ValueError(f"data {path} is not a file")
        if path.suffix == ".jsonl":
            rows = text.read_completions(path, self.tokenizer, s.max_length)
        else:
            rows = text.packed(text.read_texts(path), self.tokenizer, s.max_length)
        random.Random(0).shuffle(rows)
        held_out = min(s.test_rows, len(rows) // 10)
        return rows[held_out:], rows[:held_out]

    def _prompted(self, rows: list[text.Row]) -> list[text.Row]:
        """Rows of which every token counted, with a prompt; others as they are."""
        begin = self.settings.max_length // 4
        return [
            row
            if row["labels"][0] == text.OFF
            else text.with_prompt(row["input_ids"][:begin], row["input_ids"][begin:], self.settings.max_length)
            for row in rows
        ]

    def _train(self) -> tuple[Any, stages.History]:
        """The distilled student and its log history: loaded where it is finished, else trained."""
        s, folder = self.settings, self.folder / "student"
        history = stages.finished(folder)
        if history is None:
            trainer = OnPolicyTrainer(
                copy.deepcopy(self.start),
                self._arguments(folder),
                teacher=self.teacher,
                objective=s.objective(),
                on_policy=s.on_policy,
                max_new_tokens=s.max_new_tokens,
                train_dataset=self.train,
                eval_dataset=self.test[:CURVE_ROWS],
                data_collator=self.collate,
                processing_class=self.tokenizer,
                callbacks=[_PeakMemory()],
            )
            history = stages.train_stage(trainer, folder, MODELS["student"])
        student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        return student.to(self.teacher.device), history

    def _arguments(self, folder: Path) -> TrainingArguments:
        s, on_cpu = self.settings, not torch.cuda.is_available()
        return TrainingArguments(
            output_dir=str(folder / "checkpoints"),
            use_cpu=on_cpu,
            bf16=stages.cpu_has_bf16() if on_cpu else torch.cuda.is_bf16_supported(),
            seed=s.seed,
            max_steps=s.steps,
            per_device_train_batch_size=s.batch_size,
            per_device_eval_batch_size=4,
            train_sampling_strategy="group_by_length",
            learning_rate=s.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.06,
            weight_decay=0.01,
            eval_strategy="steps",
            eval_steps=-(-s.steps // 8),
            prediction_loss_only=True,
            include_num_input_tokens_seen="non_padding",
            save_steps=50,
            save_total_limit=1,
            logging_steps=max(1, s.steps // 60),
            disable_tqdm=False,
            dataloader_pin_memory=False,
            report_to="none",
        )

    def _measure(self, models: dict[str, Any], history: stages.History) -> dict[str, report.Metrics]:
        stored = self.folder / "metrics.json"
        if stored.is_file():
            measured: dict[str, report.Metrics] = json.loads(stored.read_text())["models"]
            return measured
        results = quality(models, self.test, self.collate)
        batch = {k: v.to(self.teacher.device) for k, v in self.collate(self.test[:4]).items() if k != "labels"}
        milliseconds = report.latency_ms(models, batch, repeats=5)
        for name, model in models.items():
            results[name] |= report.size(model, self.folder / name)
            results[name]["tokens_per_second"] = 1e3 * int(batch["attention_mask"].sum()) / milliseconds[name]
        speeds = [event["train_tokens_per_second"] for event in history if "train_tokens_per_second" in event]
        training = {
            "tokens_per_second": speeds[-1],  # since it was last continued, its evaluations included
            "peak_memory_mb": next(event["peak_memory_mb"] for event in history if "peak_memory_mb" in event),
        }
        versions = {"kdfast": kdfast.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        stages.write_json(
            stored,
            {"settings": asdict(self.settings), "versions": versions, "training": training, "models": results},
        )
        return results
