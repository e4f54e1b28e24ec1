"""Runs the recipe of token classification in its folder. What is finished is not repeated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

import kdfast
from kdfast.data import words
from kdfast.data.text import OFF
from kdfast.models.inputs import model_inputs
from kdfast.results import measure, progress
from kdfast.runs.heads import HeadRun


class TokenClassificationRun(HeadRun):
    caption: ClassVar = "F1: of whole names. Accuracy: of words. KL: from the teacher's distribution at T = 1, in nats"
    auto = AutoModelForTokenClassification
    kind = "a token classifier"

    def read_teacher(self, quantised: bool) -> None:
        super().read_teacher(quantised)
        self.collate = DataCollatorForTokenClassification(self.tokenizer)
        names = self.teacher.config.id2label.values()
        self.metric = "f1" if any(str(name).startswith(("B-", "I-")) for name in names) else "accuracy"

    def labelled(self, part: Any) -> bool:
        name = words.column_of(part.features, self.recipe.label_column, words.TAGS)
        return any(row and row[0] not in (None, -1) for row in part[name])

    def rows(self, part: Any, test: bool) -> list[Any]:
        r = self.recipe
        classes = {str(name): int(number) for number, name in self.teacher.config.id2label.items()}
        made = words.rows(part, classes, self.tokenizer, r.max_length, r.word_column, r.label_column)
        if not made:
            raise ValueError(f"data {r.data}: expected rows with words to train on and to test, got none")
        return made

    @torch.inference_mode()
    def quality(self, models: Mapping[str, Any]) -> dict[str, measure.Metrics]:
        named = {int(number): str(name) for number, name in self.teacher.config.id2label.items()}
        found: dict[str, list[list[str]]] = {name: [] for name in models}
        right: list[list[str]] = []
        apart = dict.fromkeys(models, 0.0)
        starts = range(0, len(self.test), self.rows_of_a_pass)
        for start in progress.bar("test rows", len(starts), starts):
            batch = {
                k: v.to(self.teacher.device)
                for k, v in self.collate(self.test[start : start + self.rows_of_a_pass]).items()
            }
            counted = batch["labels"] != OFF
            logits = {name: model(**model_inputs(model, batch)).logits.float() for name, model in models.items()}
            for name, its in logits.items():
                apart[name] += kdfast.kl_div(its[counted], logits["teacher"][counted], reduction="sum").item()
                found[name] += _tags(its.argmax(-1), counted, named)
            right += _tags(batch["labels"], counted, named)
        total = max(1, sum(map(len, right)))
        return {name: {**words.quality(found[name], right), "kl_to_teacher": apart[name] / total} for name in models}


def _tags(numbers: torch.Tensor, counted: torch.Tensor, named: Mapping[int, str]) -> list[list[str]]:
    """Names of the labels of the words of every row."""
    return [[named[number] for number in row[on].tolist()] for row, on in zip(numbers, counted, strict=True)]
