"""The CUDA operators on a GPU, against plain torch in float64 (tests/accuracy.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import ROUNDING, check, close, value_and_gradient
from torch import Tensor
from torch.autograd import DeviceType

import kdfast
from kdfast import _C
from kdfast.bench.registry import OPERATORS, Operator, Sample
from kdfast.bench.registry.divergences import DIVERGENCES

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALIKE = [(dtype, dtype) for dtype in DTYPES]
MIXED = [(s, t) for s in DTYPES for t in DTYPES if s != t]
# One kernel takes all mixtures of dtypes: all of them with one operator, one of them with every other.
CASES = [
    pytest.param(operator, sample, pair, id=f"{operator.name}-{sample.name}-{pair[0]}-{pair[1]}".replace("torch.", ""))
    for operator in OPERATORS.values()
    for sample in operator.samples
    for pair in ALIKE + (MIXED if operator.name == "kl_div" else MIXED[:1])
]
# One that looks once at the rows, one that looks twice, one with labels.
LOOKS = pytest.mark.parametrize("name", ["kl_div", "js_div", "kd_loss"])


@pytest.fixture(params=["clusters", "no clusters"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels of Ampere run on Hopper too, where they are forced."""
    if request.param == "no clusters":
        monkeypatch.setenv("KDFAST_CUDA_NO_CLUSTERS", "1")
    return request.param  # type: ignore[no-any-return]


def logits(
    rows: int, columns: int, dtype: torch.dtype, seed: int, *, offset: int = 0, width: int | None = None
) -> Tensor:
    """`[rows, width or columns]` on the GPU, `offset` elements off 16 bytes; columns beyond `columns` are NaN."""
    width = width or columns
    memory = torch.full((offset + rows * width,), torch.nan, dtype=dtype, device="cuda")
    z = memory[offset:].view(rows, width)
    z[:, :columns] = 3 * torch.randn(rows, columns, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")
    return z


def labels(rows: int, columns: int) -> Tensor:
    """At the edges of rows and inside; every seventh is ignored."""
    at = torch.arange(rows, device="cuda")
    return torch.where(
        at % 7 == 3, -100, torch.where(at % 2 == 0, at * 997 % columns, columns - 1 - at % min(columns, 9))
    )


def compare(student: Tensor, teacher: Tensor, name: str = "kl_div", **kwargs: Any) -> None:
    """Value and gradient by the accuracy rule: twice the error of eager in the same dtype, or a floor of rounding."""
    operator = DIVERGENCES[name]
    if name == "kd_loss":
        rows = student.shape[:-1]
        kwargs = {"labels": labels(rows.numel(), student.shape[-1]).view(rows), "label_smoothing": 0.1} | kwargs
    value, gradient = value_and_gradient(operator.function, student, teacher, kwargs)
    exact = value_and_gradient(operator.reference, student.double(), teacher.double(), kwargs)
    eager = value_and_gradient(operator.reference, student, teacher, kwargs)
    value_floor, gradient_floor = operator.floors(operator.reference, student.detach(), teacher, kwargs, exact)
    close(value, exact[0], eager[0], value_floor, name)
    allowed = torch.tensor(gradient_floor + ROUNDING[student.dtype] * float(exact[1].norm()))
    close(gradient, exact[1], eager[1], allowed, name, norm=True)


@pytest.mark.parametrize("gap", [1.0, 0.05])
@pytest.mark.parametrize(("operator", "sample", "dtypes"), CASES)
def test_registry(operator: Operator, sample: Sample, gap: float, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(operator, sample, gap, *dtypes, device="cuda")


# A lane, lanes, a warp with and without whole vectors; a block; clusters of 2, 4, 8 and 16; 4999 and 50257 are odd.
@pytest.mark.parametrize("columns", [2, 33, 999, 1000, 4999, 32000, 50257, 128256, 151936, 262144])
@pytest.mark.parametrize("dtype", DTYPES)
@LOOKS
@pytest.mark.usefixtures("path")
def test_vocabularies(columns: int, dtype: torch.dtype, name: str) -> None:
    for rows in (5, 300):  # few rows are spread over more blocks
        student, teacher = logits(rows, columns, dtype, 0), logits(rows, columns, dtype, 1)
        compare(student, teacher, name, temperature=2.0)
        compare(student, (student + 0.05 * teacher).to(dtype), name, reduction="none")


@pytest.mark.parametrize("columns", [100, 50257, 151936])
@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "kd_loss"])
@pytest.mark.usefixtures("path")
def test_every_divergence(columns: int, name: str) -> None:
    """Alone and beside labels, whose powers are at temperature 1."""
    student, teacher = logits(40, columns, torch.bfloat16, 0), logits(40, columns, torch.bfloat16, 1)
    compare(student, teacher, name)
    for temperature in (1.0, 2.0, 3.0):
        compare(student, teacher, "kd_loss", divergence=name, temperature=temperature)


