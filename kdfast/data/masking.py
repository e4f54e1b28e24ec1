"""Masked language modelling as DistilBERT does it (needs `pip install kdfast[train]`).

    rows = masking.blocks(texts, tokenizer, max_length=128)
    counts = masking.count_tokens(rows, len(tokenizer))
    collator = masking.RareWordMasking(tokenizer, counts)       # for a Trainer or DataLoader

Source: `distiller.py` and `lm_seqs_dataset.py` of DistilBERT (transformers-research-projects fccd0cda).
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from kdfast.data.text import OFF, as_list

try:
    from datasets import Dataset, Features, List, Value
except ModuleNotFoundError as error:
    raise ImportError(
        f"kdfast.data.masking needs {error.name}, which is not installed: pip install kdfast[train]"
    ) from error


class RareWordMasking:
    """A collator that pads rows and chooses the tokens to predict, rare ones more often.

    Of a batch with n tokens that are not padding, ⌈probability·n⌉ are targets, drawn without replacement with
    probability ∝ max(count, 1)^-smoothing; special tokens are never drawn. Of the targets, each for itself, a fraction
    `mask` becomes the mask token, `keep` stays, and `random` becomes any token of the vocabulary.

    The draw depends on `seed` and the batch's rows in their order, and on nothing else. So a batch is masked anew when
    it is shuffled anew, evaluations are of the same targets each time, and a resumed run sees what the uninterrupted
    one would have seen. (From torch's global generator it would not: a Trainer's loader is a batch ahead of the step
    whose state is saved.) The other side: where the order of rows is the same in each epoch, the targets are too.

    Args:
        tokenizer: of transformers, with a padding and a mask token.
        token_counts: [V] how often each token occurs, V at least len(tokenizer); see `count_tokens`. None: all alike.
        probability: of the tokens that are not padding.
        smoothing: 0 draws all alike; 1 gives each token of the vocabulary the same number of targets.
        mask, keep, random: fractions, of sum 1.
        pad_to_multiple_of: pads the length further.
        seed: of the draws.

    Returns, called with rows (their `input_ids` are all that is used), a batch of B rows, of L tokens the longest:
        input_ids, attention_mask, labels: [B, L]; the labels are the original tokens of the targets, -100 elsewhere.

    Raises:
        ValueError: an argument is out of range, the tokenizer lacks a token; at a call, an id is not in the vocabulary.
    """

    def __init__(
        self,
        tokenizer: Any,
        token_counts: Tensor | None = None,
        *,
        probability: float = 0.15,
        smoothing: float = 0.7,
        mask: float = 0.8,
        keep: float = 0.1,
        random: float = 0.1,
        pad_to_multiple_of: int | None = None,
        seed: int = 0,
    ) -> None:
        for name in ("pad_token_id", "mask_token_id"):
            if getattr(tokenizer, name, None) is None:
                raise ValueError(
                    f"RareWordMasking: tokenizer: expected one with a {name}, got {type(tokenizer).__name__}"
                )
        if not 0 < probability <= 1:
            raise ValueError(f"RareWordMasking: probability: expected above 0, at most 1, got {probability}")
        if smoothing < 0:
            raise ValueError(f"RareWordMasking: smoothing: expected at least 0, got {smoothing}")
        if min(mask, keep, random) < 0 or not math.isclose(mask + keep + random, 1):
            got = f"{mask}, {keep}, {random}"
            raise ValueError(f"RareWordMasking: mask, keep, random: expected fractions of sum 1, got {got}")
        counts = torch.ones(len(tokenizer)) if token_counts is None else token_counts
        if counts.dim() != 1 or len(counts) < len(tokenizer):
            expected = f"[V], V at least {len(tokenizer)}, as many tokens as the tokenizer has"
            raise ValueError(f"RareWordMasking: token_counts: expected {expected}, got {list(counts.shape)}")
        self.tokenizer = tokenizer
        self.probability = probability
        self.mask, self.keep = mask, keep
        self.seed = seed
        self.weights = counts.double().clamp(min=1) ** -smoothing
        self.weights[tokenizer.all_special_ids] = 0
        self.multiple = pad_to_multiple_of or 1
        self.vocab_size = len(tokenizer)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids = [as_list(row["input_ids"]) for row in rows]
        generator = torch.Generator().manual_seed(self._seed_of(ids))
        original, real = self._padded(ids)
        if original.max() >= len(self.weights):
            expected = f"ids below {len(self.weights)}, the size of the vocabulary"
            raise ValueError(f"RareWordMasking: input_ids: expected {expected}, got {original.max()}")
        weights = (self.weights[original] * real).flatten()
        # A batch of hardly anything but special tokens may have fewer that can be drawn.
        wanted = min(math.ceil(self.probability * int(real.sum())), int(weights.count_nonzero()))
        masked, labels = original.flatten().clone(), torch.full((original.numel(),), OFF)
        if wanted:
            targets = torch.multinomial(weights, wanted, generator=generator)
            labels[targets] = masked[targets]
            fate = torch.rand(wanted, generator=generator)
            masked[targets[fate < self.mask]] = self.tokenizer.mask_token_id
            random = targets[fate >= self.mask + self.keep]
            masked[random] = torch.randint(self.vocab_size, random.shape, generator=generator)
        return {
            "input_ids": masked.view_as(original),
            "attention_mask": real.long(),
            "labels": labels.view_as(original),
        }

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """The ids [B, L], and which of them are not padding; the tokenizer's own way takes most of a call."""
        lengths = torch.tensor([len(row) for row in rows])
        length = -(-int(lengths.max()) // self.multiple) * self.multiple
        real = torch.arange(length) < lengths[:, None]
        if self.tokenizer.padding_side == "left":
            real = real.flip(1)
        ids = torch.full(real.shape, self.tokenizer.pad_token_id)
        ids[real] = torch.tensor([one for row in rows for one in row])
        return ids, real

    def _seed_of(self, rows: Sequence[Sequence[int]]) -> int:
        numbers = array("q", [self.seed])
        for row in rows:
            numbers.extend((len(row), *row))
        return int.from_bytes(hashlib.blake2b(numbers.tobytes(), digest_size=4).digest(), "big")


def count_tokens(rows: Iterable[Mapping[str, Any]], vocab_size: int) -> Tensor:
    """How often each token occurs in the `input_ids` of rows: int64 [vocab_size].

    Raises:
        ValueError: an id is not below `vocab_size`.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    source = iter(rows)
    while some := list(islice(source, 1000)):  # a row at a time takes three times as long
        ids = torch.tensor([one for row in some for one in as_list(row["input_ids"])], dtype=torch.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise ValueError(f"count_tokens: rows: expected ids below {vocab_size}, got {ids.min()} to {ids.max()}")
        counts += ids.bincount(minlength=vocab_size)
    return counts


def blocks(
    texts: Iterable[str] | Any,
    tokenizer: Any,
    max_length: int,
    *,
    shortest: int = 12,
    unknown: float = 0.5,
    text_column: str = "text",
    tell: Callable[[str], Any] | None = None,
) -> Any:
    """Rows for masked language modelling: a `datasets.Dataset` with input_ids.

    Texts longer than `max_length` tokens are cut into pieces, each with special tokens of its own. Rows of fewer than
    `shortest` tokens, these included, and those of which a fraction `unknown` or more are unknown, are dropped.

    Args:
        texts: any number of them, or a `datasets.Dataset` with a column `text_column`.
        tokenizer: a fast one of transformers.
        tell: gets how many rows are dropped, where some are.

    Raises:
        ValueError: the tokenizer is not a fast one, the dataset lacks the column, or nothing is left.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"blocks: tokenizer: expected a fast one, got {type(tokenizer).__name__}")
    source = texts if isinstance(texts, Dataset) else Dataset.from_dict({text_column: list(texts)})
    if text_column not in source.column_names:
        raise ValueError(f"blocks: text_column: expected one of {', '.join(source.column_names)}, got {text_column}")
    made = 0
    unknown_id = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id

    def pieces(batch: Sequence[str]) -> dict[str, list[list[int]]]:
        nonlocal made
        whole = tokenizer(list(batch), truncation=True, max_length=max_length, return_overflowing_tokens=True)
        made += len(whole["input_ids"])
        kept = [
            ids for ids in whole["input_ids"] if len(ids) >= shortest and ids.count(unknown_id) < unknown * len(ids)
        ]
        return {"input_ids": kept}

    rows = source.map(
        pieces,
        input_columns=text_column,
        batched=True,
        remove_columns=source.column_names,
        features=Features({"input_ids": List(Value("int32"))}),
    )
    if not len(rows):
        expected = f"one of at least {shortest} tokens that are not mostly unknown"
        raise ValueError(f"blocks: texts: expected {expected}, got none among {len(source)}")
    if tell is not None and (dropped := made - len(rows)) > 0:  # made is 0 where `datasets` had them in its cache
        tell(
            f"{dropped:,} of {made:,} rows have fewer than {shortest} tokens, or mostly unknown ones, and are left out"
        )
    return rows
