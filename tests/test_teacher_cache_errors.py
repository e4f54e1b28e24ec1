"""Teacher caches: damage, caches of something else and mistakes are named, and nothing is overwritten by them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_teacher
import torch
from tiny_teacher import ROWS, TOKENIZER, VOCABULARY
from torch import Tensor, nn
from transformers import BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from kdfast.teacher_cache import CacheError, TeacherCache, text_rows


def _edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "manifest.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return edit


def _flip_last_byte(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _truncate(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _truncate_and_say_so(folder: Path) -> None:
    _truncate(folder)
    size = (folder / "shard-00001.safetensors").stat().st_size
    _edit(lambda m: m["shards"][1].update(bytes=size))(folder)


def _other_shard(folder: Path) -> None:
    path, other = folder / "shard-00001.safetensors", folder / "shard-00000.safetensors"
    path.write_bytes(other.read_bytes())
    _edit(lambda m: m["shards"][1].update(bytes=other.stat().st_size))(folder)


def _move_a_token(folder: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["shards"][0]["tokens"] += 1
        manifest["shards"][1]["tokens"] -= 1

    _edit(change)(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "shard-00002.safetensors").unlink(), r"expected .*shard-00002.* of \d+ bytes, got no file"),
        (_truncate, r"expected .*shard-00001.safetensors of (\d+) bytes, got \d+ bytes"),
        (_truncate_and_say_so, "expected .*shard-00001.safetensors to be a safetensors file, got .*"),
        (_other_shard, "expected first_row [1-9].* in .*shard-00001.safetensors, as in manifest.json, got 0"),
        (_flip_last_byte, "expected .*shard-00001.safetensors with sha256 .*, got"),
        (lambda f: (f / "manifest.json").unlink(), "expected a teacher cache with .*manifest.json, got none"),
        (lambda f: (f / "manifest.json").write_text("{"), "expected a manifest in JSON at .*manifest.json, got"),
        (_edit(lambda m: m.update(format=2)), "expected a manifest of format 1 at .*manifest.json, got format 2"),
        (_edit(lambda m: m.pop("teacher")), "expected the fields of format 1 in .*manifest.json, got KeyError"),
        (
            _edit(lambda m: m["settings"].update(x=1)),
            "expected the fields of format 1 in .*manifest.json, got TypeError",
        ),
        (
            _edit(lambda m: m["settings"].update(temperature=3.0)),
            "expected temperature 3.0 in .*shard-00000.*, got 1.0",
        ),
        (
            _edit(lambda m: m["settings"].update(dtype="float16")),
            "expected dtype float16 in .*shard-00000.*, got float32",
        ),
        (_edit(lambda m: m.update(rows=21)), "expected rows 20, the sum over the shards in .*manifest.json, got 21"),
        (_edit(lambda m: m["shards"].pop()), r"expected rows \d+, the sum over the shards in .*manifest.json, got 20"),
        (_edit(lambda m: m["shards"][1].update(first_row=0)), r"expected shard-00001.safetensors to begin at row \d+"),
        (_move_a_token, r"expected positions to be \['I32', \d+\] in .*shard-00000.safetensors, got \['I32', \d+\]"),
        (
            _edit(lambda m: m.update(complete=False)),
            "expected a complete cache in .*, got one that was stopped after 20",
        ),
    ],
)
def test_damage_is_found_and_named(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    tiny_teacher.write(tmp_path)
    damage(tmp_path)
    with pytest.raises(CacheError, match=f"^teacher_cache: folder: {message}"):
        TeacherCache(tmp_path, verify=damage is _flip_last_byte)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (
            {"tokenizer": tiny_teacher.tokenizer(eos_token="w2")},
            "tokenizer: expected the one with sha256 [0-9a-f]{64} of",
        ),
        ({"temperature": 2.0}, "temperature: expected 1.0, as in .*manifest.json, got 2.0"),
        ({"k": 7}, "k: expected 1 to 6, as many as .*manifest.json has, got 7"),
        ({"k": 0}, "k: expected 1 to 6, as many as .*manifest.json has, got 0"),
        ({"teacher": "gpt"}, "teacher: expected 'LlamaForCausalLM', as in .*manifest.json, got 'gpt'"),
        ({"teacher": tiny_teacher.llama(seed=1)}, "teacher: expected weights with sha256 [0-9a-f]{64}, as in"),
        (
            {"teacher": tiny_teacher.gemma()},
            "teacher: expected a config with sha256 [0-9a-f]{64}, as in .*manifest.json, got",
        ),
        ({"teacher": nn.Linear(2, 2)}, "teacher: expected a config with sha256 [0-9a-f]{64}, as in .*, got none"),
    ],
)
def test_cache_of_something_else_is_refused(expected: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny_teacher.write(tmp_path)
    with pytest.raises(CacheError, match=f"^teacher_cache: {message}"):
        TeacherCache(tmp_path, **expected)


def test_other_dataset_is_refused(tmp_path: Path) -> None:
    cache = tiny_teacher.write(tmp_path)
    with pytest.raises(CacheError, match=r"dataset: expected 20 rows, as in .*manifest.json, got 19"):
        cache.beside(ROWS[:-1])
    beside = cache.beside([ROWS[1], ROWS[0], *ROWS[2:]])
    assert beside[2]["input_ids"] == ROWS[2]["input_ids"]
    with pytest.raises(
        CacheError, match=r"dataset: expected row 1 with the input_ids that the teacher of .*, got others"
    ):
        beside[1]


def _t5() -> Any:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes))


class _Broken(nn.Module):
    """Answers with what it was given, whatever is asked."""

    def __init__(self, logits: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.logits = logits

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        class Answer:
            logits = self.logits if self.logits is None else self.logits.expand(*input_ids.shape, -1)

        return Answer()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: expected at least 1, got 0"),
        ({"k": 51}, "k: expected at most 50, the width of the teacher's logits, got 51"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"shard_bytes": 0}, "shard_bytes: expected at least 1, got 0"),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"outputs": "topk"}, "outputs: expected some of topk, logits, cls, hidden, got 'topk'"),
        ({"outputs": ()}, "outputs: expected some of topk, logits, cls, hidden, got ()"),
        ({"outputs": ["attention"]}, "outputs: expected some of topk, logits, cls, hidden, got ['attention']"),
        ({"outputs": ("topk", "logits")}, "outputs: expected 'topk', of a language model, or 'logits', of a classifier, got"),
        ({"outputs": ("hidden",)}, "layers: expected layer numbers with output 'hidden', got none"),
        ({"layers": (1,)}, "layers: expected none without output 'hidden' or 'cls', got [1]"),
        ({"outputs": ("cls",), "layers": (3,)}, "layers: expected numbers from 0 to 2, got [3]"),
        ({"outputs": ("hidden",), "layers": (3,)}, "layers: expected numbers from 0 to 2, got [3]"),
        ({"outputs": ("hidden",), "layers": (-1,)}, "layers: expected numbers from 0 to 2, got [-1]"),
        ({"positions": "masked"}, "positions: expected one of all, labels, next_labels, got 'masked'"),
        ({"positions": "labels"}, "rows: expected labels or completion_mask in row 0, for positions='labels', got ['input_ids']"),
        ({"dtype": torch.float64}, "dtype: expected one of float32, float16, bfloat16, got float64"),
        ({"rows": []}, "rows: expected at least one, got none"),
        ({"rows": [{"ids": [1]}]}, "rows: expected input_ids in row 0, a list or tensor of integers [L], got none"),
        ({"rows": [{"input_ids": []}]}, "rows: expected input_ids in row 0, a list or tensor of integers [L], got none"),
        ({"rows": [{"input_ids": [[1]]}]}, "rows: expected input_ids in row 0, a list or tensor of integers [L], got [[1]]"),
        ({"rows": [{"input_ids": [2, 3], "attention_mask": [1]}]}, "rows: expected 2 attention_mask in row 0, got 1"),
        ({"rows": [{"input_ids": [2, 3], "labels": 1}], "positions": "labels"}, "rows: expected 2 labels in row 0, got 1"),
        ({"rows": [{"input_ids": [2], "attention_mask": [0]}]}, "rows: expected a token in row 0, got none"),
        ({"outputs": ("logits",)}, "model: expected logits [batch, classes] for output 'logits' of LlamaForCausalLM, got shape"),
        ({"model": _t5()}, "model: expected an encoder or a decoder, got T5ForConditionalGeneration, which is both"),
        ({"model": _Broken(None)}, "model: expected logits [batch, length, vocabulary] for output 'topk' of _Broken, got none"),
        ({"model": _Broken(None), "outputs": ("cls",)}, "model: expected hidden_states for outputs 'hidden' and 'cls', got none"),
        (
            {"model": _Broken(torch.full((9,), torch.nan))},
            "model: expected outputs that float32 can hold, got NaN or infinity in topk_logprobs of rows 0 to 2",
        ),
    ],
)  # fmt: skip
def test_mistakes_of_a_write_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=f"^teacher_cache: {re.escape(message)}"):
        tiny_teacher.write(tmp_path / "new", **options)


def test_overflow_of_float16_is_named(tmp_path: Path) -> None:
    model = tiny_teacher.bert(BertForSequenceClassification)
    with torch.no_grad():
        model.classifier.weight.mul_(1e6)
    with pytest.raises(
        CacheError, match=r"outputs that float16 can hold, got NaN or infinity in logits of rows 0 to 2"
    ):
        tiny_teacher.write(tmp_path, model, outputs=("logits",), dtype="float16")
    assert tiny_teacher.write(tmp_path, model, outputs=("logits",), resume=False)[0]["logits"].abs().max() > 65504


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": [*ROWS[:3], ROWS[4]]}, "rows: expected at least [1-9].*, as many as .* holds, got 4"),
        (
            {"rows": [ROWS[1], *ROWS[1:]]},
            "rows: expected the input_ids of rows 0 to .* that .* was begun with, got others",
        ),
        ({"rows": ROWS * 2}, "rows: expected 20, as in the complete cache .*, got more"),
        (
            {"k": 5},
            r"k: expected 6, as the cache in .* was begun with \(resume=False, or --fresh, starts over\), got 5",
        ),
        ({"temperature": 3.0}, "temperature: expected 1.0, as the cache in .*, got 3.0"),
        ({"dtype": "float16"}, "dtype: expected float32, as the cache in .*, got float16"),
        (
            {"tokenizer": tiny_teacher.tokenizer(eos_token="w2")},
            "tokenizer: expected tokenizer_sha256 .*, as the cache in",
        ),
        ({"model": tiny_teacher.llama(seed=1)}, "model: expected teacher_weights_sha256 .*, as the cache in"),
    ],
)
def test_write_goes_on_with_nothing_else(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny_teacher.write(tmp_path)
    before = tiny_teacher.files(tmp_path)
    with pytest.raises(CacheError, match=f"^teacher_cache: {message}"):
        tiny_teacher.write(tmp_path, **options)
    assert tiny_teacher.files(tmp_path) == before
    assert len(tiny_teacher.write(tmp_path, **options, resume=False)) == len(options.get("rows", ROWS))


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for resume in (True, False):
        with pytest.raises(
            CacheError, match=r"folder: expected a new folder, or one .* nothing else, got .*thesis\.tex"
        ):
            tiny_teacher.write(tmp_path, resume=resume)
    with pytest.raises(CacheError, match=r"folder: expected a folder, got the file .*thesis\.tex"):
        tiny_teacher.write(tmp_path / "thesis.tex")
    assert tiny_teacher.files(tmp_path) == {"thesis.tex": b"mine"}


def test_text_becomes_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    lines = ["w2 w3 w4", "", "w5", "   "]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": line, "labels": 1}) + "\n" for line in lines))
    (tmp_path / "a.csv").write_text("body,labels\n" + "".join(f"{line},1\n" for line in lines))
    assert text_rows(tmp_path / "a.txt", TOKENIZER)["input_ids"] == [[2, 3, 4], [5]]
    for name in ("a.jsonl", "a.csv"):
        rows = text_rows(tmp_path / name, TOKENIZER, text_column="body", max_length=2)
        assert (rows["input_ids"], rows["labels"]) == ([[2, 3], [5]], [1, 1])
        assert "body" not in rows.column_names
    (tmp_path / "empty.txt").write_text("\n \n")
    for name, message in {
        "none.txt": "data: expected a file .*none.txt, got none",
        "empty.txt": "data: expected text in column text of .*empty.txt, got none",
        "a.csv": "text_column: expected one of body, labels in .*a.csv, got text",
    }.items():
        with pytest.raises(CacheError, match=f"^teacher_cache: {message}"):
            text_rows(tmp_path / name, TOKENIZER)
    (tmp_path / "a.jsonl").write_text('{"text": [')
    with pytest.raises(
        CacheError, match=r"data: expected rows that `datasets` can read in .*jsonl, got JSON parse error"
    ):
        text_rows(tmp_path / "a.jsonl", TOKENIZER)
    with pytest.raises(CacheError, match=r"data: expected a file that ends in \.txt, .*, or a name on the Hub, got"):
        text_rows(__file__, TOKENIZER)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.tsv").write_text('body\tlabels\nw2 "w3\t1\nw4\t2\n')
    rows = text_rows(tmp_path / "texts", TOKENIZER, text_column="body")
    assert (rows["input_ids"], rows["labels"]) == ([[2, 0], [4]], [1, 2])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CacheError, match=r"data: expected .*, which needs a network or .* 'org/name' and no answer"):
        text_rows("org/name", TOKENIZER)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"reading .*a.txt needs datasets.*: pip install kdfast\[train\]"):
        text_rows(tmp_path / "a.txt", TOKENIZER)
