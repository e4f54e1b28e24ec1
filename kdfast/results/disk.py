"""What goes wrong with a disk, as an OSError that names the place: libraries tell it in several ways, or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

LITTLE = 1 << 20  # bytes: a disk with less is full
FAILURES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}  # a disk's own


@contextmanager
def saving(place: Path) -> Iterator[None]:
    """In its block, `place` is written, by Python, safetensors or torch.
    What is no failure of a disk goes on untouched.

    Raises:
        OSError: it could not be, with the number of the reason and the place, where the library names no other.
    """
    try:
        yield
    except Exception as error:
        told_already = isinstance(error, OSError) and (error.errno is None or error.filename is not None)
        if told_already or (number := failure(error, place)) is None:
            raise
        raise OSError(number, os.strerror(number), str(place)) from error


def failure(error: BaseException | None, place: Path) -> int | None:
    """The number of a disk's failure, as each library tells it of `place`; None where an error is another."""
    number: int | None = None
    if isinstance(error, OSError):
        number = failure(error.__cause__, place) if error.errno is None else error.errno
    elif isinstance(error, RuntimeError) and _of_torch_writing(str(error)):
        number = errno.ENOSPC if shutil.disk_usage(_there(place)).free < LITTLE else errno.EIO
    elif isinstance(error, _safetensor_errors()) and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
    return number if number in FAILURES else None


def of_the_user(error: OSError, arguments: Sequence[str]) -> bool:
    """Whether an error is a disk's, or of a path among a command's `arguments` or around one:
    what one line says all of.

    Any other may be a bug, whose traceback is needed.
    """
    if failure(error, Path()) is not None:
        return True
    if not isinstance(error.filename, str):
        return False
    paths = (Path(one.split("=", 1)[-1]).absolute() for one in arguments)  # --output runs/mine, or --output=runs/mine
    return any(path.is_relative_to(Path(error.filename).absolute()) for path in paths)


def _of_torch_writing(told: str) -> bool:
    return "PytorchStreamWriter" in told or ("inline_container" in told and "PytorchStreamReader" not in told)


def _safetensor_errors() -> tuple[type[Exception], ...]:
    """Asked for after a failure, when safetensors is there if it was what failed."""
    try:
        from safetensors import SafetensorError
    except ModuleNotFoundError:
        return ()
    return (SafetensorError,)


def check_output(folder: Path) -> None:
    """Before anything is loaded, trained or measured.

    Raises:
        ValueError: nothing can be written into it.
    """
    if reason := why_not_writable(folder):
        raise ValueError(f"output {folder}: expected a folder that can be written, got {reason}")


def why_not_writable(folder: Path) -> str | None:
    """The reason why nothing can be written into a folder that may not be there yet; None where something can."""
    there = _there(folder)
    if not there.is_dir():
        return f"{there} is not a folder"
    if os.access(there, os.W_OK | os.X_OK):
        return _why_not_made(folder)
    read_only = os.statvfs(there).f_flag & os.ST_RDONLY
    return os.strerror(errno.EROFS if read_only else errno.EACCES).lower()


def _why_not_made(folder: Path) -> str | None:
    """Found by making it, and removing what was made: /proc says that root may write there."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"one that cannot be made ({str(error.strerror).lower()})"
    finally:
        for one in missing:
            with suppress(OSError):  # not made, or another run's by now
                one.rmdir()
    return None


def _there(place: Path) -> Path:
    """The place, or the nearest of the folders around it that exists; what may not be looked at counts as none."""
    return next(one for one in (place.absolute(), *place.absolute().parents) if os.path.exists(one))


def told(error: OSError) -> str:
    """An error in one line."""
    if error.errno is None:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    if error.filename is None:
        caches = " (a cache or temporary folder: $HF_HOME, $KDFAST_CACHE, $TMPDIR)" * (error.errno == errno.ENOSPC)
        return f"{error.strerror}{caches}"
    return f"{error.filename}: {str(error.strerror).lower()}"
