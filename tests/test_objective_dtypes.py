"""Every term on float32, bfloat16 and float16 outputs, and mixtures of them, inside and outside autocast, against float64."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from objective_outputs import BATCH, LENGTH, TOKEN_LABELS, batch, side
from tiny_berts import bert, moved, rows, trainer
from torch import Tensor, nn

from kdfast.objective import CLS, Attention, Cosine, Embedding, Hidden, Labels, Logits, Relations, Spans, Terms

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
WIDTH = 20  # of the teacher, where the student is projected


def linears(count: int, *, no_bias: tuple[int, ...] = (), dtype: torch.dtype = F32) -> Any:
    torch.manual_seed(7)
    made = [nn.Linear(12, WIDTH, bias=i not in no_bias).to(dtype) for i in range(count)]
    return made[0] if count == 1 else made


TERMS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "logits": (lambda: Logits(temperature=2.0), {}),
    "reverse": (lambda: Logits("reverse_kl_div"), {}),
    "js": (lambda: Logits("js_div"), {}),
    "tokens": (lambda: Logits(tokens="all"), {"tokens": True}),
    "labels": (Labels, {}),
    "labels of tokens": (lambda: Labels("tokens"), {"tokens": True}),
    "multi_label": (lambda: Labels("multi_label"), {}),
    "regression": (lambda: Labels("regression"), {}),
    "spans": (Spans, {}),
    "labels of spans": (lambda: Labels("spans"), {}),
    "hidden": (Hidden, {}),
    "projected": (lambda: Hidden(projection=linears(1)), {"width": WIDTH}),
    "projected by each": (lambda: Hidden(projection=linears(2)), {"width": WIDTH}),
    "projected in bf16": (lambda: Hidden(projection=linears(1, dtype=BF16)), {"width": WIDTH}),
    "embedding": (lambda: Embedding(projection=linears(1)), {"width": WIDTH}),
    "cosine": (Cosine, {}),
    "cls": (CLS, {}),
    "attention": (Attention, {}),
    "relations": (lambda: Relations(relations=("qk", "vv")), {}),
}
PAIRS = [(BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (F16, F32), (F32, F16), (BF16, F16), (F16, BF16)]
LABELS = {
    "labels of tokens": TOKEN_LABELS,
    "multi_label": (torch.arange(BATCH * 5).view(BATCH, 5) % 3 == 0).float(),
    "regression": torch.arange(BATCH * 5).view(BATCH, 5) / 7,
}


def inputs(name: str, weighted: bool) -> dict[str, Any]:
    labels = LABELS.get(name, torch.tensor([1, 4, 0, 2]))
    return batch(
        weighted, labels=labels, start_positions=torch.arange(BATCH) % 3, end_positions=torch.arange(BATCH) % 2
    )


def outputs(seed: int, dtype: torch.dtype, options: dict[str, Any], exact: torch.dtype | None = None) -> Any:
    """What a model might have returned, rounded to a dtype; `exact`: those numbers in another."""
    made = side(seed, dtype, **{"layers": 2, "width": 12, **options})

    def leaf(x: Tensor) -> Tensor:
        return x.detach().to(exact or dtype).requires_grad_(seed == 0)

    generator = torch.Generator().manual_seed(10 + seed)
    spans = [leaf(torch.randn(BATCH, LENGTH, generator=generator).to(dtype)) for _ in range(2)]
    named = SimpleNamespace(logits=leaf(made.logits), start_logits=spans[0], end_logits=spans[1])
    read = {name: [leaf(x) for x in getattr(made, name)] for name in ("hidden", "q", "k", "v")}
    return dataclasses.replace(made, outputs=named, **read)


def leaves(student: Any, term: Any) -> dict[str, Tensor]:
    lists = {name: getattr(student, name) for name in ("hidden", "q", "k", "v")}
    found = {f"{name} {i}": x for name, of in lists.items() for i, x in enumerate(of)}
    own = {name: getattr(student.outputs, name) for name in ("logits", "start_logits", "end_logits")}
    return found | own | dict(term.named_parameters())


def value_and_gradients(term: Any, student: Any, teacher: Any, given: Any) -> tuple[Tensor, dict[str, Tensor]]:
    value = Terms(it=term)(student, teacher, given)["it"]
    named = leaves(student, term)
    grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return value, {name: g for name, g in zip(named, grads, strict=True) if g is not None}


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(str(x).removeprefix("torch.") for x in pair))
@pytest.mark.parametrize("name", TERMS)
def test_terms_in_every_precision(name: str, pair: tuple[torch.dtype, torch.dtype], autocast: bool) -> None:
    """Value and gradients within a rounding of the coarsest dtype of those of the same numbers in float64.

    Projections are products, which autocast rounds to bfloat16, as do a bfloat16 student and projection: 8 of its roundings.
    Else the loss is float32's own, and a gradient has a rounding of its leaf's dtype (2, where layers sum up in it).
    """
    make, options = TERMS[name]
    of_teacher = options
    of_student = {key: x for key, x in options.items() if key != "width"}
    for weighted in (False, True):
        given = inputs(name, weighted)
        term = make()
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            value, got = value_and_gradients(
                term, outputs(0, pair[0], of_student), outputs(1, pair[1], of_teacher), given
            )
        exact = copy.deepcopy(term).double()
        sides = outputs(0, pair[0], of_student, F64), outputs(1, pair[1], of_teacher, F64)
        expected, wanted = value_and_gradients(exact, *sides, given)
        assert value.dtype == F32
        product = name == "embedding" or name.startswith("projected")
        rounded = product and (autocast or (name == "projected in bf16" and pair[0] == BF16))
        tolerance = 8 * 2.0**-8 if rounded else 1e-5
        assert abs(expected.item()) > 1e-3
        torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=0)
        assert set(got) == set(wanted)
        assert got
        for leaf, gradient in wanted.items():
            rounding = {F32: 2.0**-20, BF16: 2.0**-8, F16: 2.0**-10}[got[leaf].dtype]
            scale = float(gradient.norm())
            assert scale > 1e-5, leaf
            error = float((got[leaf].double() - gradient).norm()) / scale
            assert error <= max(tolerance, 2 * rounding), (leaf, error)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "sample_weight"])
@pytest.mark.parametrize("no_bias", [(0,), (1,), (0, 1)])
def test_projections_of_which_some_have_no_bias(no_bias: tuple[int, ...], weighted: bool) -> None:
    made = linears(2, no_bias=no_bias, dtype=F64)
    student, teacher, given = outputs(0, F64, {}), outputs(1, F64, {"width": WIDTH}), inputs("hidden", weighted)
    value, got = value_and_gradients(Hidden(projection=made), student, teacher, given)
    on = given["attention_mask"].bool()
    weight = given.get("sample_weight", torch.ones(BATCH)).double()[:, None, None]
    expected = sum(
        ((weight * (made[i](student.hidden[i + 1]) - teacher.hidden[i + 1]) ** 2)[on]).mean() for i in range(2)
    )
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    for i, linear in enumerate(made):
        if linear.bias is not None:
            gradient = torch.autograd.grad(expected, linear.bias, retain_graph=True)[0]
            assert gradient.norm() > 1e-3
            torch.testing.assert_close(got[f"projection.{i}.bias"], gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("mixed", [False, True], ids=["", "bf16=True"])
@pytest.mark.parametrize("dtypes", [(BF16, F32), (BF16, BF16), (F32, BF16), (F32, F16)], ids=str)
def test_models_of_16_bits_are_trained_as_those_of_32(
    tmp_path: Path, dtypes: tuple[torch.dtype, torch.dtype], mixed: bool
) -> None:
    given, losses = rows(8), []
    for of_student, of_teacher in (dtypes, (F32, F32)):
        torch.manual_seed(5)
        projection = nn.Linear(16, 24)
        before = copy.deepcopy(projection)
        objective = Terms(
            kl=Logits(temperature=2.0), ce=Labels(), hidden=Hidden(projection=projection),
            embedding=Embedding(projection=projection), attention=Attention(weight=0.1), relations=Relations(),
        )  # fmt: skip
        student, teacher = bert(1).to(of_student), bert(0, width=24, layers=4).to(of_teacher)
        it = trainer(tmp_path, student, given, objective, teacher=teacher, eval_dataset=given, bf16=mixed)
        metrics = it.evaluate()
        losses.append([metrics[f"eval_{name}"] for name in objective.terms])
        it.train()
        assert all(p.dtype == of_student for p in student.parameters())
        assert projection.weight.dtype == F32
        moved(projection, before)
        assert student.bert.encoder.layer[0].attention.self.query.weight.isfinite().all()
    torch.testing.assert_close(losses[0], losses[1], rtol=0.05, atol=1e-3)
    assert min(losses[1]) > 1e-2


def test_layers_of_several_dtypes() -> None:
    """As of a model that keeps some of its layers in float32."""
    for term in (Hidden(), CLS({1: 1, 2: 2}), Attention(), Cosine({1: 1, 2: 2}), Relations({1: 1, 2: 2})):
        student, teacher = outputs(0, F32, {}), outputs(1, F32, {})
        for x in (student, teacher):
            mixed = {
                n: [y.detach().bfloat16() if i == 1 else y for i, y in enumerate(getattr(x, n))]
                for n in ("hidden", "q", "k", "v")
            }
            for name, values in mixed.items():
                setattr(x, name, values)
        exact = [
            dataclasses.replace(x, **{n: [y.double() for y in getattr(x, n)] for n in ("hidden", "q", "k", "v")})
            for x in (student, teacher)
        ]
        got, expected = (Terms(it=term)(*sides, inputs("hidden", False))["it"] for sides in ((student, teacher), exact))
        assert expected > 1e-3
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
