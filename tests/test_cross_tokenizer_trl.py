"""ULD and GOLD against TRL's own loss, the one of its GOLDTrainer, called on the same logits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from other_libraries import same
from torch import Tensor

from kdfast.objective import GOLD, ULD

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own
OWN, ITS = 11, 17  # vocabularies
# Ends of the tokens of three rows; 0: prompts, padding.
OWN_ENDS = [[0, 2, 5, 6, 9, 12, 0], [0, 0, 1, 2, 3, 4, 5], [0, 3, 4, 0, 0, 0, 0]]
ITS_ENDS = [[0, 0, 1, 3, 5, 9, 10, 11, 12], [0, 5, 0, 0, 0, 0, 0, 0, 0], [0, 1, 3, 4, 0, 0, 0, 0, 0]]
DTYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
# TRL's "bayesian" takes the logits that predict a token, its "observed" those at the token's own place: that other
# place has another gradient.
MERGES = pytest.mark.parametrize(("merge", "causal"), [("bayesian", True), ("observed", False)])


def theirs(folder: Path, **settings: Any) -> Any:
    gold = pytest.importorskip("trl.experimental.gold")
    trainer = pytest.importorskip("trl.experimental.gold.gold_trainer")
    # By default it leaves the last token of both sides out, which is the end of the text.
    ends = {"uld_skip_student_eos": False, "uld_skip_teacher_eos": False}
    temperatures = {"uld_student_temperature": 2.0, "uld_teacher_temperature": 2.0}
    config = gold.GOLDConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, use_uld_loss=True, **ends, **temperatures, **settings
    )
    loss = trainer.ULDLoss(config)

    def called(student: Tensor, teacher: Tensor, batch: dict[str, Tensor]) -> Tensor:
        sides = [(student, ""), (teacher, "teacher_")]
        labels, ids = ([batch[f"{prefix}{name}"] for _, prefix in sides] for name in ("labels", "input_ids"))
        offsets = [torch.stack((torch.zeros_like(x), x), -1) for x in (batch["sample_ends"], batch["teacher_ends"])]
        value: Tensor = loss(student, teacher, *labels, *ids, *offsets)
        return value

    return called


def example(dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits of both sides, and a batch."""
    generator = torch.Generator().manual_seed(0)
    batch, logits = {}, []
    for prefix, name, ends, width in (
        ("", "sample_", torch.tensor(OWN_ENDS), OWN),
        ("teacher_", "teacher_", torch.tensor(ITS_ENDS), ITS),
    ):
        ids = torch.randint(width, ends.shape, generator=generator)
        batch |= {f"{prefix}input_ids": ids, f"{prefix}labels": torch.where(ends > 0, ids, -100), f"{name}ends": ends}
        logits.append(2 * torch.randn(*ends.shape, width, generator=generator, dtype=torch.float64).to(dtype))
    return logits[0].requires_grad_(), logits[1], batch


def by_rows(term: Any, student: Tensor, teacher: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The mean over rows of each one's mean, as TRL has it."""
    rows = [slice(i, i + 1) for i in range(len(student))]
    values = [
        term(*(SimpleNamespace(logits=x[row]) for x in (student, teacher)), {name: x[row] for name, x in batch.items()})
        for row in rows
    ]
    return torch.stack(values).mean()


@DTYPES
@MERGES
@pytest.mark.parametrize("kind", [ULD, GOLD])
def test_value_and_gradient(
    kind: type[ULD], merge: str, causal: bool, dtype: torch.dtype, rtol: float, tmp_path: Path
) -> None:
    loss = theirs(tmp_path, uld_token_merge_strategy=merge, use_extended_uld=kind is GOLD)
    more = {"merge": merge} if kind is GOLD else {}
    term = kind(causal=causal, temperature=2.0, **more)
    student, teacher, batch = example(dtype)
    same(lambda: by_rows(term, student, teacher, batch), lambda: loss(student, teacher, batch), [student], rtol)
    # Over all spans together it is another number.
    whole = term(SimpleNamespace(logits=student), SimpleNamespace(logits=teacher), batch)
    assert float((whole - loss(student, teacher, batch)).abs().detach()) > 1e-3


@MERGES
def test_what_two_cuts_leave_is_a_span_of_trl(merge: str, causal: bool, tmp_path: Path) -> None:
    """Behind the last end that both have there is text of both, of different lengths."""
    loss = theirs(tmp_path, uld_token_merge_strategy=merge)
    student, teacher, batch = example(torch.float64)
    cut, closed = batch["sample_ends"].clone(), batch["teacher_ends"].clone()
    cut[0, 5], closed[0, 8] = 13, 13
    term = GOLD(merge=merge, causal=causal, temperature=2.0)
    value = loss(student, teacher, batch | {"sample_ends": cut})
    assert float((value - by_rows(term, student, teacher, batch | {"sample_ends": cut})).abs().detach()) > 1e-3
    same(
        lambda: by_rows(term, student, teacher, batch | {"sample_ends": cut, "teacher_ends": closed}),
        lambda: loss(student, teacher, batch | {"sample_ends": cut}),
        [student],
        1e-10,
    )
