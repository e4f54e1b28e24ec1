"""Rows for causal language models: packed text, or prompts with their completions; and their batches.

A row has `input_ids` and `labels` of one length: the labels are the ids themselves where a token counts and -100 where
it does not (prompts). Nothing is shifted here; objectives and models do that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

OFF = -100  # the label of a token, or a row, that does not count

Row = dict[str, list[int]]


def packed(texts: Iterable[str], tokenizer: Any, length: int) -> list[Row]:
    """Texts, each closed by the end-of-text token, one after another, cut every `length` tokens; all tokens count.

    What is left at the end is dropped.

    Raises:
        ValueError: the tokenizer has no end-of-text token.
    """
    end = _end(tokenizer)
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], end]
    blocks = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return [{"input_ids": block, "labels": list(block)} for block in blocks]


def with_prompt(prompt: Sequence[int], completion: Sequence[int], length: int) -> Row:
    """A row in which only the completion counts, at most `length` tokens long.

    A prompt longer than half of that loses its beginning, then a completion that is still too long its end.
    """
    prompt = list(prompt)[-(length // 2) :]
    completion = list(completion)[: length - len(prompt)]
    return {"input_ids": [*prompt, *completion], "labels": [*[OFF] * len(prompt), *completion]}


def read_texts(path: Path) -> list[str]:
    """The texts of a file in which empty lines separate them.

    Raises:
        ValueError: the file is not text in UTF-8.
    """
    return [part.strip() for part in re.split(r"\n\s*\n", _content(path)) if part.strip()]


def read_completions(path: Path, tokenizer: Any, length: int) -> list[Row]:
    """Rows of a JSONL file: each line an object with `prompt` and `completion`, which the end-of-text token closes.

    The two are joined as they are: separators, chat templates and the like belong to the prompt.

    Raises:
        ValueError: a line that is not such an object, or whose completion is empty; file and line are named. The file
            is not text in UTF-8, or the tokenizer has no end-of-text token.
    """
    end = _end(tokenizer)
    rows = []
    for number, line in enumerate(_content(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            parts = json.loads(line)
            prompt, completion = parts["prompt"], parts["completion"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'{path}:{number}: expected {{"prompt": "...", "completion": "..."}}, got {line[:40]}'
            ) from None
        if not (isinstance(prompt, str) and isinstance(completion, str) and prompt and completion):
            raise ValueError(f"{path}:{number}: expected prompt and completion of some text, got {line[:40]}")
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion)]
        rows.append(with_prompt(ids[0], [*ids[1], end], length))
    return rows


def _content(path: Path) -> str:
    """The content of a file of text, without the byte order mark that some systems begin it with."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, got other bytes, the first at {error.start}") from None
    if "\0" in content:
        raise ValueError(f"{path}: expected text in UTF-8, got a zero byte at character {content.index(chr(0))}")
    return content


def _end(tokenizer: Any) -> int:
    end: int | None = tokenizer.eos_token_id
    if end is None:
        raise ValueError("kdfast.data.text: tokenizer: expected one with an eos_token, which closes texts, got None")
    return end


def padded(rows: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """A batch of rows padded on the right: `input_ids`, `labels` and `attention_mask`, each [rows, longest row]."""
    ids = [torch.tensor(row) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "labels": pad_sequence([torch.tensor(row) for row in labels], batch_first=True, padding_value=OFF),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }


@dataclass(frozen=True)
class Collator:
    """Makes batches of rows, padded on the right with the token `pad`."""

    pad: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        return padded([row["input_ids"] for row in rows], [row["labels"] for row in rows], self.pad)


def as_list(value: Any) -> Any:
    """A tensor or array as a list, anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value
