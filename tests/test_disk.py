"""What ends a command beside its own work, each in one line: disks, Ctrl-C while libraries are imported, quantised models."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call
from safetensors import SafetensorError
from word_classifiers import bert, save, write_reviews

from kdfast.cli.main import main
from kdfast.results import disk
from kdfast.runs import stages

LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes}, {bytes})); "


def _hear_interrupts() -> None:
    """What a shell runs in the background ignores Ctrl-C, and so would what a test starts there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", **environment},
        preexec_fn=_hear_interrupts,
    )


# ---- disks
@pytest.mark.parametrize(
    ("write", "expected"),
    [
        ("open(path, 'w').write('x' * 10000)", errno.EFBIG),
        ("save_file({'x': torch.zeros(5000)}, path)", errno.EFBIG),
        ("torch.save(torch.zeros(5000), path)", errno.EIO),  # which tells nothing but that it failed
    ],
)
def test_real_failures_of_each_library_name_the_place(write: str, expected: int, tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from safetensors.torch import save_file; from kdfast.results.disk import saving\n"
        f"{LIMITED.format(bytes=4096)}path = sys.argv[1]\n"
        f"try:\n with saving(Path('the/place')): {write}\n"
        "except OSError as error: print(error.errno, error.filename)"
    )
    done = _python(code, tmp_path / "file")
    assert done.stdout == f"{expected} the/place\n", done.stderr


def test_torch_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 4096}))
    told = "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"
    with (
        pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/new'") as failure,
        disk.saving(tmp_path / "new"),
    ):
        raise RuntimeError(told)
    assert disk.told(failure.value) == f"{tmp_path}/new: no space left on device"
    with pytest.raises(RuntimeError, match="mat1 and mat2"), disk.saving(tmp_path):
        raise RuntimeError("mat1 and mat2 must have the same dtype")
    # A library that names a file of its own keeps it; elsewhere only caches are written.
    with pytest.raises(FileNotFoundError) as missing, disk.saving(tmp_path):
        (tmp_path / "none" / "file").write_text("")
    assert disk.told(missing.value) == f"{tmp_path}/none/file: no such file or directory"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert disk.told(full) == "No space left on device (a cache or temporary folder: $HF_HOME, $KDFAST_CACHE, $TMPDIR)"
    assert disk.told(OSError("cannot write it: so\nand so")) == "cannot write it: so"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)),
        OSError("no number"),
        RuntimeError("[enforce fail at inline_container.cc:145] . PytorchStreamReader failed reading zip archive"),
        SafetensorError("Error while serializing: I/O error: Cannot allocate memory (os error 12)"),
    ],
    ids=repr,
)
def test_what_is_no_failure_of_a_disk_goes_on_untouched(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as failure, disk.saving(tmp_path):
        raise error
    assert failure.value is error
    assert disk.failure(error, tmp_path) is None


@pytest.mark.parametrize("name", ["ENOSPC", "EROFS", "EACCES", "EDQUOT", "EIO", "EFBIG"])
def test_failures_of_a_disk(name: str, tmp_path: Path) -> None:
    number = getattr(errno, name)
    for error in (OSError(number, os.strerror(number)), SafetensorError(f"I/O error: it (os error {number})")):
        with pytest.raises(OSError, match=re.escape(f"{os.strerror(number)}: '{tmp_path}'")), disk.saving(tmp_path):
            raise error
        told = OSError("cannot write shard 3")  # as kdfast.teacher_cache does
        told.__cause__ = error
        assert disk.of_the_user(told, [])


def test_bugs_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """What is raised in a command's work: one line where a disk fails or the user named the path, else what it is."""

    def check_cache(folder: Path) -> None:
        raise raised

    monkeypatch.setattr("kdfast.runs.cache.check_cache", check_cache)
    named = tmp_path / "cache" / "of"
    for raised, line in (
        (ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)), None),
        (OSError("not said where"), None),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(named / "state.json")), None),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(named)), f"{named}: no such file or directory"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", str(named.parent)), f"{named.parent}: not a directory"),
        (OSError(errno.ENOSPC, "No space left", str(named / "a")), f"{named}/a: no space left"),
    ):
        if line is None:
            monkeypatch.setattr(sys, "argv", ["kdfast", "check-cache", str(named)])
            with pytest.raises(type(raised)) as failure:
                main()
            assert failure.value is raised
        else:
            assert call(monkeypatch, "check-cache", named) == 1
            assert capsys.readouterr().err == f"kdfast: {line}\n"