@pytest.mark.parametrize("offset", range(1, 8))
@pytest.mark.parametrize("columns", [1000, 4999, 50257])
@LOOKS
@pytest.mark.usefixtures("path")
def test_unaligned(columns: int, offset: int, name: str) -> None:
    """Alike, where gradients are aligned and the general kernel takes over, and unlike."""
    for dtype in (torch.float32, torch.bfloat16):
        student = logits(7, columns, dtype, 0, offset=offset)
        compare(student, logits(7, columns, dtype, 1, offset=offset), name)
        compare(student, logits(7, columns, dtype, 1), name)


@pytest.mark.parametrize("columns", [3, 1000, 4999, 32000])
def test_strided(columns: int) -> None:
    student, teacher = logits(columns, 6, torch.bfloat16, 0), logits(columns, 6, torch.bfloat16, 1)
    compare(student.T, teacher.T)
    wide = logits(12, columns, torch.float32, 2).view(3, 4, columns)
    compare(wide.transpose(0, 1), logits(12, columns, torch.float32, 3).view(4, 3, columns), reduction="batchmean")
    compare(wide[:, ::2], logits(6, columns, torch.bfloat16, 3).view(3, 2, columns))
    compare(wide[:, :1].expand(3, 5, columns), logits(15, columns, torch.float32, 3).view(3, 5, columns))


@pytest.mark.parametrize("columns", [40, 1000, 50257, 151936])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "batchmean"])
@pytest.mark.usefixtures("path")
def test_rows_that_are_not_read(columns: int, reduction: str) -> None:
    """Masked rows and padded columns hold NaN; their gradient is zero."""
    student = logits(64, columns, torch.bfloat16, 0, width=columns + 128)
    teacher = logits(64, columns, torch.bfloat16, 1, width=columns + 128)
    mask = torch.arange(64, device="cuda") % 3 != 0
    student[~mask] = teacher[~mask] = torch.nan
    rows = {"mask": mask, "weight": torch.linspace(0.1, 2, 64, device="cuda")}
    rows["temperature"] = torch.linspace(0.5, 3, 64, device="cuda")
    value, gradient = value_and_gradient(
        kdfast.kl_div, student, teacher, {"vocab_size": columns, "reduction": reduction, **rows}
    )
    assert (gradient[~mask] == 0).all()
    assert (gradient[:, columns:] == 0).all()
    assert value.isfinite().all()
    clean = [z[:, :columns].nan_to_num().contiguous() for z in (student, teacher)]
    compare(*clean, reduction=reduction, **rows)
    expected = value_and_gradient(kdfast.kl_div, *clean, {"reduction": reduction, **rows})
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(gradient[:, :columns], expected[1])


@pytest.mark.parametrize("columns", [10, 1000, 4999, 128256])
@pytest.mark.parametrize("name", ["kl_div", "js_div", "skew_kl_div", "skew_reverse_kl_div", "total_variation"])
@pytest.mark.usefixtures("path")
def test_infinities(columns: int, name: str) -> None:
    inf = torch.inf
    student, teacher = logits(6, columns, torch.bfloat16, 0), logits(6, columns, torch.bfloat16, 1)
    student[0, ::3] = teacher[0, ::3] = -inf
    teacher[1, ::5] = -inf
    student[2, 7] = -inf
    student[3] = -inf
    teacher[4, 1] = torch.nan
    student[5, 2] = inf
    compare(student[:2], teacher[:2], name, reduction="none")
    loss = DIVERGENCES[name].function(student, teacher, reduction="none")
    assert loss[:2].isfinite().all()
    assert loss[2] == inf if name == "kl_div" else loss[2].isfinite()  # the others are bounded
    assert loss[3:].isnan().all()


