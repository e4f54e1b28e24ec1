"""Augmented rows: candidates and probabilities as TinyBERT's code has them, the same whatever interrupts, read by tasks."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call, refused
from datasets import ClassLabel, Dataset
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

from kdfast.data import augment, demo, tasks
from kdfast.data.augment import Augmentation, Proposer, Vectors, Words, variants
from kdfast.runs.augment import Predictor, proposer

WORDS = ["good", "bad", "film", "plot", "the", "un", "##seen", "##s", ".", "actor", "scene", "great", "e", "##clair"]
VECTORS = (
    "film 1 0 0\nplot 0.9 0.1 0\nunseen 0 1 0\nhidden 0.1 0.9 0\nsecret 0 0.9 0.2\nNew York 0 0 1\nstrange 0 -1 0\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked language model, the same without its head, word vectors, and reviews."""
    made = tmp_path_factory.mktemp("augment")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    config = BertConfig(vocab_size=5 + len(WORDS), max_position_embeddings=40, initializer_range=0.4, **sizes)
    for name, kind in (("masked", BertForMaskedLM), ("encoder", BertModel)):
        kind(config).save_pretrained(made / name)
        (made / name / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
        (made / name / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "BertTokenizer", "do_lower_case": true}'
        )
    (made / "vectors.txt").write_text(VECTORS)
    draw = random.Random(0)
    rows = ["text,label"] + [
        f"{'good' if i % 2 else 'bad'} {' '.join(draw.choices(WORDS[:4], k=4))} {i},{'yes' if i % 2 else 'no'}"
        for i in range(1300)
    ]
    (made / "reviews.csv").write_text("\n".join(rows))
    return made


def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "masked")


# ---- candidates ----
def test_candidates_of_a_masked_language_model(folder: Path) -> None:
    text = "The FILM was unseen. Great films"
    (found,) = proposer(
        Augmentation(1, candidates=6, model=str(folder / "masked"), vectors=str(folder / "vectors.txt")), ""
    )([text])
    assert found.words == ["the", "film", "was", "unseen", ".", "great", "films"]
    assert set(found.candidates) == {1, 3, 5, 6}  # no stop words ("the", "was"), no point
    near = found.candidates[3]  # of several pieces
    assert (near[:3], {*near[3:5]}, near[5]) == (["hidden", "secret", "plot"], {"film", "New York"}, "strange")
    assert found.candidates[6] == ["films"]  # of several pieces, and without a vector
    # Of one piece: the masked text and the text itself, to the model by hand.
    model, own = AutoModelForMaskedLM.from_pretrained(folder / "masked").eval(), tokenizer(folder)
    pieces = own.tokenize(text)
    assert pieces == ["the", "film", "[UNK]", "un", "##seen", ".", "great", "film", "##s"]
    for place, piece in ((1, 1), (5, 6)):
        masked = ["[CLS]", *pieces[:piece], "[MASK]", *pieces[piece + 1 :], "[SEP]", *pieces, "[SEP]"]
        types = [0] * (len(pieces) + 2) + [1] * (len(pieces) + 1)
        with torch.no_grad():
            ids = torch.tensor([own.convert_tokens_to_ids(masked)])
            logits = model(input_ids=ids, token_type_ids=torch.tensor([types])).logits[0, piece + 1]
        best = own.convert_ids_to_tokens(logits.topk(6).indices.tolist())
        kept = [token for token in best if not token.startswith("##") and token not in own.all_special_tokens]
        assert found.candidates[place] == (kept or [found.words[place]])
        assert kept


def test_batches_of_masks_do_not_change_what_is_proposed(folder: Path) -> None:
    how = Augmentation(1, candidates=4, model=str(folder / "masked"))
    texts = ["good film", "the plot of the actor was bad bad bad film", "great"]
    propose = proposer(how, "")
    assert propose(texts) == [one for text in texts for one in propose([text])]


