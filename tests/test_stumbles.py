"""Mistakes whose message did not say what to do, or that gave a number instead: of kinds of outputs, labels and batches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdfast.data import tasks
from kdfast.objective import Labels, Logits, Terms

ROWS = {"input_ids": torch.ones(4, 3, dtype=torch.long)}


def outputs(*shape: int) -> Any:
    return SimpleNamespace(logits=torch.randn(shape, generator=torch.Generator().manual_seed(1)))


def test_soft_targets_of_one_number_are_refused() -> None:
    """Whose softmax is 1: the divergence would be 0 always."""
    with pytest.raises(
        ValueError, match=r"Logits: logits: expected two classes .*Logits\('logit_mse'\)\), got \[4, 1\]"
    ):
        Logits()(outputs(4, 1), outputs(4, 1), ROWS)
    assert Logits("logit_mse")(outputs(4, 1), SimpleNamespace(logits=torch.zeros(4, 1)), ROWS) > 0.01


def test_labels_of_another_task_name_it() -> None:
    with pytest.raises(
        TypeError, match=r"Labels: labels: expected an int64 .*Labels\('regression'\).*, got torch.float32"
    ):
        Labels()(outputs(4, 2), None, ROWS | {"labels": torch.rand(4)})


def test_a_batch_without_tensors() -> None:
    with pytest.raises(ValueError, match="expected a batch with columns of tensors, got text"):
        Terms(kl=Logits()).num_items({"text": ["good", "bad"]})


@pytest.mark.parametrize("value", ["inf", "-inf"])
def test_infinite_labels_are_refused(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    lines = [f"film {i},{value if i == 7 else 0.5 * i}" for i in range(30)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(lines))
    with pytest.raises(tasks.TaskError, match=rf"expected finite labels in column label .* got {value}"):
        tasks.load(tmp_path / "rows.csv")
