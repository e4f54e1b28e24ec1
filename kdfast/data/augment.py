"""Variants of labelled text, as TinyBERT makes them (Jiao et al., 2020; `data_augmentation.py` of its code).

For every word that is of the letters a to z and no stop word there are candidates. A word that is one piece to the
tokenizer is masked, in a pair of the masked text and the text itself, and a masked language model's most likely tokens
are its candidates, without those that go on a word; a word of several pieces has those that are nearest by the cosine
of word vectors; and where there are none, itself. A variant is the text's words, joined by spaces, in which every such
word was exchanged with a probability for a candidate that was drawn uniformly. Variants that are there already are
dropped. Of pairs each text has variants, the other as it was.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SHARD = 500  # rows of the original in a file: what an interruption loses at most
MANIFEST = "augmentation.json"
VOCABULARY = 100_000  # words of a file of vectors, which begins with the frequent ones
# The original's stop words that are letters alone: words with an apostrophe are several words to a tokenizer.
_STOP_WORDS = """
    i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it
    its itself they them their theirs themselves this that these those am is are was were be been being have has had
    having do does did doing a an the and but if or because as until while of at by for with about against between
    into through during before after above below to from up down in out on off over under again further then once here
    there all any both each few more most other some such no nor not only own same so than too very s t can will just
    don should now d ll m o re ve y ain aren couldn didn doesn hadn hasn haven isn ma mightn mustn needn shan shouldn
    wasn weren won wouldn
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())

