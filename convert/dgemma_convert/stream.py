"""Writes a planned conversion: streaming, resumable, and visible only when it is whole.

Files are written in a hidden folder beside the destination, each under a temporary name until its bytes are
on the disk; the folder takes the destination's name last, and the run holds its lock until it has. So the
destination is whole or not there, whatever kills a run, and the same command goes on with the first shard
that is missing. A few threads convert parts of tensors (NumPy lets go of the interpreter) and write them at
offsets known beforehand.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.faults import HF_QUANT_CONFIG
from dgemma.checkpoint.folder import INDEX
from dgemma.errors import CheckpointError, ConfigError
from dgemma.files import Progress
from dgemma.formats.quantized import Quantized
from dgemma.formats.stored import Stored
from dgemma.reports.tables import amount
from dgemma.reports.verify import scale_findings

from .encode import cut, fields, parts
from .lock import locked as _locked
from .place import STATE, TEMPORARY, Place, check_leftovers, keep_apart, settle, try_out
from .plan import Job, Plan, header
from .record import FOREIGN, facts, fault, index, names, source_digest, state_hash
from .source import Watch, by_file, chunks, side_files, weight_files

THREADS = min(4, os.cpu_count() or 1)


def convert(plan: Plan, checkpoint: Checkpoint, dest: Path, progress: Progress | None = None) -> bool:
    """Convert into the folder `dest`; False if it holds this very conversion already.

    Goes on with what an interrupted run of the same plan has left. `progress(done, total)` counts bytes
    written. CheckpointError for damage in the source, for a source that changes meanwhile, and for a disk
    without room; ConfigError for a destination that is something else, or that another run is writing.
    """
    place = settle(dest)
    checkpoint, watch = by_file(checkpoint)
    keep_apart(place, checkpoint.folder, weight_files(checkpoint))
    sides = side_files(checkpoint.folder, (INDEX, "config.json", HF_QUANT_CONFIG, STATE, *plan.files))
    source = source_digest(checkpoint)
    if _is_done(plan, source, place, sides):
        return False
    _check_room(plan, sides, place.work)
    with _locked(place.work), _room(place.work):
        place = replace(settle(place.target), shown=dest)
        if _is_done(plan, source, place, sides):  # by a run that had the lock until now
            return False
        if not _is_whole(plan, source, place.work, sides):
            check_leftovers(place.work)
            try_out(place)
            check_scales(checkpoint)
            _resume(place.work, state_hash(plan, source, checkpoint))
            _fill(plan, source, checkpoint, watch, place.work, sides, progress)
        _publish(place)
    return True


def _is_done(plan: Plan, source: str, place: Place, sides: Sequence[Path]) -> bool:
    """Whether the destination holds this very conversion; ConfigError if it holds anything else."""
    if not place.occupied:
        return False
    if wrong := fault(plan, source, place.target, sides):
        # Whatever else a folder holds, nobody is told to remove it.
        advice = "name another folder" if wrong == FOREIGN else "remove it to convert again, or name another"
        raise ConfigError(f"{place.shown}: {wrong}; {advice}")
    return True


def _is_whole(plan: Plan, source: str, work: Path, sides: Sequence[Path]) -> bool:
    """Whether a run was killed when only the destination's name was missing."""
    unmarked = os.path.isdir(work) and not os.path.islink(work) and not os.path.lexists(work / STATE)
    return unmarked and fault(plan, source, work, sides) is None


def check_scales(checkpoint: Checkpoint) -> None:
    """CheckpointError for scales of a quantized source that are damaged: they would spoil all they scale."""
    for finding in scale_findings(checkpoint):
        raise CheckpointError(f"{checkpoint.folder}: {finding.text}")


def _fill(
    plan: Plan,
    source: str,
    checkpoint: Checkpoint,
    watch: Watch,
    work: Path,
    sides: Sequence[Path],
    progress: Progress | None,
) -> None:
    """All files of the output. Those beside the weights come first, as one may be unreadable."""
    _write_rest(plan, sides, work)
    done = 0
    for name, jobs in plan.shards():
        if not _is_shard(work / name, jobs, plan):
            shifted = _shifted(progress, done, plan.nbytes)
            _write_shard(work / name, jobs, plan, checkpoint, watch, shifted)
        done += sum(job.nbytes for job in jobs)
        if progress:
            progress(done, plan.nbytes)
    written = names(plan, sides)
    for name in os.listdir(work):  # of a side file that the source has no longer
        if name not in written and name != STATE:
            (work / name).unlink()
    _write_json(work / INDEX, index(plan, source, {name: facts(work / name) for name in written}))


def _shifted(progress: Progress | None, by: int, total: int) -> Progress | None:
    return None if progress is None else (lambda done, _: progress(by + done, total))


# ---- the folder beside the destination ------------------------------------------------------------