def test_empty() -> None:
    for shape in ((0, 5), (3, 0), (2, 0, 5)):
        z = torch.zeros(shape, device="cuda", requires_grad=True)
        loss = kdfast.kl_div(z, z.detach())
        loss.backward()
        assert loss == 0
        assert z.grad is not None
        assert z.grad.shape == shape


@pytest.mark.parametrize("name", ["kl_div", "js_div"])
def test_same_every_time(name: str) -> None:
    student, teacher = logits(3000, 50257, torch.bfloat16, 0), logits(3000, 50257, torch.bfloat16, 1)
    function = DIVERGENCES[name].function
    first = value_and_gradient(function, student, teacher, {})
    for _ in range(3):
        again = value_and_gradient(function, student, teacher, {})
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_on_another_stream() -> None:
    """Launches must follow the fill on the current stream, which a long wait holds up."""
    stream = torch.cuda.Stream()
    teacher = logits(100, 32000, torch.float32, 1)
    student = torch.full_like(teacher, torch.nan)
    right = logits(100, 32000, torch.float32, 0)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        student.copy_(right)
        value, gradient = value_and_gradient(kdfast.kl_div, student, teacher, {})
    stream.synchronize()
    expected = value_and_gradient(kdfast.kl_div, right, teacher, {})
    assert torch.equal(value, expected[0])
    assert torch.equal(gradient, expected[1])


def test_on_another_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    student, teacher = (logits(9, 4999, torch.float32, seed).to("cuda:1") for seed in (0, 1))
    compare(student, teacher)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("columns", [1000, 151936])
