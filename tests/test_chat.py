"""Conversations as rows of causal language models: the chat template writes them, what the assistant says counts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_texts
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdfast.data import text

# As ChatML, in words: "<user> w1 w2 <end>", and "<assistant>" begins an answer.
CHAT = "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' <end> ' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
MARKED = (
    "{% for m in messages %}{{ '<' + m.role + '> ' }}{% if m.role == 'assistant' %}{%- generation %}"
    "{{ m.content + ' <end> ' }}{% endgeneration %}{% else %}{{ m.content + ' <end> ' }}{% endif %}{% endfor %}"
)
THINKING = PROMPT.replace("'<assistant> '", "'<assistant> <think> '")
FORGETFUL = (  # leaves out answers that were not the last, but for the first word
    "{% for m in messages %}{{ '<' + m.role + '> ' }}"
    "{{ (m.content if loop.last or m.role != 'assistant' else m.content.split()[0]) + ' <end> ' }}{% endfor %}"
)
TALK = [
    {"role": "system", "content": "w0"},
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3 w4"},
    {"role": "user", "content": "w5"},
    {"role": "assistant", "content": "w6 w7 w8"},
]
WRITTEN = "<system> w0 <end> <user> w1 w2 <end> <assistant> w3 w4 <end> <user> w5 <end> <assistant> w6 w7 w8 <end>"


def tokenizer(template: str | None) -> Any:
    words = ["<end>", "<system>", "<user>", "<assistant>", "<think>", *tiny_texts.WORDS]
    rules = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<end>"))
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=rules, eos_token="<end>", pad_token="<end>")
    made.chat_template = template
    return made


def words(ids: list[int], made: Any) -> str:
    """Tokens, a dot where a label is off."""
    return " ".join("." if number == text.OFF else made.convert_ids_to_tokens(number) for number in ids)


@pytest.mark.parametrize(
    "template", [CHAT + PROMPT, MARKED, CHAT + THINKING, MARKED + PROMPT], ids=["plain", "marked", "thinking", "both"]
)
def test_what_the_assistant_says_counts(template: str) -> None:
    made = tokenizer(template)
    row = text.of_messages(TALK, made, 64)
    assert words(row["input_ids"], made) == WRITTEN
    assert words(row["labels"], made) == ". . . . . . . . w3 w4 <end> . . . . w6 w7 w8 <end>"


def test_a_template_that_begins_no_answer_counts_its_beginning() -> None:
    made = tokenizer(CHAT)
    assert words(text.of_messages(TALK[1:3], made, 64)["labels"], made) == ". . . . <assistant> w3 w4 <end>"


def test_first_turns_may_be_the_assistants() -> None:
    made = tokenizer(CHAT + PROMPT)
    assert words(text.of_messages(TALK[2:4], made, 64)["labels"], made).endswith("w3 w4 <end> . . .")


def test_long_conversations_are_cut() -> None:
    """The prompt at its beginning, down to half of the length; what is then too long at its end."""
    made = tokenizer(CHAT + PROMPT)
    row = text.of_messages(TALK, made, 8)
    assert words(row["input_ids"], made) == "w1 w2 <end> <assistant> w3 w4 <end> <user>"
    assert words(row["labels"], made) == ". . . . w3 w4 <end> ."


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (None, TALK, "chat_template: expected the tokenizer's, which messages are written by, got none"),
        (CHAT, TALK[:2], 'messages: expected some with a role, one of them "assistant", got [{"role": "system"'),
        (CHAT, [], 'one of them "assistant", got []'),
        (CHAT, "w1", 'one of them "assistant", got "w1"'),
        (CHAT, [{"content": "w1"}], 'one of them "assistant", got [{"content": "w1"}]'),
        (CHAT, [{"role": "assistant"}], "messages: expected some that the chat template takes, got "),
        ("{{ raise_exception('no system') }}", TALK, "some that the chat template takes, got no system"),
        (FORGETFUL, TALK, "({% generation %}), got another at turn 3"),
    ],
)
def test_mistakes_are_told_with_their_line(template: str | None, messages: Any, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "w1", "completion": "w2"}\n' + json.dumps({"messages": messages}))
    with pytest.raises(ValueError, match=r"^.*rows\.jsonl:2: .*" + re.escape(expected)):
        text.read_completions(file, tokenizer(template), 64)


def test_lines_of_both_forms(tmp_path: Path) -> None:
    file, made = tmp_path / "rows.jsonl", tokenizer(CHAT + PROMPT)
    file.write_text(json.dumps({"messages": TALK[1:3]}) + '\n{"prompt": "w1", "completion": "w2"}\n')
    rows = text.read_completions(file, made, 64)
    assert [words(row["labels"], made) for row in rows] == [". . . . . w3 w4 <end>", ". w2 <end>"]
