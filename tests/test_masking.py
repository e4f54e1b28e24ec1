"""DistilBERT's masking: which tokens it draws, what becomes of them, and that a resumed run draws the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from kdfast.data.masking import RareWordMasking, blocks, count_tokens
from kdfast.teacher_cache import TeacherCache, write

VOCABULARY = 50
SPECIAL = {
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "cls_token": "<cls>",
    "sep_token": "<sep>",
    "mask_token": "<mask>",
}
PAD, UNK, CLS, SEP, MASK = range(5)
ORACLE = Path(__file__).parent / "oracles" / "distilbert_mlm_masking"


def _tokenizer(**options: Any) -> Any:
    """Words w5 to w49 with their numbers, and the oracle's special tokens."""
    words = {token: number for number, token in enumerate(SPECIAL.values())} | {
        f"w{i}": i for i in range(5, VOCABULARY)
    }
    rules = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rules.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", special_tokens=[("<cls>", CLS), ("<sep>", SEP)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=rules, **SPECIAL, **options)


TOKENIZER = _tokenizer()


def _rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 20, (count,), generator=generator).tolist()
    return [
        {"input_ids": [CLS, *torch.randint(5, VOCABULARY, (n,), generator=generator).tolist(), SEP]} for n in lengths
    ]


@pytest.fixture(scope="module")
def oracle() -> dict[str, Any]:
    with np.load(f"{ORACLE}.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def _unpadded(oracle: dict[str, Any]) -> list[dict[str, list[int]]]:
    rows = zip(oracle["token_ids_in"].tolist(), oracle["lengths"].tolist(), strict=True)
    return [{"input_ids": ids[:length]} for ids, length in rows]


def _properties(before: Tensor, after: Tensor, labels: Tensor, attention: Tensor) -> Tensor:
    """What holds of every masked batch; returns where the targets are."""
    targets = labels != -100
    assert torch.equal(labels[targets], before[targets])
    assert (before[targets] > MASK).all()  # no special token
    assert (targets <= attention.bool()).all()
    assert torch.equal(after[~targets], before[~targets])
    assert targets.sum() == math.ceil(0.15 * attention.sum())
    return targets


def test_oracle(oracle: dict[str, Any]) -> None:
    """Theirs and ours of the same batch: the random numbers differ, the rest does not."""
    hyper = json.loads(ORACLE.with_suffix(".json").read_text())["hyper"]
    masking = RareWordMasking(
        TOKENIZER,
        oracle["token_counts"],
        probability=hyper["mlm_mask_prop"],
        smoothing=hyper["mlm_smoothing"],
        mask=hyper["word_mask"],
        keep=hyper["word_keep"],
        random=hyper["word_rand"],
    )
    torch.testing.assert_close(masking.weights, oracle["token_probs"])
    batch = masking(_unpadded(oracle))
    before = oracle["token_ids_in"]
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (before.shape, torch.int64)
    )
    assert torch.equal(batch["attention_mask"].bool(), oracle["attention_mask"])
    for after, labels in ((oracle["token_ids_out"], oracle["mlm_labels"]), (batch["input_ids"], batch["labels"])):
        assert _properties(before, after, labels, oracle["attention_mask"]).sum() == oracle["n_targets"]


