"""Files and folders that may not be read or written, really so: each one line, before anything is loaded or trained.

Root may read and write all, unless it gives that right up: then modes count for it as for others.
"""

from __future__ import annotations

import ctypes
import json
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
SHORT = ["--max-length", "16"]


def _give_up_rights() -> None:
    if os.geteuid() == 0:
        for right in RIGHTS:  # where that is not allowed, modes do not count, which skips the tests
            ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, right, 0, 0, 0)


# The commands on its input, one after another: an interpreter for each would take seconds to import what it needs.
COMMANDS = """
import contextlib, io, json, os, sys
from kdfast.cli.main import main

def status():
    try:
        main()
    except SystemExit as end:
        return end.code

print(os.access(sys.argv[1], os.R_OK))
for command in json.load(sys.stdin):
    sys.argv = ["kdfast", *command]
    with contextlib.redirect_stderr(io.StringIO()) as told, contextlib.redirect_stdout(io.StringIO()):
        code = status()
    print(json.dumps([code, told.getvalue()]))
"""


def _without_rights(folder: Path, commands: list[list[str]]) -> list[str]:
    """A line of output for each, after one that says whether what is locked can be read."""
    here = {"PYTHONPATH": str(Path(kdfast.__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(folder / "locked")],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **here, "HF_DATASETS_CACHE": str(folder / "datasets")},
        preexec_fn=_give_up_rights,
    )
    return done.stdout.splitlines()


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


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[Any, Any]]]:
    """What every command ends in, and says: `locked` and `secret.csv` may not be read, of `weights` only the weights, nor
    `sealed` be written."""
    folder = tmp_path_factory.mktemp("rights")
    for name in ("locked", "weights", "model"):
        save(folder / name, bert(0))
    for name in ("lm", "sealed", "datasets"):
        (folder / name).mkdir()
    for name in ("locked/reviews.csv", "secret.csv", "reviews.csv"):
        write_reviews(folder / name)
    (folder / "texts.txt").write_text("w1 w2\n\n" * 9)
    tiny_texts.causal(folder / "lm")[demo.SMOLLM2.folder].rename(folder / "language")
    modes = {"locked": 0, "secret.csv": 0, "weights/model.safetensors": 0, "sealed": 0o555}
    for name, mode in modes.items():
        (folder / name).chmod(mode)
    cases = {(part, case): of[case][0] for part, of in (("read", READ), ("written", WRITTEN)) for case in of}
    before = sorted(path.name for path in folder.iterdir())
    try:
        reads, *lines = _without_rights(folder, [[_in(folder, word) for word in of] for of in cases.values()])
        if reads != "False":
            pytest.skip("modes do not count here")
        assert before == sorted(path.name for path in folder.iterdir())  # no run was begun
        yield folder, dict(zip(cases, map(json.loads, lines), strict=True))
    finally:
        for name in modes:
            (folder / name).chmod(0o755)


def _refused(outcome: tuple[int, str], expected: str) -> None:
    status, message = outcome
    assert status == 2, message
    assert message.count("\n") == 1, message
    assert expected in message


@pytest.mark.parametrize("case", READ)
def test_what_may_not_be_read(case: str, told: tuple[Path, dict[Any, Any]]) -> None:
    folder, outcomes = told
    _refused(outcomes["read", case], _in(folder, READ[case][1]))


@pytest.mark.parametrize("case", WRITTEN)
def test_where_nothing_may_be_written(case: str, told: tuple[Path, dict[Any, Any]]) -> None:
    folder, outcomes = told
    expected = f"output {WRITTEN[case][1]}: expected a folder that can be written, got permission denied"
    _refused(outcomes["written", case], _in(folder, expected))
