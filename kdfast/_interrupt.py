"""Ctrl-C while the command line is imported, of which torch alone takes a second: one line, as later.

Python would show where in some library's import it was. A handler that ends the process also cannot be caught there.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import NoReturn


def begin() -> None:
    """Where this process is the command, and not somebody's who handles signals already."""
    module = sys.argv[:1] == ["-m"] and "kdfast" in sys.orig_argv  # `python -m kdfast`, which imports the package first
    command = module or Path(*sys.argv[:1]).name == "kdfast"
    if threading.current_thread() is not threading.main_thread():  # Python refuses handlers elsewhere
        return
    if command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def end() -> None:
    """Ctrl-C is Python's KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"kdfast: stopped\n")
    os._exit(128 + number)
