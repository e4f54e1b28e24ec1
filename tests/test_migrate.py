"""docs/migrate.md is true: before and after print the same number."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_texts
import torch
from language_models import llama
from other_libraries import installed
from transformers import BertConfig, BertModel

from kdfast.integrations import liger, torchtune

PAGE = (Path(__file__).parents[1] / "docs" / "migrate.md").read_text()
SETUP, *EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
PAIRS = list(zip(EXAMPLES[::2], EXAMPLES[1::2], strict=True))


def printed(example: str, names: dict[str, Any]) -> float:
    found: list[float] = []
    own = {**names, "print": found.append}
    exec(SETUP + example, own)
    (value,) = found
    assert 1e-3 < value < 10_000
    return value


def compare(pair: tuple[str, str], names: dict[str, Any]) -> None:
    before, after = (printed(example, names) for example in pair)
    assert "kdfast" in pair[1]
    assert "kdfast" not in pair[0]
    assert after == pytest.approx(before, rel=1e-5)


def of(library: str) -> list[tuple[str, str]]:
    return [pair for pair in PAIRS if library in pair[0]]


def test_torch() -> None:
    (pair,) = of("F.kl_div")
    compare(pair, {})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", [0, 1], ids=["DistillationTrainer", "GKDTrainer"])
def test_trl(number: int, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from trl_trainers import distillation_trainer, gkd_trainer, tokenizer

    example = (distillation_trainer, gkd_trainer)[number](tmp_path)
    names = {
        "args": example.args,
        "rows": example.train_dataset,
        "tokenizer": tokenizer(),
        "teacher_model": llama(1, 3),
    }
    before, after = (printed(code, {**names, "model": llama(0, 2)}) for code in of("trl")[number])
    assert after == pytest.approx(before, rel=1e-5)


def test_liger() -> None:
    pytest.importorskip("liger_kernel.chunked_loss")
    (pair,) = of("liger_kernel")
    compare(pair, {})


def test_torchtune(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = installed("torchtune", "modules/loss/kd_losses.py", monkeypatch)
    monkeypatch.setitem(sys.modules, "torchtune.modules.loss", losses)
    (pair,) = of("torchtune")
    compare(pair, {})


def test_textbrewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textbrewer.losses", installed("textbrewer", "losses.py", monkeypatch))
    (pair,) = of("textbrewer")
    compare(pair, {})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", [0, 1], ids=["MSELoss", "MarginMSELoss"])
def test_sentence_transformers(number: int, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    tiny_texts.masked(tmp_path)
    shutil.copytree(tmp_path / "encoder", tmp_path / "teacher")
    torch.manual_seed(1)
    BertModel(BertConfig(num_hidden_layers=2, **tiny_texts.SMALL)).save_pretrained(tmp_path / "teacher")
    names = {
        "student_name": str(tmp_path / "encoder"),
        "teacher_name": str(tmp_path / "teacher"),
        "texts": [tiny_texts.gloss(i) for i in range(9)],
        "scores": torch.arange(9.0).square(),
    }
    compare(of("sentence_transformers")[number], names)


def test_every_pair_is_compared() -> None:
    libraries = ("F.kl_div", "trl", "liger_kernel", "torchtune", "textbrewer", "sentence_transformers")
    twice = ("trl", "sentence_transformers")
    expected = [name for name in libraries for _ in range(1 + (name in twice))]
    assert [next(name for name in libraries if name in before) for before, _ in PAIRS] == expected


@pytest.mark.parametrize("module", [liger, torchtune])
def test_names_are_told(module: Any) -> None:
    """The page names all of a drop-in's classes, or their pattern."""
    own = [name for name, x in vars(module).items() if isinstance(x, type) and x.__module__ == module.__name__]
    own = [name for name in own if name != "LossParts" and not name.startswith("_")]
    assert len(own) >= 5
    assert [name for name in own if name not in PAGE and "WithChunkedOutputLoss" not in name] == []
