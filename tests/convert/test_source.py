"""A source that changes while it is read, the files beside it, and what the output says of itself."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.errors import CheckpointError
from dgemma_convert import source as source_module
from dgemma_convert import stream
from dgemma_convert.plan import make_plan
from tests.checkpoints import SMALL_VISION, make_checkpoint, minute, small
from tests.convert.conversions import call, decoded, digest, refused, run, tree
from tests.formats.writers import CASES, LAYOUTS

# ---- changed while it is read ---------------------------------------------------------------------


def other(file: Path) -> bytes:
    """The file with the last bit of every byte of data flipped: the same header and sizes."""
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    return raw[:start] + (np.frombuffer(raw[start:], np.uint8) ^ 1).tobytes()


def overwrite(file: Path) -> None:
    file.write_bytes(other(file))


def overwrite_a_byte(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\1")


def truncate(file: Path) -> None:
    os.truncate(file, 2000)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def grow(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"more")


def replace(file: Path) -> None:
    """By another file of the same size and time."""
    fresh = file.with_name("fresh")
    fresh.write_bytes(other(file))
    shutil.copystat(file, fresh)
    fresh.rename(file)


def remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("change", [overwrite, overwrite_a_byte, truncate, empty, grow, replace, remove])
@pytest.mark.parametrize("when", [0, 2], ids=["at once", "later"])
def test_a_source_that_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], when: int
) -> None:
    """It is noticed before a shard of it gets its name, and no signal kills the process."""
    monkeypatch.setattr("dgemma_convert.plan.SHARD_BYTES", 300_000)
    source = make_checkpoint(tmp_path / "in", small(), shards=2)
    wanted = digest(run(source, tmp_path / "wanted", "bf16"))
    file = source / "model-00002-of-00002.safetensors"
    write, written = stream._write_shard, 0

    def meanwhile(*args: Any) -> None:
        nonlocal written
        if written == when:
            change(file)
        write(*args)
        written += 1

    monkeypatch.setattr(stream, "_write_shard", meanwhile)
    refused(call(source, tmp_path / "out", "--to", "bf16"), f"{file}: ")
    assert not (tmp_path / "out").exists()
    left = digest(tmp_path / ".out.partial")
    assert written == when == sum(name.endswith(".safetensors") for name in left)
    assert all(own == wanted[name] for name, own in left.items() if name.endswith(".safetensors"))


CUT = """
import os, sys
from pathlib import Path
from dgemma.errors import CheckpointError
from dgemma_convert import source, stream
from dgemma_convert.plan import make_plan
source.SMALL = 0
parts = stream.parts
def cut(job):
    os.truncate(Path(sys.argv[1], "model.safetensors"), 0)
    return parts(job)
stream.parts = cut
plan, checkpoint = make_plan(Path(sys.argv[1]), "bf16")
try:
    stream.convert(plan, checkpoint, Path(sys.argv[2]))
except CheckpointError as error:
    print(error)
"""


def test_a_file_cut_short_under_an_open_tensor(tmp_path: Path) -> None:
    """A map of it would end in SIGBUS, which nothing can catch."""
    source = make_checkpoint(tmp_path / "in", small())
    command = [sys.executable, "-c", CUT, str(source), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, (result.returncode, result.stderr)
    assert "model.safetensors: changed while it was converted" in result.stdout


def test_a_source_that_changed_before_the_run(tmp_path: Path) -> None:
    """Headers are read when the plan is made; the files may be others when it is run."""
    source = make_checkpoint(tmp_path / "in", small())
    plan, checkpoint = make_plan(source, "bf16")
    assert checkpoint
    make_checkpoint(source, small(), seed=3)  # the tensors lie in another order
    with pytest.raises(CheckpointError, match="changed while it was converted"):
        stream.convert(plan, checkpoint, tmp_path / "out")


def test_new_weights_are_not_mixed_with_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on with a source that has changed since begins anew."""
    monkeypatch.setattr("dgemma_convert.plan.SHARD_BYTES", 300_000)
    source = make_checkpoint(tmp_path / "in", small())
    write = stream._write_shard

    def interrupted(path: Path, *rest: Any) -> None:
        if "00003" in path.name:
            raise KeyboardInterrupt
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "_write_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", "bf16")
    overwrite(source / "model.safetensors")
    resumed = digest(run(source, tmp_path / "out", "bf16"))
    assert resumed == digest(run(source, tmp_path / "wanted", "bf16"))


def rename_a_tensor(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"layernorm", b"layernoRm", 1))


@pytest.mark.parametrize("damage", [truncate, empty, grow, rename_a_tensor])
def test_a_shard_that_was_left_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]
) -> None:
    monkeypatch.setattr("dgemma_convert.plan.SHARD_BYTES", 300_000)
    source = make_checkpoint(tmp_path / "in", small())
    wanted = digest(run(source, tmp_path / "wanted", "bf16"))
    with monkeypatch.context() as patch:
        patch.setattr(stream, "_publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", "bf16")
    damage(tmp_path / ".out.partial" / "model-00002-of-00003.safetensors")
    write, written = stream._write_shard, list[str]()
    monkeypatch.setattr(
        stream, "_write_shard", lambda path, *rest: (written.append(path.name), write(path, *rest))
    )
    assert digest(run(source, tmp_path / "out", "bf16")) == wanted
    assert written == ["model-00002-of-00003.safetensors"]