def test_training_that_loses_a_connection_shows_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    lost = ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    def train(*arguments: Any, **options: Any) -> None:
        raise lost

    monkeypatch.setattr("transformers.Trainer.train", train)
    data, teacher = write_reviews(tmp_path / "reviews.csv"), save(tmp_path / "teacher", bert(0))
    command = ["distill", "hinton", "--data", data, "--teacher", teacher, "--max-length", "16"]
    monkeypatch.setattr(sys, "argv", ["kdfast", *command, "--output", str(tmp_path / "run")])
    with pytest.raises(ConnectionResetError) as failure:
        main()
    assert failure.value is lost


def test_command_whose_checkpoint_cannot_be_written(tmp_path: Path) -> None:
    data = write_reviews(tmp_path / "reviews.csv")
    teacher = save(tmp_path / "teacher", bert(0, hidden_size=32))
    command = [
        "distill",
        "hinton",
        "--data",
        data,
        "--teacher",
        teacher,
        "--max-length",
        16,
        "--output",
        tmp_path / "run",
    ]
    code = f"{LIMITED.format(bytes=20_000)}from kdfast.cli.main import main; main()"
    done = _python(code, *command, HF_DATASETS_CACHE=str(tmp_path / "datasets"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    expected = f"kdfast: {tmp_path}/run/labels_only: file too large; the same command continues where this one was"
    assert done.stderr.splitlines()[-1] == expected


def test_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OSError, match="'/proc/") as failure:  # where not even root makes a folder
        stages.write_config(Path("/proc/kdfast/run"), {})
    assert disk.told(failure.value).startswith("/proc/kdfast")
    assert disk.why_not_writable(tmp_path / "new" / "run") is None
    monkeypatch.setattr(os, "access", lambda place, mode: True)  # as root has it there
    assert call(monkeypatch, "distill", "causal-lm", "--output", "/proc/kdfast/run") == 2
    expected = "output /proc/kdfast/run: expected a folder that can be written, got one that cannot be made ("
    assert expected in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda place, mode: str(place) != str(tmp_path))
    for flags, reason in ((0, "permission denied"), (os.ST_RDONLY, "read-only file system")):
        monkeypatch.setattr(os, "statvfs", lambda place, flags=flags: type("Facts", (), {"f_flag": flags}))
        output = tmp_path / "new" / "run"
        assert call(monkeypatch, "distill", "causal-lm", "--output", output) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert f"output {output}: expected a folder that can be written, got {reason}" in err
    assert not (tmp_path / "new").exists()


# ---- Ctrl-C
SIGNALS = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)\n"


@pytest.mark.parametrize(
    ("module", "command", "as_script"),
    [
        ("torch", "--version", False),
        ("torch", "--version", True),
        ("transformers", "distill hinton", True),
        ("transformers", "distill causal-lm", False),
        ("transformers", "evaluate x", False),
        ("transformers", "cache-teacher m d.txt o", False),
        ("rich", "compare x", False),
    ],
)
def test_ctrl_c_while_importing(module: str, command: str, as_script: bool, tmp_path: Path) -> None:
    """In each of the two ways to call it; `module` is one of those that take long, early or late."""
    (tmp_path / "fake" / module).mkdir(parents=True)
    (tmp_path / "fake" / module / "__init__.py").write_text(SIGNALS)
    script = tmp_path / "kdfast"
    script.write_text("from kdfast.cli.main import main\nmain()\n")
    here = str(Path(disk.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, *([str(script)] if as_script else ["-m", "kdfast"]), *command.split()],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "fake"), here])},
        preexec_fn=_hear_interrupts,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "kdfast: stopped\n")


def test_other_programs_keep_their_ctrl_c(tmp_path: Path) -> None:
    code = "import signal, kdfast; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert _python(code).stdout == "True\n"


# ---- quantised models
@pytest.mark.parametrize(
    "arguments",
    [
        ["distill", "hinton", "--teacher"],
        ["distill", "patient-kd", "--base"],
        ["distill", "distilbert", "--teacher"],
        ["distill", "causal-lm", "--teacher"],
        ["distill", "dynabert", "--teacher"],
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_quantised_models_are_refused_before_they_are_loaded(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *a, **k: pytest.fail("loaded"))
    model = Path(save(tmp_path / "model", bert(0)))
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}},
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").write_bytes(b"")
    texts = tmp_path / "texts.txt"
    texts.write_text("good film\n\n" * 40)
    of_texts = "distilbert" in arguments or "causal-lm" in arguments
    data: Any = texts if of_texts else write_reviews(tmp_path / "reviews.csv")
    output = tmp_path / "run"
    assert call(monkeypatch, *arguments, model, "--data", data, "--max-length", 16, "--output", output) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert (
        f"{model}: expected weights that are not quantised, got torchao (quantization_config in its config.json)"
        in told
    )
    assert not (tmp_path / "run").exists()
