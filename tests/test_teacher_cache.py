"""Teacher caches: what is stored is what the teacher says, however the write was stopped, and it reaches its rows."""

from __future__ import annotations

import hashlib
import pickle
import resource
import signal
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest
import tiny_teacher
import torch
from tiny_teacher import CLOSE, LLAMA, ROWS, SHARD, TOKENIZER, VOCABULARY
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from kdfast.objective import Hinton
from kdfast.teacher_cache import CacheError, TeacherCache
from kdfast.teacher_cache._teacher import Teacher
from kdfast.train.trainer import DistillationTrainer


@pytest.mark.parametrize(
    ("model", "plain"),
    [
        (LLAMA, True),
        (tiny_teacher.gemma(), False),  # a softcap behind the head
        (tiny_teacher.bert(BertForMaskedLM), False),  # a transform before it
    ],
)
def test_cache_holds_the_teachers_topk(model: Any, plain: bool, tmp_path: Path) -> None:
    cache = tiny_teacher.write(tmp_path, model, temperature=2.0)
    teacher = Teacher(model, cache.manifest.settings, TOKENIZER, None)
    assert (teacher.head is not None) == plain
    assert len(cache) == len(ROWS)
    assert len(cache.manifest.shards) > 2
    assert all(shard.bytes < SHARD + 1500 for shard in cache.manifest.shards)  # the header comes on top
    for number, row in enumerate(ROWS):
        expected = tiny_teacher.topk(model, row, 6, 2.0)
        item = cache[number]
        torch.testing.assert_close(item["topk_logprobs"], expected.values.float(), **CLOSE)
        assert (item["topk_logprobs"] < 0).all()
        assert item["topk_indices"].dtype == torch.int32
        assert torch.equal(item["topk_indices"].long(), expected.indices)
        assert item["positions"].tolist() == list(range(len(row["input_ids"])))
        assert item["topk_logprobs"].untyped_storage().nbytes() == item["topk_logprobs"].nbytes  # not the whole file
    assert torch.equal(cache[-1]["topk_indices"], cache[19]["topk_indices"])
    with pytest.raises(IndexError):
        cache[20]


def test_slices_of_tokens_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny_teacher.write(tmp_path / "whole")
    monkeypatch.setattr("kdfast.teacher_cache._teacher.SLICE", 4 * VOCABULARY)
    sliced = tiny_teacher.write(tmp_path / "sliced")
    for number in range(len(ROWS)):
        assert torch.equal(sliced[number]["topk_indices"], whole[number]["topk_indices"])
        torch.testing.assert_close(sliced[number]["topk_logprobs"], whole[number]["topk_logprobs"], **CLOSE)


def test_fewer_entries_than_stored_are_the_first(tmp_path: Path) -> None:
    cache = tiny_teacher.write(tmp_path)
    narrow = TeacherCache(tmp_path, k=2, tokenizer=TOKENIZER, teacher=LLAMA, temperature=1.0, verify=True)
    for name in ("topk_logprobs", "topk_indices"):
        assert narrow[3][name].shape[1] == 2
        assert torch.equal(narrow[3][name], cache[3][name][:, :2])


@pytest.mark.parametrize("dtype", [torch.float16, "bfloat16"])
def test_other_dtypes_are_rounded_float32(dtype: Any, tmp_path: Path) -> None:
    exact, rounded = tiny_teacher.write(tmp_path / "exact"), tiny_teacher.write(tmp_path / "rounded", dtype=dtype)
    kind = getattr(torch, str(dtype).removeprefix("torch."))
    assert torch.equal(rounded[5]["topk_logprobs"], exact[5]["topk_logprobs"].to(kind))
    assert rounded.collate([rounded[5]])["topk_logprobs"].dtype == kind


