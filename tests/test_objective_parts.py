"""Terms of parts of the teacher's distribution, and of next tokens, against plain statements in float64."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from objective_outputs import BATCH, CLASSES, LENGTH, PRECISIONS, TOKEN_LABELS, WEIGHTED, batch, compare, side
from torch import Tensor

from kdfast.objective import DecoupledLogits, Labels, LinearSchedule, Logits, Missing, Terms, TopLogits

ROW_LABELS = torch.tensor([4, 0, -100, 2])
TEMPERED = pytest.mark.parametrize("tempered", [False, True], ids=["", "sample_temperature"])
Distance = Callable[[Tensor, Tensor, int, float], Tensor]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum()


def decoupled(s: Tensor, t: Tensor, label: int, temperature: float, own: float | None = None) -> Tensor:
    """Of one row, as the paper writes it."""
    first, second = own or temperature, temperature
    b = [torch.stack((p[label], 1 - p[label])) for p in ((z / first).softmax(-1) for z in (t, s))]
    others = [i for i in range(len(s)) if i != label]
    q = [p[others] / p[others].sum() for p in ((z / second).softmax(-1) for z in (t, s))]
    return 1.5 * first**2 * kl(*b) + 6.0 * second**2 * kl(*q)


def by_hand(distance: Distance, student: Any, teacher: Any, inputs: Any, temperature: float, labels: Tensor) -> Tensor:
    """The mean over rows, or tokens, whose label counts."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for at in (labels != -100).nonzero().tolist():
        row = at[0]
        weight = inputs.get("sample_weight", torch.ones(BATCH))[row].double()
        own = float(inputs["sample_temperature"][row]) if "sample_temperature" in inputs else temperature
        s, t = student.logits[tuple(at)].double(), teacher.logits[tuple(at)].double()
        total = total + weight * distance(s, t, int(labels[tuple(at)]), own)
        count += 1
    return total / count


# ---- decoupled ----
@PRECISIONS
@WEIGHTED
@TEMPERED
@pytest.mark.parametrize("tokens", [None, "labels"])
def test_decoupled(tokens: str | None, tempered: bool, weighted: bool, dtype: torch.dtype, tolerance: float) -> None:
    labels = TOKEN_LABELS if tokens else ROW_LABELS
    student, teacher = (side(i, dtype, tokens=tokens is not None) for i in (0, 1))
    inputs = batch(weighted, tempered, labels=labels)
    term = DecoupledLogits(temperature=3.0, alpha=1.5, beta=6.0, tokens=tokens)
    expected = by_hand(decoupled, student, teacher, inputs, 3.0, labels)
    compare(term(student, teacher, inputs), expected, [student.logits], tolerance)
    assert term.count(inputs) == (labels != -100).sum()


def test_parts_with_temperatures_of_their_own() -> None:
    student, teacher, inputs = side(0), side(1), batch(labels=ROW_LABELS)
    term = DecoupledLogits(temperature=3.0, target_temperature=1.5, alpha=1.5, beta=6.0)
    expected = by_hand(lambda s, t, y, own: decoupled(s, t, y, own, 1.5), student, teacher, inputs, 3.0, ROW_LABELS)
    compare(term(student, teacher, inputs), expected, [student.logits], 1e-10)
    plain = DecoupledLogits(temperature=3.0, alpha=1.5, beta=6.0, t_squared=False)
    nine = DecoupledLogits(temperature=3.0, alpha=1.5, beta=6.0)
    values = [term(student, teacher, inputs).item() for term in (nine, plain)]
    assert values[0] == pytest.approx(9 * values[1])


def test_parts_make_the_whole() -> None:
    """KL is the first part, and of every row (1 - p_t,y) times the second."""
    student, teacher, labels = side(0), side(1), torch.tensor([4, 0, 1, 2])
    first = DecoupledLogits(temperature=2.0, beta=0.0)(student, teacher, batch(labels=labels))
    rest = 1 - (teacher.logits / 2).softmax(-1).gather(-1, labels[:, None])[:, 0]
    inputs = batch(labels=labels) | {"sample_weight": rest}
    second = DecoupledLogits(temperature=2.0, alpha=0.0, beta=1.0)(student, teacher, inputs)
    whole = Logits(temperature=2.0)(student, teacher, batch())
    compare(first + second, whole, [student.logits], 1e-10)


