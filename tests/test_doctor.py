"""`kdfast doctor`: its report, what an operator must cost, which path it takes, and the exit status of each."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import call, refused

import kdfast
from kdfast import _C
from kdfast.bench.registry import OPERATORS
from kdfast.doctor import built, cost, extras, speeds
from kdfast.ops.block_sparse import block_sparse_linear_reference

SLOW = speeds.Speeds(copy=1e9, products={"float32": 1e9, "bfloat16": 4e9})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements that take no time."""
    monkeypatch.setitem(speeds.COPIED, "cpu", 2**20)
    monkeypatch.setattr(speeds, "SECONDS", 0.0)
    monkeypatch.setattr(speeds, "WIDEST", 256)


# ---- the report ----
def test_report_names_what_is_built_and_measured(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(built.VARIANT, raising=False)
    assert call(monkeypatch, "doctor", "--device", "cpu") == 0
    out, err = capsys.readouterr()
    assert err == ""
    for text in (kdfast.__version__, _C.compiler, f"torch {_C.torch}", torch.__version__, _C.cpu_variants()[-1]):
        assert text in out
    for line in ("CUDA operators", "GPU", "train", "copy", "products, float32", "products, bfloat16", "GFLOP/s"):
        assert line in out
    assert max(map(len, out.splitlines())) <= 80


def test_library_is_for_the_torch_that_it_is_built_for() -> None:
    assert tuple(map(int, _C.torch.split("."))) == (2, 10)
    assert torch.torch_version.TorchVersion(torch.__version__) >= _C.torch


def test_stale_library_is_broken(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kdfast, "__version__", "99.0")
    assert call(monkeypatch, "doctor") == 1
    assert f"kdfast: library: expected that of kdfast 99.0, got {_C.version}; pip install" in capsys.readouterr().err


@pytest.mark.parametrize(("variant", "status"), [("portable", 0), ("sse9", 1)])
def test_forced_variant(variant: str, status: int) -> None:
    environment = os.environ | {built.VARIANT: variant, "COLUMNS": "200"}
    program = (
        "import sys; from kdfast.doctor import speeds; speeds.SECONDS, speeds.WIDEST = 0.0, 256; "
        "sys.argv = ['kdfast', 'doctor', '--device', 'cpu']; from kdfast.cli import main; main.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    if status:
        assert f"CPU variant: expected one of {', '.join(_C.cpu_variants())}, got 'sse9'" in done.stderr
    else:
        assert f"portable, as {built.VARIANT} says" in done.stdout
        assert "bfloat16 is widened" in done.stdout


# ---- what is asked for ----
def test_what_is_needed_and_there(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "doctor", "--need", "cli, train,portable") == 0


def test_what_is_needed_and_not_there(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_C, "cpu_variants", lambda: ["portable", "avx2"])
    monkeypatch.setattr(extras, "_version", lambda package: {"rich": "12.9"}.get(package, "999"))
    assert call(monkeypatch, "doctor", "--need", "cuda,amx,cli") == 1
    err = capsys.readouterr().err
    assert "kdfast: cuda: expected a GPU that torch sees, got none" in err
    assert "kdfast: amx: expected a processor that has it, got one of portable, avx2" in err
    assert "kdfast: cli: expected rich>=13 (12.9); pip install kdfast[cli]" in err
    assert call(monkeypatch, "doctor", "--device", "cuda") == 1
    assert "kdfast: device: expected a GPU that torch sees" in capsys.readouterr().err


def test_missing_parts_say_what_installs_them(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is not asked for is told, and no failure."""
    monkeypatch.setattr(extras, "_version", lambda package: None if package == "matplotlib" else "999")
    assert call(monkeypatch, "doctor", "--device", "cpu") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "pip install kdfast[bench] (missing: matplotlib>=3.8 (none))" in out


@pytest.mark.parametrize(
    ("requirements", "versions", "expected"),
    [
        (["a>=1.2; extra == 'x'"], {"a": "1.10"}, []),
        (["a>=1.2; extra == 'x'"], {"a": "1.1.9"}, ["a>=1.2 (1.1.9)"]),
        (['a<3,>=1.2 ; extra == "x"'], {}, ["a<3,>=1.2 (none)"]),
        (["a~=2.4.0; extra == 'x'"], {"a": "2.3"}, ["a~=2.4.0 (2.3)"]),
        (["a>=9", "b>=9; extra == 'y'"], {}, []),  # of the package itself, and of another part
        (["kdfast[y]; extra == 'x'", "b; extra == 'y'"], {}, ["b (none)"]),
        (["kdfast[y,z]; extra == 'x'", "b; extra == 'y'", "b; extra == 'z'"], {}, ["b (none)"]),
    ],
)
def test_requirements(
    requirements: list[str], versions: dict[str, str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: requirements)
    monkeypatch.setattr(extras, "_version", versions.get)
    assert extras.lacking("x") == expected


def test_cuda_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="card", major=7, minor=5, multi_processor_count=40)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(_C, "cuda", None)
    assert built.lacking_of_cuda().startswith(
        "expected CUDA operators, got a library without; with nvcc: KDFAST_CUDA=ON"
    )
    assert built._gpu() == ("GPU", "card, sm_75, 40 multiprocessors", "")
    monkeypatch.setattr(_C, "cuda", {"toolkit": "13.0", "architectures": "80-real 90"})
    assert built.lacking_of_cuda() == "expected a GPU of compute capability 8.0 or more, got 7.5"
    assert built._gpu().wrong

    def refuse() -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(_C, "cuda_kernels", refuse, raising=False)
    assert "kernels that load on this GPU, got no kernel image" in built.lacking_of_cuda()
    monkeypatch.setattr(_C, "cuda_kernels", list)
    assert built.lacking_of_cuda() == ""


# ---- what an operator costs ----
def test_cost_is_the_least_bytes_and_operations() -> None:
    kl = cost.cost(cost.case_of("kl_div", (64, 1000), "bfloat16", True, "cpu"))
    assert (kl.bytes, kl.flops) == (3 * 64 * 1000 * 2, None)
    assert cost.cost(cost.case_of("kl_div", (64, 1000), "float32", False, "cpu")).bytes == 2 * 64 * 1000 * 4
    linear = cost.cost(cost.case_of("linear_kd_loss", (8, 16, 1000), "bfloat16", True, "cpu"))
    assert linear.flops == 4 * 2 * 8 * 16 * 1000
    assert linear.bytes == 3 * (8 * 16 + 16 * 1000) * 2
    # The slower of the two, by products in the dtype, or in float32 where that is faster.
    assert kl.floor(SLOW) == pytest.approx(1e3 * kl.bytes / 1e9)
    assert linear.floor(SLOW) == pytest.approx(1e3 * linear.flops / 4e9)
    assert linear.floor(speeds.Speeds(1e9, {"float32": 9e9, "bfloat16": 1e9})) == pytest.approx(
        1e3 * linear.flops / 9e9
    )
    assert linear.floor(speeds.Speeds(1e6, SLOW.products)) == pytest.approx(1e3 * linear.bytes / 1e6)


def test_cost_takes_no_memory() -> None:
    huge = cost.cost(cost.case_of("linear_kd_loss", (2**20, 8192, 2**20), "bfloat16", True, "cpu"))
    assert huge.flops == 4 * 2 * 2.0**53


def test_speeds_are_of_this_machine(quick: None) -> None:
    found = speeds.measure("cpu", ["float32", "float64"])
    assert found.copy > 1e6
    assert min(found.products.values()) > 1e6
    assert found.of_product("float64") == found.products["float64"]


# ---- which path it takes ----
@pytest.mark.parametrize("op", OPERATORS)
def test_every_operator_is_on_the_fast_path(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "LONGEST", 1.0)  # at a machine's speed of 1 GFLOP/s: small calls
    shape = (4, 16, 500) if op.startswith("linear_") else None
    case = cost.case_of(op, shape, "float32", True, "cpu")
    tried = cost.attempt(case, "cpu", SLOW)
    assert cost.is_fast(case, tried)
    assert set(tried.kernels) <= set(OPERATORS[op].native)
    assert tried.shape[1:] == case.shape[1:]
    assert tried.took > 0


def test_long_calls_are_tried_in_part() -> None:
    case = cost.case_of("kl_div", (10**9, 1000), "float32", True, "cpu")
    shape = cost.attempt(case, "cpu", SLOW).shape
    assert 1 <= shape[0] <= cost.LONGEST * 1e6 / 12000
    assert shape[1] == 1000


def test_a_call_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_available", lambda device: 6e6)
    case = cost.case_of("kl_div", (5, 10**6), "float32", True, "cpu")
    with pytest.raises(
        ValueError, match=r"^shape: expected one that takes at most 0\.0 GB, .*, got 1x1000000, 0\.0 GB$"
    ):
        cost.attempt(case, "cpu", SLOW)


def test_operator_is_shown(quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--op", "linear_kd_loss", "--shape", "16x32x1000", "--dtype", "bfloat16", "--device", "cpu"]
    assert call(monkeypatch, "doctor", *options) == 0
    out = capsys.readouterr().out
    for text in (
        "linear_kd_loss 16x32x1000 bfloat16",
        "0.1951 MB",
        "0.004096 GFLOP",
        "floor",
        "took",
        "linear_divergence",
    ):
        assert text in out
    assert call(monkeypatch, "doctor", "--op", "kl_div", "--shape", "5×7", "--no-gradient", "--device", "cpu") == 0
    assert "without gradient" in capsys.readouterr().out


def test_plain_torch_is_the_slow_path(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    operator = OPERATORS["block_sparse_linear"]
    slow = {**vars(operator), "function": block_sparse_linear_reference}
    monkeypatch.setitem(OPERATORS, operator.name, type(operator)(**slow))
    options = ["--op", operator.name, "--shape", "8x128x128", "--device", "cpu"]
    assert call(monkeypatch, "doctor", *options) == 1
    out, err = capsys.readouterr()
    assert "slow: plain torch" in out
    assert err == "kdfast: op: expected a path through kdfast's kernels on cpu, got plain torch\n"


def test_wrong_result_is_told(quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    operator = OPERATORS["kl_div"]

    def half(*arguments: Any, **options: Any) -> Any:
        return operator.function(*arguments, **options) / 2

    monkeypatch.setitem(OPERATORS, "kl_div", type(operator)(**{**vars(operator), "function": half}))
    assert call(monkeypatch, "doctor", "--op", "kl_div", "--shape", "8x64", "--device", "cpu") == 1
    assert "kdfast: op: expected a right result, got kl_div: 5.0e-01" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--op", "kl"], "op: expected one of kl_div, "),
        (["--shape", "64,8", "--op", "kl_div"], "shape: expected sizes such as 64x152064, got '64,8'"),
        (["--shape", "64", "--op", "kl_div"], "shape: expected 2 numbers of 1 or more, such as 64x152064, got 64"),
        (["--shape", "0x8", "--op", "kl_div"], "shape: expected 2 numbers of 1 or more, such as 64x152064, got 0x8"),
        (
            ["--op", "block_sparse_linear", "--shape", "8x65x64"],
            "shape: expected features in blocks of 64, four blocks or a multiple of it, got 65, 64",
        ),
        (
            ["--op", "kl_div", "--dtype", "int8"],
            "dtype: expected one of float32, bfloat16, float16, float64, got 'int8'",
        ),
        (["--shape", "64x8"], "op: expected the operator to which 64x8 is a shape, got none"),
        (["--device", "tpu"], "device: expected cpu or cuda, got 'tpu'"),
        (["--need", "trian"], "need: expected some of "),
    ],
)
def test_mistakes(
    options: list[str], expected: str, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device = [] if "--device" in options else ["--device", "cpu"]
    assert call(monkeypatch, "doctor", *options, *device) == 2
    assert expected in capsys.readouterr().err


def test_mistakes_come_before_the_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--op", "kl"], ["--op", "kl_div", "--shape", "64"], ["--need", "trian"], ["--device", "tpu"]):
        refused(monkeypatch, capsys, "doctor", *options)
