"""Teachers of LanguageModel in DistillationTrainer: dispatched ones, and ones that read other tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_berts import collate, logged, rows, same, trainer
from tiny_teacher import llama
from transformers import AutoModelForCausalLM

from kdfast.objective import LanguageModel


def test_a_dispatched_teacher(tmp_path: Path) -> None:
    plain, students, given, losses = llama(), [llama(5), llama(5)], rows(12, tokens=True), []
    plain.save_pretrained(tmp_path / "teacher")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"), "cpu")
    places |= dict.fromkeys(("model.layers.1", "lm_head"), "disk")
    teacher = AutoModelForCausalLM.from_pretrained(
        tmp_path / "teacher", device_map=places, offload_folder=tmp_path / "offload"
    )
    for student, of in zip(students, (plain, teacher), strict=True):
        it = trainer(tmp_path, student, given, LanguageModel(temperature=2.0), teacher=of)
        it.train()
        losses.append([*logged(it, "kd"), *logged(it, "ce")])
    assert teacher.lm_head.weight.is_meta
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    assert min(losses[0]) > 1e-3
    same(*students, 1e-4)


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    given = [{**row, "teacher_input_ids": row["input_ids"]} for row in rows(4, tokens=True)]

    def other(batch: Any) -> Any:
        made = collate([{name: row[name] for name in ("input_ids", "labels")} for row in batch])
        return made | {"teacher_input_ids": made["input_ids"][:, 1:]}

    with pytest.raises(
        ValueError, match="LanguageModel: teacher_input_ids: expected the tokens of input_ids, one by one"
    ):
        trainer(tmp_path, llama(5), given, LanguageModel(), teacher=llama(), data_collator=other).train()
