"""`dgemma edit`: a difference on stdout, and a file that is written whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from dgemma.commands import documents
from dgemma.commands.edit import difference
from dgemma.errors import PromptError
from tests.cli.test_cli import assert_one_line, call

BROKEN = '{"name": "Ada", "year": 1990'
REPAIR = ("--instruction", f"Repair this JSON: {BROKEN}", "--backend", "numpy", "--seed", "0")


def test_a_difference_alone_changes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(BROKEN.encode() + b"\r\n")
    result = call("edit", path, *REPAIR)
    assert result.stdout_bytes == (
        f"--- {path}\n+++ {path}\n@@ -1 +1 @@\n-{BROKEN}\r\n+{BROKEN}}}\r\n".encode()
    ), result.stderr
    assert path.read_bytes() == BROKEN.encode() + b"\r\n" and [*tmp_path.iterdir()] == [path]
    piped = json.loads(call("edit", "-", *REPAIR, "--json", stdin=BROKEN).stdout)
    assert piped["text"] == BROKEN + "}" and piped["diff"].startswith("--- stdin\n+++ stdin\n")


def test_write_keeps_what_was(tmp_path: Path) -> None:
    """The file gets the new text under its old mode, also behind a link; the old one is beside it."""
    path, link = tmp_path / "a.json", tmp_path / "link"
    path.write_text(BROKEN)
    path.chmod(0o640)
    link.symlink_to(path)
    result = call("edit", link, *REPAIR, "--write")
    assert "a.json~" in result.stderr and result.stdout.startswith(f"--- {link}\n")
    assert (path.read_text(), (tmp_path / "a.json~").read_text()) == (BROKEN + "}", BROKEN)
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    assert len([*tmp_path.iterdir()]) == 3
    again = call("edit", path, "--write", "--instruction", f"Repair this JSON: {BROKEN}}}", *REPAIR[2:])
    assert (again.stdout, path.read_text()) == ("", BROKEN + "}") and "nothing changes" in again.stderr
    assert (tmp_path / "a.json~").read_text() == BROKEN


def test_a_file_is_whole_whatever_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    for call_of_os in ("fsync", "replace"):
        path.write_text("old")

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, call_of_os, interrupted)
            with pytest.raises(KeyboardInterrupt):
                documents.write_document(str(path), "old", "new")
        assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]
    path.write_text("newer")
    with pytest.raises(PromptError, match="has changed while"):
        documents.write_document(str(path), "old", "new")
    assert path.read_text() == "newer" and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    "old, new",
    [
        ("a\nb\nc\n", "a\nB\nc\n"),
        ("a\nb", "a\nb\n"),
        ("a\r\nb\u2028\x0c\n", "a\nb\u2028\x0c\n"),
        ("a", "b"),
        ("a\n", "a\n\n"),
        ("\n" * 9 + "a\n" + "\n" * 9, "\n" * 9 + "b\nc\n" + "\n" * 9),
    ],
)
def test_a_difference_can_be_applied(tmp_path: Path, old: str, new: str) -> None:
    (tmp_path / "t").write_bytes(old.encode())
    diff = difference(old, new, "t")
    git = ["git", "apply", "-p0", "--unsafe-paths", "-"]
    subprocess.run(git, input=diff.encode(), check=True, cwd=tmp_path, env=os.environ | {"GIT_DIR": "none"})
    assert (tmp_path / "t").read_bytes() == new.encode()
    assert difference(old, old, "t") == ""


def test_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text"
    for data, args, code, said in (
        (b"", (), 1, "is empty"),
        (b"\xff", (), 1, "not text in UTF-8"),
        (b"a\n", ("--lines", "2"), 1, "line 2 is beyond the text, which has 1 line"),
        (b"a\nb\nc", ("--lines", "1-2", "--lines", "2-3"), 1, "overlap"),
        (b"a", ("--max-tokens", "0"), 2, "--max-tokens"),
        (b"the cat " * 9000, (), 1, "positions, the model has 4096"),
    ):
        path.write_bytes(data)
        args = (*args, "--instruction", "x", "--backend", "numpy", "--write")
        assert_one_line(call("edit", path, *args), code, said)
        assert path.read_bytes() == data and [*tmp_path.iterdir()] == [path]
    assert_one_line(call("edit", path), 2, "--instruction")
    assert_one_line(call("edit", "-", "--write", "--instruction", "x", stdin="a"), 2, "--write needs a file")
