"""Files of text that a download left empty or full of zeros; odd files of templates and tokens."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dgemma.checkpoint.folder import INDEX
from dgemma.checkpoint.hints import foreign_names
from dgemma.errors import DgemmaError
from dgemma.files import load_json, read_text
from dgemma.loading import load, open_small
from dgemma.reports.verify import inspect
from dgemma.tiny import MODEL_DIR
from dgemma_convert.source import _comes_along

FILES = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX),
    *("chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "hf_quant_config.json"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))


def refused(folder: Path, *parts: str) -> None:
    """A load refuses the folder in one line, and verify finds the same."""
    with pytest.raises(DgemmaError) as caught:
        load(folder, "numpy")
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    assert any(all(part in finding["text"] for part in parts) for finding in inspect(folder)["findings"])


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "is empty"),
        (b" \n\r\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (bytes(4096), "holds zero bytes"),
        (b'{"a": 1}' + bytes(9), "holds zero bytes"),
    ],
)
def test_what_a_download_leaves(tmp_path: Path, data: bytes, part: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    for read in (read_text, load_json):
        with pytest.raises(DgemmaError, match=f"a.json: {part}.*; download it again"):
            read(tmp_path / "a.json")


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_read_with_this_check(folder: Path, name: str) -> None:
    (folder / name).write_bytes(bytes(64))
    refused(folder, f"{folder / name}: holds zero bytes")


def test_a_template_whose_end_was_lost(folder: Path) -> None:
    """Without the check it compiles, and every prompt ends in zeros."""
    path = folder / "chat_template.jinja"
    path.write_bytes(path.read_bytes() + bytes(512))
    refused(folder, f"{path}: holds zero bytes")


def test_escaped_zeros_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('"\\u0000"')
    assert json.loads(read_text(tmp_path / "a.json")) == "\0"


@pytest.mark.parametrize(
    "template",
    ["[]", "404: Not Found", "<!DOCTYPE html><html></html>", "Entry not found", "{{ bos_token }}{{ tools }}"],
)
def test_a_template_that_reads_no_messages_is_said(folder: Path, template: str) -> None:
    assert not open_small(folder).notes
    (folder / "chat_template.jinja").write_text(template)
    notes = open_small(folder).notes
    assert len(notes) == 1 and "reads no messages" in notes[0]
    assert notes[0] in inspect(folder)["notes"]


@pytest.mark.parametrize("id", [{}, {"id": 3}, [], [3], None, True, 3.5, "x"])
def test_added_tokens_without_an_id(folder: Path, id: Any) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": id}))
    refused(folder, "added_tokens.json", "is no token's id")


def test_more_templates_that_cannot_be_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("here")
    (more / "._tool_use.jinja").write_bytes(b"\xff left by a Mac")
    (more / "notes.txt").write_text("{{")
    tokenizer = open_small(folder).tokenizer
    assert tokenizer is not None and tokenizer.template is not None
    assert tokenizer.template.render([{"role": "user", "content": "x"}], [{"name": "f"}]) == "here"
    listed = os.listdir

    def listdir(path: Any) -> list[str]:
        if Path(path) == more:
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "listdir", listdir)
    refused(folder, f"{more}: cannot be read (Permission denied)")


def test_more_templates_that_are_none(folder: Path) -> None:
    """transformers, too, takes a folder of this name alone."""
    more = folder / "additional_chat_templates"
    more.write_text("a file")
    assert not open_small(folder).notes
    more.unlink()
    more.symlink_to("gone")
    refused(folder, f"{more}: a link to gone")
    more.unlink()
    more.mkdir()
    os.mkfifo(more / "tool_use.jinja")
    refused(folder, f"{more / 'tool_use.jinja'}: not a regular file but a pipe")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("pytorch_model-00001-of-00002.bin", True),
        ("model.bin", True),
        ("sub/Model.BIN", True),
        ("bin/valgrind.bin", False),
        ("firmware.bin", False),
    ],
)
def test_a_bin_file_is_pytorch_s_if_it_speaks_of_a_model(name: str, hint: bool) -> None:
    assert ("pickle" in (foreign_names([name]) or "")) == hint


def test_a_conversion_s_link_into_a_folder_that_may_not_be_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "t").touch()
    (tmp_path / "link").symlink_to("closed/t")
    stat = os.stat

    def closed(path: Any, *args: Any, **options: Any) -> Any:
        if "closed/" in str(path):
            raise PermissionError(13, "Permission denied")
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", closed)
    with pytest.raises(DgemmaError, match="link to no file that can be read"):
        _comes_along(tmp_path / "link")
