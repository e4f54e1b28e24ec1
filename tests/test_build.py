"""The native library as it is built: which symbols of torch it needs, and what happens without it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kdfast
from kdfast import _C
from kdfast.ops import _native

EXPORTED_BY_TORCH_2_10 = Path(__file__).parent / "torch_2_10_symbols.txt"


def test_needs_only_what_torch_2_10_exports() -> None:
    """One build serves every later torch; nothing of ATen, whose C++ symbols change with every release."""
    if shutil.which("nm") is None:
        pytest.fail("this test needs nm (binutils)")
    output = subprocess.run(
        ["nm", "-D", "--undefined-only", _native.LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    undefined = {line.split()[-1].split("@")[0] for line in output.splitlines()}
    of_torch = {name for name in undefined if name.startswith(("aoti_", "torch_"))}
    assert "aoti_torch_get_dtype" in of_torch
    assert of_torch <= set(EXPORTED_BY_TORCH_2_10.read_text().split())
    assert not [name for name in undefined if "_ZN2at" in name or "_ZN3c10" in name]


def test_reports_what_was_built() -> None:
    assert _C.version == kdfast.__version__
    assert _C.compiler.split()[0] in {"GNU", "Clang"}
    assert _C.cpu_variant() in _C.cpu_variants()
    assert _C.cpu_variants()[0] == "portable"


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_import_without_the_library_says_what_builds_it(tmp_path: Path, damage: str) -> None:
    package = tmp_path / "kdfast"
    shutil.copytree(Path(kdfast.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if damage == "broken":
        (package / "libkdfast.so").write_bytes(b"not a library")
    result = subprocess.run(
        [sys.executable, "-c", "import kdfast"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: kdfast: the native library")
    assert "pip install --no-build-isolation -e ." in last
    assert ("is missing" if damage == "missing" else "does not load") in last


def test_operators_need_no_training_extras() -> None:
    """`import kdfast` loads torch, without its compiler, and nothing of the trainer's dependencies."""
    unwanted = ("transformers", "datasets", "typer", "matplotlib", "torch._dynamo")
    program = f"import sys, kdfast; print([m for m in {unwanted} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
