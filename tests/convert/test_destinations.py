"""Where a conversion may go: it is done, or refused in one line before any work and with nothing touched."""

import errno
import os
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dgemma_convert import lock, place, stream
from tests.checkpoints import make_checkpoint, minute
from tests.convert.conversions import call, digest, refused, run, tree


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "small", minute())


@pytest.fixture(scope="module")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return digest(run(source, tmp_path_factory.mktemp("wanted") / "out", "bf16"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current one and the home."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    return here


ANY_BYTES = sys.platform == "linux"  # macOS has no names that are no UTF-8


def weights(found: dict[str, str]) -> dict[str, str]:
    """Without the two files that hold the source's name, or the digest of the one that does."""
    return {
        name: own
        for name, own in found.items()
        if name not in ("config.json", "model.safetensors.index.json")
    }


def link_to_empty(here: Path) -> None:
    (here / "drive").mkdir()
    (here / "out").symlink_to("drive")


def link_to_nothing(here: Path) -> None:
    (here / "out").symlink_to(here / "drive")


def chain_of_links(here: Path) -> None:
    (here / "out").symlink_to("one")
    (here / "one").symlink_to("two")
    (here / "two").symlink_to(here / "drive")


def parent_is_a_link(here: Path) -> None:
    (here / "drive").mkdir()
    (here / "linked").symlink_to("drive")


def stale_lock(here: Path) -> None:
    (here / ".out.partial.lock").touch()


def empty_leftover(here: Path) -> None:
    (here / ".out.partial").mkdir()


def half_a_marker(here: Path) -> None:
    empty_leftover(here)
    (here / ".out.partial" / ".tmp").write_text("abc")


def nothing(here: Path) -> None:
    pass


DONE: list[tuple[str, Callable[[Path], object]]] = [
    ("out", nothing),
    ("out/", nothing),
    ("./out", nothing),
    ("../here/out", nothing),
    ("~/out", nothing),
    ("./~out", nothing),
    (".out", nothing),
    ("a [b]*?%s {c} ünï\u202e", nothing),
    ("-", nothing),
    ("two\nlines", nothing),
    *([("bytes \udcff\udc80", nothing)] if ANY_BYTES else []),
    *((("n" * length), nothing) for length in (237, 242, 247, 255)),
    ("ü" * 127, nothing),
    ("out", lambda here: (here / "out").mkdir()),
    ("out", link_to_empty),
    ("out/", link_to_empty),
    ("out", link_to_nothing),
    ("out", chain_of_links),
    ("linked/out", parent_is_a_link),
    ("out", stale_lock),
    ("out", empty_leftover),
    ("out", half_a_marker),
]


@pytest.mark.parametrize(
    ("dest", "prepare"), DONE, ids=lambda x: ascii(x)[:20] if isinstance(x, str) else x.__name__
)
def test_destinations_that_are_taken(
    source: Path, here: Path, wanted: dict[str, str], dest: str, prepare: Callable[[Path], object]
) -> None:
    prepare(here)
    result = call(source, "--to", "bf16", "--", dest)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("\n") == 1
    folder = Path(os.path.expanduser(dest))
    assert weights(digest(folder)) == weights(wanted)
    assert not [name for name in os.listdir(folder.resolve().parent) if ".partial" in name]
    again = call(source, "--to", "bf16", "--", dest)
    assert (again.exit_code, "nothing to do" in again.stderr) == (0, True)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a second file system")
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_to_another_drive(source: Path, here: Path, exists: bool) -> None:
    """The hidden folder lies beside the link's target, as no rename leads from one drive to another."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as drive:
        target = Path(drive, "out")
        if exists:
            target.mkdir()
        (here / "link").symlink_to(target)
        assert call(source, "link", "--to", "bf16").exit_code == 0
        assert (target / "model.safetensors").is_file()
        assert os.listdir(drive) == ["out"]
        assert os.listdir(here) == ["link"]


def test_an_empty_folder_keeps_its_rights(source: Path, here: Path) -> None:
    (here / "out").mkdir(mode=0o700)
    run(source, here / "out", "bf16")
    assert stat.S_IMODE((here / "out").stat().st_mode) == 0o700


def test_a_destination_in_the_source(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", minute())
    run(source, source / "out", "bf16")
    assert "nothing to do" in call(source, source / "out", "--to", "bf16").stderr


# ---- refused ------------------------------------------------------------------------------------


def a_loop(here: Path) -> None:
    (here / "out").symlink_to("back")
    (here / "back").symlink_to("out")


def a_file(here: Path) -> None:
    (here / "out").write_text("mine")


def a_pipe(here: Path) -> None:
    os.mkfifo(here / "out")


def link_to_a_file(here: Path) -> None:
    (here / "mine").write_text("mine")
    (here / "out").symlink_to("mine")


def occupied(here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "thesis.txt").write_text("mine")


def link_to_occupied(here: Path) -> None:
    occupied(here)
    (here / "link").symlink_to("out")


def pipe_for_config(here: Path) -> None:
    (here / "out").mkdir()
    os.mkfifo(here / "out" / "config.json")


def link_into_nowhere(here: Path) -> None:
    (here / "out").symlink_to(here / "unplugged" / "out")


def work(marker: bool, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """A hidden folder with something in it."""

    def prepare(here: Path) -> None:
        folder = here / ".out.partial"
        folder.mkdir()
        if marker:
            (folder / "plan.sha256").write_text("another plan")
            (folder / "model.safetensors").write_text("half of something")
        make(folder / "thing")

    return prepare


def thing(make: Callable[[Path], object], name: str = ".out.partial") -> Callable[[Path], None]:
    """Something in place of the hidden folder."""
    return lambda here: [make(here / name), None][1]


def link_out(path: Path) -> None:
    thesis = path.parent.parent / "thesis"
    thesis.mkdir(exist_ok=True)
    (thesis / "chapter.txt").write_text("mine")
    path.symlink_to(thesis)


def link_to_marked(path: Path) -> None:
    """A link to a folder that would pass for one of ours."""
    link_out(path)
    (path / "plan.sha256").write_text("another plan")


REFUSED: list[tuple[str, Callable[[Path], object], str]] = [
    ("", nothing, "an empty DEST"),
    (".", nothing, "the current folder"),
    ("./", nothing, "the current folder"),
    ("../here", nothing, "the current folder"),
    ("..", nothing, "exists and is not this conversion"),
    ("/", nothing, "exists and is not this conversion"),
    ("~", nothing, "the current folder"),
    ("~no-such-user/out", nothing, "no such user's home"),
    ("no/out", nothing, "no such folder to write to"),
    ("no/../out", nothing, "no such folder to write to"),
    ("n" * 256, nothing, "File name too long"),
    ("n" * 250 + "/" + "n" * 250, nothing, "no such folder to write to"),
    ("zero\0byte", nothing, "not a name"),
    ("half \ud800", nothing, "not a name"),
    ("/dev/null", nothing, "not a folder"),
    ("/dev/null/out", nothing, "Not a directory"),
    ("out", a_loop, "symbolic links"),
    ("out", a_file, "not a folder"),
    ("out/", a_file, "not a folder"),
    ("out/in", a_file, "Not a directory"),
    ("out", a_pipe, "not a folder"),
    ("out", link_to_a_file, "not a folder"),
    ("out", occupied, "exists and is not this conversion"),
    ("link", link_to_occupied, "exists and is not this conversion"),
    ("out", pipe_for_config, "exists and is not this conversion"),
    ("out", link_into_nowhere, "no such folder to write to"),
    ("out", work(False, Path.touch), "in the way"),
    ("out", work(False, Path.mkdir), "in the way"),
    ("out", work(True, Path.mkdir), "thing"),
    ("out", work(True, link_out), "thing"),
    ("out", work(True, os.mkfifo), "thing"),
    ("out", thing(link_out), "in the way"),
    ("out", thing(link_to_marked), "in the way"),
    ("out", thing(Path.touch), "in the way"),
    ("out", thing(os.mkfifo), "in the way"),
    ("out", thing(lambda path: path.symlink_to("nowhere")), "in the way"),
    ("out", thing(Path.mkdir, ".out.partial.lock"), "Is a directory"),
    ("out", thing(os.mkfifo, ".out.partial.lock"), "in the way"),
    ("out", thing(lambda path: path.write_text("mine"), ".out.partial.lock"), "in the way"),
    ("out", thing(link_out, ".out.partial.lock"), "symbolic links"),
]


@pytest.mark.parametrize(("dest", "prepare", "fault"), REFUSED)
def test_destinations_that_are_refused(
    source: Path,
    tmp_path: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    dest: str,
    prepare: Callable[[Path], object],
    fault: str,
) -> None:
    prepare(here)
    before = tree(tmp_path)
    monkeypatch.setattr(stream, "_write_shard", lambda *_: pytest.fail("a shard was written"))
    refused(call(source, dest, "--to", "bf16"), fault)
    assert tree(tmp_path) == before


@pytest.mark.skipif(sys.platform != "linux", reason="a path may have 4095 bytes there")
def test_a_path_that_is_too_long_with_the_files_in_it(source: Path, here: Path) -> None:
    """The folder could be made, and its longest file could not."""
    deep = here
    while len(str(deep)) < 3900:
        deep = deep / ("d" * min(200, 4000 - len(str(deep))))
        os.mkdir(deep)
    dest = deep / ("n" * (4095 - 10 - len(str(deep))))
    refused(call(source, dest, "--to", "bf16"), "too long a path")
    assert os.listdir(deep) == []


def test_the_current_folder_was_removed(source: Path, here: Path) -> None:
    here.rmdir()
    refused(call(source, "out", "--to", "bf16"), "No such file or directory")


def test_a_destination_is_looked_at_before_a_download(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    monkeypatch.setattr("dgemma_convert.command.resolve", lambda *_, **__: pytest.fail("a download began"))
    refused(call("org/name", "no/out", "--to", "bf16"), "no such folder to write to")
    (here / "out").write_text("mine")
    refused(call("org/name", "out", "--to", "bf16"), "not a folder")


def failing(code: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EPERM, errno.EACCES, errno.EROFS])
def test_an_empty_folder_that_cannot_be_replaced(
    source: Path, here: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A bind mount, or another user's folder in /tmp: an attempt shows it, before any work."""
    (here / "out").mkdir()
    monkeypatch.setattr(place.os, "rmdir", failing(code))
    monkeypatch.setattr(stream, "_write_shard", lambda *_: pytest.fail("a shard was written"))
    refused(call(source, "out", "--to", "bf16"), os.strerror(code))
    assert os.listdir(here) == ["out"]


def test_a_mount_point(source: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "out").mkdir()
    monkeypatch.setattr(place.os.path, "ismount", lambda path: str(path).endswith("out"))
    refused(call(source, "out", "--to", "bf16"), "out: a mount point, whose place a conversion cannot take")


@pytest.mark.parametrize("what", ["access", "listdir", "stat"])
def test_folders_without_permission(
    source: Path, here: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A parent that cannot be written, a destination that cannot be read, a path that cannot be entered."""
    (here / "out").mkdir()
    if what == "access":
        monkeypatch.setattr(place.os, "access", lambda *_: False)
        refused(call(source, "out", "--to", "bf16"), f"{here}: cannot be written")
        return
    refuse = failing(errno.EACCES)
    monkeypatch.setattr(*((place.os, "listdir") if what == "listdir" else (place, "_look")), refuse)
    refused(call(source, "out", "--to", "bf16"), "out: cannot be written (Permission denied)")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_that_cannot_be_written(source: Path, here: Path) -> None:
    (here / "closed").mkdir(mode=0o500)
    refused(call(source, "closed/out", "--to", "bf16"), "closed: cannot be written")


def test_a_parent_that_cannot_be_written_after_all(
    source: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rights that `access` does not see, such as those of a read-only share."""
    monkeypatch.setattr(lock.os, "open", failing(errno.EROFS))
    refused(call(source, "out", "--to", "bf16"), "cannot be written (Read-only file system)")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(
    source: Path, here: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    import fcntl

    monkeypatch.setattr(fcntl, "flock", failing(code))
    refused(call(source, "out", "--to", "bf16"), "its file system has no locks")
    assert os.listdir(here) == []


def test_a_folder_that_cannot_be_synced(source: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network drives cannot; the conversion is there nevertheless."""
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(handle)

    monkeypatch.setattr(stream.os, "fsync", fsync)
    assert call(source, "out", "--to", "bf16").exit_code == 0


# ---- source and destination -----------------------------------------------------------------------


def test_the_source_is_the_destination(source: Path, here: Path) -> None:
    (here / "link").symlink_to(source)
    before = tree(source)
    for one, other in ((source, source), ("link", source), (source, "link"), (source, f"{source}/../small/")):
        refused(call(one, other, "--to", "bf16"), "it is the source itself")
    assert tree(source) == before


def test_the_source_is_in_the_destination(source: Path, tmp_path: Path) -> None:
    inner = make_checkpoint(tmp_path / "a" / "b" / "in", minute())
    before = tree(tmp_path)
    for dest in (inner.parent, inner.parent.parent):
        refused(call(inner, dest, "--to", "bf16"), "exists and is not this conversion")
    assert tree(tmp_path) == before


def test_the_source_is_the_hidden_folder(tmp_path: Path) -> None:
    """What is converted must not be what an interrupted run left, which would be removed."""
    inner = make_checkpoint(tmp_path / ".out.partial", minute())
    (inner / "plan.sha256").write_text("a plan")
    before = tree(tmp_path)
    refused(call(inner, tmp_path / "out", "--to", "bf16"), "where")
    linked = make_checkpoint(tmp_path / "linked", minute())
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(inner / "model.safetensors")
    refused(call(linked, tmp_path / "out", "--to", "bf16"), "where")
    assert {path: own for path, own in tree(tmp_path).items() if "linked" not in path} == before


def test_something_takes_the_name_meanwhile(
    source: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finished folder stays, and the same command only renames it."""
    write = stream._write_shard

    def taken(path: Path, *rest: object) -> None:
        write(path, *rest)  # type: ignore[arg-type]
        occupied(here)

    monkeypatch.setattr(stream, "_write_shard", taken)
    refused(call(source, "out", "--to", "bf16"), "run the same command, which only takes the name")
    (here / "out" / "thesis.txt").unlink()
    monkeypatch.setattr(stream, "_write_shard", lambda *_: pytest.fail("a shard was written again"))
    assert call(source, "out", "--to", "bf16").exit_code == 0
    assert (here / "out" / "model.safetensors").is_file()
