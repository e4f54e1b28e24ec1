"""Questions that are answered by a part of a text, in the form of SQuAD: rows of tokens, answers, and how good they are.

rows = answers.rows(part, tokenizer, max_length=384, stride=128)
answers.quality(["in Rome"], [["Rome", "in Rome"]])     # {"f1": 1.0, "exact_match": 1.0}
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

COLUMNS = ("question", "context", "answers")
LONGEST = 30  # tokens of an answer


@dataclass(frozen=True)
class Questions:
    """Rows of tokens, and what they are of.

    Attributes:
        rows: input_ids, token_type_ids where the tokenizer makes them, start_positions and end_positions: of the first
            answer, where the row has all of it, else 0, the first token's.
        question: of each row, its number.
        places: of each row and token, where it is in the text, [begin, end]; (0, 0) of what is no text.
        texts: of each question. right: the answers that are right; none where the text has none.
    """

    rows: list[dict[str, Any]]
    question: list[int]
    places: list[list[tuple[int, int]]]
    texts: list[str]
    right: list[list[str]]


def flat(part: Any) -> Any:
    """A dataset with a row for each question, of SQuAD's own files, which hold articles of paragraphs of questions;
    another one as it is."""
    if {"data", "paragraphs"}.isdisjoint(part.column_names) or "question" in part.column_names:
        return part
    articles = part.to_list()
    if "data" in part.column_names:  # a whole file in a row, or an article, as it was read
        articles = [article for row in articles for article in _listed(row["data"])]
    try:
        questions = [
            {"question": asked["question"], "context": paragraph["context"], "answers": asked["answers"]}
            for article in articles
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
        ]
    except (KeyError, TypeError) as error:
        expected = "articles with paragraphs, each with context and qas of question and answers"
        raise ValueError(f"data: expected {expected}, got one without {error}") from None
    return Dataset.from_list(questions)


def _listed(one: Any) -> list[Any]:
    return one if isinstance(one, list) else [one]


def rows(part: Any, tokenizer: Any, max_length: int, stride: int) -> Questions:
    """Texts that are longer than `max_length` are several rows, which have `stride` tokens in common.

    Args:
        part: a `datasets.Dataset` with texts question and context, and answers: lists text and answer_start, the place
            of each in the context, or a list of single ones; empty or None where it has none.
        tokenizer: a fast one.

    Raises:
        ValueError: no such columns, answers that are not where they are said to be, a question that leaves no room.
    """
    if absent := [name for name in COLUMNS if name not in part.column_names]:
        got = ", ".join(part.column_names)
        raise ValueError(f"data: expected columns {', '.join(COLUMNS)}, got {got}, without {', '.join(absent)}")
    made = Questions([], [], [], list(part["context"]), [])
    for number, (asked, context, answers) in enumerate(zip(*(part[name] for name in COLUMNS), strict=True)):
        texts, starts = _lists(asked, answers)
        begin, end = _first(asked, context, texts, starts)
        made.right.append(texts)
        of_question = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        room = max_length - of_question - tokenizer.num_special_tokens_to_add(pair=True)
        if room <= stride:
            expected = f"room for more than stride {stride} tokens of text beside the question {asked[:60]!r}"
            raise ValueError(f"max_length: expected {expected}, got {room} of {max_length}")
        encoded = tokenizer(
            asked,
            context,
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for piece, offsets in enumerate(encoded["offset_mapping"]):
            own = encoded.sequence_ids(piece)
            places = [tuple(place) if of == 1 else (0, 0) for place, of in zip(offsets, own, strict=True)]
            row = {name: encoded[name][piece] for name in ("input_ids", "token_type_ids") if name in encoded}
            made.rows.append(row | _positions(places, begin, end))
            made.question.append(number)
            made.places.append(places)
    return made


def some(of_question: Any) -> bool:
    """Whether a row has an answer."""
    return bool(of_question.get("text") if isinstance(of_question, Mapping) else of_question)


def _lists(asked: str, answers: Any) -> tuple[list[str], list[int]]:
    """Texts of answers and where they begin: of lists, as `datasets` has them, a list of single ones, as SQuAD's own
    files, either as JSON in a table, or None, where there is none."""
    try:
        single = [] if answers is None else json.loads(answers) if isinstance(answers, str) else answers
        texts, starts = (
            [answer[name] for answer in single] if isinstance(single, list) else list(single[name])
            for name in ("text", "answer_start")
        )
        if len(texts) != len(starts) or not {*map(type, texts)} <= {str} or not {*map(type, starts)} <= {int}:
            raise TypeError
    except (KeyError, TypeError, json.JSONDecodeError):
        expected = f'answers like {{"text": ["Rome"], "answer_start": [8]}} of the question {asked[:60]!r}'
        raise ValueError(f"data: expected {expected}, got {json.dumps(answers, default=str)[:60]}") from None
    return texts, starts


def _first(asked: str, context: str, texts: Sequence[str], starts: Sequence[int]) -> tuple[int, int]:
    """Where the first answer begins and ends; (0, 0) without one."""
    if not texts:
        return 0, 0
    text, begin = texts[0], starts[0]
    if context[begin : begin + len(text)] != text:
        got = repr(context[begin : begin + len(text)])
        raise ValueError(f"data: expected the answer {text!r} of the question {asked[:60]!r} at {begin}, got {got}")
    return begin, begin + len(text)


def _positions(places: Sequence[tuple[int, int]], begin: int, end: int) -> dict[str, int]:
    within = [i for i, (first, last) in enumerate(places) if first < end and last > begin and last > first]
    of_text = [(first, last) for first, last in places if last > first]
    whole = bool(within) and of_text[0][0] <= begin and of_text[-1][1] >= end
    return {"start_positions": within[0] if whole else 0, "end_positions": within[-1] if whole else 0}


def best(start: Tensor, end: Tensor, places: Sequence[tuple[int, int]]) -> tuple[float, tuple[int, int]]:
    """The answer [begin, end] in the text with the largest sum of its start's and its end's logit, [L] each, of at most
    `LONGEST` tokens; and by how much that is above the first token's, which stands for none."""
    text = torch.tensor([last > first for first, last in places])
    length = len(places)
    scores = start[:length, None] + end[None, :length]
    may = (text[:, None] & text[None]).triu() & ~torch.ones(length, length, dtype=torch.bool).triu(LONGEST)
    scores = scores.masked_fill(~may.to(scores.device), -torch.inf)
    first, last = divmod(int(scores.argmax()), length)
    above = float(scores[first, last] - start[0] - end[0])
    return above, (places[first][0], places[last][1])


def quality(predicted: Sequence[str], right: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD's measures, means over questions of the best of their right answers, without case, punctuation and
    articles: `f1` of words, and `exact_match`. A question without a right answer is answered by none."""
    pairs = [(answer, known or [""]) for answer, known in zip(predicted, right, strict=True)]
    count = max(1, len(pairs))
    return {
        "f1": sum(max(_f1(answer, one) for one in known) for answer, known in pairs) / count,
        "exact_match": sum(max(_words(answer) == _words(one) for one in known) for answer, known in pairs) / count,
    }


def _words(text: str) -> list[str]:
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _f1(answer: str, right: str) -> float:
    """2 · common / (both's words); 1 where neither has any."""
    mine, its = _words(answer), _words(right)
    if not mine or not its:
        return float(mine == its)
    return 2 * sum((Counter(mine) & Counter(its)).values()) / (len(mine) + len(its))
