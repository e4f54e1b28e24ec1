"""Which columns and rows of its datasets DistillationTrainer reads: streams lose none, stored teachers and labels stay."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny_berts import CLASSES, bert, collate, logged, rows, trainer
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from kdfast.objective import CLS, Hinton, Labels, Logits, Terms

STEPS, BATCH = 3, 4


def stored() -> list[dict[str, Any]]:
    """Rows of one length, with a teacher's columns, weights and what nobody asked for."""
    given = [{**row, "input_ids": (row["input_ids"] * 4)[:6]} for row in rows(STEPS * BATCH)]
    for i, row in enumerate(given):
        row |= {"teacher_logits": [1.0, 0.0, -i / 4], "teacher_cls_3": [i / 8] * 16, "sample_weight": 1 + i / 4}
        row |= {"note": "a text, of which no tensor can be made"}
    return given


class Once(IterableDataset):  # type: ignore[type-arg]
    """Can be read once, and looks at no row before."""

    def __init__(self, given: list[dict[str, Any]]) -> None:
        self.rows = iter(given)

    def __iter__(self) -> Iterator[Any]:
        return self.rows


SOURCES: dict[str, Any] = {
    "rows": lambda given: given,
    "once": Once,
    "datasets": datasets.Dataset.from_list,
    "datasets, streamed": lambda given: datasets.Dataset.from_list(given).to_iterable_dataset(),
}


@pytest.mark.parametrize("source", SOURCES)
def test_no_row_is_lost_and_no_column_of_the_objective(tmp_path: Path, source: str) -> None:
    given, seen = stored(), []

    def collator(batch: list[Any]) -> Any:
        assert all("note" not in row for row in batch)
        seen.extend(row["input_ids"] for row in batch)
        return collate(batch)

    objective = Terms(kl=Logits(), ce=Labels(), cls=CLS({1: 3}))
    options = {"max_steps": STEPS, "data_collator": collator, "per_device_train_batch_size": BATCH}
    it = trainer(tmp_path, bert(1), SOURCES[source](given), objective, **options)
    it.train()
    assert seen == [row["input_ids"] for row in given]
    plain = trainer(tmp_path, bert(1), given, objective, max_steps=STEPS)
    plain.train()
    for name in ("loss", *objective.terms):
        torch.testing.assert_close(logged(it, name), logged(plain, name), rtol=0, atol=1e-6)
        assert min(logged(it, name)) > 1e-4
    # An evaluation's, of a set of its own among several.
    sets = {"a": SOURCES[source](given), "b": SOURCES[source](given)}
    metrics = trainer(tmp_path, bert(1), None, objective, eval_dataset=sets, data_collator=collator).evaluate()
    assert len(seen) == 3 * len(given)
    assert metrics["eval_a_kl"] == metrics["eval_b_kl"] > 1e-4
    assert metrics["eval_b_cls"] > 1e-4


def test_a_stream_gives_the_trainer_what_it_gives_transformers(tmp_path: Path) -> None:
    read: dict[str, list[Any]] = {}

    def collator(name: str) -> Any:
        read[name] = []
        return lambda batch: read[name].extend(row["input_ids"] for row in batch) or collate(batch)

    given = [{name: row[name] for name in ("input_ids", "labels")} for row in stored()]
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", max_steps=2, save_strategy="no", per_device_train_batch_size=4
    )
    Trainer(bert(1), args, train_dataset=Once(given), data_collator=collator("transformers")).train()
    options = {"max_steps": 2, "data_collator": collator("kdfast")}
    trainer(tmp_path, bert(1), Once(given), Hinton(), teacher=bert(0), **options).train()
    assert read["kdfast"] == read["transformers"]
    assert len(read["kdfast"]) >= 8


class Own(nn.Module):
    """A model of one's own, whose forward names no labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(40, 8), nn.Linear(8, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SequenceClassifierOutput(logits=self.head(self.embedding(input_ids).mean(1)))


def test_labels_are_the_objectives(tmp_path: Path) -> None:
    given = [{name: row[name] for name in ("input_ids", "labels")} for row in stored()]

    def metrics(predicted: Any) -> dict[str, float]:
        return {"labels": float(predicted.label_ids.sum())}

    it = trainer(tmp_path, Own(), given, Terms(ce=Labels()), eval_dataset=given, compute_metrics=metrics)
    it.train()
    assert logged(it, "ce")[0] == pytest.approx(math.log(CLASSES), abs=0.5)
    assert it.evaluate()["eval_labels"] == sum(row["labels"] for row in given) > 0


def test_lengths_are_asked_for_where_there_are_no_tokens(tmp_path: Path) -> None:
    images = [{"pixel_values": [[[0.0] * 4] * 4], "labels": 0}] * 8
    it = trainer(tmp_path, Own(), images, Hinton(alpha=0.0), train_sampling_strategy="group_by_length")
    message = (
        r"DistillationTrainer: train_sampling_strategy: expected rows with input_ids or their lengths in a column 'length' "
        r"for 'group_by_length', got pixel_values, labels"
    )
    with pytest.raises(ValueError, match=message):
        it.train()
    with_lengths = [{**row, "length": i} for i, row in enumerate(images)]
    it = trainer(tmp_path, Own(), with_lengths, Hinton(alpha=0.0), train_sampling_strategy="group_by_length")
    assert sorted(it._get_train_sampler()) == list(range(8))
