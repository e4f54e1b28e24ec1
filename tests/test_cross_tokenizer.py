"""ULD and GOLD against plain statements of their formulas in float64, row by row and span by span."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from objective_outputs import PRECISIONS, WEIGHTED, compare
from torch import Tensor

from kdfast.objective import GOLD, ULD, Labels, Logits, Missing, Terms

OWN, ITS = 11, 17  # vocabularies
# Ends of the tokens of three rows; 0: prompts, padding.
OWN_ENDS = [[0, 2, 5, 6, 9, 12, 0], [0, 0, 1, 2, 3, 4, 5], [0, 3, 4, 0, 0, 0, 0]]
ITS_ENDS = [[0, 0, 1, 3, 5, 9, 10, 11, 12], [0, 5, 7, 9, 0, 0, 0, 0, 0], [0, 1, 2, 0, 0, 0, 0, 0, 0]]
# By hand: the tokens of each span, in both.
SPANS = [
    (0, [1, 2], [2, 3, 4]),  # up to 5
    (0, [3, 4], [5]),  # 9
    (0, [5], [6, 7, 8]),  # 12
    (1, [2, 3, 4, 5, 6], [1]),  # 5
]
SHARED = torch.tensor([[0, 16], [4, 2], [10, 0], [3, 5]])
SHARING = pytest.mark.parametrize("shared", [None, SHARED], ids=["", "shared"])
TEMPERED = pytest.mark.parametrize("tempered", [False, True], ids=["", "sample_temperature"])


def outputs(seed: int, length: int, width: int, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, length, width, generator=generator, dtype=torch.float64)
    return SimpleNamespace(logits=logits.float().to(dtype).requires_grad_(seed == 0))


def inputs(weighted: bool = False, tempered: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    made: dict[str, Any] = {}
    for prefix, name, ends, width in (("", "sample_", OWN_ENDS, OWN), ("teacher_", "teacher_", ITS_ENDS, ITS)):
        ends = torch.tensor(ends)
        ids = torch.randint(width, ends.shape, generator=generator)
        made[f"{prefix}input_ids"], made[f"{prefix}attention_mask"] = ids, torch.ones_like(ids)
        made[f"{prefix}labels"] = torch.where(ends > 0, ids, -100)
        made[f"{name}ends"] = ends
    if weighted:
        made["sample_weight"] = torch.tensor([0.5, 2.0, 1.25])
    if tempered:
        made["sample_temperature"] = torch.tensor([1.5, 0.5, 3.0])
    return made


def l1(s: Tensor, t: Tensor, shared: Tensor | None) -> Tensor:
    """Of probabilities: shared ones as they are, the others sorted, the shorter filled up with 0."""
    both, direct = [], torch.zeros((), dtype=torch.float64)
    for i, p in enumerate((s, t)):
        named = [] if shared is None else shared[:, i].tolist()
        rest = p[[j for j in range(len(p)) if j not in named]].sort(descending=True).values
        both.append(torch.cat((rest, rest.new_zeros(30 - len(rest)))))
    if shared is not None:
        direct = (s[shared[:, 0]] - t[shared[:, 1]]).abs().sum()
    return direct + (both[0] - both[1]).abs().sum()


def probabilities(side: Any, row: int, token: int, batch: Any, temperature: float, shift: int = 1) -> Tensor:
    own = float(batch["sample_temperature"][row]) if "sample_temperature" in batch else temperature
    return (side.logits[row, token - shift].double() / own).softmax(-1)


def weights(batch: Any) -> list[float]:
    return batch.get("sample_weight", torch.ones(3)).double().tolist()


def uld_by_hand(student: Any, teacher: Any, batch: Any, shared: Tensor | None, temperature: float) -> Tensor:
    losses = []
    for row in range(3):
        own, its = ([i for i, end in enumerate(ends[row]) if end > 0] for ends in (OWN_ENDS, ITS_ENDS))
        for i, j in zip(own, its, strict=False):
            p = probabilities(student, row, i, batch, temperature), probabilities(teacher, row, j, batch, temperature)
            losses.append(weights(batch)[row] * l1(*p, shared))
    return torch.stack(losses).mean()


def merged(
    side: Any, row: int, tokens: list[int], ids: Tensor, batch: Any, temperature: float, merge: str = "observed"
) -> Tensor:
    at = 0 if merge == "observed" else len(tokens) - 1
    p = probabilities(side, row, tokens[at], batch, temperature)
    for token in tokens[:at] + tokens[at + 1 :]:
        p = p * probabilities(side, row, token, batch, temperature)[ids[row, token]]
    return p


def gold_by_hand(
    student: Any, teacher: Any, batch: Any, shared: Tensor | None, temperature: float, merge: str = "observed"
) -> Tensor:
    losses = []
    for row, own, its in SPANS:
        s = merged(student, row, own, batch["input_ids"], batch, temperature, merge)
        t = merged(teacher, row, its, batch["teacher_input_ids"], batch, temperature, merge)
        losses.append(weights(batch)[row] * l1(s, t, shared))
    return torch.stack(losses).mean()


# ---- the formulas ----
@PRECISIONS
@WEIGHTED
@TEMPERED
@SHARING
def test_uld(shared: Any, tempered: bool, weighted: bool, dtype: torch.dtype, tolerance: float) -> None:
    student, teacher, batch = outputs(0, 7, OWN, dtype), outputs(1, 9, ITS, dtype), inputs(weighted, tempered)
    term = ULD(temperature=2.0, shared=shared)
    expected = uld_by_hand(student, teacher, batch, shared, 2.0)
    compare(term(student, teacher, batch), expected, [student.logits], tolerance)
    assert term.count(batch) == 5 + 3 + 2


@PRECISIONS
@WEIGHTED
@TEMPERED
@SHARING
@pytest.mark.parametrize("merge", ["observed", "bayesian"])
def test_gold(merge: str, shared: Any, tempered: bool, weighted: bool, dtype: torch.dtype, tolerance: float) -> None:
    student, teacher, batch = outputs(0, 7, OWN, dtype), outputs(1, 9, ITS, dtype), inputs(weighted, tempered)
    term = GOLD(temperature=2.0, shared=shared, merge=merge)
    expected = gold_by_hand(student, teacher, batch, shared, 2.0, merge)
    compare(term(student, teacher, batch), expected, [student.logits], tolerance)
    assert term.count(batch) == len(SPANS)


@pytest.mark.parametrize("swapped", [False, True], ids=["equal", "larger"])
@pytest.mark.parametrize("kind", [ULD, GOLD])
def test_a_student_of_the_larger_vocabulary(kind: Any, swapped: bool) -> None:
    """And one of equal width."""
    widths = (ITS, OWN) if swapped else (OWN, OWN)
    student, teacher, batch = outputs(0, 7, widths[0]), outputs(1, 9, widths[1]), inputs()
    for name in ("teacher_input_ids", "teacher_labels"):
        batch[name] = torch.where(batch[name] < 0, batch[name], batch[name] % widths[1])
    by_hand = uld_by_hand if kind is ULD else gold_by_hand
    compare(kind()(student, teacher, batch), by_hand(student, teacher, batch, None, 1.0), [student.logits], 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [ULD, GOLD])
def test_half_precision(kind: Any, dtype: torch.dtype) -> None:
    student, teacher, batch = outputs(0, 7, OWN, dtype), outputs(1, 9, ITS, dtype), inputs()
    value = kind()(student, teacher, batch)
    expected = (uld_by_hand if kind is ULD else gold_by_hand)(student, teacher, batch, None, 1.0)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    got, exact = (torch.autograd.grad(x, student.logits)[0].double() for x in (value, expected))
    assert float((got - exact).norm()) < 1e-2 * float(exact.norm())


def test_equal_tokens_make_gold_uld() -> None:
    student, teacher, batch = outputs(0, 7, OWN), outputs(1, 7, OWN), inputs()
    batch = {name: batch[name] for name in ("input_ids", "attention_mask", "labels", "sample_ends")}
    batch["teacher_ends"] = batch["sample_ends"]
    assert ULD()(student, student, batch).item() < 1e-14  # the teacher reads the student's tokens
    compare(GOLD()(student, teacher, batch), ULD()(student, teacher, batch), [student.logits], 1e-12)


def test_an_equal_student_has_no_loss_whatever_its_numbering() -> None:
    batch = inputs()
    order = torch.randperm(OWN, generator=torch.Generator().manual_seed(7))
    student = outputs(0, 7, OWN)
    teacher = SimpleNamespace(logits=student.logits.detach()[..., order])
    for prefix in ("input_ids", "attention_mask", "labels"):
        batch[f"teacher_{prefix}"] = batch[prefix]
    batch["teacher_input_ids"] = batch["teacher_labels"] = torch.where(
        batch["labels"] == -100, -100, order.argsort()[batch["input_ids"]]
    )
    batch["teacher_ends"] = batch["sample_ends"]
    other = outputs(1, 7, OWN)
    for term in (ULD(), GOLD(), GOLD(shared=torch.stack((order, torch.arange(OWN)), 1))):
        assert abs(term(student, teacher, batch).item()) < 1e-12
        assert term(student, other, batch).item() > 0.1


def test_small_probabilities_of_what_follows() -> None:
    """A span whose later tokens are nearly sure, and one whose are next to impossible."""
    student, teacher, batch = outputs(0, 7, OWN, torch.float32), outputs(1, 9, ITS, torch.float32), inputs()
    with torch.no_grad():
        ids, its = batch["input_ids"], batch["teacher_input_ids"]
        student.logits[0, 1, ids[0, 2]] += 60  # token 2 of the first span
        student.logits[1, 2, ids[1, 3]] -= 90
        teacher.logits[0, 6, its[0, 7]] += 12
    value, expected = GOLD()(student, teacher, batch), gold_by_hand(student, teacher, batch, None, 1.0)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    got, exact = (torch.autograd.grad(x, student.logits)[0] for x in (value, expected))
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-6)


# ---- what counts ----
@pytest.mark.parametrize("kind", [ULD, GOLD])
def test_other_places_are_not_read(kind: Any) -> None:
    student, teacher, batch = outputs(0, 7, OWN), outputs(1, 9, ITS), inputs()
    clean = kind()(student, teacher, batch)
    read = torch.zeros(3, 7, dtype=torch.bool)
    read[:, :-1] = batch["labels"][:, 1:] != -100
    its = torch.zeros(3, 9, dtype=torch.bool)
    its[:, :-1] = batch["teacher_labels"][:, 1:] != -100
    dirty = [
        SimpleNamespace(logits=x.logits.masked_fill(~on[..., None], torch.nan))
        for x, on in ((student, read), (teacher, its))
    ]
    value = kind()(*dirty, batch)
    assert value.item() == clean.item()
    (gradient,) = torch.autograd.grad(value, student.logits)
    assert gradient.isfinite().all()
    assert not gradient[~read].any()


def test_without_labels_all_tokens_count_that_something_predicts() -> None:
    student, teacher, batch = outputs(0, 7, OWN), outputs(1, 9, ITS), inputs()
    for prefix, length in (("", 7), ("teacher_", 9)):
        del batch[f"{prefix}labels"]
        lengths = torch.tensor([length, 3, 2])[:, None]
        batch[f"{prefix}attention_mask"] = (torch.arange(length) < lengths).long()
    # The last row is padded on the left: its first token is predicted by padding.
    batch["attention_mask"][2] = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    assert ULD().count(batch) == 6 + 2 + 1
    expected = [
        l1(probabilities(student, row, i, batch, 1.0), probabilities(teacher, row, j, batch, 1.0), None)
        for row, tokens in enumerate(([(i, i) for i in range(1, 7)], [(1, 1), (2, 2)], [(5, 1)]))
        for i, j in tokens
    ]
    compare(ULD()(student, teacher, batch), torch.stack(expected).mean(), [student.logits], 1e-10)


def test_encoder_decoders_are_not_shifted() -> None:
    student, teacher, batch = outputs(0, 7, OWN), outputs(1, 9, ITS), inputs()
    batch["attention_mask"] = torch.ones(3, 20)  # of the encoder's tokens
    for prefix, ends in (("", OWN_ENDS), ("teacher_", ITS_ENDS)):
        batch[f"{prefix}labels"] = torch.where(torch.tensor(ends) > 0, batch[f"{prefix}input_ids"], -100)
        batch[f"{prefix}labels"][:, 0] = 3
    pairs = [
        l1(probabilities(student, row, i, batch, 1.0, 0), probabilities(teacher, row, j, batch, 1.0, 0), None)
        for row in range(3)
        for i, j in zip(
            *([0] + [i for i, end in enumerate(ends[row]) if end > 0] for ends in (OWN_ENDS, ITS_ENDS)), strict=False
        )
    ]
    compare(ULD(causal=False)(student, teacher, batch), torch.stack(pairs).mean(), [student.logits], 1e-10)


@pytest.mark.parametrize("kind", [ULD, GOLD])
def test_nothing_to_compare(kind: Any) -> None:
    student, teacher, batch = outputs(0, 7, OWN), outputs(1, 9, ITS), inputs()
    batch["teacher_labels"] = torch.full_like(batch["teacher_labels"], -100)
    value = kind()(student, teacher, batch)
    assert value.item() == 0
    assert kind().count(batch) == 0
    assert not torch.autograd.grad(value, student.logits)[0].any()


def test_pieces_of_one_character_stay_together() -> None:
    """Both tokens of a character that is two tokens end where it ends."""
    batch = inputs()
    batch["sample_ends"] = torch.tensor([[0, 1, 1, 2, 0, 0, 0]] + [[0] * 7] * 2)
    batch["teacher_ends"] = torch.tensor([[0, 0, 1, 2, 2, 2, 0, 0, 0]] + [[0] * 9] * 2)
    student, teacher = outputs(0, 7, OWN), outputs(1, 9, ITS)
    spans = [([1, 2], [2]), ([3], [3, 4, 5])]
    expected = [
        l1(
            merged(student, 0, own, batch["input_ids"], batch, 1.0),
            merged(teacher, 0, its, batch["teacher_input_ids"], batch, 1.0),
            None,
        )
        for own, its in spans
    ]
    batch["labels"], batch["teacher_labels"] = batch["input_ids"], batch["teacher_input_ids"]
    compare(GOLD()(student, teacher, batch), torch.stack(expected).mean(), [student.logits], 1e-10)


# ---- in a training ----
def test_training_brings_them_together() -> None:
    torch.manual_seed(0)
    student, teacher, batch = outputs(0, 7, OWN), outputs(1, 9, ITS), inputs()
    term, optimizer = GOLD(), torch.optim.Adam([student.logits], lr=0.05)
    start = term(student, teacher, batch).item()
    for _ in range(200):
        optimizer.zero_grad()
        term(student, teacher, batch).backward()
        optimizer.step()
    assert term(student, teacher, batch).item() < 0.4 * start


# ---- what is refused ----
def test_errors() -> None:
    student, teacher, batch = outputs(0, 7, OWN), outputs(1, 9, ITS), inputs()

    def without(*names: str) -> dict[str, Any]:
        return {name: x for name, x in batch.items() if name not in names}

    with pytest.raises(Missing, match=r"^GOLD: inputs: expected rows with teacher_ends, got input_ids, "):
        GOLD()(student, teacher, without("teacher_ends"))
    with pytest.raises(Missing, match=r"^ULD: inputs: expected teacher_labels beside labels, got input_ids, "):
        ULD()(student, teacher, without("teacher_labels"))
    for lacking in ("teacher_ends", "teacher_labels"):  # an evaluation counts before it leaves a term out
        values, missing = Terms(it=GOLD(), ce=Labels("next_tokens")).possible(student, teacher, without(lacking))
        assert (list(values), list(missing)) == (["ce"], ["it"])
        assert GOLD().count(without(lacking)) == 3
    with pytest.raises(Missing, match=r"^ULD: teacher: expected one, or rows with a teacher_logits column"):
        Terms(it=ULD())(student, None, batch)
    with pytest.raises(
        ValueError, match=r"^ULD: teacher's logits: expected \[batch, .* \[3, 9\] tokens, got \[3, 7, 17\]"
    ):
        ULD()(student, outputs(1, 7, ITS), batch)
    with pytest.raises(ValueError, match=r"^GOLD: teacher_ends: expected int64 of the tokens' shape \[3, 9\], got "):
        GOLD()(student, teacher, batch | {"teacher_ends": batch["sample_ends"]})
    with pytest.raises(ValueError, match=r"^ULD: attention_mask: expected the tokens' shape \[3, 7\], got \[3, 5\]"):
        ULD()(student, teacher, batch | {"attention_mask": torch.ones(3, 5)})
    with pytest.raises(ValueError, match=r"^ULD: shared: expected tokens of the student's 11, got 11$"):
        ULD(shared=torch.tensor([[11, 0]]))(student, teacher, batch)
    with pytest.raises(ValueError, match=r"^GOLD: teacher: labels: expected 0 to 10, or ignore_index -100, got 1\d$"):
        GOLD()(student, outputs(1, 9, OWN), batch)
    fallen = batch["sample_ends"].clone()
    fallen[0] = torch.tensor([0, 12, 5, 9, 1, 2, 0])
    with pytest.raises(ValueError, match=r"^GOLD: sample_ends, teacher_ends: expected ends in the order of the text, "):
        GOLD()(student, teacher, batch | {"sample_ends": fallen})


@pytest.mark.parametrize(
    ("settings", "error", "expected"),
    [
        ({"merge": "first"}, ValueError, "merge: expected 'observed' or 'bayesian', got 'first'"),
        ({"temperature": 0}, ValueError, "temperature: expected a finite number > 0, got 0"),
        ({"shared": [[0, 1]]}, TypeError, r"shared: expected an int64 tensor \[n, 2\], got list"),
        ({"shared": torch.zeros(2, 2)}, TypeError, r"shared: expected an int64 tensor \[n, 2\], got torch.float32"),
        ({"shared": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"shared: expected pairs .* got \[2, 3\]"),
        (
            {"shared": torch.tensor([[0, 1], [2, 1]])},
            ValueError,
            "shared: expected each of the teacher's tokens once, got 1 twice",
        ),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], error: type[Exception], expected: str) -> None:
    with pytest.raises(error, match=f"^GOLD: {expected}$"):
        GOLD(**settings)


def test_terms_of_aligned_tokens_name_these() -> None:
    batch = inputs()
    sides = [SimpleNamespace(logits=torch.zeros(3, n, OWN)) for n in (7, 9)]
    with pytest.raises(ValueError, match="of language models: ULD and GOLD"):
        Logits(tokens="all")(*sides, batch)
