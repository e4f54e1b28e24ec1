"""Programs in a process of their own, on the CPU variant that is asked for."""

from __future__ import annotations

import os
import subprocess
import sys


def printed(variant: str, program: str) -> list[str]:
    """The words that it prints."""
    environment = os.environ | {"KDFAST_CPU_VARIANT": variant}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()
