"""`dgemma infill`: bytes in, the same bytes out but for the holes; and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_cli import assert_one_line, call

ADA = ("--instruction", "Extract as JSON: name Ada, age 41", "--backend", "numpy", "--seed", "0")


def test_a_file_and_stdin(tmp_path: Path) -> None:
    """Order mark, ends of lines, tabs and letters of any script stay; no end of a line comes or goes."""
    for around in (b"%b", b"\xef\xbb\xbf%b\r\n", b"%b\r\n\r\n"):
        data, expected = (around % b'{"name": "%b", "age": 41}' % name for name in (b"<<>>", b"Ada"))
        path = tmp_path / "text.json"
        path.write_bytes(data)
        for args, stdin in (((str(path),), b""), (("-",), data)):
            result = call("infill", *args, *ADA, stdin=stdin)
            assert result.stdout_bytes == expected, result.stderr
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    "text, args",
    [
        ('{"name": "@@", "age": 41}', ("--hole", "@@", "--length", "3")),
        ('{"name": "", "age": 41}', ("--at", "1:11")),
        ('{"name": "<<3>>", "age": <<>>}', ()),
        ('{"name": "", "age": }', ("--at", "1:21", "--at", "1:11", "--length", "3", "--length", "2")),
        ("broken {\n", ("--lines", "1")),
    ],
)
def test_where_holes_are(text: str, args: tuple[str, ...]) -> None:
    result = call("infill", "-", *ADA, *args, "--json", stdin=text)
    done = json.loads(result.stdout)
    assert done["text"].rstrip("\n") == '{"name": "Ada", "age": 41}' or "--lines" in args
    assert (done["model"], done["dtype"], done["seed"]) == ("embedded", "float64", 0)
    assert all(done["text"][hole["start"] :].startswith(hole["text"]) for hole in done["holes"])
    assert done["text"].endswith("\n") == text.endswith("\n")


def test_what_is_refused(tmp_path: Path) -> None:
    """In one line, before the model is loaded, and the file is as it was."""
    path = tmp_path / "text"
    for data, args, code, said in (
        (b"abc", (), 1, "has no hole; mark one with <<>>"),
        (b"a<<>>", ("--hole", "@@"), 1, "mark one with @@"),
        (b"", (), 1, "is empty"),
        (b"\xef\xbb\xbf", (), 1, "is empty"),
        (b"a\xff<<>>", (), 1, "not text in UTF-8 (invalid start byte at byte 1)"),
        (b"a<<0>>", (), 1, "nothing to fill"),
        (b"a<<>>", ("--length", "0"), 2, "--length"),
        (b"a<<>>", ("--max-tokens", "0"), 2, "--max-tokens"),
        (b"a<<>>", ("--length", "1", "--length", "2"), 1, "2 lengths for 1 holes"),
        (b"a<<>><<>>", (), 1, "overlap or touch"),
        (b"a\nb", ("--lines", "1-2", "--at", "2:1"), 1, "overlap or touch"),
        (b"a\nb\n", ("--lines", "2-3"), 1, "line 3 is beyond the text, which has 2 lines"),
        (b"a\nb\n", ("--at", "1:3"), 1, "line 1 has 1 columns"),
        (b"a", ("--at", "1"), 2, "LINE:COL"),
        (b"a", ("--lines", "b"), 2, "A-B"),
        (b"a", ("--hole", "b", "--at", "1:1"), 2, "--hole marks holes in the text"),
        (b"a<<>>", ("--hole", ""), 2, "marks nothing"),
        (b"a<<99>>", (), 1, "does not fit on a canvas of 32"),
        (b"the cat " * 9000 + b"<<>>", (), 1, "positions, the model has 4096; give a part of the text"),
        (b"a<<>>", ("--instruction", "the cat " * 9000), 1, "positions, the model has 4096"),
    ):
        path.write_bytes(data)
        assert_one_line(call("infill", path, "--backend", "numpy", *args), code, said)
        assert path.read_bytes() == data and [*tmp_path.iterdir()] == [path]
    assert_one_line(call("infill", tmp_path / "none"), 1, "none: cannot be read (No such file or directory)")
    assert_one_line(call("infill", tmp_path), 1, "cannot be read (Is a directory)")