def test_what_a_long_text_was_cut_before_stays(folder: Path) -> None:
    own = tokenizer(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder / "masked").eval()
    (found,) = Proposer(own, 4, Predictor(model, own, 4), None, length=10)(["good film " * 10])
    stay = [place for place, candidates in found.candidates.items() if candidates == [found.words[place]]]
    assert len(found.candidates) == 20
    assert stay[-15:] == list(range(5, 20))
    assert 0 not in stay


def test_vectors_alone(folder: Path) -> None:
    own, given = tokenizer(folder), Vectors.read(folder / "vectors.txt")
    (found,) = Proposer(own, 2, None, given)(["unseen film bad"])
    assert found.candidates == {0: ["hidden", "secret"], 1: ["plot", "hidden"], 2: ["bad"]}
    assert given.nearest("Film", 1) == []  # of a cased vocabulary
    cased = Vectors(["Film", "plot"], torch.eye(2))
    assert cased.nearest("Film", 5) == ["Plot"]
    assert len(Vectors.read(folder / "vectors.txt", limit=3).words) == 3


def test_embeddings_of_an_encoder_without_a_head(folder: Path) -> None:
    propose = proposer(Augmentation(1, candidates=3), folder / "encoder")
    assert propose.predict is None
    known = {
        "good",
        "bad",
        "film",
        "plot",
        "un",
        "actor",
        "scene",
        "great",
    }  # no pieces, stop words ("e" is none), points
    assert set(propose.vectors.words) == known | {"e"}
    weight = BertModel.from_pretrained(folder / "encoder").get_input_embeddings().weight.detach()
    rows = {word: weight[tokenizer(folder).convert_tokens_to_ids(word)] for word in propose.vectors.words}
    middle = torch.stack(list(rows.values())).mean(0)
    near = {
        word: torch.cosine_similarity(row - middle, rows["good"] - middle, dim=0).item() for word, row in rows.items()
    }
    expected = sorted((word for word in near if word != "good"), key=lambda word: -near[word])[:3]
    (found,) = propose(["good films"])
    assert found.candidates == {0: expected, 1: ["films"]}


def test_tokenizers_that_mark_beginnings() -> None:
    class Bytes:
        backend_tokenizer = type("", (), {"model": object()})

    assert augment.whole_word(Bytes, "Ġfilm") == "film"
    assert augment.whole_word(Bytes, "▁film") == "film"
    assert augment.whole_word(Bytes, "ilm") is None


# ---- variants ----
def test_probability_and_draws() -> None:
    of = Words(["a", "x", "y", "."], {1: ["x1", "x2", "x3", "x4"], 2: ["y"]})
    many = [variants(of, "A x y.", Augmentation(1, probability=0.3), random.Random(i))[0].split() for i in range(4000)]
    assert {words[0] for words in many} == {"a"}
    assert {words[2] for words in many} == {"y"}
    changed = [words[1] for words in many if words[1] != "x"]
    assert abs(len(changed) / 4000 - 0.3) < 0.03  # four standard errors
    for word in of.candidates[1]:
        assert abs(changed.count(word) / len(changed) - 0.25) < 0.05
    assert variants(of, "A x y.", Augmentation(5, probability=0.0), random.Random(0)) == ["a x y ."]
    assert variants(of, "a x y .", Augmentation(5, probability=0.0), random.Random(0)) == []
    some = variants(of, "A x y.", Augmentation(30, probability=0.9), random.Random(0))
    assert sorted(some) == sorted({f"a {word} y ." for word in ("x", "x1", "x2", "x3", "x4")})


