"""A teacher's top-k that cannot be one: topk_kl_div and linear_topk_kd_loss say so on the CPU, of the rows that count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdfast

LEADING, WIDTH, VOCABULARY, K = (2, 3), 8, 20, 4
TAILS = pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
Loss = Callable[..., Tensor]


def of_logits(values: Tensor, indices: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The loss, and the student's hidden states."""
    hidden, weight = student()
    return kdfast.topk_kl_div(hidden @ weight.T, values, indices, temperature=2.0, **kwargs), hidden


def of_hidden_states(values: Tensor, indices: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    hidden, weight = student()
    return kdfast.linear_topk_kd_loss(hidden, weight, values, indices, **{"alpha": 1.0} | kwargs), hidden


BOTH = pytest.mark.parametrize(
    ("name", "loss_of"),
    [("topk_kl_div", of_logits), ("linear_topk_kd_loss", of_hidden_states)],
    ids=["logits", "hidden"],
)


def student() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, WIDTH, generator=generator) for shape in (LEADING, (VOCABULARY,)))
    return hidden.requires_grad_(), weight


def teacher() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(*LEADING, VOCABULARY, generator=generator).log_softmax(-1).topk(K))


def all_but(*row: int) -> Tensor:
    mask = torch.ones(LEADING, dtype=torch.bool)
    mask[row] = False
    return mask


@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "batchmean"])
@TAILS
@BOTH
def test_a_column_that_comes_twice_is_named_with_its_row(name: str, loss_of: Loss, tail: str, reduction: str) -> None:
    values, indices = teacher()
    indices[1, 2, 3] = indices[1, 2, 0]
    message = rf"^{name}: teacher_topk_indices: expected a column once in a row .*, got column {int(indices[1, 2, 0])} twice in row \[1, 2\]"  # fmt: skip
    with pytest.raises(ValueError, match=message):
        loss_of(values, indices, tail=tail, reduction=reduction)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        loss_of(values, indices.int(), tail=tail, reduction=reduction)


@TAILS
@BOTH
def test_padding_may_repeat_a_column(name: str, loss_of: Loss, tail: str) -> None:
    """Entries of log-probability -inf, of any index: the same as a shorter row."""
    values, indices = teacher()
    values[..., 2:] = -torch.inf
    expected, _ = loss_of(values[..., :2], indices[..., :2], tail=tail)
    assert expected.isfinite()
    assert expected != 0
    for filler in (0, int(indices[0, 0, 0]), -1, VOCABULARY):
        indices[..., 2:] = filler
        torch.testing.assert_close(loss_of(values, indices, tail=tail)[0], expected)


@pytest.mark.parametrize("what", ["twice", "negative", "beyond", "positive"])
@BOTH
def test_rows_that_do_not_count_are_not_looked_at(name: str, loss_of: Loss, what: str) -> None:
    values, indices = teacher()
    expected, hidden = loss_of(values, indices, mask=all_but(1, 2))
    gradient = torch.autograd.grad(expected, hidden)[0]
    assert gradient.any()
    if what == "positive":
        values[1, 2] = 0.5
    else:
        indices[1, 2] = {"twice": 3, "negative": -1, "beyond": VOCABULARY}[what]
    with pytest.raises(ValueError, match=f"^{name}: teacher_topk_"):
        loss_of(values, indices)
    loss, hidden = loss_of(values, indices, mask=all_but(1, 2))
    assert torch.equal(loss, expected)
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], gradient)


def test_rows_without_a_label_are_not_looked_at() -> None:
    values, indices = teacher()
    indices[0, 1] = -1
    labels = torch.where(all_but(0, 1), 5, -100)
    loss, _ = of_hidden_states(values, indices, labels=labels, alpha=0.5)
    assert loss.isfinite()
    assert loss > 0


@BOTH
def test_other_nans_are_no_mistake_of_the_teacher(name: str, loss_of: Loss) -> None:
    values, indices = teacher()
    values[0, 0, 0] = torch.nan
    assert loss_of(values, indices, reduction="none")[0].isnan().sum() == 1


def test_compiled_code_gives_nan_in_the_row() -> None:
    """As on a device, where nothing may wait."""
    values, indices = teacher()
    indices[1, 2, 3] = indices[1, 2, 0]
    compiled = torch.compile(kdfast.topk_kl_div, fullgraph=True, backend="aot_eager")
    z = torch.randn(*LEADING, VOCABULARY, requires_grad=True)
    loss = compiled(z, values, indices, reduction="none")
    assert torch.equal(loss.isnan(), ~all_but(1, 2))
    assert torch.equal(torch.autograd.grad(loss.sum(), z)[0].isnan().any(-1), ~all_but(1, 2))


def test_inside_a_transform() -> None:
    values, indices = teacher()
    indices[1, 2, 3] = indices[1, 2, 0]
    z = torch.randn(*LEADING, VOCABULARY)
    with pytest.raises(ValueError, match=r"topk_kl_div: teacher_topk_indices: expected a column once .* row \[2\]"):
        torch.func.vmap(torch.func.grad(kdfast.topk_kl_div))(z, values, indices)
