"""Every function and its reference on tensors that are not on the CPU: what they make without `device=` would meet these there.
`meta` stands for a GPU, which takes no other tensors of the CPU either than numbers and indices."""

from __future__ import annotations

import pytest
import torch
from accuracy import inputs, value_and_gradient
from test_operators import CASES

from kdfast.bench.registry import Operator, Sample
from kdfast.bench.registry.operator import mapped


@pytest.mark.parametrize("which", ["function", "reference"])
@pytest.mark.parametrize(("operator", "sample"), CASES)
def test_results_are_where_the_inputs_are(operator: Operator, sample: Sample, which: str) -> None:
    given = inputs(sample, 1.0, torch.float32, torch.float32)
    student, teacher, kwargs = (mapped(lambda x: x.to("meta"), x) for x in given)
    value, gradient = value_and_gradient(getattr(operator, which), student, teacher, kwargs)
    assert (value.device.type, gradient.device.type) == ("meta", "meta")