def _many(masking: RareWordMasking, rows: list[dict[str, Any]], draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """Original, masked and label of the rows [draws, B, L], drawn with as many seeds."""
    padded = masking(rows)
    before = torch.where(padded["labels"] == -100, padded["input_ids"], padded["labels"])
    after, labels = [], []
    for masking.seed in range(draws):
        batch = masking(rows)
        _properties(before, batch["input_ids"], batch["labels"], batch["attention_mask"])
        after.append(batch["input_ids"])
        labels.append(batch["labels"])
    return before.expand(draws, -1, -1), torch.stack(after), torch.stack(labels)


def test_fate_of_the_targets() -> None:
    before, after, labels = _many(RareWordMasking(TOKENIZER), _rows(16), 400)
    targets = labels != -100
    before, after = before[targets], after[targets]
    count = len(after)
    assert count > 10_000
    other = (after != before) & (after != MASK)
    # One in fifty of the random tokens is the mask and one the original.
    expected = {"mask": 0.8 + 0.1 / 50, "kept": 0.1 + 0.1 / 50, "other": 0.1 * 48 / 50}
    found = {"mask": after == MASK, "kept": after == before, "other": other}
    for name, fraction in expected.items():
        deviation = math.sqrt(fraction * (1 - fraction) / count)
        assert abs(found[name].double().mean() - fraction) < 4 * deviation, name
    assert set(after[other].tolist()) >= {PAD, UNK, CLS, SEP, 5, 49}  # any of the vocabulary
    masking = RareWordMasking(TOKENIZER, mask=0.0, keep=1.0, random=0.0)
    assert torch.equal(*_many(masking, _rows(4), 3)[:2])


def test_rare_words_are_drawn_more_often() -> None:
    """One target of ten words in each draw: frequencies against probabilities, by χ² with 9 degrees of freedom."""
    words = list(range(10, 20))
    counts = torch.zeros(VOCABULARY, dtype=torch.int64)
    counts[10:20] = torch.tensor([0, 1, 2, 5, 10, 20, 50, 100, 1000, 10_000])
    weights = counts[10:20].double().clamp(min=1) ** -0.7
    rows = [{"input_ids": [CLS, *words, SEP]}]
    for given, expected in ((counts, weights), (None, torch.ones(10))):
        masking = RareWordMasking(TOKENIZER, given, probability=1 / 12)
        drawn = []
        for masking.seed in range(4000):
            labels = masking(rows)["labels"]
            drawn.append(int(labels[labels != -100]))
        found = torch.tensor(drawn).bincount(minlength=VOCABULARY)[10:20]
        assert found.sum() == 4000
        expected = 4000 * expected / expected.sum()
        assert ((found - expected) ** 2 / expected).sum() < 33.7  # one in ten thousand is above


def test_draw_depends_on_rows_and_seed_alone() -> None:
    rows, masking = _rows(8), RareWordMasking(TOKENIZER)
    first = masking(rows)
    torch.rand(1)
    same = RareWordMasking(TOKENIZER)(Dataset.from_list(rows).with_format("torch").select(range(8)))
    for name in first:
        assert torch.equal(first[name], same[name])
    assert not torch.equal(first["labels"], RareWordMasking(TOKENIZER, seed=1)(rows)["labels"])
    assert not torch.equal(first["labels"].flip(0), masking(rows[::-1])["labels"])


def test_padding() -> None:
    rows = _rows(8)
    longest = max(len(row["input_ids"]) for row in rows)
    batch = RareWordMasking(TOKENIZER, pad_to_multiple_of=32)(rows)
    assert all(value.shape == (8, 32) for value in batch.values())
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == PAD).all()
    left = RareWordMasking(_tokenizer(padding_side="left"))(rows)
    assert left["attention_mask"].shape == (8, longest)
    assert (left["attention_mask"][:, -1] == 1).all()
    assert (left["input_ids"][:, -1] == SEP).all()
    assert (left["input_ids"][left["attention_mask"] == 0] == PAD).all()


def test_nothing_that_could_be_drawn() -> None:
    batch = RareWordMasking(TOKENIZER)([{"input_ids": [CLS, SEP]}])
    assert batch["input_ids"].tolist() == [[CLS, SEP]]
    assert batch["labels"].tolist() == [[-100, -100]]
    one = RareWordMasking(TOKENIZER, probability=1.0)([{"input_ids": [CLS, 7, SEP]}])
    assert one["labels"].tolist() == [[-100, 7, -100]]


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


class _Seen(Trainer):
    """Keeps what its model was given."""

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        self.seen.append(inputs["input_ids"].clone())
        return super().compute_loss(model, inputs, *arguments, **options)


def _train(folder: Path, stop: int | None, workers: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Goes on from the folder's checkpoint, if there is one; with dropout, of whose state the same is asked."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        num_train_epochs=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        dataloader_num_workers=workers,
        save_strategy="no",
    )
    trainer = _Seen(
        BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **sizes)),
        arguments,
        train_dataset=_rows(40),
        data_collator=RareWordMasking(TOKENIZER),
        callbacks=[_StopAt(stop)] if stop else [],
    )
    trainer.seen = []
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    return trainer.seen, trainer.model.state_dict()


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_run_sees_what_the_uninterrupted_one_saw(workers: int, tmp_path: Path) -> None:
    whole, weights = _train(tmp_path / "whole", None, workers)
    assert len(whole) == 20
    assert len({str(batch.tolist()) for batch in whole}) == 20  # masked anew in the second epoch
    before, _ = _train(tmp_path / "stopped", 3, workers)
    after, resumed = _train(tmp_path / "stopped", None, workers)
    for one, other in zip(before + after, whole, strict=True):
        assert torch.equal(one, other)
    for name, value in weights.items():
        assert torch.equal(resumed[name], value), name


