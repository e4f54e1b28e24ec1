"""Training from a teacher that was run before: all of it (k = V) is the teacher itself, some of it is `topk_kl_div`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import ARGUMENTS, losses, same
from tiny_teacher import LLAMA, ROWS, TOKENIZER, VOCABULARY, llama, write
from transformers import DataCollatorWithPadding, TrainingArguments

import kdfast
from kdfast.objective import LanguageModel


def train(folder: Path, objective: LanguageModel, dataset: Any, collate: Any, teacher: Any = None) -> Any:
    arguments: dict[str, Any] = ARGUMENTS | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = kdfast.DistillationTrainer(
        copy.deepcopy(llama(seed=5)),
        TrainingArguments(output_dir=str(folder), **arguments),
        teacher=copy.deepcopy(teacher),
        objective=objective,
        train_dataset=dataset,
        data_collator=collate,
    )
    trainer.train()
    return trainer


def test_all_of_a_teacher_is_the_teacher(tmp_path: Path) -> None:
    collate, objective = DataCollatorWithPadding(TOKENIZER), LanguageModel(alpha=1.0, temperature=2.0)
    cache = write(tmp_path / "cache", k=VOCABULARY, temperature=2.0)
    ours = train(tmp_path, objective, cache.beside(ROWS), cache.collator(collate))
    live = train(tmp_path, objective, ROWS, collate, teacher=LLAMA)
    assert len(losses(ours)) == 5
    assert losses(ours)[0] > 0.01
    assert losses(ours) == pytest.approx(losses(live), rel=1e-4)
    same(ours.model, live.model, 1e-5)


def test_the_loss_of_a_batch_from_its_topk(tmp_path: Path) -> None:
    collate, student = DataCollatorWithPadding(TOKENIZER), llama(seed=5)
    cache = write(tmp_path / "cache", k=8, temperature=1.5)
    batch = cache.collator(collate)([cache.beside(ROWS)[i] for i in range(4)])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    objective = LanguageModel(alpha=0.7, temperature=1.5, tail="renormalize")
    terms = objective(objective.run(student, batch), None, batch | {"labels": labels})
    logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    top = batch["teacher_topk_logprobs"][:, :-1], batch["teacher_topk_indices"][:, :-1]
    soft = kdfast.topk_kl_div(logits, *top, tail="renormalize", temperature=1.5, mask=labels[:, 1:] != -100)
    hard = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(terms["kd"], 0.7 * 1.5**2 * soft)
    torch.testing.assert_close(terms["ce"], 0.3 * hard)
    other, outputs = LanguageModel(alpha=1.0, divergence="js_div"), objective.run(student, batch)
    with pytest.raises(ValueError, match="divergence: expected 'kl_div' with a teacher's top-k, got 'js_div'"):
        other(outputs, None, batch)
    with pytest.raises(ValueError, match=r"temperature: expected 1\.5, the cache's, got 1.0"):
        LanguageModel(alpha=1.0)(outputs, None, batch)
    with pytest.raises(ValueError, match="teacher: expected one, or rows with its top-k, got both"):
        objective(outputs, outputs, batch)
    with pytest.raises(ValueError, match=r"student: expected one of the cache's 40 tokens, got 50; for padded"):
        objective(outputs, None, batch | {"labels": labels, "teacher_vocab_size": 40})
    with pytest.raises(ValueError, match="teacher: expected one, or rows with its top-k"):
        objective(outputs, None, {"input_ids": batch["input_ids"]})
