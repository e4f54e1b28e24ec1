"""What kdfast.objective refuses, and that every error says where, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from objective_outputs import BATCH, batch, side
from torch import Tensor, nn

import kdfast
from kdfast.objective import (
    CLS,
    Attention,
    ExponentialSchedule,
    Hidden,
    Hinton,
    Labels,
    LanguageModel,
    LinearSchedule,
    Logits,
    Relations,
    Spans,
    StageSchedule,
    Term,
    Terms,
    layer_map,
)

TINY = side(0), side(1, layers=3), batch(labels=torch.arange(BATCH))


def labels(task: str, of: Tensor) -> Callable[[], Tensor]:
    return lambda: Labels(task)(TINY[0], None, batch(labels=of))


class Own(Term):
    """The last hidden state that the teacher has, or what is made of it."""

    def __init__(self, needs: str, made: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.needs, self.made = needs, made

    def forward(self, student: Any, teacher: Any, inputs: Any) -> Any:
        return self.made(student.hidden[-1] - teacher.hidden[-1])


class Uninitialised(Term):
    def __init__(self) -> None:
        self.width = 3


class Plain(nn.Module):
    """No model of transformers."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=input_ids.float())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Logits("kl"), r"Logits: divergence: expected one of kl_div, .*, got 'kl'"),
        (lambda: Logits(temperature=0), r"Logits: temperature: expected a finite number > 0, got 0"),
        (lambda: Logits(tokens="mask"), r"Logits: tokens: expected None, 'all' or 'labels', got 'mask'"),
        (
            lambda: Logits(weight=-1),
            r"Logits: weight: expected a number that is not negative, or a schedule .*, got -1",
        ),
        (lambda: Labels("tagging"), r"Labels: task: expected one of classification, .*, got 'tagging'"),
        (lambda: Labels(label_smoothing=2), r"Labels: label_smoothing: expected a number from 0 to 1, got 2"),
        (lambda: Hidden("every"), r"Hidden: layers: expected one of uniform, skip, last or a dict, got 'every'"),
        (lambda: CLS({}), r"CLS: layers: expected at least one pair, got none"),
        (lambda: Relations(relations=["qx"]), r"Relations: relations: expected pairs of q, k and v .*, got \['qx'\]"),
        (lambda: Terms(), r"Terms: terms: expected at least one, got none"),
        (
            lambda: StageSchedule({0.5: 1.0}),
            r"StageSchedule: stages: expected beginnings from 0.0 on, below 1, got \[0.5\]",
        ),
        (lambda: ExponentialSchedule(1.0, 0.0), r"ExponentialSchedule: start, end: expected positive .*, got 1.0, 0.0"),
        (lambda: Hinton(alpha=2), r"Hinton: alpha: expected a number from 0 to 1, got 2"),
        (
            lambda: layer_map("skip", 12, 6),
            r"layer_map: layers: expected a dict .*, got 'skip' for a student of 12 layers",
        ),
        (
            lambda: layer_map("last", 1, 6),
            r"layer_map: layers: expected a dict where the rule has no pairs, got 'last'",
        ),
        (lambda: layer_map({7: 1}, 6, 12), r"layer_map: layers: expected states of the student from 0 to 6, got 7"),
        (
            lambda: layer_map({1: -14}, 6, 12),
            r"layer_map: layers: expected states of the teacher from 0 to 12, got -14",
        ),
        (
            lambda: Logits()(TINY[0], SimpleNamespace(logits=None), {}),
            r"Logits: teacher: expected one, or rows with a teacher_logits",
        ),
        (
            lambda: Terms(a=Logits())(TINY[0], None, TINY[2]),
            r"Logits: teacher: expected one, or rows with a teacher_logits column, got neither",
        ),
        (
            lambda: Logits(tokens="all")(*TINY),
            r"Logits: logits: expected \[batch, length, vocabulary\] .*, got \[4, 5\]",
        ),
        (
            lambda: Logits(tokens="labels")(side(0, tokens=True), side(1, tokens=True), batch()),
            r"Logits: inputs: expected rows with labels for tokens='labels', got ",
        ),
        (lambda: Labels()(TINY[0], None, batch()), r"Labels: inputs: expected rows with labels, got "),
        (
            lambda: Labels()(side(0, tokens=True), None, TINY[2]),
            r"Labels: logits: expected \[batch, classes\] for task 'classification', got \[4, 6, 5\]",
        ),
        (lambda: Hidden({3: 1})(*TINY), r"Hidden: layers: expected states of the student from 0 to 2, got 3"),
        (lambda: Hidden()(side(0, width=8), TINY[1], TINY[2]), r"hidden_mse: projection: expected one, \[12, 8\]"),
        (
            lambda: Hidden(projection=[nn.Linear(12, 12)] * 3)(*TINY),
            r"Hidden: projection: expected one nn.Linear, or 2, one per layer, got 3",
        ),
        (lambda: Attention({0: 1})(*TINY), r"Attention: layers: expected layers from 1, as .*, got {0: 1}"),
        (lambda: Terms(a=Labels(weight=0))(*TINY), r"Terms: terms: expected one whose weight is not 0 at 0%, got none"),
        # ---- settings ----
        (
            lambda: Logits(temprature=4),
            r"Logits: arguments: expected some of weight, temperature, .*, got 'temprature'",
        ),
        (lambda: Logits("kl_div", beta=0.5), r"Logits: arguments: .*, vocab_size beside 'kl_div', got 'beta'"),
        (lambda: Logits("js_div", skew=0.5), r"Logits: arguments: .*, vocab_size, beta beside 'js_div', got 'skew'"),
        (lambda: Logits("js_div", beta=2), r"Logits: beta: expected a number from 0 to 1, got 2"),
        (lambda: Logits(temperature="4"), r"Logits: temperature: expected a number, got str"),
        (lambda: Spans(temperature=torch.tensor(2.0)), r"Spans: temperature: expected a number, got torch.float32"),
        (
            lambda: LanguageModel(temperature=torch.tensor(2.0)),
            r"LanguageModel: temperature: expected a number, got torch.float32",
        ),
        (lambda: Logits(weight="0.5"), r"Logits: weight: expected a number that is not negative, .*, got '0.5'"),
        (lambda: Logits(weight=True), r"Logits: weight: expected a number that is not negative, .*, got True"),
        (lambda: LinearSchedule(True, 0), r"LinearSchedule: start: expected a number that is not negative, got True"),
        (lambda: Labels(weight=lambda p: -p - 0.1), r"Labels: weight: expected a number that is not .*, got -0.1"),
        (lambda: Labels(weight=lambda p: 0.5 - p), r"Labels: weight: expected a number that is not .*, got -0.5"),
        (lambda: CLS(weight=float("nan")), r"CLS: weight: expected a number that is not negative, .*, got nan"),
        (
            lambda: Labels(weight=lambda p: -(p % 1)).weight_at(0.3),
            r"Labels: weight: expected a number that is not negative, .*, got -0.3",
        ),
        (lambda: LinearSchedule("a", 1), r"LinearSchedule: start: expected a number that is not negative, got 'a'"),
        (lambda: LinearSchedule(1, -1), r"LinearSchedule: end: expected a number that is not negative, got -1"),
        (lambda: ExponentialSchedule(1, None), r"ExponentialSchedule: end: expected a number that .*, got None"),
        (lambda: StageSchedule({0.0: 1, 0.5: -1}), r"StageSchedule: stages: expected a number that .*, got -1"),
        (lambda: StageSchedule(1.0), r"StageSchedule: stages: expected a dict of beginnings to weights, .*, got 1.0"),
        (lambda: Hidden([1, 3]), r"Hidden: layers: expected one of uniform, .* or a dict of .*, got \[1, 3\]"),
        (lambda: Hidden(1), r"Hidden: layers: expected one of uniform, .* or a dict of .*, got 1"),
        (lambda: Hidden({"1": "2"}), r"Hidden: layers: expected one of uniform, .* or a dict of .*, got {'1': '2'}"),
        (
            lambda: Hidden(projection=nn.Linear.__call__)(*TINY),
            r"Hidden: projection: expected one that Terms.for_models\(student, teacher\) made, got <function",
        ),
        (
            lambda: Terms(it=Hidden(projection=lambda a, b: nn.Linear(a, b))).for_models(nn.Linear(2, 2), None),
            r"Hidden: projection: expected a module where a model's config has no hidden_size, or there is no teacher",
        ),
        (
            lambda: Hidden(projection=(64, 96)),
            r"Hidden: projection: expected an nn.Linear, or a list .*, got \(64, 96\)",
        ),
        (
            lambda: Hidden(projection=nn.Sequential(nn.Linear(12, 12))),
            r"Hidden: projection: expected an nn.Linear, or a list of them, .*, got <class '.*Sequential'>",
        ),
        (lambda: Attention(head_map=3), r"Attention: head_map: expected the teacher's head of every .*, got 3"),
        (lambda: Relations(relation_heads="4"), r"Relations: relation_heads: expected an int, got str"),
        (
            lambda: StageSchedule({0.0: 1, "half": 0}),
            r"StageSchedule: stages: expected beginnings .*, got \[0.0, 'half'\]",
        ),
        (lambda: Hinton(alpha=LinearSchedule(1, 0)), r"Hinton: alpha: expected a number, got LinearSchedule"),
        (lambda: Hinton(temperature="2"), r"Hinton: temperature: expected a number, got str"),
        (
            lambda: Logits(temperature=LinearSchedule(1, 2)),
            r"Logits: temperature: expected a number, got LinearSchedule",
        ),
        (
            lambda: Labels(label_smoothing=LinearSchedule(1, 0)),
            r"Labels: label_smoothing: expected a number, got Linear",
        ),
        # ---- batches ----
        (
            labels("classification", torch.rand(BATCH)),
            r"Labels: labels: expected an int64 tensor .*, got torch.float32",
        ),
        (
            labels("classification", torch.arange(4) + 2),
            r"Labels: labels: expected 0 to 4, or ignore_index -100, got 5",
        ),
        (
            labels("tokens", torch.arange(BATCH)),
            r"Labels: logits: expected \[batch, length, vocabulary\] .*, got \[4, 5\]",
        ),
        (
            labels("multi_label", torch.arange(BATCH)),
            r"Labels: labels: expected shape \[4, 5\] for task 'multi_label' .*, got \[4\]",
        ),
        (
            labels("regression", torch.rand(BATCH)),
            r"Labels: labels: expected shape \[4, 5\] for task 'regression' .*, got \[4\]",
        ),
        *(
            (
                lambda column=column, values=values: Terms(it=Labels())(TINY[0], None, {**TINY[2], column: values}),
                rf"Terms: {column}: expected {message}",
            )
            for column, values, message in (
                ("sample_weight", torch.ones(3), r"shape \[4\], a number per row, got \[3\]"),
                ("sample_weight", torch.tensor([1.0, 0, -2, 1]), "numbers that are not negative, got -2.0"),
                ("sample_temperature", torch.ones(BATCH, 1), r"shape \[4\], a number per row, got \[4, 1\]"),
            )
        ),
        # ---- terms together ----
        (
            lambda: Terms(Logits()),
            r"Terms: terms: expected some by name, such as Terms\(kl=Logits\(\)\), got Logits alone",
        ),
        (lambda: Terms(kl=nn.KLDivLoss()), r"Terms: kl: expected a kdfast.objective.Term, got KLDivLoss"),
        (lambda: Terms(kl=Logits), r"Terms: kl: expected a kdfast.objective.Term, got the class Logits"),
        *(
            (lambda name=name: Terms(**{name: Labels()}), rf"Terms: name: expected one without a dot, .*, got '{name}'")
            for name in ("loss", "epoch", "kl_to_teacher", "mse_to_teacher", "agreement", "runtime", "keys", "a.b")
        ),
        (
            lambda: Terms(it=Hidden()).run(Plain(), TINY[2]),
            r"Terms: model: expected one whose forward takes output_hidden_states, .*, got Plain",
        ),
        (
            lambda: kdfast.DistillationTrainer(Plain(), objective=Logits()),
            r"DistillationTrainer: objective: expected named terms, such as Terms\(it=Logits\(\)\), got Logits alone",
        ),
        # ---- terms of one's own ----
        (
            lambda: Terms(own=Own("hiden")),
            r"Own: needs: expected one of '', 'hidden', 'attention', 'branches', got 'hiden'",
        ),
        (lambda: Terms(own=Uninitialised()), r"Terms: own: expected a term whose __init__ calls .*, got Uninitialised"),
        (
            lambda: Terms(own=Own(""))(SimpleNamespace(logits=None), None, TINY[2]),
            r"Own: needs: expected 'hidden' or 'attention' where the term reads .hidden, got ''",
        ),
        (
            lambda: Terms(own=Own("hidden"))(SimpleNamespace(logits=None), None, TINY[2]),
            r"Own: student: expected outputs with .hidden, what objective.run\(student, inputs\) returns, got SimpleNamespace",
        ),
        (
            lambda: Terms(own=Own("hidden"))(TINY[0], None, TINY[2]),
            r"Own: teacher: expected outputs with .hidden, what objective.run\(teacher, inputs\) returns, got none",
        ),
        (lambda: Terms(own=Own("hidden"))(*TINY), r"Own: forward: expected a scalar, the mean .*, got \[4, 6, 12\]"),
        (
            lambda: Terms(own=Own("hidden", lambda x: 0.5))(*TINY),
            r"Own: forward: expected a scalar tensor, got 'float'",
        ),
    ],
)
def test_errors_name_what_is_wrong(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call()
