"""What `--model` may say: folders, ids, links, and what they are told that say something else."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.hub import resolve
from dgemma.checkpoint.names import hub_id
from dgemma.errors import CheckpointError
from tests.checkpoint import refusal
from tests.checkpoints import make_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def refused(call: Callable[[], Any], *parts: str) -> str:
    return refusal.refused(call, *parts, kind=CheckpointError)


@pytest.mark.parametrize(
    ("name", "revision"),
    [
        ("org/name", None),
        ("org/name@v1.0", "v1.0"),
        ("org/name@refs/pr/1", "refs/pr/1"),
        ("https://huggingface.co/org/name", None),
        ("https://huggingface.co/org/name/", None),
        ("http://huggingface.co/org/name", None),
        ("HTTPS://HuggingFace.co/org/name", None),
        ("https://www.huggingface.co/org/name", None),
        ("https://hf.co/org/name", None),
        ("huggingface.co/org/name", None),
        ("hf.co/org/name", None),
        ("hf.co/org/name/", None),
        ("HF.co/org/name", None),
        ("https://huggingface.co//org//name//", None),
        (" https://huggingface.co/org/name\n", None),
        ("hf.co/org/name\t", None),
        ("https://huggingface.co/org/name?library=transformers", None),
        ("https://huggingface.co/org/name#usage", None),
        ("https://huggingface.co/org/name.git", None),
        ("https://user:secret@huggingface.co/org/name", None),
        ("https://huggingface.co/models/org/name", None),
        ("https://huggingface.co/api/models/org/name", None),
        ("https://huggingface.co/org/name@v2", "v2"),
        ("https://huggingface.co/org/name/tree/main", "main"),
        ("https://huggingface.co/org/name/tree/main/", "main"),
        ("https://huggingface.co/org/name/tree/v1.0?x=1#y", "v1.0"),
        ("huggingface.co/org/name/tree/main", "main"),
        (f"https://huggingface.co/org/name/tree/{COMMIT}", COMMIT),
        ("https://huggingface.co/org/name/tree/refs/pr/3", "refs/pr/3"),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F3", "refs/pr/3"),
        ("https://huggingface.co/org/name/tree/feature%2Ffoo", "feature/foo"),
        ("https://huggingface.co/org/name/blob/main/config.json", "main"),
        ("https://huggingface.co/org/name/blob/refs/pr/3/config.json", "refs/pr/3"),
        ("https://huggingface.co/org/name/resolve/main/model.safetensors?download=true", "main"),
        ("https://huggingface.co/org/name/raw/v1/config.json", "v1"),
        (f"https://huggingface.co/org/name/commit/{COMMIT}", COMMIT),
        ("https://huggingface.co/org/name/commits/main", "main"),
        ("hf://org/name", None),
        ("hf://models/org/name", None),
        ("hf://org/name@v1", "v1"),
        ("hf://org/name@refs/pr/2", "refs/pr/2"),
        ("hf://org/name@v1/config.json", "v1"),
        ("hf://org/name/config.json", None),
    ],
)
def test_ids_and_links(name: str, revision: str | None) -> None:
    assert hub_id(name) == ("org/name", revision)


def test_a_link_to_the_hub_that_the_user_named(monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: hub_id("https://hub.example/org/name"), "huggingface.co")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    assert hub_id("https://hub.example/org/name") == ("org/name", None)
    assert hub_id("hub.example/org/name/tree/v1") == ("org/name", "v1")
    monkeypatch.setenv("HF_ENDPOINT", "http://[")
    assert hub_id("hf.co/org/name") == ("org/name", None)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("https://example.com/org/name", "takes a folder, a hub id org/name[@revision], or a link"),
        ("https://huggingface.co.evil.example/org/name", "takes a folder"),
        ("https://github.com/org/name", "takes a folder"),
        ("s3://bucket/name", "takes a folder"),
        ("file:///models/name", "takes a folder"),
        ("ftp://huggingface.co/org/name", "takes a folder"),
        ("https://[/org/name", "takes a folder"),
        ("https://huggingface.co", "names no model"),
        ("https://huggingface.co/", "names no model"),
        ("https://huggingface.co/org", "names no model"),
        ("hf://", "names no model"),
        ("hf://org", "names no model"),
        ("https://huggingface.co/datasets/org/name", "a page of the hub's datasets"),
        ("https://huggingface.co/spaces/org/name", "a page of the hub's spaces"),
        ("hf.co/datasets/org/name", "a page of the hub's datasets"),
        ("hf://datasets/org/name", "a page of the hub's datasets"),
        ("https://huggingface.co/collections/org/name-1", "collections"),
        ("https://huggingface.co/papers/2401.00001", "papers"),
        ("https://huggingface.co/org/name/discussions/1", "give org/name"),
        ("https://huggingface.co/org/name/tree/main/onnx", "give org/name"),
        ("https://huggingface.co/org/name/blob/main/onnx/config.json", "give org/name"),
        ("hf://org/name/onnx/config.json", "give org/name"),
        ("https://huggingface.co/org/na me", "neither"),
        ("https://huggingface.co/org/..", "neither"),
        ("https://huggingface.co/org/name/tree/..", "neither"),
        ("https://huggingface.co/org/name/tree/%2E%2E%2Fx", "neither"),
    ],
)
def test_links_that_are_not_taken(name: str, part: str) -> None:
    refused(lambda: resolve(name), part)


@pytest.mark.parametrize(
    "name", ["./no", "../no", "/no", "~/no", "~nobody/no", "a/b/c", "a\\b", Path("org/name")]
)
def test_no_such_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | Path) -> None:
    monkeypatch.chdir(tmp_path)
    refused(lambda: resolve(name), "no such folder", str(name).replace("\\", "\\\\"))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "tiny",
        "a/",
        "b/",
        "a b/c",
        "a/b@",
        "a/b@..",
        "-a/b",
        "a/b.",
        "a/b@x\n",
        "\0",
        "a\0/b",
        "x" * 300,
        "x" * 5000,
    ]
    + [
        "x" * 300 + "/y",
        "a--b/c",
        "\ud800",
        "org/\udcff\udcfe",
        "a\nb",
        "a\x1b[31m",
        "a/\u202eb",
        "/" + "x/" * 3000,
    ],
)
def test_what_is_neither(name: str) -> None:
    message = refused(lambda: resolve(name))
    assert message.isprintable()


def test_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org") == tmp_path / "org"
    (tmp_path / "link").symlink_to("org")
    assert resolve("./link") == Path("link")


def test_a_file_in_place_of_its_folder(tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json", "chat_template.jinja", "model.safetensors.index.json"):
        (tmp_path / name).touch()
        refused(lambda name=name: resolve(tmp_path / name), name, f"give its folder {tmp_path}")
    (tmp_path / "model.Q4_K_M.gguf").touch()
    refused(lambda: resolve(tmp_path / "model.Q4_K_M.gguf"), "is GGUF")
    (tmp_path / "notes").touch()
    refused(lambda: resolve(tmp_path / "notes"), "is not a folder")
    os.mkfifo(tmp_path / "pipe.json")
    refused(lambda: resolve(tmp_path / "pipe.json"), "is not a folder")
    refused(lambda: resolve("/dev/null"), "is not a folder")
    refused(lambda: resolve(tmp_path / "notes" / "below"), "no such folder")


def test_links_of_the_file_system(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere")
    refused(lambda: resolve(tmp_path / "gone"), "a link to nowhere, which is not there")
    (tmp_path / "loop").symlink_to("loop")
    refused(lambda: resolve(tmp_path / "loop"), "cannot be read (Too many levels of symbolic links)")


# ---- folders of something else --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "part"),
    [
        (["model.Q4_K_M.gguf"], "model.Q4_K_M.gguf is GGUF"),
        (["MODEL.GGUF"], "is GGUF"),
        (["pytorch_model.bin"], "PyTorch's pickle"),
        (["pytorch_model-00001-of-00002.bin"], "PyTorch's pickle"),
        (["model.pt"], "PyTorch's pickle"),
        (["model.pth"], "PyTorch's pickle"),
        (["last.ckpt"], "PyTorch's pickle"),
        (["weights.npz"], "NumPy's format"),
        (["model.onnx", "model.onnx_data"], "ONNX"),
        (["onnx/model.onnx"], "onnx/model.onnx is ONNX"),
        (["tf_model.h5"], "not safetensors"),
        (["adapter_config.json", "adapter_model.safetensors"], "belongs to an adapter"),
        (["adapters.safetensors", "adapter_config.json"], "belongs to an adapter"),
        (["model.safetensors.incomplete"], "an unfinished download"),
    ],
)
@pytest.mark.parametrize("config", [False, True])
def test_a_folder_of_something_else(tmp_path: Path, files: list[str], part: str, config: bool) -> None:
    if config:
        make_checkpoint(tmp_path)
        (tmp_path / "model.safetensors").unlink()
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    if config:  # `info` reads no more of such a folder
        assert resolve(tmp_path) == tmp_path
        refused(lambda: Checkpoint.open(tmp_path), str(tmp_path), "no .safetensors file here", part)
    else:
        refused(lambda: resolve(tmp_path), str(tmp_path), part)


def test_the_folder_above(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "a" / "model")
    refused(lambda: resolve(tmp_path / "a"), f"in a folder below; give {tmp_path / 'a' / 'model'}")
    for name in "bcde":
        make_checkpoint(tmp_path / "a" / name)
    refused(lambda: resolve(tmp_path / "a"), f"give one of them: {tmp_path / 'a' / 'b'}, ", ", …")
    assert resolve(tmp_path) == tmp_path  # two levels below is too far to guess


@pytest.mark.parametrize("below", ["", "snapshots", "blobs", "refs"])
def test_a_model_s_folder_in_the_hub_s_cache(tmp_path: Path, below: str) -> None:
    root = tmp_path / "models--org--my-name"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "snapshots").mkdir()
    refused(lambda: resolve(root / below), "without a snapshot; give org/my-name")
    make_checkpoint(root / "snapshots" / ("a" * 40))
    make_checkpoint(root / "snapshots" / ("b" * 40))
    (root / "refs" / "main").write_text("b" * 40)
    refused(lambda: resolve(root / below), "give org/my-name", str(root / "snapshots" / ("b" * 40)))
    (root / "refs" / "main").write_bytes(b"\xff")
    refused(lambda: resolve(root / below), "give org/my-name", str(root / "snapshots" / ("a" * 40)))
    refused(lambda: resolve(tmp_path), "the hub's cache; give a model of it: org/my-name")
    snapshot = root / "snapshots" / ("a" * 40)
    assert resolve(snapshot) == snapshot
    (snapshot / "model.safetensors").unlink()
    refused(
        lambda: Checkpoint.open(resolve(snapshot)),
        "no .safetensors",
        "give org/my-name to complete the download",
    )
    (snapshot / "config.json").unlink()
    refused(lambda: resolve(snapshot), "give org/my-name to complete the download")
