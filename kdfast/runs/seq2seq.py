"""Runs the recipe of encoder-decoders in its folder. What is finished is not repeated."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import shorten
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq

from kdfast.data import pairs
from kdfast.data.hub import first_line
from kdfast.models import pairing, students
from kdfast.models.student_parts import SIDES, count_name
from kdfast.objective import Objective
from kdfast.results import measure
from kdfast.runs import written
from kdfast.runs.adapters import check_adapters, with_adapters
from kdfast.runs.heads import HeadRun
from kdfast.runs.language import common_vocabulary, per_token

WRITTEN = "targets.jsonl"  # of a run's folder
OUTGROWN = (
    "student: its generate() fails in transformers, whose cache has the encoder's layers, fewer than the decoder's; "
    "give it EncoderDecoderCache(DynamicCache(), DynamicCache()), or use_cache=False"
)


class Seq2SeqRun(HeadRun):
    losses: ClassVar = {"kd": "teacher's term", "ce": "labels' term"}
    caption: ClassVar = "Perplexity, KL from the teacher's distribution at T = 1 in nats: of the targets' tokens"
    auto = AutoModelForSeq2SeqLM
    kind = "an encoder-decoder of text"
    kind_of_rows = "pairs of texts, a source and its target"
    metric = "perplexity"

    def prepare(self) -> None:
        r = self.recipe
        check_adapters(r.lora)
        super().prepare()
        self.collate = DataCollatorForSeq2Seq(self.tokenizer)
        if written.outgrows_cache(self.start):
            self.notes = [*self.notes, OUTGROWN]
        self.vocabulary = common_vocabulary(self.teacher, self.start)
        known = self.vocabulary or self.teacher.get_output_embeddings().weight.shape[0]
        if (largest := max(max(row["labels"], default=0) for row in (*self.train, *self.test))) >= known:
            expected = f"targets of the {known} tokens that teacher and student know"
            raise ValueError(f"data {r.data}: expected {expected}, got token {largest}")
        for who, model in self.both():
            pairing.check_length(who, model, r.max_target_length, "max_target_length")
            try:
                with torch.inference_mode():
                    r.objective().run(model, self.collate(self.train[:2]).to(model.device))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{who}: expected {self.kind} that takes these rows, got {first_line(error)}"
                ) from None

    def student_of_layers(self) -> Any:
        r, config = self.recipe, self.teacher.config
        encoder, decoder = (getattr(config, count_name(config, side), 1) for side in SIDES)
        return students.from_layers(
            self.teacher,
            r.student_layers or range(encoder),
            decoder_layers=r.decoder_layers or students.spread(decoder, -(-decoder // 2)),
            dropout=0.0,
        )

    def own_student(self) -> Any:
        return self.load_student(self.recipe.student)

    # ---- rows ----
    def flat(self, part: Any) -> Any:
        return pairs.flat(part)

    def labelled(self, part: Any) -> bool:
        return pairs.has_targets(part, self.recipe.target_column)

    def rows(self, part: Any, test: bool) -> list[Any]:
        r = self.recipe
        texts = pairs.texts(part, r.source_column, r.target_column)
        if not texts:
            raise ValueError(f"data {r.data}: expected rows with texts to train on and to test, got none")
        if lacking := len(part) - len(texts):
            what = "test" if test else "training"
            self.notes = [*self.notes, f"{lacking:,} {what} rows without a source or a target are left out"]
        return pairs.rows(texts, self.tokenizer, r.max_length, r.max_target_length, r.prefix or "")

    def train_teacher(self) -> None:
        """Where the targets are to be the teacher's, it writes them."""
        r, given = self.recipe, len(self.labelled_rows)
        if r.targets != "teacher":
            return
        self.train = written.rows(
            self.teacher, self.labelled_rows, self.tokenizer, self.folder / WRITTEN, r.beams, r.max_target_length
        )
        if not self.train:
            raise ValueError(
                f"teacher {r.teacher}: expected one that writes targets, got no text of any of {given:,} sources "
                f"({self.folder / WRITTEN}); has it learned this task, with this prefix?"
            )
        if lacking := given - len(self.train):
            self.console.print(f"{lacking:,} training rows of which the teacher writes no text are left out")
        source, target = (
            shorten(self.tokenizer.decode(self.train[0][name], skip_special_tokens=True), 60, placeholder=" …")
            for name in ("input_ids", "labels")
        )
        self.console.print(f"the teacher writes, of {source!r}: {target!r}", markup=False)

    # ---- training and results ----
    def trained(self) -> Any:
        return with_adapters(self.start, self.recipe.lora, self.recipe.seed, "SEQ_2_SEQ_LM")

    def objective(self, alone: bool) -> Objective:
        r = self.recipe
        its: Objective = r.labels_only(self.vocabulary) if alone else r.objective(self.vocabulary)
        return its

    def quality(self, models: Mapping[str, Any]) -> dict[str, measure.Metrics]:
        return per_token(models, self.test, self.collate, self.vocabulary)

    def timed_batch(self) -> Mapping[str, Tensor]:
        batch = dict(super().timed_batch())
        batch["decoder_input_ids"] = self.teacher.prepare_decoder_input_ids_from_labels(batch["labels"])
        return batch
