"""What a stage found, on disk after every case: a stage that is killed leaves the rest."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kdfast.bench import harness

# A rehearsal: the CPU in the GPU's place and small shapes, so that every stage can be tried where there is no GPU.
DRY = os.environ.get("KDFAST_GPU_DRY", "") not in ("", "0")
DEVICE = "cpu" if DRY else "cuda"


class Record:
    """The cases of one stage: `<folder>/<stage>.json` holds those so far, and the log a line of each."""

    def __init__(self, stage: str, folder: Path) -> None:
        self.stage, self.folder = stage, folder
        self.facts = harness.environment(DEVICE) | {"device_state": device_state()}
        self.results: list[dict[str, Any]] = []
        self.failed = False

    def add(self, case: str, **found: Any) -> None:
        self.results.append({"case": case, **found})
        self.write()
        print(f"{case:58s}", *(f"{name} {shown(x)}" for name, x in found.items()), flush=True)
        self.rehearse()

    @contextlib.contextmanager
    def case(self, case: str) -> Iterator[dict[str, Any]]:
        """What the block puts into the dictionary, and the error it ends with: one case never stops the others."""
        found: dict[str, Any] = {}
        try:
            yield found
        except Exception as error:
            self.failed = True
            found["error"] = f"{type(error).__name__}: {str(error).strip()[:400]}"
        finally:
            if DEVICE == "cuda" and "out of memory" in found.get("error", ""):
                torch.cuda.empty_cache()
        self.add(case, **found)

    def write(self) -> None:
        path = self.folder / f"{self.stage}.json"
        part = path.with_suffix(".part")  # a file that is there is whole
        harness.write(self.results, self.facts | {"stage": self.stage}, part)
        part.replace(path)

    def rehearse(self) -> None:
        """Fails or hangs after the first case, where a rehearsal asks for it."""
        if DRY and os.environ.get("KDFAST_GPU_FAIL") == self.stage:
            raise RuntimeError(f"{self.stage}: failed as KDFAST_GPU_FAIL asks")
        if DRY and os.environ.get("KDFAST_GPU_HANG") == self.stage:
            os.kill(os.getppid(), signal.SIGALRM)  # to `timeout`, whose time is up
            time.sleep(3600)


def shown(x: Any) -> str:
    return f"{x:.4g}" if isinstance(x, float) else json.dumps(x) if isinstance(x, dict) else str(x)


def device_state() -> str:
    """Driver, clocks and temperature, by nvidia-smi; empty where there is none."""
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,ecc.mode.current"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
