"""Targets that the teacher of `distill seq2seq` writes: with more layers in its decoder, and where they are no text."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_pairs import bart, of, recipe, saved, t5
from transformers import AutoTokenizer, BartForConditionalGeneration

from kdfast.recipes.seq2seq import Recipe
from kdfast.runs import run, written
from kdfast.runs.seq2seq import Seq2SeqRun

__all__ = ["recipe"]  # a fixture
NOTHING = 2  # the token that ends BART's texts


def prepared(recipe: Recipe, folder: Path) -> tuple[Seq2SeqRun, io.StringIO]:
    shown = io.StringIO()
    made = Seq2SeqRun(dataclasses.replace(recipe, targets="teacher", beams=2), folder, Console(file=shown, width=400))
    made.prepare()
    folder.mkdir()
    return made, shown


@pytest.mark.parametrize("beams", [1, 3])
def test_decoders_of_more_layers_write_as_without_a_cache(beams: int, tmp_path: Path) -> None:
    model = t5(3, 1, std=0.5, num_decoder_layers=3)
    assert written.outgrows_cache(model)
    tokenizer = AutoTokenizer.from_pretrained(saved(tmp_path / "model", "t5", layers=1, seed=0))
    given = [tokenizer(text) for text in ("w1 w2 w3", "w9 w8 w7 w6", "w4 w30 w31 w5")]
    found = written.rows(model, given, tokenizer, tmp_path / "targets.jsonl", beams, 6)
    assert len(found) == 3
    assert len({tuple(row["labels"]) for row in found}) == 3
    for row in found:
        ids, longest = torch.tensor([row["input_ids"]]), {"max_new_tokens": 6, "do_sample": False}
        assert [row["labels"]] == model.generate(ids, num_beams=beams, use_cache=False, **longest)[:, 1:].tolist()
    with pytest.raises(IndexError):  # where there is none, transformers makes a whole one, and ours can go
        model.generate(ids, **longest)


def test_other_models_make_their_own_cache() -> None:
    deep = bart(0, 1).config
    deep.decoder_layers = 3
    model = BartForConditionalGeneration(deep).eval()
    for one in (model, t5(0, 3), t5(0, 3, num_decoder_layers=1)):
        assert not written.outgrows_cache(one)
        assert one.generate(torch.tensor([[5, 9, 2]]), max_new_tokens=3).shape[0] == 1


def test_students_with_more_layers_in_the_decoder_are_told_of(recipe: Recipe, tmp_path: Path) -> None:
    note = (
        "student: its generate() fails in transformers, whose cache has the encoder's layers, fewer than the decoder's"
    )
    lopsided = dataclasses.replace(recipe, student_layers=(0,), decoder_layers=(0, 2), epochs=1)
    for name, chosen, so in (("a", lopsided, True), ("b", recipe, False)):
        made, _ = prepared(chosen, tmp_path / name)
        assert any(one.startswith(note) for one in made.notes) == so
    shown = io.StringIO()
    run(lopsided, tmp_path / "run", Console(file=shown, width=400))
    assert note in shown.getvalue()


def test_rows_without_a_target_of_text_are_left_out(recipe: Recipe, tmp_path: Path) -> None:
    made, shown = prepared(recipe, tmp_path / "run")
    sources = sorted((row["input_ids"] for row in made.train), key=len)
    lines = [{"text": "" if i < 3 else "w7", "tokens": [0, 1] if i < 3 else [10, 1]} for i in range(len(sources))]
    (tmp_path / "run" / "targets.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    made.train_teacher()
    assert [row["input_ids"] for row in made.train] == sources[3:]
    assert {tuple(row["labels"]) for row in made.train} == {(10, 1)}
    assert "3 training rows of which the teacher writes no text are left out" in shown.getvalue()
    first = made.tokenizer.decode(sources[3], skip_special_tokens=True)
    assert f"the teacher writes, of {first!r}: 'w7'" in shown.getvalue()


def test_teacher_that_writes_nothing_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    silent = of("bart", recipe, tmp_path)
    model = bart(0, 3, std=None)
    model.final_logits_bias[0, NOTHING] = 1e4
    model.save_pretrained(str(silent.teacher))
    made, _ = prepared(silent, tmp_path / "run")
    expected = f"teacher {silent.teacher}: expected one that writes targets, got no text of any of 54 sources"
    with pytest.raises(ValueError, match=re.escape(expected)) as refusal:
        made.train_teacher()
    assert "\n" not in str(refusal.value)
