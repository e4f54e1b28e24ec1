"""`prefix_linear`, `selected_linear` and their modules, against slices in plain torch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kdfast
from kdfast.ops._packed import Packed
from kdfast.ops.prefix import prefix_linear_reference
from kdfast.ops.selected import selected_linear_reference

OUT, IN = 12, 40
ROWS, COLUMNS = torch.tensor([0, 3, 4, 5, 11]), torch.tensor([1, 2, 8, 9, 10, 11, 12, 30, 39])
NONE = torch.empty(0, dtype=torch.int64)
Call = Callable[..., Tensor]

# Name, the operator, its reference, keyword arguments.
PARTS: dict[str, tuple[Call, Call, dict[str, Any]]] = {
    "prefix": (kdfast.prefix_linear, prefix_linear_reference, {"in_features": 9, "out_features": 5}),
    "prefix_rows": (kdfast.prefix_linear, prefix_linear_reference, {"out_features": 5}),
    "prefix_columns": (kdfast.prefix_linear, prefix_linear_reference, {"in_features": 9}),
    "prefix_all": (kdfast.prefix_linear, prefix_linear_reference, {}),
    "prefix_no_rows": (kdfast.prefix_linear, prefix_linear_reference, {"in_features": 9, "out_features": 0}),
    "prefix_no_columns": (kdfast.prefix_linear, prefix_linear_reference, {"in_features": 0}),
    "rows": (kdfast.selected_linear, selected_linear_reference, {"rows": ROWS}),
    "columns": (kdfast.selected_linear, selected_linear_reference, {"columns": COLUMNS}),
    "both": (kdfast.selected_linear, selected_linear_reference, {"rows": ROWS, "columns": COLUMNS}),
    "all": (kdfast.selected_linear, selected_linear_reference, {}),
    "no_rows": (kdfast.selected_linear, selected_linear_reference, {"rows": NONE, "columns": COLUMNS}),
    "no_columns": (kdfast.selected_linear, selected_linear_reference, {"columns": NONE}),
}
EVERY = pytest.mark.parametrize("name", PARTS)
SOME = pytest.mark.parametrize("name", ["prefix", "rows", "columns", "both"])


def live(kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Live rows and columns."""
    rows, columns = kwargs.get("rows"), kwargs.get("columns")
    return (
        torch.arange(kwargs.get("out_features", OUT)) if rows is None else rows,
        torch.arange(kwargs.get("in_features", IN)) if columns is None else columns,
    )


def with_nan(x: Tensor, *alive: Tensor) -> Tensor:
    """NaN in what is dead."""
    dead = torch.ones(x.shape, dtype=torch.bool)
    dead[torch.meshgrid(*alive, indexing="ij")] = False
    return x.masked_fill(dead, torch.nan)


def made(kwargs: dict[str, Any], dtype: torch.dtype = torch.float64, leading: tuple[int, ...] = (6,)) -> list[Tensor]:
    """x, weight, bias and the gradient of the result; NaN where nothing lives."""
    torch.manual_seed(0)
    rows, columns = live(kwargs)
    x, grad = torch.randn(*leading, len(columns)), torch.randn(*leading, len(rows))
    weight, bias = with_nan(torch.randn(OUT, IN), rows, columns), with_nan(torch.randn(OUT), rows)
    return [t.to(dtype) for t in (x, weight, bias, grad)]


