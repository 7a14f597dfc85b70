"""One run at a time writes a destination: a locked file beside the hidden folder."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dgemma.errors import ConfigError

from .place import lock_file


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """The right to write `work`, for one run at a time; it goes with the process, however that ends.

    The lock is on a file beside the folder, so that it can be held until the folder has its last name.
    ConfigError if another run has it, or if there can be none.
    """
    path = lock_file(work)
    handle = _take(path, work)
    while not _is_same(handle, path):  # whoever had the lock removed the file after it was opened
        os.close(handle)
        handle = _take(path, work)
    try:
        yield
    finally:
        _remove(path)
        os.close(handle)


def _take(path: Path, work: Path) -> int:
    """The file, open and locked."""
    # A link of this name is not followed, and a pipe is not waited for.
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(path, os.O_CREAT | os.O_RDWR | flags, 0o644)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another folder") from None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_size:
            raise ConfigError(f"{path}: in the way, and no lock of this program; move or remove it")
        _lock(handle)
    except OSError as error:
        os.close(handle)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise ConfigError(f"{work}: another run is writing this conversion") from None
        _remove(path)
        raise ConfigError(
            f"{work}: its file system has no locks ({error.strerror}), which keep two runs apart; convert "
            "into a folder on a local disk and move it"
        ) from None
    except ConfigError:
        os.close(handle)
        raise
    return handle


def _lock(handle: int) -> None:
    """OSError if another process has the lock of this file."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
