"""`block_sparse_linear`: values and gradients against the whole weight in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import variants
from torch import Tensor

import kdfast
from kdfast import _C, BlockLayout
from kdfast.ops.block_sparse import block_sparse_linear_reference

T, F = True, False
MASK = torch.tensor([[T, F, T, F], [F, F, F, F], [T, F, F, F]])  # a block row and two block columns without any
LAYOUT = BlockLayout(MASK, (32, 64))
MASKS = {"part": MASK, "none": torch.zeros(2, 2) > 0, "all": torch.ones(2, 3) > 0}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FLOATS = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ERROR = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-14}
BIG = BlockLayout(torch.rand(24, 12, generator=torch.Generator().manual_seed(1)) < 0.5, (128, 64))


def made(layout: BlockLayout, *leading: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, values, bias and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((*leading, layout.shape[1]), (layout.count, *layout.block), layout.shape[:1], (*leading, layout.shape[0]))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def results(function: Any, layout: BlockLayout, x: Tensor, values: Tensor, bias: Tensor | None, grad: Tensor) -> Any:
    """The value and all gradients."""
    leaves = [t.detach().requires_grad_() for t in (x, values, bias) if t is not None]
    y = function(leaves[0], leaves[1], layout, *leaves[2:])
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def ours(layout: BlockLayout, *given: Tensor | None) -> Any:
    return results(kdfast.block_sparse_linear, layout, *given)


def exact(layout: BlockLayout, *given: Tensor | None) -> Any:
    return results(block_sparse_linear_reference, layout, *(None if t is None else t.double() for t in given))


def close(got: list[Tensor], wanted: list[Tensor], error: float) -> None:
    """By the norm; what is not zero is not zero here."""
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert float((ours.double() - theirs.double()).norm()) <= error * float(theirs.double().norm())


# ---- values and gradients ----
@pytest.mark.parametrize("leading", [(6,), (2, 1, 3), (), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients(mask: str, leading: tuple[int, ...], with_bias: bool) -> None:
    layout = BlockLayout(MASKS[mask], (64, 32))
    x, values, bias, grad = made(layout, *leading)
    given = (x, values, bias if with_bias else None, grad)
    close(ours(layout, *given), exact(layout, *given), 1e-14)


@pytest.mark.parametrize("block", [(32, 32), (64, 128), (128, 32), (96, 64)], ids=str)
def test_gradcheck(block: tuple[int, int]) -> None:
    layout = BlockLayout(MASK, block)
    x, values, bias, _ = (t.requires_grad_() for t in made(layout, 3))
    call = lambda x, values, bias: kdfast.block_sparse_linear(x, values, layout, bias)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, values, bias), fast_mode=True)


@pytest.mark.usefixtures("cpu_variant")
@FLOATS
@pytest.mark.parametrize("rows", [1, 31, 200])
@pytest.mark.parametrize("block", [(32, 96), (64, 64), (128, 32)], ids=str)
def test_every_variant(dtype: torch.dtype, rows: int, block: tuple[int, int]) -> None:
    """A row; less than a tile; several chunks and panels with a rest."""
    layout = BlockLayout(MASK, block)
    given = made(layout, rows, dtype=dtype)
    got = ours(layout, *given)
    assert {t.dtype for t in got} == {dtype}
    close(got, exact(layout, *given), ERROR[dtype])


@FLOATS
def test_more_than_fits_a_cache(dtype: torch.dtype) -> None:
    """Blocks in several groups, rows in several slabs, gradients in several panels."""
    given = made(BIG, 1100, dtype=dtype)
    close(ours(BIG, *given), exact(BIG, *given), 2 * ERROR[dtype])


def test_short_numbers_are_summed_in_float32() -> None:
    """A thousand times a number that bfloat16 could not add to the sum of the others."""
    layout = BlockLayout(torch.ones(1, 16) > 0, (32, 64))
    x, values = torch.ones(2, 1024).bfloat16(), torch.ones(16, 32, 64).bfloat16()
    got = ours(layout, x, values, None, torch.ones(2, 32).bfloat16())
    assert (got[0] == 1024).all()
    rows = torch.ones(4096, 1024).bfloat16()
    assert (ours(layout, rows, values, None, torch.ones(4096, 32).bfloat16())[2] == 4096).all()


@FLOATS
def test_strides(dtype: torch.dtype) -> None:
    """Transposed, interleaved and expanded tensors; rows that start at odd places."""
    x, values, bias, grad = made(LAYOUT, 4, 6, dtype=dtype)
    x, grad = x.transpose(0, 1), grad[:1, :1].expand(6, 4, -1)
    values, bias = values.transpose(1, 2).contiguous().transpose(1, 2), torch.stack((bias, bias), 1)[:, 0]
    close(ours(LAYOUT, x, values, bias, grad), exact(LAYOUT, x, values, bias, grad), ERROR[dtype])
    wide = torch.full((24, 259), torch.nan, dtype=dtype)
    wide[:, 1:257] = x.reshape(24, 256)
    given = wide[:, 1:257], values, None, grad.reshape(24, -1)
    close(ours(LAYOUT, *given), exact(LAYOUT, *given), ERROR[dtype])
    none = torch.empty_strided((0, 256), (1, 7), dtype=dtype)
    assert ours(LAYOUT, none, values, None, torch.empty(0, grad.shape[-1], dtype=dtype))[0].shape == (0, 96)


@pytest.mark.usefixtures("cpu_variant")
@FLOATS
def test_nan_in_a_dead_place_reaches_nothing(dtype: torch.dtype) -> None:
    """In x where no block reads it, or only those of the first block row; in the gradient of a dead block row, or the
    third, which no block of the third block column reads."""
    x, values, bias, grad = made(LAYOUT, 5, dtype=dtype)
    clean = ours(LAYOUT, x, values, bias, grad)
    x[:, 64:128], x[:, 192:], grad[:, 32:64] = torch.nan, torch.nan, torch.nan
    got = ours(LAYOUT, x, values, bias, grad)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], clean[:3], strict=True))
    x[:, 128:192], grad[:, 64:] = torch.inf, torch.nan
    y, of_x, of_values, _ = ours(LAYOUT, x, values, bias, grad)
    assert not y[:, :32].isfinite().any()
    assert torch.equal(y[:, 32:], clean[0][:, 32:])
    assert of_x[:, :64].isnan().all()
    assert torch.equal(of_x[:, 64:], clean[1][:, 64:])
    assert torch.equal(of_values[0], clean[2][0])
    assert of_values[2].isnan().all()


@pytest.mark.usefixtures("cpu_variant")
@FLOATS
def test_bitwise_the_same_whatever_the_threads(dtype: torch.dtype) -> None:
    layout, before = BlockLayout(BIG.mask[:8], (64, 64)), torch.get_num_threads()
    given = made(layout, 150, dtype=dtype)
    runs = []
    try:
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            runs.append(ours(layout, *given))
    finally:
        torch.set_num_threads(before)
    assert all(t.any() for t in runs[0])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("variant", _C.cpu_variants())
def test_the_variant_that_is_asked_for(variant: str) -> None:
    program = (
        "import torch, kdfast; from kdfast import _C\n"
        "layout = kdfast.BlockLayout(torch.ones(2, 2) > 0, (32, 64))\n"
        "x, v = torch.ones(3, 128).bfloat16(), torch.ones(4, 32, 64).bfloat16()\n"
        "print(_C.cpu_variant(), kdfast.block_sparse_linear(x, v, layout).sum().item())"
    )
    assert variants.printed(variant, program) == [variant, str(float(3 * 64 * 128))]


# ---- autograd, autocast, compilation ----
def test_only_what_is_asked_for() -> None:
    x, values, bias, grad = made(LAYOUT, 3)
    y = kdfast.block_sparse_linear(x, values.requires_grad_(), LAYOUT, bias)
    (gradient,) = torch.autograd.grad(y, values, grad)
    close([gradient], [exact(LAYOUT, x, values, bias, grad)[2]], 1e-14)
    assert not kdfast.block_sparse_linear(x, values.detach(), LAYOUT).requires_grad
    y = kdfast.block_sparse_linear(x.requires_grad_(), values, LAYOUT)
    with pytest.raises(RuntimeError, match="block_sparse_linear: double backward is not available"):
        torch.autograd.grad(y, x, grad, create_graph=True)


def test_autocast() -> None:
    """As F.linear: products in bfloat16, gradients in the parameters' dtype."""
    x, values, bias, grad = made(LAYOUT, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ours(LAYOUT, x, values, bias, grad.bfloat16())
        short = ours(LAYOUT, x.bfloat16(), values, bias, grad.bfloat16())
        doubles = ours(LAYOUT, *made(LAYOUT, 5))
    assert [t.dtype for t in got] == [torch.bfloat16, *[torch.float32] * 3]
    assert [t.dtype for t in short] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert {t.dtype for t in doubles} == {torch.float64}
    rounded = [t.bfloat16() for t in (x, values, bias, grad)]
    close(got, exact(LAYOUT, *rounded), ERROR[torch.bfloat16])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str) -> None:
    """By kdfast's own operators, not by the whole weight."""
    torch.compiler.reset()
    x, values, bias, grad = made(LAYOUT, 5, dtype=torch.float32)
    x[:, 64:128] = torch.nan
    compiled = torch.compile(lambda *args: kdfast.block_sparse_linear(*args), fullgraph=True, backend=backend)
    got = results(compiled, LAYOUT, x, values, bias, grad)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], ours(LAYOUT, x, values, bias, grad)[:3], strict=True))
    assert got[0].isfinite().all()


