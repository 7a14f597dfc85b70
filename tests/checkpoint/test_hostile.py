"""Files that are none, folders that may not be read, and headers that would take all day: always one line."""

import errno
import json
import os
import socket
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.folder import INDEX, SINGLE, find_tensors, has_weights, shards
from dgemma.checkpoint.hub import resolve
from dgemma.checkpoint.safetensors import MAX_TENSORS, read_header
from dgemma.errors import CheckpointError, DgemmaError, visible
from dgemma.files import exists, file_size, is_folder, load_json, names, quoted, read_text
from dgemma.network.numpy_ops import NumpyOps
from tests.checkpoint.refusal import refused
from tests.checkpoints import make_checkpoint, minute, write_json, write_raw

SHARD = "model-00002-of-00002.safetensors"
FILES = ["config.json", "generation_config.json", INDEX, SHARD]


def opened(folder: Path) -> Callable[[], Any]:
    return lambda: Checkpoint.open(resolve(folder))


# ---- what is no file ------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def plug(path: Path) -> None:
    folder = os.getcwd()
    os.chdir(path.parent)  # a socket's name has a hundred letters at most
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(folder)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder_of(path: Path) -> None:
    path.mkdir()


def dangling(path: Path) -> None:
    path.symlink_to("gone")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


KINDS: dict[Callable[[Path], None], str] = {
    pipe: "not a regular file but a pipe",
    plug: "not a regular file but a socket",
    device: "not a regular file but a device",
    folder_of: "not a regular file but a folder",
    dangling: "a link to gone, which is not there",
    loop: "cannot be read (Too many levels of symbolic links)",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("make", list(KINDS), ids=lambda make: make.__name__)
def test_what_is_no_file(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    folder = make_checkpoint(tmp_path, minute(), shards=2)
    (folder / name).unlink()
    make(folder / name)
    refused(opened(folder), f"{folder / name}: ", KINDS[make])


@pytest.mark.parametrize("make", list(KINDS), ids=lambda make: make.__name__)
def test_what_is_no_file_in_place_of_all_weights(tmp_path: Path, make: Callable[[Path], None]) -> None:
    folder = make_checkpoint(tmp_path, minute())
    (folder / SINGLE).unlink()
    make(folder / SINGLE)
    refused(opened(folder), f"{folder / SINGLE}: ", KINDS[make])
    (folder / SINGLE).rename(folder / "other.safetensors")
    refused(opened(folder), "other.safetensors: ")


def test_a_pipe_that_takes_the_weights_place_later(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, minute()))
    (tmp_path / SINGLE).unlink()
    os.mkfifo(tmp_path / SINGLE)
    refused(lambda: checkpoint.load(NumpyOps()), "a pipe")


# ---- pointers and single files --------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 17477929\n"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_pointers(tmp_path: Path, name: str, mark: str) -> None:
    folder = make_checkpoint(tmp_path, minute(), shards=2)
    if mark and name == SHARD:
        return
    (folder / name).write_text(mark + POINTER)
    refused(opened(folder), str(folder / name), "Git LFS pointer", "git lfs pull")


def test_a_pointer_in_place_of_an_index_that_is_not_needed(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, minute())
    (folder / INDEX).write_text(POINTER)
    refused(opened(folder), str(folder / INDEX), "Git LFS pointer")


def index(folder: Path, *files: str) -> None:
    write_json(folder / INDEX, {"weight_map": {f"t{i}": file for i, file in enumerate(files)}})


def test_an_index_left_over_from_another_checkpoint(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, minute())
    index(folder, "model-00001-of-00002.safetensors", SHARD)
    assert shards(folder) == [folder / SINGLE]
    where, tensors = find_tensors(folder)
    assert where == folder / SINGLE and tensors
    opened(folder)()


def test_two_sets_of_weights(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, minute(), shards=2)
    make_checkpoint(tmp_path / "single", minute())
    (tmp_path / "single" / SINGLE).rename(folder / SINGLE)
    refused(opened(folder), str(folder), "two sets of weights", SINGLE, INDEX, "model-00001", "remove one")
    refused(lambda: shards(folder), "two sets of weights")
    (folder / SHARD).unlink()  # a half of a set is one, too
    refused(opened(folder), "two sets of weights")


def test_an_index_that_names_the_single_file(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, minute())
    names = list(find_tensors(folder)[1])
    write_json(folder / INDEX, {"weight_map": dict.fromkeys(names, SINGLE)})
    where, tensors = find_tensors(folder)
    assert where == folder / INDEX and list(tensors) == names
    write_json(folder / INDEX, {"weight_map": dict.fromkeys(names[1:], SINGLE)})
    refused(opened(folder), repr(names[0]), f"is not in {INDEX}")


# ---- what the system refuses ----------------------------------------------------------------------

CODES = [errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ELOOP, errno.ENAMETOOLONG, errno.EMFILE]


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, int], None]:
    """Makes a function of `os`, or `open`, fail for paths that end in a name; a test may run as root."""

    def refuse(function: str, name: str, code: int) -> None:
        own = getattr(os, function) if function != "open" else Path.open

        def fail(path: Any, *args: Any, **kwargs: Any) -> Any:
            if str(path).endswith(name):
                raise OSError(code, os.strerror(code), str(path))
            return own(path, *args, **kwargs)

        monkeypatch.setattr(*((Path, "open") if function == "open" else (os, function)), fail)

    return refuse


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("function", ["stat", "open"])
def test_a_file_that_may_not_be_read(
    tmp_path: Path, refusing: Callable[[str, str, int], None], function: str, name: str, code: int
) -> None:
    folder = make_checkpoint(tmp_path, minute(), shards=2)
    refusing(function, f"/{name}", code)
    refused(opened(folder), f"{folder / name}: cannot be read ({os.strerror(code)})")


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_a_folder_that_may_not_be_listed(
    tmp_path: Path, refusing: Callable[[str, str, int], None], code: int
) -> None:
    folder = make_checkpoint(tmp_path / "model", minute(), shards=2)
    refusing("listdir", "/model", code)
    opened(folder)()  # the index names all that is needed
    (folder / INDEX).unlink()
    refused(lambda: has_weights(folder), f"{folder}: cannot be read ({os.strerror(code)})")
    message = refused(opened(folder), f"{folder}: cannot be read ({os.strerror(code)})")
    assert "no .safetensors" not in message
    (folder / "config.json").unlink()
    refused(opened(folder), f"{folder}: cannot be read ({os.strerror(code)})")


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_a_model_that_may_not_be_looked_at(
    tmp_path: Path, refusing: Callable[[str, str, int], None], code: int
) -> None:
    folder = make_checkpoint(tmp_path / "model", minute())
    refusing("stat", "/model", code)
    refused(lambda: resolve(folder), str(folder), f"cannot be read ({os.strerror(code)})")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", [*FILES, "."])
