"""Rows whose label is ignored, as Liger, TRL and torchtune have them: they count for no term, unless a mask says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from kdfast.ops import reference

LEADING, WIDTH, VOCABULARY, T = (3, 5), 8, 60, 2.0
FUNCTIONS = ("kd_loss", "linear_kd_loss", "linear_topk_kd_loss")
EVERY = pytest.mark.parametrize("name", FUNCTIONS)
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean", "sum", "batchmean"])
IGNORED = torch.tensor([[True, True, False, False, True], [False] * 5, [True] * 5])


class Case(NamedTuple):
    """A call of `function` on `trained` and `teacher`, and the float64 logits that it comes to."""

    function: Callable[..., Any]
    trained: list[Tensor]
    teacher: tuple[Tensor, ...]
    teacher_logits: Tensor

    def logits(self) -> tuple[list[Tensor], Tensor]:
        """Float64 copies of what is trained, and the student's logits from them."""
        copies = [x.detach().double().requires_grad_() for x in self.trained]
        return copies, copies[0] if len(copies) == 1 else copies[0] @ copies[1].T

    def run(self, labels: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
        """Loss and gradients."""
        loss = self.function(*self.trained, *self.teacher, labels, temperature=T, **kwargs)
        return loss.detach(), *torch.autograd.grad(loss, self.trained, factors(loss))


def factors(loss: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)


def case(name: str, spoilt: Tensor | None = None) -> Case:
    """Rows that are `spoilt` are NaN: who reads them shows it."""
    generator = torch.Generator().manual_seed(2)

    def made(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator)
        if spoilt is not None and shape[:-1] == LEADING:
            x[spoilt] = torch.nan
        return x.requires_grad_()

    hidden, weight, of_teacher, teacher_weight = made(*LEADING, WIDTH), made(VOCABULARY, WIDTH), made(*LEADING, WIDTH), made(VOCABULARY, WIDTH)  # fmt: skip
    exact = (of_teacher.double() @ teacher_weight.double().T).detach()
    if name == "kd_loss":
        return Case(kdfast.kd_loss, [made(*LEADING, VOCABULARY)], (exact.float(),), exact)
    if name == "linear_kd_loss":
        return Case(kdfast.linear_kd_loss, [hidden, weight], (of_teacher, teacher_weight), exact)
    known = (exact / T).log_softmax(-1).float().sort(-1, descending=True)  # all of them: KL then
    return Case(kdfast.linear_topk_kd_loss, [hidden, weight], tuple(known), exact)


def labels_of(ignored: Tensor = IGNORED, ignore_index: int = -100) -> Tensor:
    labels = torch.randint(1, VOCABULARY, LEADING, generator=torch.Generator().manual_seed(4))
    return torch.where(ignored, ignore_index, labels)


def by_hand(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    alpha: float,
    reduction: str,
    weight: Tensor,
    num_items: int | None,
) -> Tensor:
    """Rows without a label are taken out first, as those libraries do."""
    kept = labels != -100
    soft = F.kl_div((student[kept] / T).log_softmax(-1), (teacher[kept] / T).softmax(-1), reduction="none").sum(-1)
    rows = alpha * T**2 * soft + (1 - alpha) * F.cross_entropy(student[kept], labels[kept], reduction="none")
    rows = rows * weight.expand(LEADING)[kept]
    if reduction == "none":
        return torch.zeros(LEADING, dtype=rows.dtype).masked_scatter(kept, rows)
    divisor = {"mean": int(kept.sum()) if num_items is None else num_items, "sum": 1, "batchmean": LEADING[0]}
    return rows.sum() / divisor[reduction]


def close(got: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    for ours, wanted in zip(got, exact, strict=True):
        assert wanted.any(), "zeros would pass"
        torch.testing.assert_close(ours.double(), wanted.double(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize(
    ("reduction", "num_items"), [("none", None), ("mean", None), ("mean", 11), ("sum", None), ("batchmean", None)]
)
@EVERY
def test_as_plain_torch_with_the_rows_taken_out(name: str, reduction: str, alpha: float, num_items: int | None) -> None:
    labels, weight = labels_of(), torch.linspace(0.5, 2, LEADING[1])
    of = case(name)
    copies, student = of.logits()
    exact = by_hand(student, of.teacher_logits, labels, alpha, reduction, weight, num_items)
    wanted = (exact.detach(), *torch.autograd.grad(exact, copies, factors(exact)))
    given: dict[str, Any] = {"alpha": alpha, "reduction": reduction, "weight": weight, "num_items": num_items}
    close(of.run(labels, **given), wanted)
    spoilt = case(name, IGNORED).run(labels, **given)
    close(spoilt, wanted)
    assert (spoilt[1][IGNORED] == 0).all()
    if reduction == "none":
        assert (spoilt[0][IGNORED] == 0).all()


@EVERY
def test_components_count_the_same_rows(name: str) -> None:
    labels, of = labels_of(), case(name)
    loss, divergence, cross_entropy = of.function(
        *of.trained, *of.teacher, labels, alpha=0.3, temperature=T, return_components=True
    )
    _, student = of.logits()
    ones = torch.ones(())
    soft = by_hand(student, of.teacher_logits, labels, 1.0, "mean", ones, None)
    hard = by_hand(student, of.teacher_logits, labels, 0.0, "mean", ones, None)
    close((divergence, cross_entropy, loss.detach()), (soft, hard, 0.3 * soft + 0.7 * hard))


@REDUCTIONS
@EVERY
def test_a_mask_decides_whatever_the_labels(name: str, reduction: str) -> None:
    """All rows distil; those with a label have a cross-entropy too."""
    labels, of = labels_of(), case(name)
    mask = torch.ones(LEADING, dtype=torch.bool)
    copies, student = of.logits()
    exact = reference.kd_loss(student, of.teacher_logits, labels, alpha=0.3, mask=mask, reduction=reduction)
    got = of.run(labels, alpha=0.3, mask=mask, reduction=reduction)
    close(got, (exact.detach(), *torch.autograd.grad(exact, copies, factors(exact))))
    assert got[1][IGNORED].any(-1).all()
    assert not torch.allclose(got[0], of.run(labels, alpha=0.3, reduction=reduction)[0])


@EVERY
def test_a_mask_leaves_out_rows_that_have_a_label(name: str) -> None:
    labels, mask = labels_of(), ~IGNORED
    mask[1, :3] = False
    got = case(name, ~mask).run(labels, mask=mask)
    close(got, case(name).run(torch.where(mask, labels, -100)))


@REDUCTIONS
@EVERY
def test_all_rows_ignored(name: str, reduction: str) -> None:
    everything = torch.ones(LEADING, dtype=torch.bool)
    for alpha in (0.3, 1.0):
        for x in case(name, everything).run(labels_of(everything), alpha=alpha, reduction=reduction):
            assert (x == 0).all()


@pytest.mark.parametrize("ignore_index", [0, VOCABULARY, -1])
@EVERY
def test_other_numbers_are_ignored(name: str, ignore_index: int) -> None:
    """Such as the padding token's, which is of the vocabulary."""
    got = case(name, IGNORED).run(labels_of(IGNORED, ignore_index), ignore_index=ignore_index)
    close(got, case(name).run(labels_of()))


@EVERY
def test_labels_out_of_range_are_still_refused(name: str) -> None:
    labels = labels_of()
    labels[1, 2] = VOCABULARY
    message = f"{name}: labels: expected 0 to {VOCABULARY - 1}, or ignore_index -100, got {VOCABULARY}"
    with pytest.raises(ValueError, match=message):
        case(name).run(labels)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@EVERY
def test_compiles_without_graph_breaks(name: str, reduction: str) -> None:
    labels, of = labels_of(), case(name)
    compiled = of._replace(function=torch.compile(of.function, fullgraph=True, backend="aot_eager"))
    close(compiled.run(labels, reduction=reduction), of.run(labels, reduction=reduction))


def test_modules_too() -> None:
    labels, of = labels_of(), case("kd_loss")
    module = of._replace(function=kdfast.nn.Loss("kd_loss", temperature=T))
    loss = module.function(*of.trained, *of.teacher, labels)
    assert torch.equal(loss, of.run(labels)[0])
    linear = case("linear_kd_loss", IGNORED)
    loss = kdfast.nn.Loss("linear_kd_loss", temperature=T)(*linear.trained, *linear.teacher, labels)
    assert torch.equal(loss, linear.run(labels)[0])