def test_both_texts_of_a_pair() -> None:
    row = {"one": "x", "two": "y", "label": 3}
    of = {"one": Words(["x"], {0: ["x1", "x2"]}), "two": Words(["y"], {0: ["y1", "y2"]})}
    made = list(augment.augmented(row, of, Augmentation(50, probability=0.9), 7))
    assert made[0] == row
    assert {(one["one"], one["two"]) for one in made} == {
        ("x", "y"),
        ("x1", "y"),
        ("x2", "y"),
        ("x", "y1"),
        ("x", "y2"),
    }
    assert {one["label"] for one in made} == {3}
    kept = list(augment.augmented(row, of, Augmentation(50, probability=0.9, restore=False), 7))
    assert len(kept) == 5
    assert {one["one"] for one in kept[3:]} == {kept[2]["one"]} != {"x"}  # the first's last variant
    few = {"one": Words(["x"], {0: [f"x{i}" for i in range(99)]}), "two": of["two"]}
    seventh, again, eighth = (list(augment.augmented(row, few, Augmentation(9), number)) for number in (7, 7, 8))
    assert seventh == again != eighth


# ---- files ----
def of_letters(texts: Any) -> list[Words]:
    return [Words(text.split(), {i: ["p", "q"] for i, _ in enumerate(text.split())}) for text in texts]


def rows(count: int) -> Any:
    return Dataset.from_dict({"text": [f"a b {i}" for i in range(count)], "label": [i % 2 for i in range(count)]})


def written(folder: Path) -> list[Any]:
    files = sorted(folder.glob("train-*.parquet"))
    return [row for file in files for row in Dataset.from_parquet(str(file), cache_dir=str(folder / "cache"))]


HOW = Augmentation(3, seed=5)
KILLED = """
import os, signal, sys
from pathlib import Path
import test_augment as t
def propose(texts):
    if texts[0] == "a b 1000":
        os.kill(os.getpid(), signal.SIGKILL)
    return t.of_letters(texts)
t.augment.write(t.rows(1100), t.rows(2), ["text"], t.HOW, propose, Path(sys.argv[1]), {"rows": "r"})
"""


def test_killed_and_continued(tmp_path: Path) -> None:
    done: list[int] = []
    augment.write(rows(1100), rows(2), ["text"], HOW, of_letters, tmp_path / "through", {"rows": "r"}, done.append)
    assert done == [500, 1000, 1100]
    expected = written(tmp_path / "through")
    assert 1100 * 3 < len(expected) <= 1100 * 4
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    killed = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    there = sorted(path.name for path in (tmp_path / "run").glob("train*"))
    assert there == ["train-00000.parquet", "train-00001.parquet"]
    assert not augment.complete(tmp_path / "run", 1100)
    asked: list[str] = []

    def propose(texts: Any) -> list[Words]:
        asked.extend(texts)
        return of_letters(texts)

    augment.write(rows(1100), rows(2), ["text"], HOW, propose, tmp_path / "run", {"rows": "r"})
    assert len(asked) == 100
    assert written(tmp_path / "run") == expected
    assert augment.complete(tmp_path / "run", 1100)
    other = Augmentation(3, seed=6)
    augment.write(rows(1100), rows(2), ["text"], other, of_letters, tmp_path / "other", {"rows": "r"})
    assert written(tmp_path / "other") != expected


