"""The evidence run (tools/gpu.sh), rehearsed on a CPU: every stage runs, what fails or hangs takes nothing with it; and the
library that is brought along is taken where it is of these sources."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from kdfast.bench import harness
from kdfast.bench.evidence import smoke

ROOT = Path(__file__).parents[1]


def rehearsed(out: Path, **settings: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """What a rehearsal says, and the files of its archive."""
    environment = os.environ | {"KDFAST_GPU_DRY": "1", "OUT": str(out), "PYTHON": sys.executable} | settings
    done = subprocess.run([ROOT / "tools" / "gpu.sh"], env=environment, capture_output=True, text=True, check=False)
    assert sorted(path.name for path in out.iterdir()) == ["evidence.tar.gz", "summary.txt"]
    with tarfile.open(out / "evidence.tar.gz") as archive:
        files = {m.name.removeprefix("./"): archive.extractfile(m) for m in archive.getmembers() if m.isfile()}
        return done, {name: file.read().decode() for name, file in files.items() if file is not None}


def results(files: dict[str, str], stage: str) -> list[dict[str, Any]]:
    return json.loads(files[f"{stage}.json"])["results"]  # type: ignore[no-any-return]


def test_every_stage_leaves_what_it_found(tmp_path: Path) -> None:
    """One hangs after its first case, one fails."""
    done, files = rehearsed(tmp_path, KDFAST_GPU_HANG="benchmarks", KDFAST_GPU_FAIL="linear")
    assert done.returncode == 1
    said = {line.split(":")[0].split()[-1]: line for line in files["summary.txt"].splitlines()}
    assert "OUT OF TIME" in said["benchmarks"]
    assert "FAILED" in said["linear"]
    assert "failed as KDFAST_GPU_FAIL asks" in said["linear"]
    for stage in ("smoke", "tests", "memcheck", "synccheck", "racecheck", "peers"):
        assert "done in" in said[stage]
    assert [r["case"] for r in results(files, "smoke")] == list(smoke.CASES)
    assert [r["case"] for r in results(files, "benchmarks")] == ["ceilings"]
    assert results(files, "benchmarks")[0]["copy_GBps"] > 0
    assert results(files, "linear")[0]["of_products"] > 0
    assert all(r["code"] == 0 and " passed" in r["summary"] for r in results(files, "tests"))
    assert "racecheck/smoke.json" in files
    libraries, *peers = results(files, "peers")
    assert libraries["case"] == "libraries"
    assert len(peers) >= 2
    assert all(case[way]["ms"] > 0 for case in peers for way in ("kdfast", "torch", "torch.compile"))


def test_only_some_benchmarks(tmp_path: Path) -> None:
    """Errors of a case are results."""
    done, files = rehearsed(tmp_path, STAGES="benchmarks", ONLY="js_div")
    assert done.returncode == 0
    _, case = results(files, "benchmarks")
    assert case["case"].startswith("js_div-16x16-")
    assert min(case["ms"], case["of_ceiling"], case["x_eager"]) > 0


def test_a_wrong_result_ends_the_run(tmp_path: Path) -> None:
    done, files = rehearsed(tmp_path, KDFAST_GPU_FAIL="smoke")
    assert done.returncode == 1
    assert "smoke: FAILED" in files["summary.txt"]
    assert "tests.json" not in files


def test_a_case_that_is_wrong_or_raises_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdfast.bench.evidence.record.DEVICE", "cpu")
    monkeypatch.setattr("kdfast.bench.evidence.smoke.DEVICE", "cpu")
    monkeypatch.setattr("kdfast.bench.evidence.smoke.DRY", True)
    record = smoke.Record("smoke", tmp_path)
    monkeypatch.setattr(smoke, "ALLOWED", dict.fromkeys(smoke.ALLOWED, 0.0))
    with pytest.raises(SystemExit, match="smoke: registers, lanes: AssertionError: value and gradient are"):
        smoke.run(record)
    assert "error" in json.loads((tmp_path / "smoke.json").read_text())["results"][0]


def test_headlines_come_first() -> None:
    from kdfast.bench.evidence import benchmarks

    names = [case.name for case in sorted(harness.cases(device="cuda"), key=benchmarks.place)]
    places = [benchmarks.HEADLINES[benchmarks.place(c)] for c in harness.cases(device="cuda") if c.gradient]
    assert set(places) == set(benchmarks.HEADLINES)  # none is of a case that there is not
    assert names[0].endswith("x128256-bfloat16-grad")
    assert names.index("kl_div-8192x2-bfloat16-grad") < 10
    assert all(name.endswith("-loss") for name in names[len(names) // 2 :])


def test_the_library_is_taken_where_it_is_of_these_sources(tmp_path: Path) -> None:
    for name in ("csrc", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    script, folder = tmp_path / "tools" / "gpu_library.sh", tmp_path / "gpu-library"

    def current(**settings: str) -> bool:
        return subprocess.run([script, "current"], env=os.environ | settings, check=False).returncode == 0

    assert not current()
    folder.mkdir()
    (folder / "libkdfast.so").write_bytes(b"")
    assert not current()
    stamp = subprocess.run([script, "stamp"], capture_output=True, text=True, check=True).stdout
    (folder / "stamp").write_text(stamp)
    assert current()
    assert not current(ARCHITECTURE="80-real")
    with (tmp_path / "csrc" / "cuda" / "plan.h").open("a") as source:
        source.write("// another\n")
    assert not current()


# What a bare machine with a GPU has beside Python: the packages that collecting the CUDA tests may import.
COLLECTED = """
import sys
unwanted = ("transformers", "typer", "rich", "datasets", "xdist", "matplotlib", "onnx", "peft", "accelerate")
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in unwanted:
            raise ImportError(f"{name} is missing on a bare machine")
sys.meta_path.insert(0, Missing())
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:xdist", "-p", "no:benchmark", *sys.argv[1:]]))
"""


def test_cuda_tests_need_torch_and_pytest_alone() -> None:
    from kdfast.bench.evidence import tests

    command = [sys.executable, "-c", COLLECTED, *tests.files()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert tests.files() == ["tests/test_cuda.py"]
    assert done.returncode == 5, done.stdout + done.stderr  # all deselected, where there is no GPU
    assert "error" not in done.stdout.lower()
