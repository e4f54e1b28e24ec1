"""Runs the recipe of question answering in its folder. What is finished is not repeated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding

from kdfast.data import answers
from kdfast.models.inputs import model_inputs
from kdfast.objective import Spans, Terms
from kdfast.results import measure, progress
from kdfast.runs.heads import HeadRun


class QuestionAnsweringRun(HeadRun):
    caption: ClassVar = (
        "F1, exact: of answers, as SQuAD has them. KL: from the teacher's distributions at T = 1, in nats"
    )
    auto = AutoModelForQuestionAnswering
    kind = "a model for question answering"
    metric = "f1"
    asked: answers.Questions

    def read_teacher(self, quantised: bool) -> None:
        super().read_teacher(quantised)
        self.collate = DataCollatorWithPadding(self.tokenizer)

    def flat(self, part: Any) -> Any:
        return answers.flat(part)

    def labelled(self, part: Any) -> bool:
        return "answers" in part.column_names and any(map(answers.some, part["answers"]))

    def rows(self, part: Any, test: bool) -> list[Any]:
        made = answers.rows(part, self.tokenizer, self.recipe.max_length, self.recipe.stride)
        if test:
            self.asked = made
        return made.rows

    @torch.inference_mode()
    def quality(self, models: Mapping[str, Any]) -> dict[str, measure.Metrics]:
        asked, apart = self.asked, dict.fromkeys(models, 0.0)
        found: dict[str, list[tuple[float, str]]] = {name: [(float("-inf"), "")] * len(asked.texts) for name in models}
        order = sorted(range(len(asked.rows)), key=lambda i: len(asked.rows[i]["input_ids"]))
        starts = range(0, len(order), self.rows_of_a_pass)
        objective = Terms(kl=Spans())
        for start in progress.bar("test rows", len(starts), starts):
            numbers = order[start : start + self.rows_of_a_pass]
            batch = {k: v.to(self.teacher.device) for k, v in self.collate([asked.rows[i] for i in numbers]).items()}
            outputs = {name: model(**model_inputs(model, batch)) for name, model in models.items()}
            for name, output in outputs.items():
                kl = objective(output, outputs["teacher"], batch)["kl"]
                apart[name] += kl.item() * len(numbers) / len(order)
                for i, first, last in zip(numbers, output.start_logits, output.end_logits, strict=True):
                    above, (begin, end) = answers.best(first.float(), last.float(), asked.places[i])
                    of = asked.question[i]
                    found[name][of] = max(found[name][of], (above, asked.texts[of][begin:end]))
        return {name: {**self._of(found[name]), "kl_to_teacher": apart[name]} for name in models}

    def _of(self, found: list[tuple[float, str]]) -> dict[str, float]:
        """Where no question is without an answer, each is answered."""
        some_without = not all(self.asked.right)
        chosen = ["" if some_without and above <= 0 else answer for above, answer in found]
        return answers.quality(chosen, self.asked.right)