def test_permissions(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path / "model", minute(), shards=2)
    os.chmod(folder / name, 0)
    try:
        refused(opened(folder), "Permission denied")
    finally:
        os.chmod(folder / name, stat.S_IRWXU)


def test_what_files_says_of_names_that_no_file_system_takes(tmp_path: Path) -> None:
    for name in ("x" * 300, "a\0b", "\ud800"):
        for call in (exists, is_folder, file_size, read_text, load_json, names):
            with pytest.raises(DgemmaError):
                call(tmp_path / name)


def test_a_path_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not exists(tmp_path / "file" / "below")
    refused(lambda: read_text(tmp_path / "file" / "below"), "no such file")


# ---- shards' names --------------------------------------------------------------------------------

NAMES = [
    "/etc/model.safetensors",
    "../model.safetensors",
    "a/model.safetensors",
    "a\\model.safetensors",
    "C:model.safetensors",
    "..",
    ".safetensors",
    ".hidden.safetensors",
    "CON",
    "model.safetensors\n",
    "a\nb.safetensors",
    "a\0b.safetensors",
    "a\x1b[31m.safetensors",
    "a\x7f.safetensors",
    "a\u202eb.safetensors",
    "a\u2028b.safetensors",
    "\ud800.safetensors",
    "\udcff.safetensors",
    "x" * 300 + ".safetensors",
    "\N{GRINNING FACE}" * 70 + ".safetensors",
    "x" * 100_000,
    None,
    7,
    [],
    {},
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:30])
def test_what_is_no_shard_s_name(tmp_path: Path, name: Any) -> None:
    folder = make_checkpoint(tmp_path, minute(), shards=2)
    write_json(folder / INDEX, {"weight_map": {"a": SHARD, "b": name}})
    message = refused(opened(folder), str(folder / INDEX), "'b'", "not a shard's name")
    assert message.isprintable()
    refused(lambda: shards(folder), "not a shard's name")


@pytest.mark.parametrize(
    "name", ["CON.safetensors", "Zoë 1.safetensors", "-.safetensors", "x..y.safetensors"]
)
def test_shards_of_any_other_name(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path, minute(), shards=2)
    data = json.loads((folder / INDEX).read_text())
    data["weight_map"] = {t: name if file == SHARD else file for t, file in data["weight_map"].items()}
    write_json(folder / INDEX, data)
    (folder / SHARD).rename(folder / name)
    opened(folder)()
    (folder / name).unlink()
    refused(opened(folder), str(folder / name), "missing shard")


# ---- sizes ----------------------------------------------------------------------------------------


