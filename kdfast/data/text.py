"""Rows for causal language models: packed text, prompts with their completions, or conversations; and their batches.

A row has `input_ids` and `labels` of one length: the labels are the ids themselves where a token counts and -100 where
it does not (prompts). Nothing is shifted here; objectives and models do that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
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
    return _cut([*prompt, *completion], [*[OFF] * len(prompt), *completion], length)


def _cut(ids: list[int], labels: list[int], length: int) -> Row:
    """What comes before the first label is the prompt."""
    prompt = next((place for place, label in enumerate(labels) if label != OFF), len(labels))
    begin = max(0, prompt - length // 2)
    return {"input_ids": ids[begin:][:length], "labels": labels[begin:][:length]}


def of_messages(messages: Any, tokenizer: Any, length: int) -> Row:
    """A conversation as the tokenizer's chat template writes it, in which only what the assistant says counts, with
    what ends its turns; at most `length` tokens long, cut as in `with_prompt`.

    Where the template marks what the assistant says ({% generation %}), that is it; else it is what each of its turns
    adds to the turns before and what the template begins an answer with.

    Args:
        messages: dicts with `role` and `content`, as chat templates take them.

    Raises:
        ValueError: messages of another form, none of the assistant's, or such as the template refuses; a tokenizer
            without a template, or with one that writes turns otherwise once others follow.
    """
    from jinja2 import TemplateError  # which only templates need

    turns = isinstance(messages, list) and all(
        isinstance(x, Mapping) and isinstance(x.get("role"), str) for x in messages
    )
    if not turns or all(message["role"] != "assistant" for message in messages):
        got = json.dumps(messages, ensure_ascii=False)[:60]
        raise ValueError(f'messages: expected some with a role, one of them "assistant", got {got}')
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat_template: expected the tokenizer's, which messages are written by, got none")
    try:
        ids, counts = _counted(messages, tokenizer)
    except (TypeError, KeyError, TemplateError) as error:
        raise ValueError(f"messages: expected some that the chat template takes, got {error}") from None
    labels = [token if counted else OFF for token, counted in zip(ids, counts, strict=True)]
    return _cut(ids, labels, length)


def _counted(messages: list[Any], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and which of them are the assistant's."""

    def written(turns: list[Any], **settings: Any) -> Any:
        return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **settings)

    if re.search(r"\{%-?\s*generation\b", tokenizer.get_chat_template()):
        whole = written(messages, return_assistant_tokens_mask=True)
        return list(whole["input_ids"]), [bool(counted) for counted in whole["assistant_masks"]]
    ids = list(written(messages)["input_ids"])
    counts = [False] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = list(written(messages[:number])["input_ids"]) if number else []
        begun = list(written(messages[:number], add_generation_prompt=True)["input_ids"]) if number else []
        after = list(written(messages[: number + 1])["input_ids"])
        start, stop = _common(begun, ids), len(after)
        if ids[: len(before)] != before or ids[:stop] != after or start >= stop:
            raise ValueError(
                "chat_template: expected one that writes turns alike whatever follows, or marks the assistant's "
                f"({{% generation %}}), got another at turn {number + 1}"
            )
        counts[start:stop] = [True] * (stop - start)
    return ids, counts


def _common(beginning: list[int], ids: list[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(beginning, ids, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(beginning), len(ids)))


def read_texts(path: Path) -> list[str]:
    """The texts of a file in which empty lines separate them.

    Raises:
        ValueError: the file is not text in UTF-8.
    """
    return [part.strip() for part in re.split(r"\n\s*\n", _content(path)) if part.strip()]


def read_completions(path: Path, tokenizer: Any, length: int) -> list[Row]:
    """Rows of a JSONL file: each line an object with `prompt` and `completion`, which the end-of-text token closes, or
    with `messages`, of which the assistant's count (`of_messages`).

    Prompt and completion are joined as they are: separators and the like belong to the prompt.

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
            if isinstance(parts, dict) and "messages" in parts:
                rows.append(of_messages(parts["messages"], tokenizer, length))
                continue
            prompt, completion = parts["prompt"], parts["completion"]
        except (json.JSONDecodeError, KeyError, TypeError):
            forms = '{"prompt": "...", "completion": "..."} or {"messages": [...]}'
            raise ValueError(f"{path}:{number}: expected {forms}, got {line[:40]}") from None
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
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
