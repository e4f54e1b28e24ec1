"""Sums of columns of 16-bit numbers on the CPU, `kdfast::column_sums`: against float64."""

from __future__ import annotations

import pytest
import torch

from kdfast.ops import _live_linear

SHORT = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# None; one number; tails of vectors; whole lines and blocks, and one more; rows in several pieces.
SIZES = [(0, 5), (5, 0), (1, 1), (3, 17), (64, 64), (7, 1024), (66, 1025), (257, 2100)]


def column_sums(x: torch.Tensor) -> torch.Tensor:
    sums: torch.Tensor = torch.ops.kdfast.column_sums(x)
    return sums


def made(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Amid NaN."""
    whole = torch.full((rows + 2, columns + 5), torch.nan, dtype=dtype)
    return whole[1 : rows + 1, 3 : columns + 3].copy_(torch.rand(rows, columns) + 0.5)


@pytest.mark.usefixtures("cpu_variant")
@SHORT
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_variant(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Off by a rounding of the result: no sum of positive numbers is small."""
    x = made(*size, dtype)
    got, exact = column_sums(x), x.double().sum(0)
    assert got.dtype is dtype
    torch.testing.assert_close(got.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=0.0)


@SHORT
def test_long_columns_keep_float32s_accuracy(dtype: torch.dtype) -> None:
    """What 64 rows add up to counts beside 2^15, in which one running float32 sum would lose each of them, and four too."""
    x = torch.full((64 * 1002,), 2.0**-12)
    x[:64], x[-64:] = 0, 0
    x[0], x[-1] = 2.0**15, -(2.0**15)
    assert column_sums(x[:, None].to(dtype)).tolist() == [64_000 * 2.0**-12]


@SHORT
def test_sums_are_not_of_16_bits(dtype: torch.dtype) -> None:
    x = torch.tensor([1000.0, 2.0**-6, -1000.0, 2.0**-6]).repeat(20_000)[:, None].to(dtype)
    assert column_sums(x).tolist() == torch.tensor([40_000 * 2.0**-6]).to(dtype).tolist()


def test_the_same_bits_whatever_the_threads() -> None:
    x, before = made(700, 1000, torch.bfloat16), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            results.append(column_sums(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_nan_and_inf_stay_in_their_columns() -> None:
    x = torch.ones(9, 40, dtype=torch.bfloat16)
    x[4, 3], x[8, 20], x[0, 39] = torch.nan, torch.inf, -torch.inf
    sums = column_sums(x)
    assert torch.isnan(sums).nonzero().flatten().tolist() == [3]
    assert (sums[20], sums[39]) == (torch.inf, -torch.inf)
    assert (sums == 9).sum() == 37


@pytest.mark.parametrize(
    "x",
    [torch.ones(3, 4), torch.ones(3).half(), torch.ones(4, 3).half().t(), torch.ones(2, 3, dtype=torch.int16)],
    ids=["float32", "vector", "columns", "integers"],
)
def test_what_it_refuses(x: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="column_sums: x: expected rows of bfloat16 or float16, side by side, got "):
        column_sums(x)


def test_a_biass_gradient_of_any_strides() -> None:
    """An expanded gradient, as of a sum, and a transposed one."""
    one = torch.tensor(0.5, dtype=torch.bfloat16)
    assert _live_linear.sum_of_rows(one.expand(6, 3)).tolist() == [3.0, 3.0, 3.0]
    x = torch.arange(6.0).view(3, 2).bfloat16()
    assert _live_linear.sum_of_rows(x).tolist() == [6.0, 9.0]
    assert _live_linear.sum_of_rows(x.t()).tolist() == [1.0, 5.0, 9.0]
