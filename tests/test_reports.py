"""The scripts of `tests/reports`, each made after a stranger's report, end well: what they show wrong is right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPORTS = sorted((Path(__file__).parent / "reports").glob("*.py"))


@pytest.mark.parametrize("script", REPORTS, ids=lambda path: path.stem)
def test_report(script: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