def test_two_classes_have_one_part() -> None:
    s, t = torch.tensor([[1.0, -0.5], [0.3, 2.0]], requires_grad=True), torch.tensor([[0.2, 0.1], [3.0, -1.0]])
    sides, inputs = (SimpleNamespace(logits=s), SimpleNamespace(logits=t)), {"labels": torch.tensor([0, 1])}
    value = DecoupledLogits(temperature=1.0, beta=8.0)(*sides, inputs)
    compare(value, Logits()(*sides, inputs), [s], 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoupled_in_half_precision(dtype: torch.dtype) -> None:
    student, teacher = side(0, dtype), side(1, dtype)
    inputs = batch(labels=ROW_LABELS)
    term = DecoupledLogits(temperature=3.0, alpha=1.5, beta=6.0)
    value = term(student, teacher, inputs)
    expected = by_hand(decoupled, student, teacher, inputs, 3.0, ROW_LABELS)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    got, exact = (torch.autograd.grad(x, student.logits)[0].double() for x in (value, expected))
    assert float((got - exact).norm()) < 1e-2 * float(exact.norm())


def test_rows_without_a_label_are_not_read() -> None:
    for make in (DecoupledLogits, lambda: DecoupledLogits(tokens="labels")):
        term = make()
        labels = TOKEN_LABELS if term.tokens else ROW_LABELS
        sides = [side(i, tokens=term.tokens is not None) for i in (0, 1)]
        logits = [torch.where((labels == -100)[..., None], torch.nan, one.logits) for one in sides]
        clean = term(*sides, batch(labels=labels))
        read = term(*(SimpleNamespace(logits=z) for z in logits), batch(labels=labels))
        assert float(clean) > 0
        assert float(read) == float(clean)
        (gradient,) = torch.autograd.grad(read, sides[0].logits)
        assert gradient.isfinite().all()
        assert not gradient[labels == -100].any()
        nothing = term(*sides, batch(labels=torch.full_like(labels, -100)))
        assert float(nothing) == 0


def test_sure_teachers_and_impossible_classes() -> None:
    s = torch.tensor([[30.0, -40.0, 2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[200.0, -torch.inf, 3.0, 0.5]], dtype=torch.float64)
    inputs = {"labels": torch.tensor([0])}
    value = DecoupledLogits(temperature=1.0)(SimpleNamespace(logits=s), SimpleNamespace(logits=t), inputs)
    q = [z[0, [2, 3]].softmax(-1) for z in (t, s)]  # the student's third other class has e^-42 of them
    assert float(value) == pytest.approx(float(8 * kl(*q)), rel=1e-9)
    assert torch.autograd.grad(value, s)[0].isfinite().all()


def test_padded_vocabulary() -> None:
    student, teacher, inputs = side(0), side(1), batch(labels=ROW_LABELS)
    wide = [SimpleNamespace(logits=F.pad(one.logits, (0, n), value=50.0)) for one, n in ((student, 3), (teacher, 1))]
    for make in (DecoupledLogits, lambda **own: TopLogits(3, **own)):
        plain, padded = make(), make(vocab_size=CLASSES)
        compare(padded(*wide, inputs), plain(student, teacher, inputs), [student.logits], 1e-12)


# ---- the teacher's largest classes ----
def of_top(tail: str, k: int) -> Distance:
    def distance(s: Tensor, t: Tensor, label: int, temperature: float) -> Tensor:
        p, q = ((z / temperature).softmax(-1) for z in (t, s))
        top = p.topk(k).indices
        a, b = p[top], q[top]
        if tail == "renormalize":
            a = a / a.sum()
        if tail == "bucket":
            a, b = (torch.cat((x, 1 - x.sum(-1, keepdim=True))) for x in (a, b))
        return temperature**2 * kl(a, b)

    return distance


@PRECISIONS
@WEIGHTED
@TEMPERED
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
@pytest.mark.parametrize("tokens", [None, "labels"])
def test_top(
    tokens: str | None, tail: str, tempered: bool, weighted: bool, dtype: torch.dtype, tolerance: float
) -> None:
    labels = TOKEN_LABELS if tokens else torch.zeros(BATCH, dtype=torch.long)
    student, teacher = (side(i, dtype, tokens=tokens is not None) for i in (0, 1))
    inputs = batch(weighted, tempered, labels=labels)
    term = TopLogits(3, tail=tail, temperature=2.0, tokens=tokens)
    expected = by_hand(of_top(tail, 3), student, teacher, inputs, 2.0, labels)
    compare(term(student, teacher, inputs), expected, [student.logits], tolerance)


def test_all_classes_are_logits() -> None:
    student, teacher, inputs = side(0), side(1), batch()
    for tail in ("bucket", "renormalize", "drop"):
        whole = TopLogits(CLASSES, tail=tail, temperature=2.0)(student, teacher, inputs)
        compare(whole, Logits(temperature=2.0)(student, teacher, inputs), [student.logits], 1e-10)


def test_padding_does_not_count() -> None:
    student, teacher = (side(i, tokens=True) for i in (0, 1))
    inputs = batch()
    mask = inputs["attention_mask"].bool()
    labels = torch.where(mask, 0, -100)
    expected = by_hand(of_top("bucket", 2), student, teacher, inputs, 1.0, labels)
    compare(TopLogits(2, tokens="all")(student, teacher, inputs), expected, [student.logits], 1e-10)


# ---- next tokens ----
@PRECISIONS
@WEIGHTED
def test_next_tokens(weighted: bool, dtype: torch.dtype, tolerance: float) -> None:
    student, inputs = side(0, dtype, tokens=True), batch(weighted, labels=TOKEN_LABELS)
    term = Labels("next_tokens")
    weight = inputs.get("sample_weight", torch.ones(BATCH)).double()
    losses = [
        -weight[b] * student.logits[b, i - 1].double().log_softmax(-1)[TOKEN_LABELS[b, i]]
        for b in range(BATCH)
        for i in range(1, LENGTH)
        if TOKEN_LABELS[b, i] != -100
    ]
    compare(term(student, None, inputs), torch.stack(losses).mean(), [student.logits], tolerance)
    assert term.count(inputs) == len(losses)


# ---- as terms ----
def test_in_an_objective() -> None:
    student, teacher, inputs = side(0), side(1), batch(labels=ROW_LABELS)
    objective = Terms(
        dkd=DecoupledLogits(weight=LinearSchedule(0.0, 2.0)), top=TopLogits(2, weight=0.5), ce=Labels(weight=0.3)
    )
    assert list(objective(student, teacher, inputs)) == ["top", "ce"]  # the schedule begins at 0
    objective.progress = 0.5
    values = objective(student, teacher, inputs)
    assert float(values["dkd"]) == pytest.approx(float(DecoupledLogits()(student, teacher, inputs)))
    assert objective.num_items(inputs).tolist() == [3, BATCH, 3]
    # Micro-batches of unequal numbers of labels, as one batch.
    parts = []
    for rows in (slice(0, 2), slice(2, 4)):
        of = {name: x[rows] for name, x in inputs.items()} | {"num_items": objective.num_items(inputs)}
        one = [SimpleNamespace(logits=x.logits[rows]) for x in (student, teacher)]
        parts.append(objective(*one, of))
    for name, value in values.items():
        assert float(sum(part[name] for part in parts)) == pytest.approx(float(value)), name


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: DecoupledLogits(beta=-1.0), "DecoupledLogits: beta: expected a number that is not negative, got -1.0"),
        (
            lambda: DecoupledLogits(temperature=0.0),
            "DecoupledLogits: temperature: expected a finite number > 0, got 0.0",
        ),
        (
            lambda: DecoupledLogits(target_temperature=-1),
            "DecoupledLogits: target_temperature: expected a number > 0, got -1",
        ),
        (lambda: DecoupledLogits(tokens="all"), "DecoupledLogits: tokens: expected None or 'labels': .*, got 'all'"),
        (lambda: TopLogits(0), "TopLogits: k: expected 1 or more, got 0"),
        (lambda: TopLogits(2, tail="cut"), "TopLogits: tail: expected 'bucket', 'renormalize' or 'drop', got 'cut'"),
    ],
)
def test_settings_that_are_refused(make: Callable[[], Any], expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{expected}$"):
        make()


def test_other_errors() -> None:
    student, teacher = side(0), side(1)
    with pytest.raises(TypeError, match=r"^TopLogits: k: expected an int, got float$"):
        TopLogits(2.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^DecoupledLogits: arguments: expected .*, got 'skew'$"):
        DecoupledLogits(skew=0.1)
    with pytest.raises(ValueError, match=r"^TopLogits: k: expected at most 5, the classes that there are, got 6$"):
        TopLogits(6)(student, teacher, batch())
    with pytest.raises(Missing, match=r"^DecoupledLogits: inputs: expected rows with labels, got input_ids"):
        DecoupledLogits()(student, teacher, batch())
    with pytest.raises(ValueError, match=r"^DecoupledLogits: labels: expected 0 to 4, or ignore_index -100, got 7$"):
        DecoupledLogits()(student, teacher, batch(labels=torch.tensor([0, 7, 1, 1])))
    with pytest.raises(TypeError, match=r"^DecoupledLogits: labels: expected an int64 tensor"):
        DecoupledLogits()(student, teacher, batch(labels=torch.rand(BATCH)))
    with pytest.raises(ValueError, match=r"^DecoupledLogits: teacher_logits: expected the student's width 5"):
        DecoupledLogits()(student, SimpleNamespace(logits=torch.zeros(BATCH, 9)), batch(labels=ROW_LABELS))
    with pytest.raises(ValueError, match=r"^Labels: labels: expected shape \[4, 6\] for task 'next_tokens'"):
        Labels("next_tokens")(side(0, tokens=True), None, batch(labels=TOKEN_LABELS[:, 1:]))
