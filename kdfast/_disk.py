"""What goes wrong with a disk, as an OSError that names the place: libraries tell it in several ways, or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LITTLE = 1 << 20  # bytes: a disk with less is full


@contextmanager
def saving(place: Path) -> Iterator[None]:
    """In its block, `place` is written, by Python, safetensors or torch.

    Raises:
        OSError: it could not be, with the number of the reason and the place, where the library names no other.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(place)) from error
    except RuntimeError as error:  # torch's
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        full = shutil.disk_usage(_there(place)).free < LITTLE
        reason = errno.ENOSPC if full else errno.EIO
        raise OSError(reason, os.strerror(reason), str(place)) from error
    except _safetensor_errors() as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(place)) from error


def _safetensor_errors() -> tuple[type[Exception], ...]:
    """Asked for after a failure, when safetensors is there if it was what failed."""
    try:
        from safetensors import SafetensorError
    except ModuleNotFoundError:
        return ()
    return (SafetensorError,)


def why_not_writable(folder: Path) -> str | None:
    """The reason why nothing can be written into a folder that may not be there yet; None where something can."""
    there = _there(folder)
    if not there.is_dir():
        return f"{there} is not a folder"
    if os.access(there, os.W_OK | os.X_OK):
        return None
    read_only = os.statvfs(there).f_flag & os.ST_RDONLY
    return os.strerror(errno.EROFS if read_only else errno.EACCES).lower()


def _there(place: Path) -> Path:
    """The place, or the nearest of the folders around it that exists."""
    return next(one for one in (place.absolute(), *place.absolute().parents) if one.exists())


def told(error: OSError) -> str:
    """An error in one line."""
    if error.errno is None:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    if error.filename is None:
        caches = " (a cache or temporary folder: $HF_HOME, $KDFAST_CACHE, $TMPDIR)" * (error.errno == errno.ENOSPC)
        return f"{error.strerror}{caches}"
    return f"{error.filename}: {str(error.strerror).lower()}"
