"""One run at a time writes a destination: a locked file beside the hidden folder."""

from __future__ import annotations

import errno
import os
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
    """
    path = lock_file(work)
    while True:
        try:
            # Neither a link nor a pipe of this name is opened.
            flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
            handle = os.open(path, os.O_CREAT | os.O_RDWR | flags, 0o644)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another folder") from None
        try:
            _lock(handle, work)
            # Who had the lock before may have removed the file since it was opened.
            if _is_same(handle, path):
                break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def _is_same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _lock(handle: int, work: Path) -> None:
    """ConfigError if another process has the lock of this file, or if its file system has no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise ConfigError(f"{work}: another run is writing this conversion") from None
        raise ConfigError(
            f"{work}: its file system has no locks ({error.strerror}), which keep two runs apart; convert "
            "into a folder on a local disk and move it"
        ) from None