@contextmanager
def _room(work: Path) -> Iterator[None]:
    """Says in one line that the disk is full, or why it cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = f"{work.parent}: the disk is full; make room and run the same command, which goes on"
        else:
            text = f"{work}: cannot be written ({error.strerror}); the same command goes on from here"
        raise CheckpointError(text) from None


def _resume(work: Path, state: str) -> None:
    """Keep what a run of the same plan has left, remove what any other has, after `check_leftovers`."""
    work.mkdir(exist_ok=True)
    (work / TEMPORARY).unlink(missing_ok=True)
    file = work / STATE
    if file.exists() and file.read_bytes() == state.encode():
        return
    for name in os.listdir(work):
        if name != STATE:
            (work / name).unlink()
    _write_whole(file, state.encode())


def _check_room(plan: Plan, sides: Sequence[Path], work: Path) -> None:
    """CheckpointError if the disk has no room for what is still to be written."""
    try:
        there = sum(path.lstat().st_size for path in work.glob("[!.]*"))
        needed = plan.nbytes + sum(path.stat().st_size for path in sides) - there
        free = shutil.disk_usage(work.parent).free
    except OSError as error:
        raise ConfigError(
            f"{work.parent}: cannot be written ({error.strerror}); name another folder"
        ) from None
    if needed > free:
        raise CheckpointError(
            f"{work.parent}: {amount(needed)} are needed and {amount(free)} are free; make room or name "
            "another folder"
        )


def _publish(place: Place) -> None:
    """The work folder becomes the destination."""
    work, target = place.work, place.target
    (work / STATE).unlink(missing_ok=True)
    _sync(work)
    try:
        if target.exists():  # an empty folder, whose rights stay; not every system renames over it
            with suppress(OSError):  # a file system without rights
                os.chmod(work, stat.S_IMODE(target.stat().st_mode) | stat.S_IRWXU)
            os.rmdir(target)
        os.rename(work, target)
    except OSError as error:
        raise ConfigError(
            f"{place.shown}: cannot be replaced ({error.strerror}) by {work}, which is finished; make way "
            "and run the same command, which only takes the name"
        ) from None
    _sync(target.parent)


def _sync(path: Path) -> None:
    """A file's bytes, or a folder's names, are on the disk. Not every file system can say so of a folder."""
    is_folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if not is_folder:
            raise


def _write_whole(path: Path, data: bytes) -> None:
    """A small file that is there whole or not at all."""
    _write_chunks(path, [data])


def _write_chunks(path: Path, data: Iterable[bytes]) -> None:
    temporary = path.with_name(TEMPORARY)
    with temporary.open("wb") as stream:
        stream.writelines(data)
    _sync(temporary)
    os.replace(temporary, path)


def _write_json(path: Path, data: Any) -> None:
    # A name that is no UTF-8 has halves of letters, which JSON writes as such an escape.
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    _write_whole(path, text.encode("utf-8", "backslashreplace"))


# ---- shards -------------------------------------------------------------------------------------


def _is_shard(path: Path, jobs: list[Job], plan: Plan) -> bool:
    """Whether a file left by an interrupted run has this shard's size and header."""
    if not path.exists():
        return False
    head, _ = header(jobs, plan.target.metadata)
    if path.stat().st_size != len(head) + sum(job.nbytes for job in jobs):
        return False
    with path.open("rb") as stream:
        return stream.read(len(head)) == head


def _write_shard(
    path: Path,
    jobs: list[Job],
    plan: Plan,
    checkpoint: Checkpoint,
    watch: Watch,
    progress: Progress | None,
) -> None:
    head, offsets = header(jobs, plan.target.metadata)
    total = sum(job.nbytes for job in jobs)
    temporary = path.with_name(TEMPORARY)
    handle = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    try:
        os.truncate(handle, len(head) + total)
        _write_at(handle, 0, head)
        done = 0
        for written in _convert(jobs, checkpoint, handle, offsets):
            done += written
            if progress:
                progress(done, total)
        assert done == total, (done, total)
        os.fsync(handle)
    finally:
        os.close(handle)
    watch.check()
    os.replace(temporary, path)


def _convert(
    jobs: list[Job], checkpoint: Checkpoint, handle: int, offsets: Mapping[str, int]
) -> Iterator[int]:
    """Convert and write all parts of all jobs; yields the bytes of each part as it is done."""

    def work(stored: Stored | Quantized, job: Job, start: int, stop: int) -> int:
        made = fields(stored, job, start, stop)
        written = 0
        for output in job.outputs:
            if (piece := cut(output, made, start, stop)) is not None:
                offset, data = piece
                if output.role == "unused" and job.kept and output.name in checkpoint.entries:
                    data = checkpoint.entries[output.name].read().data  # a calibrated scale, no use to us
                raw = data.tobytes()
                _write_at(handle, offsets[output.name] + offset, raw)
                written += len(raw)
        return written

    with ThreadPoolExecutor(THREADS) as pool:
        pending: set[Future[int]] = set()
        try:
            for job in jobs:
                stored = checkpoint.read(job.param.name)
                for start, stop in parts(job):
                    pending.add(pool.submit(work, stored, job, start, stop))
                    if len(pending) > THREADS:  # no more in memory than threads can work on
                        finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                        yield from (future.result() for future in finished)
            yield from (future.result() for future in pending)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _write_at(handle: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count


# ---- the files beside the shards ------------------------------------------------------------------


def _write_rest(plan: Plan, sides: Sequence[Path], work: Path) -> None:
    """Configuration and the source's other files; all but the index, which is the last."""
    watch = Watch(sides)
    for path in sides:
        if not (work / path.name).exists() or facts(work / path.name) != facts(path):
            _write_chunks(work / path.name, chunks(path))
    watch.check()
    for name, data in {"config.json": plan.config, **plan.files}.items():
        _write_json(work / name, data)