def test_manifest_names_the_rows_and_the_teacher(tmp_path: Path) -> None:
    manifest = tiny_teacher.write(tmp_path).manifest
    digest = hashlib.sha256()
    for row in ROWS:
        digest.update(array("q", [len(row["input_ids"]), *row["input_ids"]]).tobytes())
    assert manifest.shards[-1].rows_sha256 == digest.hexdigest()
    assert manifest.tokens == sum(len(row["input_ids"]) for row in ROWS)
    assert (manifest.rows, manifest.vocab_size, manifest.settings.k) == (20, VOCABULARY, 6)
    assert manifest.teacher == "LlamaForCausalLM"


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import tiny_teacher
tiny_teacher.write(Path(sys.argv[1]), progress=lambda rows, tokens: rows >= 12 and os.kill(os.getpid(), signal.SIGKILL))
"""


def test_write_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    tiny_teacher.write(whole)
    command = [sys.executable, "-c", KILLED, str(killed), str(Path(__file__).parent)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    with pytest.raises(CacheError, match=r"expected a complete cache in .*, got one that was stopped after [1-9]"):
        TeacherCache(killed)
    shards = sorted(killed.glob("shard-*"))
    assert 0 < len(shards) < len(list(whole.glob("shard-*")))
    (killed / f"shard-{len(shards):05d}.partial").write_bytes(b"half a shard")
    (killed / "manifest.json.partial").write_text("{")
    done: list[int] = []
    tiny_teacher.write(killed, progress=lambda rows, tokens: done.append(rows))
    assert 0 < done[0] < 12
    assert tiny_teacher.files(killed) == tiny_teacher.files(whole)
    before = tiny_teacher.files(killed)
    tiny_teacher.write(killed, model=_Unasked(LLAMA))  # nothing is left to do
    assert tiny_teacher.files(killed) == before


class _Unasked(nn.Module):
    """The Llama, which must not be run."""

    def __new__(cls, model: Any) -> Any:
        twin = tiny_teacher.llama()
        twin.forward = lambda **inputs: model(**inputs) if inputs["input_ids"].shape == (1, 16) else pytest.fail("ran")
        return twin


def test_full_disk_leaves_what_is_finished(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "full"
    tiny_teacher.write(whole, shard_bytes=SHARD)
    tiny_teacher.write(folder, shard_bytes=SHARD, rows=ROWS[:1])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(rows: int, tokens: int) -> None:
        if rows == 12:  # from here on no file can grow beyond a kilobyte
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    try:
        with pytest.raises(
            OSError, match=r"teacher_cache: folder: cannot write .*shard-0000\d.*: .*too large.*goes on"
        ):
            tiny_teacher.write(folder, resume=False, progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(folder.glob("shard*.partial"))
    assert list(folder.glob("shard-*"))
    tiny_teacher.write(folder)
    assert tiny_teacher.files(folder) == tiny_teacher.files(whole)


def test_teacher_is_known_again(tmp_path: Path) -> None:
    cache = tiny_teacher.write(tmp_path / "cache")
    teacher = tiny_teacher.llama()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    Trainer(teacher, arguments, processing_class=TOKENIZER)  # changes the config
    teacher.save_pretrained(tmp_path / "teacher")
    for known in (teacher, type(teacher).from_pretrained(tmp_path / "teacher")):
        assert len(TeacherCache(cache.folder, teacher=known)) == 20
    with pytest.raises(CacheError, match=r"teacher: expected weights"):
        TeacherCache(cache.folder, teacher=teacher.to(torch.bfloat16))


def test_tokenizer_is_known_again(tmp_path: Path) -> None:
    cache = tiny_teacher.write(tmp_path / "cache")
    tokenizer = tiny_teacher.tokenizer()
    tokenizer.pad_token = "<unk>"  # as people do where there is none; what the teacher said stays true
    tokenizer(["w3 w4", "w5"], truncation=True, max_length=1, padding=True)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for known in (tokenizer, type(tokenizer).from_pretrained(tmp_path / "tokenizer")):
        assert len(TeacherCache(cache.folder, tokenizer=known)) == 20


@pytest.mark.parametrize("side", ["right", "left"])
def test_workers_give_shuffled_rows_with_their_teacher(side: str, tmp_path: Path) -> None:
    cache = pickle.loads(pickle.dumps(tiny_teacher.write(tmp_path)))
    cache[0]  # an open file must not go to the workers
    tokenizer = tiny_teacher.tokenizer(padding_side=side)
    loader = DataLoader(
        cache.beside(ROWS),
        batch_size=4,
        shuffle=True,
        num_workers=2,
        prefetch_factor=2,
        collate_fn=cache.collator(DataCollatorWithPadding(tokenizer)),
        generator=torch.Generator().manual_seed(0),
    )
    seen = []
    for batch in loader:
        mask = batch["attention_mask"].bool()
        assert torch.equal(batch["teacher_token_mask"], mask)
        assert batch["teacher_topk_logprobs"].shape == (*mask.shape, 6)
        assert (batch["teacher_topk_logprobs"][~mask] == -torch.inf).all()
        assert (batch["teacher_topk_indices"][~mask] == 0).all()
        assert batch["teacher_topk_indices"].dtype == torch.int64
        for ids, real, logprobs, indices in zip(
            batch["input_ids"], mask, batch["teacher_topk_logprobs"], batch["teacher_topk_indices"], strict=True
        ):
            seen.append({"input_ids": ids[real].tolist()})
            expected = tiny_teacher.topk(LLAMA, seen[-1], 6, 1.0)
            torch.testing.assert_close(logprobs[real], expected.values.float(), **CLOSE)
            assert torch.equal(indices[real], expected.indices)
    assert seen != ROWS
    assert sorted(map(str, seen)) == sorted(map(str, ROWS))


def test_cache_is_a_dataset_of_its_own(tmp_path: Path) -> None:
    cache = tiny_teacher.write(tmp_path)
    batch = next(iter(DataLoader(cache, batch_size=3, collate_fn=cache.collate)))
    longest = max(len(row["input_ids"]) for row in ROWS[:3])
    assert batch["topk_logprobs"].shape == (3, longest, 6)
    assert cache.collate([cache[0]], 30)["topk_logprobs"].shape == (1, 30, 6)
    with pytest.raises(CacheError, match=f"length: expected at least {longest}, as many tokens .*, got 1"):
        cache.collate([cache[i] for i in range(3)], 1)


def test_trainer_shuffles_dataset_and_cache_together(tmp_path: Path) -> None:
    cache = tiny_teacher.write(tmp_path / "cache")
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False, per_device_train_batch_size=5
    )
    collator = cache.collator(DataCollatorWithPadding(TOKENIZER))
    trainer = Trainer(LLAMA, arguments, train_dataset=cache.beside(ROWS), data_collator=collator)
    batches = list(trainer.get_train_dataloader())
    assert len(batches) == 4
    for batch in batches:
        ids = batch["input_ids"][0][batch["attention_mask"][0].bool()]
        expected = tiny_teacher.topk(LLAMA, {"input_ids": ids.tolist()}, 6, 1.0)
        torch.testing.assert_close(batch["teacher_topk_logprobs"][0, : len(ids)], expected.values.float(), **CLOSE)


def test_distillation_trainer_keeps_the_logits(tmp_path: Path) -> None:
    teacher = tiny_teacher.bert(BertForSequenceClassification, num_labels=3)
    rows = [{**row, "labels": 1} for row in ROWS]
    cache = tiny_teacher.write(tmp_path / "cache", teacher, rows, outputs=("logits",))
    trainer = DistillationTrainer(
        tiny_teacher.bert(BertForSequenceClassification, num_labels=3),
        TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=5),
        objective=Hinton(0.9, 2.0),
        train_dataset=cache.beside(rows),
        data_collator=cache.collator(DataCollatorWithPadding(TOKENIZER)),
    )
    batches = list(trainer.get_train_dataloader())
    assert len(batches) == 4
    for batch in batches:
        with torch.no_grad():
            expected = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(batch["teacher_logits"], expected, **CLOSE)


def test_only_tokens_that_count_are_stored(tmp_path: Path) -> None:
    ids = torch.arange(2, 8)
    labels = torch.tensor([-100, -100, 4, -100, 6, 7])
    row = {"input_ids": ids, "labels": labels}
    completion = {"input_ids": ids, "completion_mask": (labels != -100).int()}
    padded = {"input_ids": torch.cat([torch.ones(2, dtype=torch.long), ids]), "attention_mask": [0, 0] + [1] * 6}
    expected = tiny_teacher.topk(LLAMA, {"input_ids": ids.tolist()}, 6, 1.0)
    for number, (rows, positions, stored) in enumerate(
        [
            ([row], "labels", [2, 4, 5]),
            ([row], "next_labels", [1, 3, 4]),
            ([completion], "next_labels", [1, 3, 4]),
            ([row], "all", [0, 1, 2, 3, 4, 5]),
        ]
    ):
        item = tiny_teacher.write(tmp_path / str(number), rows=rows, positions=positions)[0]
        assert item["positions"].tolist() == stored
        torch.testing.assert_close(item["topk_logprobs"], expected.values.float()[stored], **CLOSE)
    cache = tiny_teacher.write(tmp_path / "padded", rows=[padded, *ROWS])
    assert cache[0]["positions"].tolist() == [2, 3, 4, 5, 6, 7]
    torch.testing.assert_close(
        cache[0]["topk_logprobs"], expected.values.float(), **CLOSE
    )  # rotary: shifts do not count
    batch = cache.collate([cache[0], cache[1]], 12)
    assert batch["token_mask"].sum(1).tolist() == [6, len(ROWS[0]["input_ids"])]
    assert batch["token_mask"][0].nonzero().flatten().tolist() == [2, 3, 4, 5, 6, 7]


def test_classifier_logits_cls_and_hidden_states(tmp_path: Path) -> None:
    model = tiny_teacher.bert(BertForSequenceClassification, num_labels=3)
    rows = [{**row, "token_type_ids": [i % 2 for i in range(len(row["input_ids"]))]} for row in ROWS]
    cache = tiny_teacher.write(tmp_path / "a", model, rows, outputs=("logits", "cls", "hidden"), layers=(2, 0))
    assert (cache.manifest.settings.k, cache.manifest.settings.layers) == (None, (0, 2))
    for number, row in enumerate(rows):
        answer = tiny_teacher.alone(
            model, row, token_type_ids=torch.tensor([row["token_type_ids"]]), output_hidden_states=True
        )
        expected = {
            "logits": answer.logits[0],
            "cls_0": answer.hidden_states[0][0, 0],
            "cls_2": answer.hidden_states[2][0, 0],
            "hidden_0": answer.hidden_states[0][0],
            "hidden_2": answer.hidden_states[2][0],
        }
        for name, value in expected.items():
            torch.testing.assert_close(cache[number][name], value, **CLOSE)
    batch = cache.collate([cache[0], cache[1]], 15)
    assert {name: list(value.shape) for name, value in batch.items()} == {
        "logits": [2, 3],
        "cls_0": [2, 16],
        "cls_2": [2, 16],
        "token_mask": [2, 15],
        "hidden_0": [2, 15, 16],
        "hidden_2": [2, 15, 16],
    }
    assert torch.equal(batch["logits"][1], cache[1]["logits"])
    assert (batch["hidden_2"][~batch["token_mask"]] == 0).all()
    with pytest.raises(CacheError, match=r"temperature: expected None, as .* is of a cache without topk, got 1"):
        TeacherCache(cache.folder, temperature=1.0)
    alone = tiny_teacher.write(tmp_path / "b", tiny_teacher.bert(BertModel), outputs=("cls",))
    assert list(alone[0]) == ["cls"]
    torch.testing.assert_close(
        alone[4]["cls"], tiny_teacher.alone(tiny_teacher.bert(BertModel), ROWS[4]).last_hidden_state[0, 0], **CLOSE
    )


def test_states_of_the_first_token_come_with_the_rows(tmp_path: Path) -> None:
    """Patient-KD: logits and first states of some layers, and nothing per token, beside shuffled rows with labels."""
    model = tiny_teacher.bert(BertForSequenceClassification, num_labels=3)
    rows = [{**row, "labels": number % 3} for number, row in enumerate(ROWS)]
    tiny_teacher.write(tmp_path, model, rows, outputs=("logits", "cls"), layers=(2, 1))
    cache = TeacherCache(tmp_path, tokenizer=TOKENIZER, teacher=model, verify=True)
    assert sorted(cache[0]) == ["cls_1", "cls_2", "logits"]
    loader = DataLoader(
        cache.beside(rows), batch_size=4, shuffle=True, collate_fn=cache.collator(DataCollatorWithPadding(TOKENIZER))
    )
    labels = []
    for batch in loader:
        with torch.no_grad():
            answer = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
            )
        torch.testing.assert_close(batch["teacher_logits"], answer.logits, **CLOSE)
        for layer in (1, 2):
            torch.testing.assert_close(batch[f"teacher_cls_{layer}"], answer.hidden_states[layer][:, 0], **CLOSE)
        assert sorted(batch) == [
            *("attention_mask", "input_ids", "labels"),
            *("teacher_cls_1", "teacher_cls_2", "teacher_logits"),
        ]
        labels += batch["labels"].tolist()
    assert sorted(labels) == sorted(row["labels"] for row in rows)


def test_first_token_behind_padding_on_the_left(tmp_path: Path) -> None:
    padded = {"input_ids": [1, 1, *range(2, 8)], "attention_mask": [0, 0] + [1] * 6}
    cache = tiny_teacher.write(tmp_path, rows=[padded, *ROWS], outputs=("cls",), layers=(0, 2))
    states = tiny_teacher.alone(LLAMA, {"input_ids": [*range(2, 8)]}, output_hidden_states=True).hidden_states
    for layer in (0, 2):
        torch.testing.assert_close(cache[0][f"cls_{layer}"], states[layer][0, 0], **CLOSE)