def results(
    function: Call, kwargs: dict[str, Any], x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor
) -> list[Tensor]:
    """The value and all gradients."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = function(*leaves, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def exact(name: str, *tensors: Tensor | None) -> list[Tensor]:
    _, reference, kwargs = PARTS[name]
    return results(reference, kwargs, *(None if t is None else t.double() for t in tensors))  # type: ignore[arg-type]


def close(got: list[Tensor], wanted: list[Tensor], error: float) -> None:
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert not theirs.isnan().any()
        assert float((ours.double() - theirs).norm()) <= error * float(theirs.norm())


# ---- values and gradients ----
@EVERY
@pytest.mark.parametrize("leading", [(6,), (2, 1, 3), (), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients(name: str, leading: tuple[int, ...], with_bias: bool) -> None:
    """Dead weights are NaN: none of it leaks, and their gradient is zero."""
    function, _, kwargs = PARTS[name]
    x, weight, bias, grad = made(kwargs, leading=leading)
    given = (x, weight, bias if with_bias else None, grad)
    got = results(function, kwargs, *given)
    close(got, exact(name, *given), 1e-12)
    rows, columns = live(kwargs)
    dead = with_nan(torch.zeros(OUT, IN), rows, columns).isnan()
    assert (got[2][dead] == 0).all()
    assert (got[2][~dead] != 0).all() == (0 not in leading or not len(got[2][~dead]))


@SOME
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_short_floats(name: str, dtype: torch.dtype) -> None:
    """As exact as the vendor's product of the sliced layer: a rounding of each result."""
    given = made(PARTS[name][2], dtype)
    got = results(PARTS[name][0], PARTS[name][2], *given)
    assert {t.dtype for t in got} == {dtype}
    close(got, exact(name, *given), torch.finfo(dtype).eps * (4 if dtype is torch.float32 else 1))


@SOME
def test_strides(name: str) -> None:
    """Transposed, interleaved and expanded tensors."""
    function, _, kwargs = PARTS[name]
    x, weight, bias, grad = made(kwargs, leading=(4, 6))
    x = x.transpose(0, 1)
    weight, bias = weight.t().contiguous().t(), torch.stack((bias, bias), 1)[:, 0]
    grad = grad[:1, :1].expand(6, 4, -1)
    close(results(function, kwargs, x, weight, bias, grad), exact(name, x, weight, bias, grad), 1e-12)
    close(
        results(function, kwargs, x[::2], weight, None, grad[::2]), exact(name, x[::2], weight, None, grad[::2]), 1e-12
    )


