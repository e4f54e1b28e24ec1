"""Teachers that torchao and bitsandbytes quantised, and runs with them."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

from kdfast import runs

# As a config.json has it.
HOW: dict[str, dict[str, Any]] = {
    "torchao": {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}}},
    "bitsandbytes": {"load_in_8bit": True},
}
LIBRARIES = pytest.mark.parametrize("library", HOW)


def quantised(library: str, auto: Any, source: str | Path, folder: Path, **how: Any) -> Path:
    """A copy of a saved model, with its tokenizer. how: in place of what `HOW` has."""
    pytest.importorskip(library)
    config = {"torchao": TorchAoConfig, "bitsandbytes": BitsAndBytesConfig}[library].from_dict(how or HOW[library])
    auto.from_pretrained(source, quantization_config=config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def check_run(library: str, auto: Any, recipe: Any, own: Path, folder: Path) -> Path:
    """A student of one's own comes closer to the recipe's teacher, quantised, and all of the table is numbers; no
    student is made of its layers. Returns the run's folder."""
    teacher = quantised(library, auto, recipe.teacher, folder / "teacher-quantised")
    given = dataclasses.replace(recipe, teacher=str(teacher), student=str(own))
    results = runs.run(given, folder / "run", Console(file=io.StringIO()))
    assert list(results) == ["teacher", "start", "student"]
    assert results["student"]["kl_to_teacher"] < 0.9 * results["start"]["kl_to_teacher"]
    assert all(math.isfinite(number) for row in results.values() for number in row.values())
    assert results["teacher"]["megabytes"] > 0 < results["teacher"]["parameters"]
    expected = f"teacher {teacher}: expected weights that are not quantised, got {library}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        runs.run(dataclasses.replace(given, student=None), folder / "other", Console(file=io.StringIO()))
    assert not (folder / "other").exists()
    return folder / "run"