def test_waits_for_nothing(columns: int) -> None:
    student = logits(64, columns, torch.bfloat16, 0).requires_grad_()
    teacher, mask = logits(64, columns, torch.bfloat16, 1), torch.ones(64, dtype=torch.bool, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        kdfast.kl_div(student, teacher, mask=mask).backward()
        (
            2 * kdfast.kl_div(student, teacher, num_items=torch.tensor(3.0).pin_memory().to("cuda", non_blocking=True))
        ).backward()
        kdfast.kd_loss(student, teacher, mask.long(), mask=mask).backward()
        kdfast.kd_loss(student, teacher, mask.long(), ignore_index=0).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("columns", [1000, 50257])
def test_two_launches(columns: int) -> None:
    """And a third before them where labels have to be counted, or after them where rows are very many."""
    student = logits(64, columns, torch.bfloat16, 0).requires_grad_()
    teacher = logits(64, columns, torch.bfloat16, 1)
    hard = torch.zeros(64, dtype=torch.long, device="cuda")
    many = [logits(33000, 2, torch.float32, seed) for seed in (0, 1)]
    for call, launches in (
        (lambda: kdfast.kl_div(student, teacher), 2),
        (lambda: kdfast.js_div(student, teacher), 2),
        (lambda: kdfast.kd_loss(student, teacher, hard, reduction="sum"), 2),
        (lambda: kdfast.kd_loss(student, teacher, hard), 3),
        (lambda: kdfast.kl_div(*many), 3),
    ):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        kernels = [e.name for e in profile.events() if e.device_type == DeviceType.CUDA and "kdfast" in e.name]
        assert len(kernels) == launches, kernels


@pytest.mark.parametrize("columns", [1000, 50257, 151936])
@pytest.mark.usefixtures("path")
def test_cuda_graph(columns: int) -> None:
    student = logits(32, columns, torch.bfloat16, 0).requires_grad_()
    teacher, mask = logits(32, columns, torch.bfloat16, 1), torch.arange(32, device="cuda") % 2 == 0
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # warm up, as capture requires
        torch.autograd.grad(kdfast.kl_div(student, teacher, mask=mask), student)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = kdfast.kl_div(student, teacher, mask=mask)
        (gradient,) = torch.autograd.grad(loss, student)
    for seed in (2, 3):
        with torch.no_grad():
            student.copy_(logits(32, columns, torch.bfloat16, seed))
        mask.copy_(~mask)
        graph.replay()
        expected = kdfast.kl_div(student, teacher, mask=mask)
        assert torch.equal(loss, expected)
        assert torch.equal(gradient, torch.autograd.grad(expected, student)[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(reduction: str) -> None:
    student, teacher = logits(16, 4999, torch.bfloat16, 0), logits(16, 4999, torch.bfloat16, 1)
    compiled = torch.compile(kdfast.kl_div, fullgraph=True)
    kwargs = {"reduction": reduction, "temperature": 2.0}
    for got, expected in zip(
        value_and_gradient(compiled, student, teacher, kwargs),
        value_and_gradient(kdfast.kl_div, student, teacher, kwargs),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_upstream_factors() -> None:
    """Scaled in place only when nobody can ask again; a kept graph gives the same gradient twice."""
    student = logits(16, 4999, torch.bfloat16, 0).requires_grad_()
    teacher = logits(16, 4999, torch.bfloat16, 1)
    (one,) = torch.autograd.grad(kdfast.kl_div(student, teacher), student)
    (three,) = torch.autograd.grad(3 * kdfast.kl_div(student, teacher), student)
    torch.testing.assert_close(three, 3 * one)
    loss = kdfast.kl_div(student, teacher)
    for _ in range(2):
        (again,) = torch.autograd.grad(4 * loss, student, retain_graph=True)
        assert torch.equal(again, 4 * one)
    (nothing,) = torch.autograd.grad(0 * loss, student)
    assert (nothing == 0).all()


def test_float16_gradients_survive_a_grad_scaler() -> None:
    student = logits(8192, 1000, torch.float16, 0).requires_grad_()
    teacher = logits(8192, 1000, torch.float16, 1)
    (gradient,) = torch.autograd.grad(65536.0 * kdfast.kl_div(student, teacher), student)
    exact = value_and_gradient(DIVERGENCES["kl_div"].reference, student.double(), teacher.double(), {})[1] * (
        65536.0 / 0.5
    )
    assert (gradient.double() - exact).norm() <= 2**-11 * exact.norm()


@pytest.mark.parametrize(("columns", "pad"), [(2, 0), (1000, 0), (128256, 0), (50257, 1)])
def test_more_than_2_31_elements(columns: int, pad: int) -> None:
    """The last rows lie beyond what 32 bits address; `pad` makes row starts change alignment."""
    rows = (2**31 + 2**20) // (columns + pad) + 1
    if torch.cuda.mem_get_info()[0] < 3.3 * rows * (columns + pad) * 2 + 2**30:
        pytest.skip("needs more GPU memory")
    student, teacher = (torch.zeros(rows, columns + pad, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    ends = [0, 1, rows // 2, rows - 2, rows - 1]
    student[ends, :columns], teacher[ends, :columns] = (logits(5, columns, torch.bfloat16, seed) for seed in (0, 1))
    student.requires_grad_()
    loss = kdfast.kl_div(student, teacher, reduction="sum", vocab_size=columns)
    (gradient,) = torch.autograd.grad(loss, student)
    small = student.detach()[ends, :columns].contiguous(), teacher[ends, :columns].contiguous()
    expected = value_and_gradient(DIVERGENCES["kl_div"].reference, *(z.double() for z in small), {"reduction": "sum"})
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(gradient[ends, :columns].double(), 2 * expected[1], rtol=2**-7, atol=1e-6)
    assert not gradient[2 : rows // 2].any()


def test_kernels_keep_to_registers() -> None:
    for kernel in _C.cuda_kernels():
        assert kernel["local_bytes"] == 0, kernel
        assert kernel["registers"] * kernel["max_threads"] <= 65536, kernel
