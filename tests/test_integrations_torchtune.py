"""torchtune's losses by kdfast, against the file that torchtune has them in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from other_libraries import OFF, installed, same, some_labels

from kdfast.integrations import torchtune

ROWS, VOCABULARY = 24, 37
NAMES = pytest.mark.parametrize("name", ["ForwardKL", "ReverseKL", "SymmetricKL"])


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    return installed("torchtune", "modules/loss/kd_losses.py", monkeypatch)


@NAMES
@pytest.mark.parametrize("normalize", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("settings", [{}, {"ignore_index": 3}], ids=["", "ignore_index"])
def test_losses(settings: dict[str, Any], normalize: bool, name: str, theirs: Any) -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(ROWS, VOCABULARY, requires_grad=True), torch.randn(ROWS, VOCABULARY)
    labels = some_labels(ROWS, VOCABULARY)
    labels[5] = 3
    ours, its = (getattr(of, f"{name}Loss")(**settings) for of in (torchtune, theirs))
    same(lambda: ours(logits, teacher, labels, normalize), lambda: its(logits, teacher, labels, normalize), [logits])


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked(dtype: torch.dtype, name: str, theirs: Any) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, ROWS // 2, VOCABULARY, dtype=dtype, requires_grad=True)
    teacher, labels = torch.randn_like(logits).detach(), some_labels(ROWS, VOCABULARY).view(2, -1)

    def of(module: Any) -> torch.Tensor:
        loss = getattr(module, f"{name}WithChunkedOutputLoss")(num_output_chunks=5)
        value: torch.Tensor = loss(list(logits.chunk(5, 1)), list(teacher.chunk(5, 1)), labels)
        return value

    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # gradients of all are bfloat16
    same(lambda: of(torchtune), lambda: of(theirs), [logits], tolerance)


@pytest.mark.parametrize("ratio", [0.0, 0.2, 1.0])
def test_ratio(ratio: float, theirs: Any) -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(ROWS, VOCABULARY, requires_grad=True), torch.randn(ROWS, VOCABULARY)
    call = logits, teacher, some_labels(ROWS, VOCABULARY)
    ours, its = (of.SymmetricKLLoss(sym_kd_ratio=ratio) for of in (torchtune, theirs))
    same(lambda: ours(*call), lambda: its(*call), [logits])


def test_columns_of_no_probability(theirs: Any) -> None:
    """-inf on both sides, as masked vocabularies have it."""
    torch.manual_seed(0)
    logits, teacher = torch.randn(ROWS, VOCABULARY, requires_grad=True), torch.randn(ROWS, VOCABULARY)
    off = torch.zeros(VOCABULARY).index_fill(0, torch.tensor([2, 30]), -torch.inf)
    call = teacher + off, some_labels(ROWS, VOCABULARY)
    same(*(lambda of=of: of.ForwardKLLoss()(logits + off, *call) for of in (torchtune, theirs)), [logits])


@pytest.mark.parametrize("name", ["ForwardKL", "ReverseKL", "SymmetricKL"])
def test_where_nothing_counts(name: str) -> None:
    logits = torch.randn(1, 4, VOCABULARY, requires_grad=True)
    labels = torch.full((1, 4), OFF)
    chunked = getattr(torchtune, f"{name}WithChunkedOutputLoss")(2)(
        [logits[:, :2], logits[:, 2:]], [logits[:, :2]] * 2, labels
    )
    whole = getattr(torchtune, f"{name}Loss")()(logits, logits, labels)
    assert (chunked, whole) == (0, 0)


def test_errors() -> None:
    with pytest.raises(ValueError, match="SymmetricKLLoss: sym_kd_ratio: expected a number from 0 to 1, got 2"):
        torchtune.SymmetricKLLoss(2)
