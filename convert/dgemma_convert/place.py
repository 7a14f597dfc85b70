"""Where a conversion goes: the folder that DEST means, and the hidden one beside it in which it is made.

All that can be known of a destination is known before any work: `settle` reads and changes nothing, and
`try_out` shows that an empty folder can be replaced. What a run finds in the hidden folder is removed only if
another run has left it there.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from dgemma.errors import ConfigError

STATE = "plan.sha256"  # marks a hidden folder as ours, and says which conversion is in it
TEMPORARY = ".tmp"  # a file until it is whole; the files of a conversion are not hidden
_LONGEST = "model-00001-of-00001.safetensors"  # of the names that every conversion writes


@dataclass(frozen=True)
class Place:
    """`shown` is DEST as it was given, `target` the folder that it means, `work` where that is made.

    `occupied`: whether the folder is there and holds something.
    """

    shown: Path
    target: Path
    work: Path
    occupied: bool


def settle(dest: Path) -> Place:
    """The place of a destination. Links are followed, to a folder that does not exist yet, too.

    ConfigError in one line if no conversion can appear there. An occupied folder passes: what is in it may be
    the conversion.
    """
    try:
        target = Path(os.path.realpath(dest))
        there = _look(target)
        if there is not None and not stat.S_ISDIR(there.st_mode):
            raise ConfigError(f"{dest}: exists and is not a folder; name another folder")
        occupied = there is not None and bool(os.listdir(target))
        work = _work(target)
        if not occupied:
            _check_free(dest, target, there)
    except OSError as error:
        raise ConfigError(f"{dest}: cannot be written ({error.strerror}); name another folder") from None
    except ValueError:  # a zero byte, or letters that no file name can have
        raise ConfigError(f"{str(dest)!r}: not a name that a folder can have; name another") from None
    return Place(dest, target, work, occupied)


def _look(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _work(target: Path) -> Path:
    """The hidden folder; one with a name of fixed length if the destination's leaves no room for a longer."""
    if not target.name:  # the root, which is occupied
        return target
    work = target.with_name(f".{target.name}.partial")
    if _is_too_long(lock_file(work)):
        digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:32]
        return target.with_name(f".{digest}.partial")
    return work


def lock_file(work: Path) -> Path:
    """The file beside the hidden folder that a run holds locked."""
    return work.with_name(work.name + ".lock")


def _is_too_long(path: Path) -> bool:
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    return False


def _check_free(dest: Path, target: Path, there: os.stat_result | None) -> None:
    """ConfigError if no folder can take this place, though nothing is in it."""
    parent = target.parent
    for folder in (dest.parent, parent):
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder to write to")
    if there is not None and os.path.ismount(target):
        raise _fixed(dest, "a mount point")
    if there is not None and _is_current(there):
        raise _fixed(dest, "the current folder")
    if any(_is_too_long(path / _LONGEST) for path in (target, _work(target))):
        raise ConfigError(f"{dest}: too long a path for the files in it; name another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{parent}: cannot be written, and a conversion is made beside {dest}; name another"
        )


def _is_current(there: os.stat_result) -> bool:
    try:
        return os.path.samestat(there, os.stat(os.curdir))
    except OSError:  # it was removed
        return False


def _fixed(dest: Path, what: str) -> ConfigError:
    inside = dest / "model"
    return ConfigError(f"{dest}: {what}, whose place a conversion cannot take; name a folder in it: {inside}")


def try_out(place: Place) -> None:
    """ConfigError if a finished conversion could not take the place of the empty folder that is there.

    A mount point, or the folder of another user in /tmp, stays where it is. Only an attempt shows that.
    """
    try:
        mode = stat.S_IMODE(place.target.stat().st_mode)
        os.rmdir(place.target)
        os.mkdir(place.target, mode)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _fixed(place.shown, f"a folder that stays where it is ({error.strerror})") from None


def keep_apart(place: Place, folder: Path, files: list[Path]) -> None:
    """ConfigError if the source is the destination, or lies in the folder where that is made."""
    if place.occupied:  # and stays as it is
        if os.path.samefile(place.target, folder):
            raise ConfigError(
                f"{place.shown}: exists and is not this conversion: it is the source itself; name another"
            )
        return
    for path in (folder, *files):
        if Path(os.path.realpath(path)).is_relative_to(place.work):
            raise ConfigError(
                f"{path}: lies in {place.work}, where {place.shown} is made; name another folder"
            )


def check_leftovers(work: Path) -> None:
    """ConfigError if something is at `work` that no run of this program has left. Nothing is touched."""
    try:
        if not stat.S_ISDIR(os.lstat(work).st_mode):
            raise ConfigError(f"{work}: in the way, and not a folder of this program; move or remove it")
        with os.scandir(work) as found:
            files = {entry.name: entry.is_file(follow_symlinks=False) for entry in found}
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{work}: cannot be read ({error.strerror}); move or remove it") from None
    if not files.keys() <= {TEMPORARY} and STATE not in files:
        raise ConfigError(f"{work}: in the way, and nothing that an interrupted run left; move or remove it")
    for name, is_file in files.items():
        if not is_file:
            raise ConfigError(f"{work / name}: no file of an interrupted run; move or remove it")
