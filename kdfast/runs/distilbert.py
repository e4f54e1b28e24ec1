"""Runs the recipe of DistilBERT in its folder. What is finished is not repeated."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoModelForMaskedLM, TrainingArguments

from kdfast import kl_div
from kdfast.data import demo, masking, text
from kdfast.data.text import OFF
from kdfast.models import students
from kdfast.models.last_hidden import LastHidden, last_hidden
from kdfast.objective import model_inputs
from kdfast.objective.term import divisor
from kdfast.results import measure, progress
from kdfast.runs import arguments, stages
from kdfast.runs.language import LanguageRun, PeakMemory
from kdfast.train.trainer import DistillationTrainer

CURVE_ROWS = 64  # of the held-out rows, for the points of the learning curve; the table is measured on all
BATCH = 16  # rows of a forward pass without a backward
STEPS = 300  # of the student, on WordNet

Rows = Sequence[Mapping[str, Any]]


class MaskedTokens:
    """Cross-entropy of the tokens to be predicted, whose logits alone are made: a seventh of those of all tokens.

    An objective for `DistillationTrainer`, which needs no teacher.
    """

    def run(self, model: Any, inputs: Mapping[str, Any]) -> LastHidden:
        return last_hidden(model, **model_inputs(model, inputs))

    def num_items(self, inputs: Mapping[str, Any]) -> Tensor:
        counted: Tensor = (inputs["labels"] != OFF).sum()
        return counted

    def __call__(
        self, student_outputs: LastHidden, teacher_outputs: Any, inputs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        on = inputs["labels"] != OFF
        logits = student_outputs.make_logits(student_outputs.hidden[on])
        total = F.cross_entropy(logits, inputs["labels"][on], reduction="sum")
        return {"mlm": total / divisor(inputs.get("num_items", on.sum()))}


@torch.inference_mode()
def quality(models: Mapping[str, Any], rows: Rows, collate: masking.RareWordMasking) -> dict[str, measure.Metrics]:
    """Perplexity and accuracy of the masked tokens, and mean KL(teacher ‖ model) at temperature 1 in nats over all
    tokens.

    Padding aside. One of the models is named "teacher".
    """
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in models}
    masked = tokens = 0
    starts = range(0, len(rows), BATCH)
    for start in progress.bar("held-out text", len(starts), starts):
        batch = {k: v.to(models["teacher"].device) for k, v in collate(rows[start : start + BATCH]).items()}
        on, real = batch["labels"] != OFF, batch["attention_mask"].bool()
        masked, tokens = masked + int(on.sum()), tokens + int(real.sum())
        logits = {name: model(**model_inputs(model, batch)).logits for name, model in models.items()}
        for name, own in logits.items():
            loss = F.cross_entropy(own[on].float(), batch["labels"][on], reduction="sum")
            right = (own[on].argmax(-1) == batch["labels"][on]).sum()
            kl = kl_div(own, logits["teacher"], mask=real) * real.sum()
            sums[name] += torch.stack([loss, right, kl]).cpu()
    return {
        name: {"perplexity": math.exp(loss / masked), "accuracy": right / masked, "kl_to_teacher": kl / tokens}
        for name, (loss, right, kl) in ((name, total.tolist()) for name, total in sums.items())
    }


class DistilBERTRun(LanguageRun):
    """Beside the others' files, the folder has `teacher/`, where that was trained here."""

    losses: ClassVar = {"ce": "KL to the teacher", "mlm": "masked tokens", "cos": "cosine", "mse": "logits' squares"}
    caption = "Perplexity, accuracy: of masked words. KL: of all, from the teacher's distribution at T = 1, in nats"
    auto = AutoModelForMaskedLM
    kind = "a masked language model"
    data_files = ("a text file with empty lines between the texts", ())

    # ---- models and rows ----
    def prepare(self) -> None:
        r = self.recipe
        datasets.disable_progress_bars()
        self.teacher = self._load_teacher()
        if len(self.tokenizer) > self.teacher.config.vocab_size:
            known = self.teacher.config.vocab_size
            raise ValueError(
                f"teacher {r.teacher}: expected a tokenizer of the {known} tokens that it knows, got one of "
                f"{len(self.tokenizer)}"
            )
        self.start = self._new_student()
        self.train, test = self._rows()
        test, self.curve = list(test), min(CURVE_ROWS, len(test))
        # Batches that are made in this order have hardly any padding; training has an order of its own.
        self.test = [*sorted(test[: self.curve], key=_length), *sorted(test[self.curve :], key=_length)]
        self.evenly = masking.RareWordMasking(self.tokenizer)  # 15 % of the tokens, all alike
        counts = masking.count_tokens(self.train, self.teacher.config.vocab_size)
        self.collate = masking.RareWordMasking(
            self.tokenizer, counts, probability=r.mask_probability, smoothing=r.mask_smoothing, seed=r.seed
        )

    def _load_teacher(self) -> Any:
        """The given one; else the trained one, or what it is to be made of."""
        r, trained = self.recipe, self.folder / "teacher"
        ready = r.teacher is not None or stages.finished(trained) is not None
        source = r.teacher or (trained if ready else demo.fetch(demo.MINILM))
        # PyTorch's fused attention has no dropout on the CPU; the rest of the dropout stays.
        options = {} if ready else {"attention_probs_dropout_prob": 0.0}
        transformers.set_seed(r.seed)  # for a new head
        model = self.load_teacher(source, new_head=not ready, **options)
        for name in ("pad_token", "mask_token"):
            if getattr(self.tokenizer, name) is None:
                raise ValueError(f"teacher {source}: expected a tokenizer with a {name}, got one without")
        if not self.tokenizer.is_fast:
            raise ValueError(f"teacher {source}: expected a fast tokenizer, got {type(self.tokenizer).__name__}")
        return model

    def _new_student(self) -> Any:
        r, count = self.recipe, self.teacher.config.num_hidden_layers
        layers = r.student_layers or students.spread(count, max(1, count // 2))
        transformers.set_seed(r.seed)  # for what is not the teacher's
        if type(self.teacher).__name__ == "BertForMaskedLM":
            options = {"vocab_transform": r.vocab_transform, "freeze_positions": r.freeze_positions}
            return students.distilbert(self.teacher, layers, dropout=r.dropout, **options)
        student = students.from_layers(self.teacher, layers, dropout=r.dropout)
        positions = getattr(getattr(student.base_model, "embeddings", None), "position_embeddings", None)
        if positions is not None:
            positions.requires_grad_(not r.freeze_positions)
        return student

    def _rows(self) -> tuple[Any, Any]:
        """To train on, and held out: the same texts whatever `train_rows` is."""
        r = self.recipe
        texts = demo.wordnet(demo.fetch(demo.WORDNET)) if r.data is None else self._texts()
        random.Random(0).shuffle(texts)
        # Twice as many texts as rows: some are too short to be one.
        held_out = min(2 * r.test_rows, len(texts) // 10)
        parts: list[Any] = []
        self.notes = []
        for which, some, count in (
            ("training", texts[held_out:], r.train_rows),
            ("held-out", texts[:held_out], r.test_rows),
        ):
            notes: list[str] = []
            some = some if count is None else some[: 2 * count]
            try:
                rows = masking.blocks(some, self.tokenizer, r.max_length, tell=notes.append)
            except ValueError:  # the tokenizer is a fast one: nothing is left
                raise ValueError(
                    f"data {r.data or 'by default'}: expected texts of at least 12 tokens that the teacher knows, to "
                    f"train on and to hold out, got none among {len(some)}"
                ) from None
            self.notes += [f"{which} texts: {note}" for note in notes]
            parts.append(rows if count is None else rows.select(range(min(count, len(rows)))))
        return parts[0], parts[1]

    def _texts(self) -> list[str]:
        texts: list[str] = self.read(text.read_texts)
        if len(texts) < 10:
            raise ValueError(
                f"data {self.recipe.data}: expected at least 10 texts with empty lines between them, a tenth of them "
                f"to hold out, got {len(texts)}"
            )
        return texts

    # ---- training ----
    def train_teacher(self) -> None:
        r, folder = self.recipe, self.folder / "teacher"
        if r.teacher is not None or stages.finished(folder) is not None:
            return
        trainer = DistillationTrainer(
            self.teacher,
            self._arguments(folder, r.teacher_steps),
            objective=MaskedTokens(),
            train_dataset=self.train,
            data_collator=self.evenly,
            processing_class=self.tokenizer,
        )
        stages.train_stage(trainer, folder, "teacher")
        self.teacher = self._load_teacher()
        self.start = self._new_student()

    def trainer(self, folder: Path) -> DistillationTrainer:
        r = self.recipe
        per_epoch = -(-len(self.train) // (r.batch_size * r.accumulation))
        steps = r.steps or (STEPS if r.data is None else r.epochs * per_epoch)
        return DistillationTrainer(
            copy.deepcopy(self.start),
            self._arguments(
                folder,
                steps,
                eval_strategy="steps",
                eval_steps=-(-steps // 8),
                prediction_loss_only=True,
                include_num_input_tokens_seen="non_padding",
            ),
            teacher=self.teacher,
            objective=r.objective(self.teacher.config.vocab_size),
            train_dataset=self.train,
            eval_dataset=self.test[: self.curve],
            data_collator=self.collate,
            processing_class=self.tokenizer,
            callbacks=[PeakMemory()],
        )

    def _arguments(self, folder: Path, steps: int, **more: Any) -> TrainingArguments:
        r = self.recipe
        return arguments.training(
            r,
            folder,
            max_steps=steps,
            gradient_accumulation_steps=r.accumulation,
            per_device_eval_batch_size=BATCH,
            learning_rate=r.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=r.warmup,
            adam_beta1=0.9,
            adam_beta2=0.98,
            adam_epsilon=1e-6,
            weight_decay=r.weight_decay,
            max_grad_norm=r.max_grad_norm,
            save_steps=100,
            logging_steps=max(1, steps // 60),
            **more,
        )

    # ---- results ----
    def quality(self, models: Mapping[str, Any]) -> dict[str, measure.Metrics]:
        return quality(models, self.test, self.evenly)

    def timed_batch(self) -> Mapping[str, Tensor]:
        """A batch of median length."""
        middle = sorted(self.test, key=_length)[len(self.test) // 2 :]
        return self.evenly(middle[:BATCH])


def _length(row: Mapping[str, Any]) -> int:
    return len(row["input_ids"])