Predict = Callable[[Sequence["Masked"]], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Augmentation:
    """How rows are augmented.

    Attributes:
        count: variants of each text; copies among them are dropped.
        probability: of a word to be exchanged.
        candidates: from which its place is taken.
        model: masked language model that proposes them; None: the base, where it is one.
        vectors: file of word vectors; None: the base's embeddings, where no model proposes, else none.
        restore: variants of a pair's second text come beside the first as it was; False: beside the first's last
            variant, as in the original.
        seed: of the draws.
    """

    count: int
    probability: float = 0.4
    candidates: int = 15
    model: str | None = None
    vectors: str | None = None
    restore: bool = True
    seed: int = 0


class Masked(NamedTuple):
    """A text with a masked word: tokens, their types where the model has any, and the place of the mask."""

    ids: list[int]
    types: list[int]
    place: int


class Words(NamedTuple):
    """A text's words, and for those that may be exchanged, by their place, the candidates."""

    words: list[str]
    candidates: dict[int, list[str]]


class Vectors:
    """Words and their vectors [words, width], of which the nearest are found by cosine."""

    def __init__(self, words: Sequence[str], vectors: Tensor) -> None:
        self.words, self.place = list(words), {word: i for i, word in enumerate(words)}
        self.vectors = torch.nn.functional.normalize(vectors.float(), dim=-1)
        self._found: dict[tuple[str, int], list[str]] = {}

    @classmethod
    def read(cls, path: str | Path, limit: int = VOCABULARY) -> Vectors:
        """Of a text file in GloVe's form: a word and its numbers in each line.

        Raises:
            ValueError: no such file, or a line that is not of this form; file and line are named.
        """
        words: list[str] = []
        rows: list[Tensor] = []
        try:
            with Path(path).open(encoding="utf-8") as lines:
                for number, line in zip(range(1, limit + 1), lines, strict=False):
                    # From the right: some words have spaces in them.
                    word, *numbers = line.rstrip().rsplit(" ", len(rows[0]) if rows else -1)
                    rows.append(_numbers(f"word_vectors {path}:{number}", numbers, len(rows[0]) if rows else None))
                    words.append(word)
        except (OSError, UnicodeDecodeError) as error:
            got = error.strerror if isinstance(error, OSError) else "other bytes"
            raise ValueError(f"word_vectors {path}: expected a file of text in UTF-8, got {got}") from None
        if not rows:
            raise ValueError(f"word_vectors {path}: expected a word and its numbers in each line, got an empty file")
        return cls(words, torch.stack(rows))

    @classmethod
    def of_embeddings(cls, tokenizer: Any, embeddings: Tensor) -> Vectors:
        """A model's input embeddings [V, width], of the tokens that are words of the letters a to z.

        What they have in common, which makes all cosines large, is taken away.
        """
        tokens = [(whole_word(tokenizer, token), i) for token, i in tokenizer.get_vocab().items()]
        words = {word: i for word, i in sorted(tokens, key=lambda one: one[1]) if word and exchangeable(word)}
        rows = embeddings.detach().float().cpu()[list(words.values())]
        return cls(list(words), rows - rows.mean(0))

    def nearest(self, word: str, count: int) -> list[str]:
        """The most similar words, this one aside; none of a word without a vector. In title case where it is."""
        if word not in self.place:
            return []
        if (word, count) not in self._found:
            similar = self.vectors @ self.vectors[self.place[word]]
            similar[self.place[word]] = -torch.inf
            best = similar.topk(min(count, len(self.words) - 1)).indices.tolist()
            self._found[word, count] = [self.words[i] for i in best]
        found = self._found[word, count]
        return [one.title() for one in found] if word.istitle() else list(found)


def _numbers(where: str, texts: Sequence[str], width: int | None) -> Tensor:
    """The numbers of a line, as many as the first line has."""
    try:
        row = torch.tensor([float(text) for text in texts])
    except ValueError:
        row = torch.empty(0)
    if len(row) < 2 or (width is not None and len(row) != width):  # a header has one number beside the first
        expected = "a word and its numbers" if width is None else f"a word and {width} numbers, as in the first line"
        raise ValueError(f"{where}: expected {expected}, got {' '.join(texts)[:40]!r} after the word")
    return row


def exchangeable(word: str) -> bool:
    return re.fullmatch("[a-z]+", word.lower()) is not None and word.lower() not in STOP_WORDS


def whole_word(tokenizer: Any, token: str) -> str | None:
    """The word that a token is or begins; None of a token that goes on a word."""
    if tokenizer.backend_tokenizer.model.__class__.__name__ == "WordPiece":
        return None if token.startswith("##") else token
    return token[1:] if token[:1] in ("Ġ", "▁") else None


class Proposer:
    """Finds the words of texts that may be exchanged, and their candidates.

    Args:
        tokenizer: a fast one of transformers.
        candidates: how many tokens or words are asked for.
        predict: most likely tokens for the place of each mask, so many; None: `vectors` serve words of one piece too.
        vectors: for words of several pieces; None: these stay.
        length: tokens of the longest input of `predict`.
    """

    def __init__(
        self, tokenizer: Any, candidates: int, predict: Predict | None, vectors: Vectors | None, length: int = 512
    ) -> None:
        self.tokenizer, self.candidates, self.predict = tokenizer, candidates, predict
        self.vectors, self.length = vectors, length

    def __call__(self, texts: Sequence[str]) -> list[Words]:
        found, masked = [], []  # masked: text, word and input of each that the model is asked for
        for number, (text, encoding) in enumerate(zip(texts, self._encoded(texts), strict=True)):
            words, pieces = self._words(text, encoding)
            candidates: dict[int, list[str]] = {}
            pair = None
            for place, word in enumerate(words):
                if not exchangeable(word):
                    continue
                candidates[place] = [word]
                if self.predict is not None and len(pieces[place]) == 1:
                    pair = self._pair(text) if pair is None else pair
                    if (one := self._masked(pair, pieces[place][0])) is not None:
                        masked.append((number, place, one))
                elif self.vectors is not None:
                    candidates[place] = self.vectors.nearest(word, self.candidates) or [word]
            found.append(Words(words, candidates))
        if self.predict is not None:
            tokens = self.predict([one for _, _, one in masked])
            for (number, place, _), best in zip(masked, tokens, strict=True):
                proposed = self._whole(best)
                found[number].candidates[place] = proposed or found[number].candidates[place]
        return found

    def _encoded(self, texts: Sequence[str]) -> Any:
        # A text may be longer than any model's input: that is no mistake here.
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False).encodings

    def _words(self, text: str, encoding: Any) -> tuple[list[str], list[list[int]]]:
        """The words as the tokenizer has them, in lower case say, and the places of their tokens."""
        spans: dict[int, list[int]] = {}
        for place, word in enumerate(encoding.word_ids):
            if word is not None:
                spans.setdefault(word, []).append(place)
        normalizer, words = self.tokenizer.backend_tokenizer.normalizer, []
        for pieces in spans.values():
            start, end = encoding.offsets[pieces[0]][0], encoding.offsets[pieces[-1]][1]
            word = text[start:end] if normalizer is None else normalizer.normalize_str(text[start:end])
            words.append(word.replace("▁", " ").strip())
        return words, list(spans.values())

    def _pair(self, text: str) -> Any:
        return self.tokenizer([(text, text)], truncation=True, max_length=self.length).encodings[0]

    def _masked(self, pair: Any, piece: int) -> Masked | None:
        """None of a piece that a long text was cut before."""
        first = pair.sequence_ids.index(0) + piece
        if first >= len(pair.ids) or pair.sequence_ids[first] != 0:
            return None
        ids = list(pair.ids)
        ids[first] = self.tokenizer.mask_token_id
        return Masked(ids, list(pair.type_ids), first)

    def _whole(self, tokens: Sequence[int]) -> list[str]:
        special = self.tokenizer.all_special_ids
        # A model may have more logits than its tokenizer has tokens: those are None.
        named = self.tokenizer.convert_ids_to_tokens([one for one in tokens if one not in special])
        return [word for token in named if token and (word := whole_word(self.tokenizer, token))]


