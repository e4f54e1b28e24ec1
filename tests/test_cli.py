"""The command line: help, mistakes in one line with exit code 2, and what users can meet on the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kdfast
from kdfast import cli, data
from kdfast.recipes import hinton
from kdfast.stages import StageInterrupted


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["kdfast", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code or 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["distil"], "No such command 'distil'"),
        (["distill", "hintn"], "No such command 'hintn'"),
        (["distill", "hinton", "--epoch", "2"], "--epoch"),
        (["distill", "hinton", "--epochs", "two"], "valid integer"),
        (["distill", "hinton", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (["distill", "hinton", "--alpha", "1.5"], "alpha must be between 0 and 1, got 1.5"),
        (["distill", "hinton", "--temperature", "0"], "temperature must be positive, got 0"),
        (["distill", "hinton", "--student-layers", "0;2"], "'0;2' is not a list of layer numbers such as 0,2,4"),
        (["distill", "hinton", "--student-layers", "0,6"], "student_layers must be numbers from 0 to 5, got [0, 6]"),
        (["distill", "hinton", "--learning-rate", "-1"], "learning_rate"),
        (["distill", "hinton", "--output", __file__], "is not a folder"),
        (["distill", "hinton", "--output", str(Path(__file__).parent)], "is not empty and holds no run"),
    ],
)
def test_mistakes_give_one_line_and_exit_code_2(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kdfast: ")
    assert err.count("\n") == 1
    assert expected in err


def test_other_settings_in_the_same_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.json").write_text('{"epochs": 5}')
    assert _run(monkeypatch, "distill", "hinton", "--output", str(tmp_path)) == 2
    assert "holds a run with epochs 5, not 3" in capsys.readouterr().err


def test_help_names_recipe_and_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert _run(monkeypatch, "distill", "--help") == 0
    assert "hinton" in capsys.readouterr().out
    assert _run(monkeypatch, "distill", "hinton", "--help") == 0
    shown = capsys.readouterr().out
    for text in ("--output", "--quick", "--fresh", "--temperature", "learning_curves.png", "Ctrl-C"):
        assert text in shown


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"kdfast {kdfast.__version__}\n"


@pytest.mark.parametrize(
    ("raised", "code", "expected"),
    [
        (data.AssetError("cannot fetch it; put it there"), 1, "kdfast: cannot fetch it; put it there\n"),
        (StageInterrupted(), 130, "the same command continues"),
        (KeyboardInterrupt(), 130, "the same command continues"),
    ],
)
def test_what_can_stop_a_run_gives_one_line(
    raised: BaseException,
    code: int,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def execute(self: Any) -> None:
        raise raised

    monkeypatch.setattr(hinton.HintonRun, "execute", execute)
    assert _run(monkeypatch, "distill", "hinton", "--output", str(tmp_path / "run")) == code
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1


def test_options_reach_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(hinton.HintonRun, "execute", lambda self: seen.append((self.settings, self.folder)))
    run = ["distill", "hinton", "--output", str(tmp_path / "run")]
    assert _run(monkeypatch, *run) == 0
    assert seen.pop() == (hinton.Settings(), tmp_path / "run")
    options = [
        "--quick",
        "--epochs",
        "5",
        "--alpha",
        "0.5",
        "--temperature",
        "4",
        "--student-layers",
        "1,3",
        "--seed",
        "7",
    ]
    assert _run(monkeypatch, *run, *options) == 0
    settings, _ = seen.pop()
    assert settings.train_rows is not None
    assert settings.train_rows < 8568
    assert (settings.epochs, settings.alpha, settings.temperature) == (5, 0.5, 4.0)
    assert (settings.student_layers, settings.seed) == ((1, 3), 7)


def test_missing_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; sys.argv = ['kdfast', 'distill', 'hinton']; "
        "from kdfast import cli; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install kdfast[train]" in done.stderr
    assert "Traceback" not in done.stderr


def test_module_can_be_run() -> None:
    done = subprocess.run([sys.executable, "-m", "kdfast", "--version"], capture_output=True, text=True, check=False)
    assert done.stdout == f"kdfast {kdfast.__version__}\n"