@pytest.mark.parametrize("case", [name for name in CASES if "affine" not in name or name in LAYOUTS])
def test_reading_by_parts_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Every format that is read; tensors of small models are read whole otherwise."""
    source = CASES[case]().write(tmp_path / "in")
    for to in ("bf16", "nvfp4"):
        wanted = digest(run(source, tmp_path / f"{to} whole", to))
        with monkeypatch.context() as patch:
            patch.setattr(source_module, "SMALL", 0)
            assert digest(run(source, tmp_path / f"{to} parts", to)) == wanted


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG])
def test_a_disk_that_takes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    source = make_checkpoint(tmp_path / "in", minute())

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(stream, "_write_at", fail)
        full = code in (errno.ENOSPC, errno.EDQUOT)
        text = "the disk is full" if full else f"cannot be written ({os.strerror(code)})"
        refused(call(source, tmp_path / "out", "--to", "bf16"), text)
    assert call(source, tmp_path / "out", "--to", "bf16").exit_code == 0


# ---- the files beside the weights -----------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "in", minute())


def sides(folder: Path) -> set[str]:
    usual = {"config.json", "model.safetensors", "model.safetensors.index.json", "generation_config.json"}
    return {path.name for path in folder.iterdir()} - usual


def test_what_comes_along_and_what_is_left(source: Path, tmp_path: Path) -> None:
    """Weights of other formats, hidden files, folders, pipes and our own marker stay behind."""
    left = ["pytorch_model.bin", "m.gguf", "M.GGUF", "tf_model.h5", "model.onnx", "flax_model.msgpack"]
    left += [
        "pytorch_model.bin.index.json",
        ".gitattributes",
        ".tmp",
        "plan.sha256",
        "hf_quant_config.json.bin",
    ]
    come = ["README.md", "archive.zip", "n" * 255, "two\nlines", "model.safetensors.tmp", "-"]
    come += ["\udcff"] * (sys.platform == "linux")
    for name in (*left, *come):
        (source / name).write_text(name, errors="surrogateescape")
    (source / "assets").mkdir()
    (source / "link to a folder").symlink_to("assets")
    os.mkfifo(source / "pipe")
    (source / "inside").symlink_to("README.md")
    out = run(source, tmp_path / "out", "bf16")
    assert sides(out) == {*come, "inside"}
    assert not (out / "inside").is_symlink()
    assert (out / "inside").read_text() == "README.md"
    assert "nothing to do" in call(source, out, "--to", "bf16").stderr


def outside(path: Path) -> Path:
    secret = path.parent.parent / "secret"
    secret.write_text("token")
    return secret


def by_two_links(path: Path) -> Path:
    (path.parent.parent / "step").symlink_to(outside(path))
    return path.parent.parent / "step"


def by_a_folder(path: Path) -> Path:
    outside(path)
    (path.parent / "assets").symlink_to("..")
    return Path("assets/secret")


@pytest.mark.parametrize(
    ("lead", "fault"),
    [
        (outside, "a link that leads out of its folder"),
        (lambda path: os.path.relpath(outside(path), path.parent), "a link that leads out of its folder"),
        (by_two_links, "a link that leads out of its folder"),
        (by_a_folder, "a link that leads out of its folder"),
        (lambda path: "/etc/passwd", "a link that leads out of its folder"),
        (lambda path: "nowhere", "a link to no file"),
        (lambda path: path.name, "a link to no file"),
        (lambda path: "/dev/zero", "a link to no file"),
    ],
)
@pytest.mark.parametrize("name", ["notes.txt", "tokenizer.json"])
def test_links_that_lead_out(
    source: Path, tmp_path: Path, name: str, lead: Callable[[Path], Any], fault: str
) -> None:
    (source / name).symlink_to(lead(source / name))
    before = tree(tmp_path)
    refused(call(source, tmp_path / "out", "--to", "bf16"), f"{source / name}: {fault}")
    assert tree(tmp_path) == before


def cached(tmp_path: Path, source: Path) -> Path:
    """The source as the hub's cache holds it: links to blobs, weights as well."""
    repository = tmp_path / "hub" / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copyfile(path, blobs / f"{number:064}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064}")
    return snapshot