def test_beside_a_cache_of_the_teacher(tmp_path: Path) -> None:
    rows = _rows(6)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    write(BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **sizes)), rows, tmp_path, tokenizer=TOKENIZER, k=3)
    cache = TeacherCache(tmp_path)
    beside = cache.beside(rows)
    batch = cache.collator(RareWordMasking(TOKENIZER))([beside[i] for i in range(6)])
    assert batch["teacher_topk_logprobs"].shape == (*batch["input_ids"].shape, 3)
    assert torch.equal(batch["teacher_token_mask"], batch["attention_mask"].bool())


def test_count_tokens() -> None:
    rows = [{"input_ids": [CLS, 5, 5, SEP]}, {"input_ids": torch.tensor([7])}, {"input_ids": []}] * 700
    counts = count_tokens(rows, 9)
    assert counts.tolist() == [0, 0, 700, 700, 0, 1400, 0, 700, 0]
    assert counts.dtype == torch.int64
    with pytest.raises(ValueError, match="count_tokens: rows: expected ids below 5, got 2 to 7"):
        count_tokens(rows, 5)


def _words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def test_blocks() -> None:
    texts = [
        _words(*range(5, 14)),  # 11 tokens with CLS and SEP
        _words(*range(5, 15)),  # 12
        _words(*range(5, 49), 5),  # pieces of 18, 18 and 9
        _words(*range(5, 10)) + " x" * 7,  # 14, of which 7 are unknown
        _words(*range(5, 10)) + " x" * 6,  # 13, of which 6
        "",
    ]
    whole = list(range(5, 49))
    expected = [
        [CLS, *range(5, 15), SEP],
        [CLS, *whole[:18], SEP],
        [CLS, *whole[18:36], SEP],
        [CLS, *range(5, 10), *[UNK] * 6, SEP],
    ]
    for source in (texts, iter(texts), Dataset.from_dict({"number": range(6), "text": texts})):
        told: list[str] = []
        rows = blocks(source, TOKENIZER, 20, tell=told.append)
        assert rows.column_names == ["input_ids"]
        assert rows["input_ids"] == expected
        assert told == ["4 of 8 rows have fewer than 12 tokens, or mostly unknown ones, and are left out"]
    blocks(texts[1:2], TOKENIZER, 20, tell=told.append)
    assert len(told) == 1
    everything = blocks(texts, TOKENIZER, 20, shortest=2, unknown=1.1)
    assert [len(ids) for ids in everything["input_ids"]] == [11, 12, 20, 20, 11, 14, 13, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": 0.0}, "probability: expected above 0, at most 1, got 0.0"),
        ({"smoothing": -1.0}, "smoothing: expected at least 0, got -1.0"),
        ({"mask": 0.9}, "mask, keep, random: expected fractions of sum 1, got 0.9, 0.1, 0.1"),
        ({"mask": 1.0, "keep": 0.1, "random": -0.1}, "mask, keep, random: expected fractions of sum 1"),
        ({"token_counts": torch.ones(49)}, r"token_counts: expected \[V\], V at least 50, .*, got \[49\]"),
        ({"tokenizer": PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer)}, "tokenizer: expected one with a pad_"),
    ],
)  # fmt: skip
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^RareWordMasking: {message}"):
        RareWordMasking(**{"tokenizer": TOKENIZER, **options})


def test_mistakes_in_rows_and_texts_are_named() -> None:
    with pytest.raises(ValueError, match=r"RareWordMasking: input_ids: expected ids below 50, .*, got 50"):
        RareWordMasking(TOKENIZER)([{"input_ids": [5, 50]}])
    with pytest.raises(ValueError, match="blocks: text_column: expected one of body, got text"):
        blocks(Dataset.from_dict({"body": ["w5"]}), TOKENIZER, 20)
    with pytest.raises(ValueError, match=r"blocks: texts: expected one of at least 12 tokens .*, got none among 1"):
        blocks(["w5 w6"], TOKENIZER, 20)
    with pytest.raises(ValueError, match="blocks: tokenizer: expected a fast one, got object"):
        blocks(["w5 w6"], object(), 20)