def test_a_large_index(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, minute(), shards=2)
    with (folder / INDEX).open("r+b") as stream:
        stream.truncate(200_000_000)  # sparse: takes no room on the disk
    refused(opened(folder), str(folder / INDEX), "200,000,000 bytes are too many")


def test_an_index_of_too_many_tensors(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, minute(), shards=2)
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {str(i): SHARD[5:] for i in range(MAX_TENSORS + 1)}})
    )
    refused(opened(folder), str(folder / INDEX), f"more than {MAX_TENSORS:,} tensors")


def headed(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "h.safetensors"
    write_raw(file, text, b"")
    return file


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [' + "[]," * 5_000_000 + "[]]}",
        '{"a": {"b": [' + "{}," * 5_000_000 + "{}]}}",
        '{"a": ' + "[" * 3_000_000 + "}",
        "{" + ",".join(f'"{i}":{{}}' for i in range(MAX_TENSORS + 1)) + "}",
        "{" + '"a":' * 2_000_000,
        '{"__metadata__": ' + '{"a":' * 1_000_000 + "}",
        '{"' + "x" * 30_000_000,
        '{"' + "x" * 30_000_000 + '": 1}',
        '{"a": "' + "\\u0000" * 5_000_000 + '"}',
        '{"a": ' + "9" * 20_000_000 + "}",
        " " * 30_000_000,
    ],
    ids=[
        "lists",
        "objects",
        "depth",
        "tensors",
        "cut",
        "metadata",
        "open name",
        "long name",
        "text",
        "digits",
        "blank",
    ],
)
def test_headers_that_would_take_all_day(tmp_path: Path, text: str) -> None:
    before = time.process_time()
    refused(lambda: read_header(headed(tmp_path, text)), "h.safetensors")
    assert time.process_time() - before < 20  # a few seconds at most on any machine


def test_many_tensors_are_read(tmp_path: Path) -> None:
    """More than the released model has if every matrix of every expert is a record of its own."""
    facts = {f"t.{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(60_000)}
    assert len(read_header(headed(tmp_path, json.dumps(facts)))) == 60_000


@pytest.mark.parametrize(
    "metadata", [None, 3, "x", [], [[]], {}, {"format": 3}, {"a": {"b": []}}, {"format": "pt"}]
)
def test_metadata_are_not_looked_at(tmp_path: Path, metadata: Any) -> None:
    assert read_header(headed(tmp_path, json.dumps({"__metadata__": metadata}))) == []


@pytest.mark.parametrize(
    "text",
    [
        '{"__metadata__": {}, "__metadata__": {}}',
        '{"__metadata__": {"a": "1", "a": "2"}}',
        '{"a": {"dtype": "U8", "dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}',
        '{"a": {"dtype": "U8", "shape": [0], "shape": [0], "data_offsets": [0, 0]}}',
    ],
)
def test_keys_that_occur_twice(tmp_path: Path, text: str) -> None:
    refused(lambda: read_header(headed(tmp_path, text)), "occurs twice")


@pytest.mark.parametrize("length", [1001, 1_000_000])
def test_long_names_of_tensors(tmp_path: Path, length: int) -> None:
    fact = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    refused(lambda: read_header(headed(tmp_path, json.dumps({"x" * length: fact}))), f"{length:,} letters")


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, minute(), shards=2)
    checkpoint = Checkpoint.open(folder)
    last = read_header(folder / SHARD)[-1]
    with (folder / SHARD).open("r+b") as stream:
        stream.truncate(last.offset + last.nbytes - 1)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(NumpyOps())


def test_a_header_without_an_end(tmp_path: Path) -> None:
    file = tmp_path / "h.safetensors"
    file.write_bytes(struct.pack("<Q", 4) + b'{"a"')
    refused(lambda: read_header(file), "unreadable header")


def test_values_in_errors_are_cut() -> None:
    assert len(quoted("x" * 10_000)) < 300
    assert len(quoted(["x" * 10_000] * 1000)) < 3000
    assert quoted("model.decoder.layers.29.experts.127.down_proj.weight")[1:-1].endswith(
        "127.down_proj.weight"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain: 'a' (b) – Zoë 猫", "plain: 'a' (b) – Zoë 猫"),
        ("a\nb\r\n\tc\u2028d  e", "a b c d e"),
        ("\x1b[31mred\x07\x00", "\\x1b[31mred\\x07\\x00"),
        ("\x9b31m\x7f", "\\x9b31m\\x7f"),
        ("a\u202eb\u2066c\ufeff", "a\\u202eb\\u2066c\\ufeff"),
        ("\ud800.json \udcff", "\\ud800.json \\udcff"),
        ("\U000e0001", "\\U000e0001"),
    ],
)
def test_what_a_terminal_would_obey_is_shown(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(text).isprintable() and visible(text).encode()
