"""`prefix_linear` and `selected_linear`: values and gradients against slices in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruned import COLUMNS, EVERY, IN, OUT, PARTS, ROWS, SOME, close, exact, live, made, results, with_nan
from torch import Tensor, nn

import kdfast


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
    """Transposed, interleaved and expanded tensors; a weight that lies neither in rows nor in columns."""
    function, _, kwargs = PARTS[name]
    x, weight, bias, grad = made(kwargs, leading=(4, 6))
    x = x.transpose(0, 1)
    weight, bias = weight.t().contiguous().t(), torch.stack((bias, bias), 1)[:, 0]
    grad = grad[:1, :1].expand(6, 4, -1)
    kwargs = {k: v.repeat_interleave(2)[::2] if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    close(results(function, kwargs, x, weight, bias, grad), exact(name, x, weight, bias, grad), 1e-12)
    given = x[::2], torch.stack((weight, weight), -1)[..., 0], None, grad[::2]
    close(results(function, kwargs, *given), exact(name, *given), 1e-12)


@SOME
def test_nan_between_rows_of_bfloat16(name: str) -> None:
    """torch's products read past a row where its numbers are no multiple of 32, on processors with AMX."""
    function, _, kwargs = PARTS[name]
    x, weight, _, grad = made(kwargs, torch.bfloat16, leading=(40,))
    apart = [torch.full((40, t.shape[1] + 7), torch.nan, dtype=t.dtype)[:, : t.shape[1]].copy_(t) for t in (x, grad)]
    close(results(function, kwargs, apart[0], weight, None, apart[1]), exact(name, x, weight, None, grad), 2**-7)


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


# ---- the native operators ----
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.usefixtures("cpu_variant")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", [1, 15, 16, 33, 100, 512])
def test_pack_and_unpack(dtype: torch.dtype, width: int) -> None:
    """Bit for bit what indexing gives, under every CPU variant; what is dead stays what it was, -0 and NaN too."""
    generator = torch.Generator().manual_seed(width)
    for share in (0.0, 0.1, 0.5, 1.0):
        rows, columns = (torch.nonzero(torch.rand(n, generator=generator) < share).flatten() for n in (21, width))
        for live_rows, live_columns in ((rows, columns), (None, columns), (rows, None)):
            at = (
                torch.arange(21) if live_rows is None else live_rows,
                torch.arange(width) if live_columns is None else live_columns,
            )
            at = at[0][:, None], at[1]
            matrix = torch.randn(21, width + 3, generator=generator).to(dtype)[:, :width]
            part = torch.ops.kdfast.pack_part(matrix, live_rows, live_columns)
            assert torch.equal(part, matrix[at])
            before = torch.where(torch.rand(21, width, generator=generator) < 0.5, -0.0, torch.nan).to(dtype)
            before[at] = matrix[at]
            added = before.clone()
            torch.ops.kdfast.unpack_part_(added, 3 * part, live_rows, live_columns, True)
            wanted = before.clone()
            wanted[at] += 3 * part
            assert torch.equal(added.view(torch.uint8), wanted.view(torch.uint8))
            torch.ops.kdfast.unpack_part_(added, part, live_rows, live_columns, False)
            assert torch.equal(added, torch.zeros_like(added).index_put_(at, part))


def test_native_operators_refuse_what_would_leave_memory() -> None:
    pack, unpack = torch.ops.kdfast.pack_part, torch.ops.kdfast.unpack_part_
    x, live = torch.randn(4, 5), torch.tensor([1, 3])
    for wrong in ([3, 1], [1, 1], [-1, 2], [1, 4]):
        with pytest.raises(RuntimeError, match="pack_part: rows: expected sorted indices below 4, each once"):
            pack(x, torch.tensor(wrong), None)
    with pytest.raises(RuntimeError, match="pack_part: columns: expected dtype Long"):
        pack(x, None, live.int())
    with pytest.raises(RuntimeError, match=r"pack_part: matrix: expected a matrix .* with rows side by side"):
        pack(x.t(), None, live)
    with pytest.raises(RuntimeError, match=r"unpack_part_: part: expected \[4, 2\]"):
        unpack(x, torch.randn(4, 3), None, live, True)
    with pytest.raises(RuntimeError, match="unpack_part_: part: expected dtype Float, got Double"):
        unpack(x, torch.randn(4, 2).double(), None, live, True)


