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
    x = torch.randn(3, len(COLUMNS))
    with torch.inference_mode():
        layer(x)
    assert not layer.packed._kept.part.requires_grad
    layer.weight.requires_grad_(False)
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


def test_transforms_of_a_module(layer: Any) -> None:
    """Other parameters, gradients per row: nothing that is kept leaks into another call."""
    x = torch.randn(3, len(COLUMNS))
    kept = layer(x)
    others = {name: 2 * p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (row,)).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(others, x)
    for i in range(3):
        leaves = {name: p.clone().requires_grad_() for name, p in others.items()}
        y = selected_linear_reference(x[i], leaves["weight"], leaves["bias"], rows=ROWS, columns=COLUMNS)
        wanted = torch.autograd.grad(y.square().sum(), list(leaves.values()))
        torch.testing.assert_close([g[i] for g in got.values()], list(wanted))
    assert torch.equal(layer(x), kept)
    with pytest.raises(RuntimeError, match="selected_linear: forward-mode differentiation is not available"):
        torch.func.jvp(layer, (x,), (x,))


def test_autocast_of_a_module(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part is packed and cast once; calls in another dtype pack their own."""
    counted = packs(monkeypatch)
    x = torch.randn(3, len(COLUMNS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (layer(x) + layer(2 * x)).float().sum().backward()
        assert len(counted) == 1
        assert torch.equal(layer(x), reference_of(layer, x))
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer(x), reference_of(layer, x))
    assert len(counted) == 3


def test_tracers_see_the_packing(layer: Any) -> None:
    """What is kept is no constant of a graph that is traced."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.randn(3, len(COLUMNS))
    with torch.no_grad():
        layer(x)
        graph = make_fx(lambda weight: torch.func.functional_call(layer, {"weight": weight}, (x,)))(layer.weight)
        weight = 2 * layer.weight
        torch.testing.assert_close(
            graph(weight), selected_linear_reference(x, weight, layer.bias, rows=ROWS, columns=COLUMNS)
        )


def test_a_module_that_moves() -> None:
    """Indices stay where a weight without memory cannot take them."""
    layer = kdfast.nn.SelectedLinear(IN, OUT, device="meta")
    layer.rows, layer.columns = ROWS, COLUMNS
    assert layer(torch.empty(3, len(COLUMNS), device="meta")).shape == (3, len(ROWS))
    layer.to_empty(device="cpu").reset_parameters()
    x = torch.randn(3, len(COLUMNS))
    torch.testing.assert_close(layer(x), reference_of(layer, x))


def test_modules_refuse() -> None:
    layer = kdfast.nn.SelectedLinear(IN, OUT)
    with pytest.raises(ValueError, match="SelectedLinear: rows: expected indices from 0 to 11, got 12"):
        layer.rows = torch.tensor([0, 12])
    layer.columns = COLUMNS
    with pytest.raises(ValueError, match="SelectedLinear: x: expected 9 features, those that live, got shape"):
        layer(torch.randn(3, IN))
    with pytest.raises(
        TypeError, match=r"PrefixLinear\.from_linear: linear: expected an nn.Linear that is no more than"
    ):
        kdfast.nn.PrefixLinear.from_linear(layer)
    elastic = kdfast.nn.PrefixLinear(IN, OUT)
    elastic.out_features = OUT + 1
    with pytest.raises(ValueError, match="prefix_linear: out_features: expected 0 to 12, got 13"):
        elastic(torch.randn(3, IN))
