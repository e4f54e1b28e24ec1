"""Files and folders that may not be read or written, really so: each one line, before anything is loaded or trained.

Root may read and write all, unless it gives that right up: then modes count for it as for others.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_texts
from word_classifiers import bert, save, write_reviews

import kdfast
from kdfast.data import demo

PR_CAPBSET_DROP, RIGHTS = 24, (1, 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
SHORT = ["--max-length", 16]


def _give_up_rights() -> None:
    if os.geteuid() == 0:
        for right in RIGHTS:  # where that is not allowed, modes do not count, which skips the tests
            ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, right, 0, 0, 0)


def _without_rights(command: list[Any], **environment: str) -> subprocess.CompletedProcess[str]:
    here = {"PYTHONPATH": str(Path(kdfast.__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **here, **environment},
        preexec_fn=_give_up_rights,
    )


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`locked` and `secret.csv` may not be read, of `weights` only the weights, nor `sealed` be written."""
    folder = tmp_path_factory.mktemp("rights")
    for name in ("locked", "weights", "model"):
        save(folder / name, bert(0))
    (folder / "lm").mkdir()
    for name in ("locked/reviews.csv", "secret.csv", "reviews.csv"):
        write_reviews(folder / name)
    (folder / "texts.txt").write_text("w1 w2\n\n" * 9)
    (folder / "sealed").mkdir()
    tiny_texts.causal(folder / "lm")[demo.SMOLLM2.folder].rename(folder / "language")
    modes = {"locked": 0, "secret.csv": 0, "weights/model.safetensors": 0, "sealed": 0o555}
    for name, mode in modes.items():
        (folder / name).chmod(mode)
    try:
        found = _without_rights(["-c", "import os, sys; print(os.access(sys.argv[1], os.R_OK))", folder / "locked"])
        if found.stdout != "False\n":
            pytest.skip(f"modes do not count here: {found.stdout}{found.stderr}")
        yield folder
    finally:
        for name in modes:
            (folder / name).chmod(0o755)


HINTON = ["distill", "hinton", *SHORT]
RUN = ["--data", "{reviews.csv}", "--teacher", "{model}", "--output", "{new}"]
READ = {
    "file of data": ([*HINTON, *RUN, "--data", "{secret.csv}"], "data: expected a file or folder {secret.csv} that"),
    "folder of data": ([*HINTON, *RUN, "--data", "{locked}"], "data: expected a file or folder {locked} that"),
    "data inside": (
        [*HINTON, *RUN, "--data", "{locked/reviews.csv}"],
        "data: expected a file or folder {locked/reviews.csv}",
    ),
    "teacher": ([*HINTON, *RUN, "--teacher", "{locked}"], "teacher {locked}: expected a folder that can be read"),
    "teacher inside": (
        [*HINTON, *RUN, "--teacher", "{locked/of}"],
        "teacher {locked/of}: expected a folder that can be",
    ),
    "weights": ([*HINTON, *RUN, "--teacher", "{weights}"], "teacher {weights}: expected what transformers loads"),
    "texts": (["cache-teacher", "{language}", "{secret.csv}", "{new}", *SHORT], "data: expected a file or folder"),
    "evaluate": (["evaluate", "{locked}"], "model {locked}: expected a folder that can be read"),
    "compare": (["compare", "{locked}"], "path '{locked}' is not readable"),
    "check-cache": (["check-cache", "{locked}"], "path '{locked}' is not readable"),
}
WRITTEN = {
    "run": ([*HINTON, *RUN, "--output", "{sealed}"], "{sealed}"),
    "run inside": ([*HINTON, *RUN, "--output", "{sealed/a/b}"], "{sealed/a/b}"),
    "unseen": ([*HINTON, *RUN, "--output", "{locked/new}"], "{locked/new}"),
    "cache": (["cache-teacher", "{language}", "{texts.txt}", "{sealed/cache}"], "{sealed/cache}"),
    "augment": (["augment", "{sealed/rows}", "--data", "{reviews.csv}"], "{sealed/rows}"),
    "evaluate": (["evaluate", "{model}", "--output", "{sealed/a.json}"], "{sealed}"),
    "compare": (["compare", "{model}", "--output", "{sealed}"], "{sealed}"),
    "report": (["report", "{model}", "--output", "{sealed/a.html}"], "{sealed}"),
    "export": (["export", "{model}", "{sealed/of}"], "{sealed/of}"),
}


def _in(folder: Path, text: Any) -> str:
    return str(text).replace("{", f"{folder}/").replace("}", "")


def _refused(places: Path, command: list[Any], expected: str) -> None:
    before = sorted(path.name for path in places.iterdir())
    caches = {"HF_DATASETS_CACHE": str(places / "datasets")}
    (places / "datasets").mkdir(exist_ok=True)
    done = _without_rights(["-m", "kdfast", *(_in(places, word) for word in command)], **caches)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert _in(places, expected) in done.stderr
    assert {*before, "datasets"} == {path.name for path in places.iterdir()}  # no run was begun


@pytest.mark.parametrize("case", READ)
def test_what_may_not_be_read(case: str, places: Path) -> None:
    _refused(places, *READ[case])


@pytest.mark.parametrize("case", WRITTEN)
def test_where_nothing_may_be_written(case: str, places: Path) -> None:
    command, output = WRITTEN[case]
    _refused(places, command, f"output {output}: expected a folder that can be written, got permission denied")