# ---- errors ----
X, W, B = torch.randn(3, IN), torch.randn(OUT, IN), torch.randn(OUT)
BAD: list[tuple[str, type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    ("prefix_linear", ValueError, "in_features: expected 0 to 40, got 41", (X, W), {"in_features": 41}),
    ("prefix_linear", ValueError, "out_features: expected 0 to 12, got -1", (X, W), {"out_features": -1}),
    ("prefix_linear", TypeError, "out_features: expected an int, got float", (X, W), {"out_features": 5.0}),
    ("prefix_linear", ValueError, "x: expected 9 features, those that live, got shape", (X, W), {"in_features": 9}),
    ("selected_linear", ValueError, "x: expected 9 features, those that live, got shape", (X, W), {"columns": COLUMNS}),
    ("selected_linear", ValueError, "rows: expected sorted indices, each once, got 3 after 4", (X, W), {"rows": torch.tensor([0, 4, 3])}),
    ("selected_linear", ValueError, "rows: expected sorted indices, each once, got 4 after 4", (X, W), {"rows": torch.tensor([0, 4, 4])}),
    ("selected_linear", ValueError, "rows: expected indices from 0 to 11, got 12", (X, W), {"rows": torch.tensor([0, 12])}),
    ("selected_linear", ValueError, "columns: expected indices from 0 to 39, got -1", (X, W), {"columns": torch.tensor([-1, 2])}),
    ("selected_linear", TypeError, "rows: expected an int64 tensor of indices .*, got torch.int32", (X, W), {"rows": ROWS.int()}),
    ("selected_linear", TypeError, "rows: expected an int64 tensor of indices .*, got list", (X, W), {"rows": [0, 1]}),
    ("selected_linear", ValueError, "columns: expected one dimension, got shape", (X, W), {"columns": COLUMNS[None]}),
    ("selected_linear", ValueError, "rows: expected the device of x, cpu, got meta", (X, W), {"rows": ROWS.to("meta")}),
]  # fmt: skip
SHARED: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
    (TypeError, "weight: expected a tensor, got list", (X, [1.0])),
    (TypeError, "x: expected float32, bfloat16, float16 or float64, got torch.int64", (X.long(), W)),
    (TypeError, "weight: expected the dtype of x, torch.float32, got torch.bfloat16", (X, W.bfloat16())),
    (TypeError, "bias: expected the dtype of x, torch.float32, got torch.float64", (X, W, B.double())),
    (ValueError, r"weight: expected \[out, in\], got shape", (X, W[0])),
    (ValueError, "x: expected at least one dimension, the features last, got a scalar", (X[0, 0], W)),
    (ValueError, r"bias: expected the whole of it, \[12\], got shape \[5\]", (X, W, B[:5])),
    (ValueError, "weight: expected the device of x, cpu, got meta", (X, W.to("meta"))),
]


@pytest.mark.parametrize(("name", "error", "message", "arguments", "kwargs"), BAD)
def test_errors(name: str, error: type[Exception], message: str, arguments: Any, kwargs: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"^{name}: {message}"):
        getattr(kdfast, name)(*arguments, **kwargs)


@pytest.mark.parametrize(("error", "message", "arguments"), SHARED)
def test_errors_of_both(error: type[Exception], message: str, arguments: Any) -> None:
    for name in ("prefix_linear", "selected_linear"):
        with pytest.raises(error, match=f"^{name}: {message}"):
            getattr(kdfast, name)(*arguments)


def test_subclasses_of_tensors() -> None:
    """What brings its own operators is handed to them: here, a tensor that counts."""

    class Counting(Tensor):
        calls: list[str] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.calls.append(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs or {})

    weight = nn.Parameter(W.clone().as_subclass(Counting))
    y = kdfast.selected_linear(X[:, : len(COLUMNS)], weight, columns=COLUMNS)
    assert {"index_select", "linear"} <= set(Counting.calls)
    y.sum().backward()
    assert weight.grad is not None
    assert isinstance(weight.grad, Tensor)


def test_autocast_refuses_what_it_does_not_cast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x, weight in ((X.double(), W), (X, W.double())):
            with pytest.raises(TypeError, match="prefix_linear: weight: expected the dtype of x"):
                kdfast.prefix_linear(x, weight)
