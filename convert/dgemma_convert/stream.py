"""Writes a planned conversion: streaming, resumable, and visible only when it is whole.

Shards are written in a hidden folder beside the destination, each under a temporary name until its bytes are
on the disk; the folder takes the destination's name last. So the destination is whole or not there, whatever
kills a run, and the same command goes on with the first shard that is missing. A few threads convert parts of
tensors (NumPy lets go of the interpreter) and write them at offsets known beforehand.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.faults import HF_QUANT_CONFIG
from dgemma.checkpoint.folder import INDEX
from dgemma.errors import CheckpointError, ConfigError
from dgemma.files import Progress, load_json
from dgemma.formats.quantized import Quantized
from dgemma.formats.stored import Stored
from dgemma.reports.tables import amount
from dgemma.reports.verify import scale_findings

from .encode import cut, fields, parts
from .plan import Job, Plan, fingerprint

THREADS = min(4, os.cpu_count() or 1)
_STATE = "plan.sha256"
# Weights in any format: everything else of a source's folder comes along.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".index.json")


def convert(plan: Plan, checkpoint: Checkpoint, dest: Path, progress: Progress | None = None) -> bool:
    """Convert into the folder `dest`; False if it holds this very conversion already.

    Goes on with what an interrupted run of the same plan has left. `progress(done, total)` counts bytes
    written. CheckpointError for damage in the source and for a disk without room; ConfigError for a
    destination that is something else, or that another run is writing.
    """
    if _is_done(plan, dest):
        return False
    work = dest.with_name(f".{dest.name}.partial")
    _check_room(plan, work)
    check_scales(checkpoint)
    with _locked(work), _room():
        _resume(work, fingerprint(plan, checkpoint))
        done = 0
        for name, jobs in plan.shards():
            if not (work / name).exists():
                _write_shard(work / name, jobs, plan, checkpoint, _shifted(progress, done, plan.nbytes))
            done += sum(job.nbytes for job in jobs)
            if progress:
                progress(done, plan.nbytes)
        _write_rest(plan, checkpoint.folder, work)
        _publish(work, dest)
    return True


def _is_done(plan: Plan, dest: Path) -> bool:
    """Whether `dest` holds this very conversion; ConfigError if it holds anything else."""
    if not dest.exists() or (dest.is_dir() and not any(dest.iterdir())):
        return False
    try:
        made = load_json(dest / "config.json").get("dgemma")
    except ConfigError:
        made = None
    if made != plan.config["dgemma"]:
        raise ConfigError(f"{dest}: exists and is not this conversion; remove it or name another folder")
    return True


def check_scales(checkpoint: Checkpoint) -> None:
    """CheckpointError for scales of a quantized source that are damaged: they would spoil all they scale."""
    for finding in scale_findings(checkpoint):
        raise CheckpointError(f"{checkpoint.folder}: {finding.text}")


def _shifted(progress: Progress | None, by: int, total: int) -> Progress | None:
    return None if progress is None else (lambda done, _: progress(by + done, total))


# ---- the folder beside the destination ------------------------------------------------------------


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """The work folder, for one run at a time; the lock goes with the process, however it ends."""
    try:
        work.mkdir(exist_ok=True)
        handle = os.open(work / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise ConfigError(f"{work}: cannot be written ({error.strerror})") from None
    try:
        _lock(handle)
    except OSError:
        os.close(handle)
        raise ConfigError(f"{work}: another run is writing this conversion") from None
    try:
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> None:
    """OSError if another process has the lock of this file."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def _room() -> Iterator[None]:
    """Says in one line that the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError("the disk is full; make room and run the same command, which goes on") from None


def _resume(work: Path, state: str) -> None:
    """Keep what a run of the same plan has left, remove what any other has."""
    file = work / _STATE
    if file.exists() and file.read_text() == state:
        return
    for path in work.iterdir():
        if path.name != ".lock":
            path.unlink()
    _write_whole(file, state.encode())


def _check_room(plan: Plan, work: Path) -> None:
    """CheckpointError if the disk has no room for what is still to be written."""
    if not work.parent.is_dir():
        raise ConfigError(f"{work.parent}: no such folder to write to")
    there = sum(path.stat().st_size for path in work.glob("*.safetensors"))
    free, needed = shutil.disk_usage(work.parent).free, plan.nbytes - there
    if needed > free:
        raise CheckpointError(
            f"{work.parent}: {amount(needed)} are needed and {amount(free)} are free; make room or name "
            "another folder"
        )


def _publish(work: Path, dest: Path) -> None:
    """The work folder becomes the destination."""
    for name in (_STATE, ".lock"):
        (work / name).unlink()
    _sync(work)
    os.rename(work, dest)  # over an empty folder too
    _sync(dest.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_whole(path: Path, data: bytes) -> None:
    """A small file that is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    _sync(temporary)
    os.replace(temporary, path)


# ---- shards -------------------------------------------------------------------------------------


def _header(jobs: list[Job], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes and every tensor's offset in it. Padded to 8 bytes, as all writers do."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets, end = {}, 0
    for output in (output for job in jobs for output in job.outputs):
        offsets[output.name] = end
        end += output.nbytes
        spans = [offsets[output.name], end]
        header[output.name] = {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": spans}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    start = 8 + len(raw)
    return len(raw).to_bytes(8, "little") + raw, {name: start + offset for name, offset in offsets.items()}


def _write_shard(
    path: Path, jobs: list[Job], plan: Plan, checkpoint: Checkpoint, progress: Progress | None
) -> None:
    head, offsets = _header(jobs, plan.target.metadata)
    total = sum(job.nbytes for job in jobs)
    temporary = path.with_name(path.name + ".tmp")
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


def _write_rest(plan: Plan, source: Path, work: Path) -> None:
    """Index, configuration and the source's other files."""
    weight_map = {o.name: name for name, jobs in plan.shards() for job in jobs for o in job.outputs}
    index = {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
    made = {INDEX: index, "config.json": plan.config, **plan.files}
    for name, data in made.items():
        _write_whole(work / name, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())
    for path in sorted(source.iterdir()):
        other = path.name in made or path.name == HF_QUANT_CONFIG or path.name.startswith(".")
        if path.is_file() and not other and not path.name.endswith(_WEIGHTS):
            _write_whole(work / path.name, path.read_bytes())
