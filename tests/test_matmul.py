"""Dense products of our own on the CPU, `kdfast::matmul_`: against float64, and in the operators that take them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import variants
from torch import Tensor

import kdfast
from kdfast import _C
from kdfast.ops import _products
from kdfast.ops.linear_reference import linear_kd_loss as reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
PAIRS = [(F32, F32), (BF16, BF16), (F16, F16), (F64, F64), (F32, BF16), (F32, F16)]
OPERANDS = pytest.mark.parametrize("dtypes", PAIRS, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
# One number; tails everywhere; whole tiles; an odd inner dimension in several panels; more rows than wait at once, in
# several panels; several panels of columns, and of both.
SIZES = [(1, 1, 1), (7, 45, 33), (48, 64, 128), (5, 70, 1601), (509, 33, 3100), (50, 1100, 70), (60, 1100, 2000)]
LAYOUTS = ("rows", "columns", "neither")


def sums_of(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, F32)


def laid(x: Tensor, layout: str) -> Tensor:
    """The same numbers inside a larger matrix of NaN."""
    rows, columns = x.shape
    if layout == "columns":
        return laid(x.t(), "rows").t()
    if layout == "neither":
        whole = torch.full((rows, columns, 3), torch.nan, dtype=x.dtype)
        part = whole[..., 1]
    else:
        whole = torch.full((rows + 2, columns + 5), torch.nan, dtype=x.dtype)
        part = whole[1 : rows + 1, 2 : columns + 2]
    return part.copy_(x)


def made(rows: int, columns: int, inner: int, dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + columns + inner)
    a, b = (torch.randn(shape, generator=generator) for shape in ((rows, inner), (inner, columns)))
    return a.to(dtypes[0]), b.to(dtypes[1])


def close(got: Tensor, a: Tensor, b: Tensor, more: Tensor | float = 0.0) -> None:
    """The accuracy rule: twice the error of torch's product in the dtype of the sums, or a rounding of each result."""
    exact, sums = a.double() @ b.double() + more, sums_of(a.dtype)
    usual = float(((a.to(sums) @ b.to(sums)).double() + more - exact).norm())
    # What float64 is compared with is no more exact; AMX takes a float32 with bfloat16 in two parts, of 16 bits together.
    split = a.dtype is F32 and b.dtype is BF16 and _C.cpu_variant() == "amx"
    eps = max(torch.finfo(got.dtype).eps, 2.0**-17 if split else 0.0)
    rounding = (32 if a.dtype is F64 else 1) * eps * float(exact.norm())
    assert got.shape == exact.shape
    assert float((got.double() - exact).norm()) <= 2 * usual + rounding
    assert rounding < 0.01 * float(exact.norm())


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype, layout: str = "rows", **given: Any) -> Tensor:
    c = laid(torch.full((a.shape[0], b.shape[1]), torch.nan, dtype=dtype), layout)
    torch.ops.kdfast.matmul_(c, a, b, given.get("bias"), False)
    return c


# ---- the product ----
@pytest.mark.usefixtures("cpu_variant")
@OPERANDS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_variant(dtypes: tuple[torch.dtype, torch.dtype], size: tuple[int, int, int]) -> None:
    """In every layout, with NaN all around, of the sums' type and of b's."""
    a, b = made(*size, dtypes)
    for layouts in ((x, y) for x in LAYOUTS for y in LAYOUTS):
        given = [laid(x, layout) for x, layout in zip((a, b), layouts, strict=True)]
        for dtype in {sums_of(b.dtype), b.dtype}:
            close(matmul(*given, dtype), a, b)