@SOME
def test_autocast(name: str) -> None:
    """As F.linear: products in bfloat16, gradients in the parameters' dtype."""
    function, reference, kwargs = PARTS[name]
    x, weight, bias, grad = made(kwargs, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(function, kwargs, x, weight, bias, grad.bfloat16())
        wanted = results(reference, kwargs, x, weight, bias, grad.bfloat16())
        short = results(function, kwargs, x.bfloat16(), weight, bias, grad.bfloat16())
        doubles = results(function, kwargs, *made(kwargs, torch.float64))
    assert [t.dtype for t in got] == [torch.bfloat16, *[torch.float32] * 3]
    assert [t.dtype for t in short] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert {t.dtype for t in doubles} == {torch.float64}
    close(got, [t.double() for t in wanted], 1e-3)
    assert wanted[2].any()


@SOME
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(name: str, backend: str) -> None:
    if backend == "inductor" and name not in ("prefix", "both"):
        return
    function, _, kwargs = PARTS[name]
    torch.compiler.reset()
    given = made(kwargs, torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    close(results(compiled, kwargs, *given), exact(name, *given), 1e-6)


@SOME
def test_runs_are_bitwise_the_same(name: str) -> None:
    given = made(PARTS[name][2], torch.float32, leading=(64,))
    first, second = (results(*PARTS[name][::2], *given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- gradients that are added up ----
def accumulated(
    function: Call, kwargs: dict[str, Any], given: list[Tensor], before: Callable[[Tensor], Any]
) -> list[Tensor]:
    """`.grad` of all after two backwards on top of one, `before` called with the weight."""
    leaves = [t.detach().clone().requires_grad_() for t in given[:3]]
    for t in leaves:
        t.grad = torch.full_like(t, 0.5)
    before(leaves[1])
    for factor in (1.0, 2.0):
        function(*leaves, **kwargs).backward(factor * given[3])
    return [t.grad for t in leaves]  # type: ignore[misc]


WAYS: dict[str, Callable[[Tensor], Any]] = {
    "into .grad": lambda w: None,
    "tensor hook": lambda w: w.register_hook(lambda g: 1 * g),
    "hook after accumulation": lambda w: w.register_post_accumulate_grad_hook(lambda p: None),
    "grad of another layout": lambda w: setattr(w, "grad", w.grad.t().contiguous().t()),  # type: ignore[union-attr]
    "fresh": lambda w: setattr(w, "grad", None),
}


@EVERY
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_accumulation(name: str, way: str, dtype: torch.dtype) -> None:
    function, reference, kwargs = PARTS[name]
    given = made(kwargs, dtype)
    got = accumulated(function, kwargs, given, WAYS[way])
    wanted = accumulated(reference, kwargs, [t.double() for t in given], WAYS[way])
    close(got, wanted, 1e-12 if dtype is torch.float64 else 2**-7)
    dead = with_nan(torch.zeros(OUT, IN), *live(kwargs)).isnan()
    assert (got[1][dead] == (0 if way == "fresh" else 0.5)).all()


@SOME
def test_no_gradient_of_the_size_of_the_weight(name: str) -> None:
    """Where there is a .grad already, the very tensor is added to, and autograd gets none."""
    function, _, kwargs = PARTS[name]
    x, weight, bias, grad = made(kwargs, torch.float32)
    weight.requires_grad_().grad = torch.zeros_like(weight)
    there, seen = weight.grad.data_ptr(), []
    y = function(x.requires_grad_(), weight, bias, **kwargs)
    y.grad_fn.register_hook(lambda inputs, _: seen.append(inputs[1]))  # type: ignore[union-attr]
    y.backward(grad)
    assert seen == [None]
    assert weight.grad.data_ptr() == there
    assert weight.grad.any()


@SOME
def test_autocast_accumulates_in_the_dtype_of_the_weight(name: str) -> None:
    function, reference, kwargs = PARTS[name]
    given = made(kwargs, torch.float32)
    given[3] = given[3].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted = (accumulated(f, kwargs, given, WAYS["into .grad"]) for f in (function, reference))
    close(got, [t.double() for t in wanted], 1e-3)


@SOME
def test_only_what_is_asked_for(name: str) -> None:
    """`backward(inputs=)` and `torch.autograd.grad` write no other .grad; what needs no gradient gets none."""
    function, _, kwargs = PARTS[name]
    given = [t.requires_grad_() for t in made(kwargs)[:3]]
    x, weight, _ = given
    grad = made(kwargs)[3]
    for t in given:
        t.grad = torch.zeros_like(t)
    function(*given, **kwargs).backward(grad, inputs=[x])
    assert not weight.grad.any()  # type: ignore[union-attr]
    torch.autograd.grad(function(*given, **kwargs), [weight], grad)
    torch.autograd.grad(function(*given, **kwargs), [x], grad)
    assert not weight.grad.any()  # type: ignore[union-attr]
    function(*given, **kwargs).backward(grad, inputs=[weight])
    assert torch.equal(weight.grad, exact(name, *(t.detach() for t in given), grad)[2])  # type: ignore[arg-type]
    for wanted in range(3):
        leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(given)]
        function(*leaves, **kwargs).backward(grad)
        assert [t.grad is not None for t in leaves] == [i == wanted for i in range(3)]


@SOME
def test_backward_twice_and_shared_weights(name: str) -> None:
    function, reference, kwargs = PARTS[name]
    x, weight, bias, grad = made(kwargs)

    def twice(f: Call) -> Tensor:
        w = weight.clone().requires_grad_()
        y = f(x, w, bias, **kwargs) + f(2 * x, w, bias, **kwargs)
        y.backward(grad, retain_graph=True)
        y.backward(3 * grad)
        return w.grad  # type: ignore[return-value]

    close([twice(function)], [twice(reference)], 1e-12)


@SOME
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(name: str, reentrant: bool) -> None:
    function, reference, kwargs = PARTS[name]
    x, weight, bias, grad = made(kwargs)

    def run(f: Call) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        for _ in range(2):
            y = checkpoint(lambda *given: f(*given, **kwargs).tanh(), *leaves, use_reentrant=reentrant)
            y.backward(grad)
        return [t.grad for t in leaves]  # type: ignore[misc]

    close(run(function), run(reference), 1e-12)


# ---- what is packed and kept ----
def packs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one number at every packing."""
    counted: list[int] = []
    pack = Packed.__mro__[1].part

    def counting(self: Any, *args: Any) -> Tensor:
        counted.append(1)
        return pack(self, *args)

    monkeypatch.setattr(Packed.__mro__[1], "part", counting)
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
