"""TextBrewer's losses by kdfast, against the file that TextBrewer has them in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from other_libraries import installed, same
from torch import Tensor

from kdfast.integrations import textbrewer

B, L, D, H = 4, 7, 12, 3
MASK = torch.arange(L) < torch.tensor([7, 3, 1, 5])[:, None]
MASKS = pytest.mark.parametrize("mask", [None, MASK, MASK.long()], ids=["", "bool", "int"])


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    torch.manual_seed(0)
    return installed("textbrewer", "losses.py", monkeypatch)


def compare(name: str, theirs: Any, inputs: list[Tensor], *arguments: Any) -> None:
    """Of a student's inputs, a list where there are several, and the other arguments."""
    student = inputs if len(inputs) > 1 else inputs[0]
    same(*(lambda of=of: getattr(of, name)(student, *arguments) for of in (textbrewer, theirs)), inputs)


@pytest.mark.parametrize("name", ["kd_ce_loss", "kd_mse_loss"])
@pytest.mark.parametrize("shape", [(B, 5), (B, L, 5)], ids=["rows", "tokens"])
@pytest.mark.parametrize("temperature", [1, 4.0, "rows"])
def test_of_logits(temperature: Any, shape: tuple[int, ...], name: str, theirs: Any) -> None:
    per_row = temperature == "rows"
    compare(
        name,
        theirs,
        [torch.randn(shape, requires_grad=True)],
        torch.randn(shape),
        torch.rand(shape[:-1]) + 0.5 if per_row else temperature,
    )


@MASKS
@pytest.mark.parametrize("name", ["hid_mse_loss", "cos_loss", "pkd_loss"])
def test_of_hidden_states(name: str, mask: Tensor | None, theirs: Any) -> None:
    compare(name, theirs, [torch.randn(B, L, D, requires_grad=True)], torch.randn(B, L, D), mask)


def test_first_tokens(theirs: Any) -> None:
    compare("pkd_loss", theirs, [torch.randn(B, D, requires_grad=True)], torch.randn(B, D))


@MASKS
@pytest.mark.parametrize("name", ["att_mse_loss", "att_mse_sum_loss"])
def test_of_scores(name: str, mask: Tensor | None, theirs: Any) -> None:
    scores, of_teacher = torch.randn(2, B, H, L, L).unbind()
    compare(name, theirs, [scores.requires_grad_()], of_teacher, mask)


def test_of_summed_scores(theirs: Any) -> None:
    compare("att_mse_sum_loss", theirs, [torch.randn(B, L, L, requires_grad=True)], torch.randn(B, L, L), MASK)


@MASKS
@pytest.mark.parametrize(("name", "width"), [("mmd_loss", 20), ("fsp_loss", D)])
def test_of_two_layers(name: str, width: int, mask: Tensor | None, theirs: Any) -> None:
    student = [torch.randn(B, L, D, requires_grad=True) for _ in range(2)]
    compare(name, theirs, student, [torch.randn(B, L, width) for _ in range(2)], mask)


def test_names_are_of_its_tables(theirs: Any) -> None:
    """What is here is there; what is not here the module's docstring names."""
    ours = {name for name in vars(textbrewer) if name.endswith("_loss")}
    its = {name for name in vars(theirs) if name.endswith("_loss")}
    assert ours < its
    assert all(name in (textbrewer.__doc__ or "") for name in its - ours)