@pytest.mark.usefixtures("cpu_variant")
@OPERANDS
def test_bias_and_addition(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Nothing but c is written to."""
    for size in ((7, 45, 33), (70, 64, 1700), (260, 33, 1700)):
        a, b = made(*size, dtypes)
        for dtype in {sums_of(b.dtype), b.dtype}:
            bias = torch.randn(size[1], generator=torch.Generator().manual_seed(1)).to(dtype)
            close(matmul(a, b, dtype, bias=bias), a, b, bias.double())
            before = torch.randn(size[:2], generator=torch.Generator().manual_seed(2)).to(dtype)
            whole = torch.full((size[0] + 2, size[1] + 9), 7.0, dtype=dtype)
            c = whole[1:-1, 4:-5].copy_(before)
            torch.ops.kdfast.matmul_(c, a, b, None, True)
            close(c, a, b, before.double())
            c.fill_(7)
            assert (whole == 7).all()


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("add", [False, True])
def test_a_result_that_lies_in_columns(dtype: torch.dtype, add: bool) -> None:
    a, b = made(50, 70, 90, (dtype, dtype))
    c = laid(torch.ones(50, 70, dtype=dtype), "columns")
    torch.ops.kdfast.matmul_(c, laid(a, "columns"), b, None, add)
    close(c, a, b, float(add))


@pytest.mark.usefixtures("cpu_variant")
@OPERANDS
def test_without_rows_columns_or_an_inner_dimension(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    dtype = sums_of(dtypes[1])
    for rows, columns in ((0, 5), (5, 0), (0, 0)):
        assert matmul(*made(rows, columns, 3, dtypes), dtype).shape == (rows, columns)
    a, b = made(3, 40, 0, dtypes)
    assert (matmul(a, b, dtype) == 0).all()
    bias = torch.arange(40, dtype=dtype)
    assert (matmul(a, b, dtype, bias=bias) == bias).all()
    c = torch.ones(3, 40, dtype=dtype)
    torch.ops.kdfast.matmul_(c, a, b, None, True)
    assert (c == 1).all()


def test_numbers_that_are_not_finite_stay_in_their_rows_and_columns() -> None:
    for dtypes in PAIRS:
        a, b = made(60, 70, 40, dtypes)
        clean = matmul(a, b, sums_of(b.dtype))
        a[3, 5], b[7, 65] = torch.nan, torch.inf
        got = matmul(a, b, sums_of(b.dtype))
        assert got[3].isnan().all()
        assert not got[:, 65].isfinite().any()
        got[3], got[:, 65] = clean[3], clean[:, 65]
        assert torch.equal(got, clean)


@pytest.mark.usefixtures("cpu_variant")
@OPERANDS
def test_bitwise_the_same_whatever_the_threads(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """And whichever columns are asked for beside."""
    before, runs = torch.get_num_threads(), []
    a, b = made(150, 330, 900, dtypes)
    try:
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            runs.append(matmul(a, b, sums_of(b.dtype)))
    finally:
        torch.set_num_threads(before)
    runs.append(torch.cat([matmul(a, part, sums_of(b.dtype)) for part in b.split(101, 1)], 1))
    assert runs[0].all()
    assert all(torch.equal(run, runs[0]) for run in runs[1:])


@pytest.mark.parametrize("variant", _C.cpu_variants())
def test_the_variant_that_is_asked_for(variant: str) -> None:
    program = (
        "import torch, kdfast; from kdfast import _C\n"
        "c, a, b = torch.empty(3, 5), torch.ones(3, 129).bfloat16(), torch.ones(129, 5).bfloat16()\n"
        "torch.ops.kdfast.matmul_(c, a, b, None, False)\n"
        "print(_C.cpu_variant(), c.sum().item())"
    )
    assert variants.printed(variant, program) == [variant, str(float(15 * 129))]


@pytest.mark.parametrize(
    ("c", "a", "b", "bias", "add", "message"),
    [
        ((2, 3), (2, 4), (5, 3), None, False, r"b: expected 4 rows, got \[5, 3\]"),
        ((2, 2), (2, 4), (4, 3), None, False, r"c: expected \[2, 3\], got \[2, 2\]"),
        ((2, 3), (2, 4), (4,), None, False, r"b: expected a matrix, got \[4\]"),
        ((2, 3), (2, 4), (4, 3), (2,), False, r"bias: expected \[3\], contiguous"),
        ((2, 3), (2, 4), (4, 3), (3,), True, r"bias: expected \[3\], contiguous, where c is not added to"),
    ],
)
def test_wrong_shapes(c: Any, a: Any, b: Any, bias: Any, add: bool, message: str) -> None:
    given = None if bias is None else torch.empty(bias)
    with pytest.raises(RuntimeError, match=f"matmul_: {message}"):
        torch.ops.kdfast.matmul_(torch.empty(c), torch.empty(a), torch.empty(b), given, add)


def test_wrong_dtypes_and_layouts() -> None:
    a = torch.ones(4, 4)
    for c, left, right, message in (
        (a, a.bfloat16(), a, "a, b: expected numbers of one type, or float32 and 16 bits, got BFloat16 and Float"),
        (a.double(), a, a, "c: expected dtype Float or b's, got Double"),
        (torch.ones(4, 4, 2)[..., 0], a, a, "c: expected rows side by side"),
        (a.clone().t(), a, a.bfloat16(), "c: expected rows side by side"),
    ):
        with pytest.raises(RuntimeError, match=f"matmul_: {message}"):
            torch.ops.kdfast.matmul_(c, left, right, None, False)


# ---- the operators, with products of our own and with torch's, whatever the processor ----
@pytest.fixture(params=[True, False], ids=["own", "torch"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(_C, "own_products", lambda bf16: request.param)
    return bool(request.param)


def test_the_rule(cpu_variant: str) -> None:
    """Dot products of bfloat16 are never torch's; without AVX-512 nothing is our own."""
    if cpu_variant in ("portable", "avx2"):
        assert not _C.own_products(bf16=True)
        assert not _C.own_products(bf16=False)
    if cpu_variant in ("avx512_bf16", "amx"):
        assert _C.own_products(bf16=True)


def test_who_makes_a_product(products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those of few rows, nor of a tracer or a mode are our own."""
    x = torch.ones(_products.LEAST_ROWS, 4)
    assert _products.own(x) is products
    assert not _products.own(x.double())
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        kdfast.prefix_linear(x, torch.ones(16, 4), out_features=8)
    assert counter.get_total_flops() == 2 * len(x) * 4 * 8


@pytest.mark.usefixtures("products", "cpu_variant")
@pytest.mark.parametrize("leading", [(1,), (70,), (3, 5, 4)], ids=str)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("accumulated", [False, True])
def test_layers_of_which_a_part_lives(leading: tuple[int, ...], turned: bool, accumulated: bool) -> None:
    """Against float64, dead weights NaN; a weight and its gradient that lie in columns."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.arange(40), torch.arange(50)
    for kwargs, function in (
        ({"out_features": 40, "in_features": 50}, kdfast.prefix_linear),
        ({"rows": rows, "columns": columns}, kdfast.selected_linear),
    ):
        x, grad = torch.randn(*leading, 50, generator=generator), torch.randn(*leading, 40, generator=generator)
        weight, bias = torch.full((64, 96), torch.nan), torch.full((64, 2), torch.nan)[:, 0]
        weight[:40, :50], bias[:40] = torch.randn(40, 50, generator=generator), torch.randn(40, generator=generator)
        weight = weight.t().contiguous().t() if turned else weight
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        if accumulated:
            for t in leaves:
                t.grad = torch.ones_like(t)
        y = function(*leaves, **kwargs)  # type: ignore[operator]
        y.backward(grad)
        double = [t.detach().double().requires_grad_() for t in (x, weight[:40, :50], bias[:40])]
        true = torch.nn.functional.linear(*double)
        true.backward(grad.double())
        parts = [leaves[0].grad, leaves[1].grad[:40, :50], leaves[2].grad[:40]]  # type: ignore[index]
        for got, exact in zip([y, *parts], [true, *(t.grad + accumulated for t in double)], strict=True):
            assert float((got.double() - exact).norm()) <= 1e-6 * float(exact.norm())
        assert (leaves[1].grad[40:] == float(accumulated)).all()  # type: ignore[index]
        assert (leaves[1].grad[:40, 50:] == float(accumulated)).all()  # type: ignore[index]


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("rows", [40, 700])  # of one slab; of two
def test_linear_kd_loss(dtype: torch.dtype, rows: int) -> None:
    """No less exact than the loss in plain torch, of the same numbers in float32."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, 48), (3001, 48))
    teacher = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    student = [(t + 0.1 * torch.randn(t.shape, generator=generator)).to(dtype).requires_grad_() for t in teacher]
    double, single = ([t.detach().to(d).requires_grad_() for t in student] for d in (F64, F32))
    exact = torch.autograd.grad(reference(*double, *(t.double() for t in teacher), alpha=1.0), double)
    usual = torch.autograd.grad(reference(*single, *(t.float() for t in teacher), alpha=1.0), single)
    loss = kdfast.linear_kd_loss(*student, *teacher, alpha=1.0)
    for ours, theirs, true in zip(torch.autograd.grad(loss, student), usual, exact, strict=True):
        error, other, size = (float(x.norm()) for x in (ours.double() - true, theirs.double() - true, true))
        assert error <= 2 * other + (0 if dtype is F32 else torch.finfo(dtype).eps / 2) * size
