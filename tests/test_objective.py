"""kdfast.objective: terms of logits and labels, what Terms does with terms, stored teachers, layer maps, schedules."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from objective_outputs import (
    BATCH,
    CLASSES,
    LENGTHS,
    MASK,
    PRECISIONS,
    TOKEN_LABELS,
    WEIGHTED,
    ByHand,
    batch,
    check,
    compare,
    kl,
    leaves,
    rows_of,
    side,
)
from torch import Tensor

from kdfast.objective import (
    CLS,
    Attention,
    Cosine,
    Embedding,
    ExponentialSchedule,
    Hidden,
    Labels,
    LinearSchedule,
    Logits,
    Relations,
    StageSchedule,
    Terms,
    layer_map,
)

ALL = torch.ones(BATCH, dtype=torch.bool)


# ---- logits ----
def mixed(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    return (share * log_p.exp() + (1 - share) * log_q.exp()).log()


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of log-probabilities of student and teacher
    "kl_div": lambda s, t: kl(t, s),
    "reverse_kl_div": lambda s, t: kl(s, t),
    "symmetric_kl_div": lambda s, t: (kl(t, s) + kl(s, t)) / 2,
    "js_div": lambda s, t: 0.3 * kl(t, mixed(t, s, 0.3)) + 0.7 * kl(s, mixed(t, s, 0.3)),
    "skew_kl_div": lambda s, t: kl(t, mixed(t, s, 0.2)),
    "skew_reverse_kl_div": lambda s, t: kl(s, mixed(s, t, 0.2)),
    "total_variation": lambda s, t: (s.exp() - t.exp()).abs().sum(-1) / 2,
    "soft_cross_entropy": lambda s, t: -(t.exp() * s).sum(-1),
}
SETTINGS = {"js_div": {"beta": 0.3}, "skew_kl_div": {"skew": 0.2}, "skew_reverse_kl_div": {"skew": 0.2}}


def logits_by_hand(term: Logits, rows: Tensor, columns: int = CLASSES) -> ByHand:
    def value(student: Any, teacher: Any, inputs: Any) -> Tensor:
        s, t = student.logits[..., :columns][rows], teacher.logits[..., :columns][rows]
        own = rows.nonzero()[:, 0]  # the sequence of each counted row
        temperature = torch.as_tensor(inputs.get("sample_temperature", term.temperature), dtype=s.dtype)
        temperature = temperature.expand(BATCH)[own]
        s, t = s / temperature[:, None], t / temperature[:, None]
        if term.divergence == "logit_mse":
            losses = (s - t).square().mean(-1)
        else:
            losses = DIVERGENCES[term.divergence](s.log_softmax(-1), t.log_softmax(-1))
        weight = torch.as_tensor(inputs.get("sample_weight", 1.0), dtype=s.dtype).expand(BATCH)[own]
        factor = (temperature**2 if term.t_squared else 1) / (columns if term.per_class else 1)
        return (weight * factor * losses).mean()

    return value


@PRECISIONS
@pytest.mark.parametrize("divergence", [*DIVERGENCES, "logit_mse"])
def test_every_divergence(divergence: str, dtype: torch.dtype, tolerance: float) -> None:
    term = Logits(divergence, temperature=1.7, **SETTINGS.get(divergence, {}))
    check(term, logits_by_hand(term, ALL), side(0, dtype), side(1, dtype), batch(), tolerance)


@WEIGHTED
@pytest.mark.parametrize("tempered", [False, True], ids=["", "sample_temperature"])
@pytest.mark.parametrize("tokens", [None, "all", "labels"])
@pytest.mark.parametrize(("t_squared", "per_class"), [(True, False), (False, False), (True, True)])
def test_logits(t_squared: bool, per_class: bool, tokens: str | None, tempered: bool, weighted: bool) -> None:
    term = Logits(temperature=3.0, t_squared=t_squared, per_class=per_class, tokens=tokens)
    rows = {None: ALL, "all": MASK, "labels": TOKEN_LABELS != -100}[tokens]
    student, teacher = (side(seed, tokens=tokens is not None) for seed in (0, 1))
    inputs = batch(weighted, tempered, labels=TOKEN_LABELS)
    if tokens:
        teacher.logits[~rows] = torch.nan  # what does not count is not read
    check(term, logits_by_hand(term, rows), student, teacher, inputs, 1e-10)


def test_logits_of_a_padded_vocabulary() -> None:
    term = Logits(per_class=True, vocab_size=3)
    check(term, logits_by_hand(term, ALL, columns=3), side(0), side(1), batch(), 1e-10)


# ---- labels ----
@PRECISIONS
@WEIGHTED
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("task", ["classification", "tokens", "multi_label", "regression", "regression of one column"])
def test_labels(task: str, label_smoothing: float, weighted: bool, dtype: torch.dtype, tolerance: float) -> None:
    student = side(0, dtype, tokens=task == "tokens")
    labels = {
        "classification": torch.tensor([1, -100, 4, 0]),
        "tokens": TOKEN_LABELS,
        "multi_label": torch.arange(BATCH * CLASSES).view(BATCH, CLASSES) % 3 == 0,
    }.get(task, torch.tensor([0.5, -1.0, 2.0, 3.25]))
    if task.startswith("regression"):
        student.outputs.logits = student.logits[:, :1] if "column" in task else student.logits[:, 0]

    def by_hand(student: Any, teacher: Any, inputs: Any) -> Tensor:
        z, w = student.logits, inputs.get("sample_weight", torch.ones(BATCH)).to(dtype)
        if task in ("classification", "tokens"):
            at, counted = z.log_softmax(-1), labels != -100
            right = at.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            losses = -(1 - label_smoothing) * right - label_smoothing * at.mean(-1)
            return (losses * w.view(-1, *[1] * (labels.dim() - 1)))[counted].sum() / counted.sum()
        if task == "multi_label":
            p = z.sigmoid()
            return -(w * torch.where(labels, p.log(), (1 - p).log()).mean(-1)).sum() / BATCH
        return (w * (z.view(BATCH) - labels) ** 2).sum() / BATCH

    term = Labels(task.split()[0], label_smoothing=label_smoothing)
    inputs = batch(weighted, labels=labels)
    compare(term(student, None, inputs), by_hand(student, None, inputs), [student.logits], tolerance)
    if task in ("classification", "tokens"):
        value = term(student, None, {**inputs, "labels": torch.full_like(labels, -100)})
        assert value == 0
        assert not torch.autograd.grad(value, student.logits)[0].any()


# ---- terms together ----
TERMS: dict[str, Callable[[], Any]] = {
    "logits": lambda: Logits(temperature=2.0),
    "tokens": lambda: Logits(tokens="all"),
    "targets": lambda: Logits("reverse_kl_div", tokens="labels"),
    "labels of rows": Labels,
    "labels of tokens": lambda: Labels("tokens"),
    "hidden": Hidden,
    "hidden with padding": lambda: Hidden(masked=False),
    "embedding": Embedding,
    "cosine": Cosine,
    "cls": lambda: CLS("last"),
    "attention": Attention,
    "relations": Relations,
}


@WEIGHTED
@pytest.mark.parametrize("name", TERMS)
def test_unequal_micro_batches_add_up(name: str, weighted: bool) -> None:
    tokens = "to" in name or name == "targets"
    term, student, teacher = TERMS[name](), side(0, tokens=tokens), side(1, layers=4, tokens=tokens)
    if name == "embedding":
        teacher = side(1, tokens=tokens)
    objective = Terms(it=term)
    inputs = batch(weighted, labels=TOKEN_LABELS if tokens else torch.tensor([1, -100, 4, 0]))
    parts = [torch.tensor([0]), torch.tensor([2, 1, 3])]
    columns = [{key: value[rows] for key, value in inputs.items()} for rows in parts]
    num_items = torch.stack([objective.num_items(part) for part in columns]).sum(0)
    assert num_items == objective.num_items(inputs)
    total = sum(
        objective(rows_of(student, rows), rows_of(teacher, rows), {**part, "num_items": num_items})["it"]
        for rows, part in zip(parts, columns, strict=True)
    )
    compare(total, objective(student, teacher, inputs)["it"], leaves(student), 1e-6)  # counts are float32


def test_stored_teacher_gives_what_a_live_one_does() -> None:
    teacher = side(1, layers=4)
    objective = Terms(
        kl=Logits(temperature=2.0), cls=CLS({1: 2, -1: 4}), hidden=Hidden({1: 2}), cosine=Cosine({2: 0}, weight=2.0)
    )
    stored: dict[str, Any] = {"teacher_logits": teacher.logits, "teacher_hidden_2": teacher.hidden[2]}
    stored |= {f"teacher_cls_{i}": teacher.hidden[i][:, 0] for i in (2, 4)} | {"teacher_hidden_0": teacher.hidden[0]}
    student = side(0, cls_index=LENGTHS - 1)
    for outputs in (None, SimpleNamespace(logits=teacher.logits)):  # what the trainer makes of teacher_logits
        live, values = objective(student, teacher, batch()), objective(student, outputs, batch(**stored))
        for name, value in values.items():
            compare(value, live[name], leaves(student), 1e-12)
    with pytest.raises(ValueError, match="CLS: teacher: expected one, or rows with a teacher_cls_4 column"):
        objective(student, None, batch(**{k: v for k, v in stored.items() if k != "teacher_cls_4"}))
    with pytest.raises(ValueError, match="Hidden: teacher: expected one, or rows with a teacher_hidden_2 column"):
        Terms(hidden=Hidden({1: 2}))(student, None, batch())
    for layers in ("skip", {1: -1}):
        with pytest.raises(
            ValueError, match=r"CLS: layers: expected a dict of numbers from 0 where the teacher's states"
        ):
            Terms(cls=CLS(layers))(student, None, batch(**stored))
    with pytest.raises(ValueError, match="Attention: teacher: expected one, as attention is not stored, got none"):
        Terms(attention=Attention())(student, None, batch(**stored))


class Exploding(Logits):
    def forward(self, student: Any, teacher: Any, inputs: Any) -> Tensor:
        raise AssertionError("a term of weight 0 was computed")


def test_a_term_of_weight_zero_needs_nothing() -> None:
    student = side(0, tokens=True)
    off: dict[str, Any] = {"off": Exploding(weight=0.0), "targets": Logits(tokens="labels", weight=0)}
    objective = Terms(**off, ce=Labels("tokens"), later=Exploding(weight=StageSchedule({0.0: 0.0, 0.5: 1.0})))
    values = objective(student, None, batch(labels=TOKEN_LABELS))
    assert list(values) == ["ce"]
    assert values["ce"] > 0
    objective.progress = 0.5
    with pytest.raises(AssertionError, match="weight 0 was computed"):
        objective(student, None, batch(labels=TOKEN_LABELS))
    unlabelled = Terms(ce=Labels(weight=0), targets=Logits(tokens="labels", weight=0), cosine=Cosine())
    assert unlabelled.num_items(batch())[2] == MASK.sum()
    assert list(unlabelled(student, side(1), batch())) == ["cosine"]


def test_weights_follow_the_progress() -> None:
    student, inputs = side(0), batch(labels=torch.arange(BATCH))
    alone = Labels()(student, None, inputs).item()
    schedules = {"linear": LinearSchedule(2.0, 0.5), "exponential": ExponentialSchedule(4.0, 1.0)}
    stages = StageSchedule({0.0: 1.0, 0.6: 0.0, 0.9: 3.0})
    objective = Terms(
        constant=Labels(weight=7), stage=Labels(weight=stages), **{k: Labels(weight=w) for k, w in schedules.items()}
    )
    expected = {
        0.0: (7, 1, 2, 4),
        0.5: (7, 1, 1.25, 2),
        0.6: (7, 0, 1.1, 4**0.4),
        0.9: (7, 3, 0.65, 4**0.1),
        1.0: (7, 3, 0.5, 1),
    }
    for progress, weights in expected.items():
        objective.progress = progress
        values = objective(student, None, inputs)
        got = [
            values[name].item() / alone if name in values else 0
            for name in ("constant", "stage", "linear", "exponential")
        ]
        assert got == pytest.approx(list(weights), rel=1e-12)


# ---- layer maps: Patient-KD's tables, in states, and rounding ----
@pytest.mark.parametrize(
    ("layers", "student", "teacher", "expected"),
    [
        ("skip", 6, 12, {1: 2, 2: 4, 3: 6, 4: 8, 5: 10}),
        ("last", 6, 12, {1: 7, 2: 8, 3: 9, 4: 10, 5: 11}),
        ("skip", 3, 12, {1: 4, 2: 8}),
        ("last", 3, 12, {1: 10, 2: 11}),
        ("skip", 6, 24, {1: 4, 2: 8, 3: 12, 4: 16, 5: 20}),
        ("last", 6, 24, {1: 19, 2: 20, 3: 21, 4: 22, 5: 23}),
        ("uniform", 4, 12, {1: 3, 2: 6, 3: 9, 4: 12}),
        ("uniform", 6, 12, {1: 2, 2: 4, 3: 6, 4: 8, 5: 10, 6: 12}),
        ("uniform", 1, 12, {1: 12}),
        ("uniform", 12, 12, {i: i for i in range(1, 13)}),
        ("uniform", 5, 12, {1: 2, 2: 5, 3: 7, 4: 10, 5: 12}),  # 2.4, 4.8, 7.2, 9.6 rounded
        ("uniform", 4, 6, {1: 2, 2: 3, 3: 5, 4: 6}),  # 1.5 and 4.5 are rounded up, both
        ("skip", 4, 6, {1: 2, 2: 3, 3: 5}),
        ({-1: -1}, 6, 12, {6: 12}),
        ({3: 7, -6: -11, 0: 0}, 6, 12, {0: 0, 1: 2, 3: 7}),
        ({-7: -13}, 6, 12, {0: 0}),
        ({4: 2}, 4, 2, {4: 2}),  # a dict may go to a shallower teacher
    ],
)
def test_layer_map(layers: Any, student: int, teacher: int, expected: dict[int, int]) -> None:
    found = layer_map(layers, student, teacher)
    assert found == expected
    assert list(found) == sorted(found)
