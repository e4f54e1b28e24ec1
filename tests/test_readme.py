"""The README and the guide are true: examples run, tables are what the committed results say, paths exist."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import warnings

import pytest
from documents import EXAMPLES, PAGES, README, ROOT

GUIDES = [*PAGES.values()]
FENCES = re.compile(r"^ *```(.*)$", flags=re.M)


def test_tables_come_from_the_committed_results() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    import readme

    for page, blocks in readme.PAGES.items():
        assert readme.filled(page.read_text(), blocks) == page.read_text(), "run: python tools/readme.py"


def test_example_runs_and_equals_plain_torch() -> None:
    example, plain, *_ = EXAMPLES
    output = run(f"{example}\nours = loss.item()\n{plain}\nprint(ours, loss.item())")
    assert "torch.Size([8, 32000])" in output
    ours, theirs = map(float, output.split()[-2:])
    assert theirs > 0
    assert abs(ours / theirs - 1) < 1e-5


@pytest.mark.parametrize("example", EXAMPLES[2:])
def test_other_examples_run(example: str) -> None:
    value = float(run(example))
    assert 0 < value < 10_000


def test_blocks_say_what_they_are() -> None:
    """Without a language a block of Python would run in no test."""
    for page in (README, *GUIDES):
        fences = FENCES.findall(page)
        assert {*fences[::2]} <= {"python", "sh", "json", "text"}
        assert {*fences[1::2]} <= {""}


def run(program: str) -> str:
    """What it prints. In this process, where everything is imported: they are many."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an example's numbers are too small to become faster, say
        exec(compile(program, "example", "exec"), {"__name__": "__main__"})
    return printed.getvalue()


def test_named_files_exist() -> None:
    named = set(re.findall(r"`((?:kdfast|csrc|tests|tools|benchmarks|docs)/[\w./]+)`", "\n".join([README, *GUIDES])))
    assert {"csrc/library.cpp", "docs/guide.md", "csrc/common/divergence_terms.h"} <= named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