def test_subclasses_of_tensors() -> None:
    """What brings its own operators is handed to them."""
    calls = []

    class Counting(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs or {})

    x, values, *_ = made(LAYOUT, 5)
    y = kdfast.block_sparse_linear(x.as_subclass(Counting), values, LAYOUT)
    assert "linear" in calls
    torch.testing.assert_close(y.as_subclass(Tensor), kdfast.block_sparse_linear(x, values, LAYOUT))


def test_without_memory() -> None:
    x, values, bias, _ = (t.to("meta") for t in made(LAYOUT, 2, 5, dtype=torch.float32))
    assert kdfast.block_sparse_linear(x, values, LAYOUT, bias).shape == (2, 5, 96)


# ---- errors ----
X, V, B, _ = made(LAYOUT, 3, dtype=torch.float32)
BAD: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
    (TypeError, "layout: expected a kdfast.BlockLayout, got torch.bool", (X, V, MASK)),
    (TypeError, "values: expected a tensor, got list", (X, [V], LAYOUT)),
    (TypeError, "x: expected float32, bfloat16, float16 or float64, got torch.int64", (X.long(), V, LAYOUT)),
    (TypeError, "values: expected the dtype of x, torch.float32, got torch.bfloat16", (X, V.bfloat16(), LAYOUT)),
    (TypeError, "bias: expected the dtype of x, torch.float32, got torch.float64", (X, V, LAYOUT, B.double())),
    (ValueError, r"values: expected the layout's blocks, \[3, 32, 64\], got shape \[2, 32, 64\]", (X, V[:2], LAYOUT)),
    (ValueError, r"bias: expected \[96\], got shape \[5\]", (X, V, LAYOUT, B[:5])),
    (ValueError, r"x: expected 256 features, got shape \[3, 255\]", (X[:, 1:], V, LAYOUT)),
    (ValueError, "x: expected at least one dimension, the features last, got a scalar", (X[0, 0], V, LAYOUT)),
    (ValueError, "values: expected the device of x, cpu, got meta", (X, V.to("meta"), LAYOUT)),
]