def test_other_rows_or_settings_are_refused(tmp_path: Path) -> None:
    augment.write(rows(3), rows(2), ["text"], HOW, of_letters, tmp_path / "run", {"rows": "r"})
    with pytest.raises(ValueError, match="expected rows augmented with seed 6, got 5; choose another"):
        augment.check(tmp_path / "run", Augmentation(3, seed=6), {"rows": "r"})
    with pytest.raises(ValueError, match="expected rows augmented with rows q, got r"):
        augment.check(tmp_path / "run", HOW, {"rows": "q"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("years of work")
    with pytest.raises(ValueError, match="mine: expected a new folder or one of augmented rows"):
        augment.check(tmp_path / "mine", HOW, {"rows": "r"})


# ---- the command ----
def test_command_writes_what_distill_reads(folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    options = ["--data", folder / "reviews.csv", "--model", folder / "masked", "--variants", 2, "--train-rows", 700]
    assert call(monkeypatch, "augment", tmp_path / "rows", *options) == 0
    shown = capsys.readouterr().out
    original = tasks.load(folder / "reviews.csv", train_rows=700)
    task = tasks.load(tmp_path / "rows")
    assert f"{len(task.train):,} rows, 700 of them as they were" in shown
    assert 1400 < len(task.train) <= 2100
    assert task.names == original.names == ("no", "yes")
    assert tasks.fingerprint(task.test) == tasks.fingerprint(original.test)
    known = set(original.train["text"])
    assert known <= set(task.train["text"])
    assert sum(row["text"] not in known for row in task.train) > 600
    for row in task.train:  # the number of each stays
        assert row["labels"] == int(row["text"].rsplit(" ", 1)[1]) % 2
    before = {path.name: path.read_bytes() for path in (tmp_path / "rows").iterdir()}
    assert call(monkeypatch, "augment", tmp_path / "rows", *options) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "rows").iterdir()} == before
    capsys.readouterr()
    message = refused(monkeypatch, capsys, "augment", tmp_path / "rows", *options, "--seed", 1)
    assert "expected rows augmented with seed 1, got 0" in message
    assert call(monkeypatch, "augment", tmp_path / "rows", *options, "--seed", 1, "--fresh") == 0
    assert json.loads((tmp_path / "rows" / augment.MANIFEST).read_text())["seed"] == 1


def test_pairs_keep_names_and_order_of_classes(folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    made = Dataset.from_dict(
        {
            "premise": ["good film"] * 20 + ["bad plot"] * 20,
            "hypothesis": [f"great actor {i}" for i in range(40)],
            "label": [i % 3 for i in range(40)],
        }
    ).cast_column("label", ClassLabel(names=["entailment", "neutral", "contradiction"]))
    (tmp_path / "pairs").mkdir()
    made.to_parquet(tmp_path / "pairs" / "train.parquet")
    monkeypatch.setattr(demo, "fetch", lambda package: folder / "encoder")
    assert call(monkeypatch, "augment", tmp_path / "rows", "--data", tmp_path / "pairs", "--variants", 3) == 0
    task = tasks.load(tmp_path / "rows")
    assert task.names == ("entailment", "neutral", "contradiction")
    originals = {(row["text"], row["text_pair"]) for row in tasks.load(tmp_path / "pairs").train}
    firsts = {one for one, _ in originals}
    changed = [(row["text"] not in firsts, row["text_pair"] not in {two for _, two in originals}) for row in task.train]
    assert {*changed} == {(False, False), (True, False), (False, True)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--word-vectors", "none.txt"],
            "word_vectors none.txt: expected a file of text in UTF-8, got No such file or directory",
        ),
        (["--word-vectors", "header.txt"], "header.txt:1: expected a word and its numbers, got '3' after the word"),
        (
            ["--word-vectors", "uneven.txt"],
            "uneven.txt:2: expected a word and 2 numbers, as in the first line, got '1'",
        ),
        (["--word-vectors", "empty.txt"], "expected a word and its numbers in each line, got an empty file"),
        (["--model", "/none"], "augment_model /none: expected the folder of a model, got no folder"),
        (["--model", "encoder"], "encoder: expected a masked language model, got one without cls.predictions"),
        (["--data", "none.csv"], "source: expected a file none.csv, got none"),
        (["--probability", "1.5"], "--probability"),
    ],
)
def test_mistakes(
    options: list[str], expected: str, folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    for name, content in (("header.txt", "400 3\nfilm 1 2 3"), ("uneven.txt", "film 1 2\nplot 1"), ("empty.txt", "")):
        (tmp_path / name).write_text(content)
    (tmp_path / "encoder").symlink_to(folder / "encoder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "fetch", lambda package: folder / "encoder")
    message = refused(monkeypatch, capsys, "augment", "rows", "--data", folder / "reviews.csv", *options)
    assert expected in message
    assert not (tmp_path / "rows").exists()
