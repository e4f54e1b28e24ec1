"""Prompts and completions as two tokenizers cut them, for `kdfast.objective.ULD` and `GOLD`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kdfast.data.text import OFF, Row, padded, with_prompt

PREFIXES = ("", "teacher_")
ENDS = ("sample_ends", "teacher_ends")  # columns: where in the text each token ends


def row(
    prompt: str, completion: str, tokenizer: Any, teacher_tokenizer: Any, length: int, teacher_prompt: str | None = None
) -> Row:
    """What student and teacher read: `input_ids`, `labels` (-100 in the prompt) and `sample_ends` of the student,
    `teacher_input_ids`, `teacher_labels` and `teacher_ends` of the teacher.

    Prompt and completion are joined as they are (`kdfast.data.text.with_prompt` cuts them), and the end-of-text token
    closes the completion. Ends are those of the completion's tokens in its text, in characters; the end-of-text token
    ends one character behind it, so that both sides' are one span.

    Args:
        tokenizer, teacher_tokenizer: fast ones of transformers.
        length: the most tokens of either.
        teacher_prompt: where the teacher's is another (a chat template of its own).

    Raises:
        ValueError: a tokenizer that does not tell where its tokens are, or has no end-of-text token.
    """
    own = _side("tokenizer", tokenizer, prompt, completion, length)
    its_prompt = prompt if teacher_prompt is None else teacher_prompt
    its = _side("teacher_tokenizer", teacher_tokenizer, its_prompt, completion, length)
    made: Row = {}
    for prefix, ends, side in zip(PREFIXES, ENDS, (own, its), strict=True):
        made |= {f"{prefix}input_ids": side["input_ids"], f"{prefix}labels": side["labels"], ends: side["ends"]}
    return made


def _side(name: str, tokenizer: Any, prompt: str, completion: str, length: int) -> Row:
    if not getattr(tokenizer, "is_fast", False):
        got = type(tokenizer).__name__
        raise ValueError(f"kdfast.data.two_tokenizers: {name}: expected a fast one, which tells offsets, got {got}")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"kdfast.data.two_tokenizers: {name}: expected one with an eos_token, got None")
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    of = tokenizer(completion, add_special_tokens=False, return_offsets_mapping=True)
    made = with_prompt(before, [*of["input_ids"], tokenizer.eos_token_id], length)
    kept = sum(label != OFF for label in made["labels"])
    ends = [*(end for _, end in of["offset_mapping"]), len(completion) + 1]
    return {**made, "ends": [0] * (len(made["labels"]) - kept) + ends[:kept]}


@dataclass(frozen=True)
class Collator:
    """Makes batches of such rows, padded on the right with each side's token, with masks of both."""

    pad: int
    teacher_pad: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        for prefix, ends, pad in zip(PREFIXES, ENDS, (self.pad, self.teacher_pad), strict=True):
            ids, labels = ([row[f"{prefix}{name}"] for row in rows] for name in ("input_ids", "labels"))
            batch |= {f"{prefix}{name}": x for name, x in padded(ids, labels, pad).items()}
            batch[ends] = pad_sequence([torch.tensor(row[ends]) for row in rows], batch_first=True)
        return batch


def shared_tokens(tokenizer: Any, teacher_tokenizer: Any) -> Tensor:
    """[n, 2]: the numbers, in both vocabularies, of tokens that are the same string in both.

    Strings are compared as they stand: a space that one writes Ġ and another ▁ makes different tokens.
    """
    own, its = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    pairs = sorted((own[token], its[token]) for token in own.keys() & its.keys())
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