def variants(of: Words, text: str, how: Augmentation, draw: random.Random) -> list[str]:
    """Up to `how.count` variants of a text, all different and none the text itself."""
    seen = {text: None}
    for _ in range(how.count):
        words = list(of.words)
        for place, candidates in of.candidates.items():
            candidate = draw.choice(candidates)
            if draw.random() < how.probability:
                words[place] = candidate
        seen.setdefault(" ".join(words))
    return list(seen)[1:]


def augmented(
    row: Mapping[str, Any], of: Mapping[str, Words], how: Augmentation, number: int
) -> Iterator[Mapping[str, Any]]:
    """A row and its variants.

    Args:
        of: by the names of its texts, what they are made of.
        number: of the row, on which with `how.seed` the draws depend, and on nothing else.
    """
    draw = random.Random(f"{how.seed}/{number}")
    yield row
    beside = row
    for name, words in of.items():
        last = beside
        for text in variants(words, row[name], how, draw):
            last = {**beside, name: text}
            yield last
        beside = row if how.restore else last


def write(
    train: Any,
    test: Any,
    texts: Sequence[str],
    how: Augmentation,
    propose: Callable[[Sequence[str]], Sequence[Words]],
    folder: Path,
    identity: Mapping[str, str],
    progress: Callable[[int], Any] = lambda rows: None,
) -> None:
    """Writes rows and their variants as `folder/train-*.parquet`, test rows as they are as `folder/test.parquet`. Files
    that are there already are not made again.

    Args:
        train, test: `datasets.Dataset`s.
        texts: their columns of text.
        propose: a `Proposer`.
        identity: what tells the rows and the proposer, beside `how`.
        progress: called with how many rows of the original are done.

    Raises:
        ValueError: the folder holds something else, or an augmentation of other rows or settings.
    """
    from datasets import Dataset

    check(folder, how, identity)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / MANIFEST, lambda path: path.write_text(json.dumps(_facts(how, identity), indent=1)))
    _replace(folder / "test.parquet", test.to_parquet)
    for shard, start in enumerate(range(0, len(train), SHARD)):
        target, rows = folder / f"train-{shard:05}.parquet", train.select(range(start, min(start + SHARD, len(train))))
        if not target.is_file():
            words = {name: propose(list(rows[name])) for name in texts}
            made = [
                one
                for i, row in enumerate(rows)
                for one in augmented(row, {name: words[name][i] for name in texts}, how, start + i)
            ]
            _replace(target, Dataset.from_list(made, features=train.features).to_parquet)
        progress(start + len(rows))


def complete(folder: Path, rows: int) -> bool:
    """Whether the variants of so many rows are all there."""
    return len(list(folder.glob("train-*.parquet"))) == -(-rows // SHARD) > 0


def check(folder: Path, how: Augmentation, identity: Mapping[str, str]) -> None:
    """
    Raises:
        ValueError: the folder is not empty, and holds no augmentation, or one of other rows or settings.
    """
    if not folder.is_dir() or all(path.name.endswith(".partial") for path in folder.iterdir()):
        return
    try:
        stored = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        raise ValueError(f"output {folder}: expected a new folder or one of augmented rows, got another's") from None
    for name, value in _facts(how, identity).items():
        if stored.get(name) != value:
            raise ValueError(
                f"output {folder}: expected rows augmented with {name} {value}, got {stored.get(name)}; choose another"
            )


def _facts(how: Augmentation, identity: Mapping[str, str]) -> dict[str, Any]:
    # Files and folders by their last name: a run's folder may have been moved with what it was made of.
    places = {name: value and Path(value).name for name, value in (("model", how.model), ("vectors", how.vectors))}
    return {**asdict(how), **places, **identity}


def _replace(target: Path, write_to: Callable[[Path], Any]) -> None:
    """Writes beside `target` and renames, so that the file is whole whenever it is there."""
    partial = target.with_name(f".{target.name}.partial")
    write_to(partial)
    partial.replace(target)
