"""Every function, its reference and the floors of its errors on tensors that are not on the CPU: what they make without `device=` would meet these there.
`meta` stands for a GPU, which takes no other tensors of the CPU either than numbers and indices."""

from __future__ import annotations

import pytest
import torch
from accuracy import inputs, value_and_gradient
from test_operators import CASES

from kdfast.bench.registry import Operator, Sample, floors
from kdfast.bench.registry.operator import mapped


@pytest.mark.parametrize("which", ["function", "reference"])
@pytest.mark.parametrize(("operator", "sample"), CASES)
def test_results_are_where_the_inputs_are(operator: Operator, sample: Sample, which: str) -> None:
    given = inputs(sample, 1.0, torch.float32, torch.float32)
    student, teacher, kwargs = (mapped(lambda x: x.to("meta"), x) for x in given)
    value, gradient = value_and_gradient(getattr(operator, which), student, teacher, kwargs)
    assert (value.device.type, gradient.device.type) == ("meta", "meta")


@pytest.mark.parametrize(("operator", "sample"), CASES)
def test_floors_are_where_the_inputs_are(operator: Operator, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU too what results are compared with is made there (tests/accuracy.py)."""
    monkeypatch.setattr(floors, "float", lambda x: 0.5, raising=False)  # meta tensors have no numbers
    given = inputs(sample, 1.0, torch.float32, torch.float32)
    student, teacher, kwargs = (mapped(lambda x: x.to("meta"), x) for x in given)
    exact = value_and_gradient(operator.reference, student, teacher, kwargs)
    value, gradient = operator.floors(operator.reference, student, teacher, kwargs, exact)
    assert value.device.type == "meta"
    assert isinstance(gradient, float)
