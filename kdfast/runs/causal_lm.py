"""Runs the recipe of causal language models in its folder. What is finished is not repeated."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdfast.data import demo, text
from kdfast.models import pairing, students
from kdfast.models.last_hidden import last_hidden
from kdfast.results import measure
from kdfast.runs import arguments
from kdfast.runs.adapters import check_adapters, with_adapters
from kdfast.runs.language import LanguageRun, PeakMemory, common_vocabulary, per_token
from kdfast.train.on_policy import OnPolicyTrainer

CURVE_ROWS = 8  # of the held-out rows, for the points of the learning curve; the table is measured on all


@torch.inference_mode()
def check_causal(model: Any, who: str) -> None:
    """That predictions do not depend on later tokens: those of an encoder do,
    which may be loaded as a language model too.

    Args:
        model: the teacher, or a student of one's own.
        who: how messages call it.

    Raises:
        ValueError: they do, or they are made in a way that `kdfast.linear_kd_loss` does not know.
    """
    ids = torch.tensor([[0, 1, 2], [0, 1, 3]], device=model.device)
    try:
        first, second = last_hidden(model, input_ids=ids, attention_mask=torch.ones_like(ids)).hidden
    except (TypeError, ValueError) as error:
        raise ValueError(f"{who}: {error}") from None
    if (first - second)[:-1].abs().max() > 1e-3 * first.abs().max():
        raise ValueError(
            f"{who}: expected a causal language model, got one whose prediction of a token depends on the tokens after "
            "it"
        )


class CausalLMRun(LanguageRun):
    losses: ClassVar = {"kd": "teacher's term", "ce": "labels' term"}
    caption = "Perplexity, KL from the teacher's distribution at T = 1 in nats: of the next token"
    auto = AutoModelForCausalLM
    kind = "a causal language model"
    other_tokens = "; kdfast.objective.ULD and GOLD compare language models of two tokenizers"
    data_files = (
        "a .jsonl file with prompt and completion, or messages, in each line, or a text file with empty lines between "
        "the texts",
        (".jsonl",),
    )

    def prepare(self) -> None:
        r = self.recipe
        check_adapters(r.lora)
        source = demo.fetch(demo.SMOLLM2) if r.teacher is None else r.teacher
        self.teacher = self.load_teacher(source, quantised=r.student is not None)
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"teacher {source}: expected a tokenizer with an end-of-text token (eos_token), which closes texts and "
                "completions, got one without"
            )
        check_causal(self.teacher, f"teacher {source}")
        self.start = self._student()
        pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        self.collate = text.Collator(pad)
        train, test = self._rows()
        if r.on_policy > 0:
            train, test = self._prompted(train), self._prompted(test)
        self.train, self.test = train[: r.train_rows], test[: r.test_rows]
        if not self.train or not self.test:
            expected = (
                f"10 rows or more (of max_length {r.max_length} tokens where texts are packed), one in ten to hold out"
            )
            raise ValueError(f"data {r.data or 'by default'}: expected {expected}, got {len(train) + len(test)}")
        for who, model in ((f"teacher {source}", self.teacher), (f"student {r.student}", self.start)):
            pairing.check_ids(who, model, [*self.train, *self.test, {"input_ids": [pad]}])
        self.vocabulary = common_vocabulary(self.teacher, self.start)

    def _student(self) -> Any:
        r = self.recipe
        if r.student is not None:
            student = self.load_student(r.student)
            check_causal(student, f"student {r.student}")
            return student
        layers = range(0, self.teacher.config.num_hidden_layers, 3) if r.student_layers is None else r.student_layers
        return students.from_layers(self.teacher, layers)

    def _rows(self) -> tuple[list[text.Row], list[text.Row]]:
        r = self.recipe
        if r.data is None:
            train, test = demo.articles(demo.fetch(demo.ARTICLES))
            return text.packed(train, self.tokenizer, r.max_length), text.packed(test, self.tokenizer, r.max_length)
        if r.data.lower().endswith(".jsonl"):
            rows = self.read(text.read_completions, self.tokenizer, r.max_length)
        else:
            rows = text.packed(self.read(text.read_texts), self.tokenizer, r.max_length)
        random.Random(0).shuffle(rows)
        held_out = min(r.test_rows, len(rows) // 10)
        return rows[held_out:], rows[:held_out]

    def _prompted(self, rows: list[text.Row]) -> list[text.Row]:
        """Rows of which every token counted, with a prompt; others as they are."""
        begin = self.recipe.max_length // 4
        return [
            row
            if row["labels"][0] == text.OFF
            else text.with_prompt(row["input_ids"][:begin], row["input_ids"][begin:], self.recipe.max_length)
            for row in rows
        ]

    def trainer(self, folder: Path) -> OnPolicyTrainer:
        r = self.recipe
        settings = arguments.training(
            r,
            folder,
            max_steps=r.steps,
            per_device_eval_batch_size=4,
            learning_rate=r.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.06,
            weight_decay=0.01,
            eval_strategy="steps",
            eval_steps=-(-r.steps // 8),
            prediction_loss_only=True,
            include_num_input_tokens_seen="non_padding",
            save_steps=50,
            logging_steps=max(1, r.steps // 60),
        )
        return OnPolicyTrainer(
            with_adapters(self.start, r.lora, r.seed, "CAUSAL_LM"),
            settings,
            teacher=self.teacher,
            objective=r.objective(self.vocabulary),
            on_policy=r.on_policy,
            max_new_tokens=r.max_new_tokens,
            train_dataset=self.train,
            eval_dataset=self.test[:CURVE_ROWS],
            data_collator=self.collate,
            processing_class=self.tokenizer,
            callbacks=[PeakMemory()],
        )

    def quality(self, models: Mapping[str, Any]) -> dict[str, measure.Metrics]:
        return per_token(models, self.test, self.collate, self.vocabulary)

    def timed_batch(self) -> Mapping[str, Tensor]:
        return self.collate(self.test[:4])