@pytest.mark.parametrize("how", ["itself", "behind a link", "links elsewhere", "moved cache"])
def test_a_snapshot_of_the_hubs_cache(source: Path, tmp_path: Path, how: str) -> None:
    """Also behind a link, as a folder of links that older clients made, and with the cache moved."""
    (source / "README.md").write_text("a card")
    snapshot = cached(tmp_path, source)
    if how == "behind a link":
        (tmp_path / "model").symlink_to(snapshot)
        snapshot = tmp_path / "model"
    elif how == "links elsewhere":
        (tmp_path / "model").mkdir()
        for path in snapshot.iterdir():
            (tmp_path / "model" / path.name).symlink_to(path.resolve())
        snapshot = tmp_path / "model"
    elif how == "moved cache":
        (tmp_path / "hub").rename(tmp_path / "drive")
        (tmp_path / "hub").symlink_to("drive")
    out = run(snapshot, tmp_path / "out", "bf16")
    assert not any(path.is_symlink() for path in out.iterdir())
    assert (out / "README.md").read_text() == "a card"
    assert "nothing to do" in call(source, out, "--to", "bf16").stderr


def test_a_blob_that_leads_out(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("a card")
    snapshot = cached(tmp_path, source)
    blob = (snapshot / "README.md").resolve()
    blob.unlink()
    blob.symlink_to("/etc/passwd")
    refused(call(snapshot, tmp_path / "out", "--to", "bf16"), "leads out of its folder")


def test_weights_may_be_links(source: Path, tmp_path: Path) -> None:
    """They are read as tensors, and only tensors of them are written."""
    (source / "model.safetensors").rename(tmp_path / "elsewhere")
    (source / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    out = run(source, tmp_path / "out", "bf16")
    assert not (out / "model.safetensors").is_symlink()


def test_a_side_file_that_cannot_be_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "README.md").write_text("a card")
    real = Path.open

    def closed(path: Path, *args: Any, **options: Any) -> Any:
        if path == source / "README.md":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "open", closed)
    before = set(os.listdir(tmp_path))
    refused(call(source, tmp_path / "out", "--to", "bf16"), "README.md: cannot be read (Permission denied)")
    assert set(os.listdir(tmp_path)) == before


def test_side_files_count_as_room(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (source / "archive.zip").open("wb") as file:
        file.truncate(10_000_000_000)  # a hole
    usage = shutil.disk_usage(tmp_path)._replace(free=5_000_000_000)
    monkeypatch.setattr("dgemma_convert.stream.shutil.disk_usage", lambda _: usage)
    refused(call(source, tmp_path / "out", "--to", "bf16"), "are needed and 5.00 GB are free")


def test_a_side_file_that_is_gone_when_a_run_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not published; the shards stay."""
    (source / "README.md").write_text("a card")
    with monkeypatch.context() as patch:
        patch.setattr(stream, "_publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", "bf16")
    (source / "README.md").unlink()
    monkeypatch.setattr(stream, "_write_shard", lambda *_: pytest.fail("a shard was written again"))
    assert sides(run(source, tmp_path / "out", "bf16")) == set()


# ---- what the output says of itself ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("to", ["bf16", "mlx", "nvfp4"])
def test_the_config_names_the_type_that_is_written(tmp_path: Path, dtype: str, to: str) -> None:
    name = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]
    config = small(dtype=name, torch_dtype=name) | {"dtype": name, "torch_dtype": name}
    config["vision_config"] = SMALL_VISION | {"dtype": name, "torch_dtype": None}
    out = run(make_checkpoint(tmp_path / "in", config, dtype=dtype), tmp_path / "out", to)
    made = json.loads((out / "config.json").read_text())
    sections = [made, made["text_config"], made["vision_config"]]
    assert [section["dtype"] for section in sections] == ["bfloat16"] * 3
    assert [section["torch_dtype"] for section in sections] == ["bfloat16", "bfloat16", None]
    plain = {e.dtype for name, e in Checkpoint.open(out).entries.items() if "norm" in name}
    assert plain == {"BF16"}


def test_a_config_without_types_gets_none(tmp_path: Path) -> None:
    config = minute()
    del config["dtype"], config["text_config"]["dtype"]
    out = run(make_checkpoint(tmp_path / "in", config, dtype="F32"), tmp_path / "out", "bf16")
    made = json.loads((out / "config.json").read_text())
    assert "dtype" not in made
    assert "dtype" not in made["text_config"]


def test_transformers_reads_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types, the index with its record, and every weight of the text model, tensor by tensor."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers.models.diffusion_gemma")
    monkeypatch.setattr("dgemma_convert.plan.SHARD_BYTES", 100_000)
    config = small(dtype="float32") | {"dtype": "float32"}
    out = run(make_checkpoint(tmp_path / "in", config, dtype="F32"), tmp_path / "out", "bf16")
    made = transformers.DiffusionGemmaConfig.from_pretrained(out)
    assert (made.dtype, made.text_config.dtype) == (torch.bfloat16, torch.bfloat16)
    model = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(out)
    theirs = model.state_dict()
    assert {x.dtype for x in theirs.values() if x.is_floating_point()} == {torch.bfloat16}
    ours = decoded(out)
    assert all((theirs[name].float().numpy() == x).all() for name, x in ours.items())
    assert len(ours) > 50
