"""The live weights that `Packed` keeps, and the modules of layers of which a part lives."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pruned import COLUMNS, IN, OUT, ROWS
from torch import Tensor, nn

import kdfast
from kdfast.ops._selection import Selection
from kdfast.ops.selected import selected_linear_reference


def packs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one number at every packing."""
    counted: list[int] = []
    pack = Selection.part

    def counting(self: Any, *args: Any) -> Tensor:
        counted.append(1)
        return pack(self, *args)

    monkeypatch.setattr(Selection, "part", counting)
    return counted


@pytest.fixture
def layer() -> kdfast.nn.SelectedLinear:
    torch.manual_seed(0)
    layer = kdfast.nn.SelectedLinear(IN, OUT)
    layer.rows, layer.columns = ROWS, COLUMNS
    return layer


def reference_of(layer: kdfast.nn.SelectedLinear, x: Tensor) -> Tensor:
    return selected_linear_reference(x, layer.weight, layer.bias, rows=layer.rows, columns=layer.columns)


def test_packs_once_for_many_calls(layer: kdfast.nn.SelectedLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls before a backward, as of shared layers, and evaluations."""
    counted = packs(monkeypatch)
    x = torch.randn(3, len(COLUMNS))
    (layer(x) + layer(2 * x)).sum().backward()
    assert len(counted) == 1
    layer(x).sum().backward()
    assert len(counted) == 2
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(layer(x), reference_of(layer, x))
    assert len(counted) == 3


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda layer: layer.weight.mul_(2),
    "by .data": lambda layer: layer.weight.data.mul_(2),
    "another .data": lambda layer: setattr(layer.weight, "data", 2 * layer.weight.data),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(2 * layer.weight)),
    "state": lambda layer: layer.load_state_dict({"weight": 2 * layer.weight, "bias": layer.bias}),
    "assigned state": lambda layer: layer.load_state_dict(
        {"weight": 2 * layer.weight, "bias": layer.bias}, assign=True
    ),
    "bias": lambda layer: layer.bias.data.mul_(2),
    "rows": lambda layer: setattr(layer, "rows", ROWS[1:]),
    "columns": lambda layer: setattr(layer, "columns", COLUMNS + torch.tensor([*[0] * 7, 1, 0])),
    "dtype": lambda layer: layer.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("trained", [False, True])
def test_changes_are_seen(layer: Any, change: str, trained: bool) -> None:
    x = torch.randn(3, len(COLUMNS))
    with torch.set_grad_enabled(trained):
        before = layer(x)
        with torch.no_grad():
            CHANGES[change](layer)
        x = x.to(layer.weight.dtype)
        after, wanted = layer(x), reference_of(layer, x)
    assert torch.equal(after, wanted)
    assert before.shape != after.shape or not torch.allclose(before, after.float())


def test_an_optimizer_that_writes_by_data(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the sample would not show it: after a backward weights are packed anew."""
    monkeypatch.setattr("kdfast.ops._packed._SAMPLED", 0)
    x = torch.randn(3, len(COLUMNS))
    layer(x).sum().backward()
    layer.weight.data.sub_(layer.weight.grad)
    torch.testing.assert_close(layer(x), reference_of(layer, x))


def test_other_indices_between_forward_and_backward(layer: Any) -> None:
    """Sub-networks one after another, then one backward."""
    x = torch.randn(3, len(COLUMNS))
    first = layer(x)
    layer.rows = torch.tensor([1, 2])
    (first.sum() + layer(x).sum()).backward()
    got = layer.weight.grad.clone()
    layer.weight.grad = None
    both = selected_linear_reference(x, layer.weight, layer.bias, rows=ROWS, columns=COLUMNS), reference_of(layer, x)
    sum(y.sum() for y in both).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(got, layer.weight.grad)


def test_inference_mode_then_training(layer: Any) -> None:
    layer.weight.requires_grad_(False)
    x = torch.randn(3, len(COLUMNS))
    with torch.inference_mode():
        layer(x)
    layer(x.requires_grad_()).sum().backward()
    layer(x).sum().backward()
    assert x.grad.any()
    with torch.inference_mode():
        inner = kdfast.nn.SelectedLinear(IN, OUT)
        inner.columns = COLUMNS
        assert torch.equal(inner(x), reference_of(inner, x))


def test_modules_are_linears(layer: Any) -> None:
    """State, copies and pickles; parameters are shared with what they were made of."""
    plain = nn.Linear(IN, OUT)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(3, len(COLUMNS))
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y)
    made = kdfast.nn.SelectedLinear.from_linear(plain.eval(), rows=ROWS)
    assert isinstance(made, nn.Linear)
    assert made.weight is plain.weight
    assert made.bias is plain.bias
    assert not made.training
    elastic = kdfast.nn.PrefixLinear.from_linear(plain)
    elastic.in_features, elastic.out_features = 7, 3
    z = torch.randn(2, 7)
    torch.testing.assert_close(elastic(z), z @ plain.weight[:3, :7].T + plain.bias[:3])
    assert kdfast.nn.SelectedLinear.from_linear(nn.Linear(3, 2, bias=False)).bias is None
    assert "rows=5, columns=9" in repr(layer)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_compiled_module(layer: Any, backend: str) -> None:
    torch.compiler.reset()
    x = torch.randn(3, len(COLUMNS), requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), reference_of(layer, x))
    compiled(x).sum().backward()
    assert layer.weight.grad.any()