@pytest.mark.parametrize(("error", "message", "arguments"), BAD, ids=[b[1][:30] for b in BAD])
def test_errors(error: type[Exception], message: str, arguments: Any) -> None:
    with pytest.raises(error, match=f"^block_sparse_linear: {message}"):
        kdfast.block_sparse_linear(*arguments)


def test_native_operators_refuse_what_would_leave_memory() -> None:
    product, gradient = torch.ops.kdfast.block_sparse_product, torch.ops.kdfast.block_sparse_gradient
    begin, index, place = LAYOUT.rows
    for wrong, message in (
        ((begin, index + 3, place), "index: expected 0 to 3, got "),
        ((begin, index, place - 1), "place: expected 0 to 2, got -1"),
        ((begin.flip(0), index, place), "begin: expected ascending numbers from 0 to 3"),
        ((begin, index[1:], place), "place: expected as many numbers as of index, got 3 and 2"),
        ((begin.int(), index, place), "begin: expected dtype Long, got Int"),
    ):
        with pytest.raises(RuntimeError, match=f"block_sparse_product: {message}"):
            product(X, V, *wrong, None, True)
        with pytest.raises(RuntimeError, match=f"block_sparse_gradient: {message}"):
            gradient(torch.ones(3, 96), X, *wrong, 32, 64, True)
    with pytest.raises(RuntimeError, match="block_sparse_product: x: expected columns in blocks of 64"):
        product(X[:, :100], V, *LAYOUT.rows, None, True)
    with pytest.raises(RuntimeError, match="block_sparse_product: block: expected sides of 32, 64, 96 or 128"):
        product(X, V[:, :16].contiguous(), *LAYOUT.rows, None, True)
    with pytest.raises(RuntimeError, match=r"block_sparse_product: bias: expected \[96\], contiguous, got \[5\]"):
        product(X, V, *LAYOUT.rows, B[:5], True)
    with pytest.raises(RuntimeError, match="block_sparse_gradient: begin: expected 5 numbers, got 4"):
        gradient(torch.ones(3, 96), X, *LAYOUT.rows, 32, 64, False)
    with pytest.raises(RuntimeError, match="block_sparse_gradient: grad, x: expected as many rows"):
        gradient(torch.ones(2, 96), X, *LAYOUT.rows, 32, 64, True)
