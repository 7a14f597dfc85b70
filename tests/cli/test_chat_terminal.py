"""`dgemma chat` on a terminal: keys, signals, what is shown and what is kept of the lines."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dgemma.commands import process, replies
from dgemma.commands.lines import _history, history_file
from dgemma.engine.events import Done, Stats
from dgemma.text.calls import ToolCall

STATS = Stats(5, 0, 4, 1.0, 0.0, 0.5, 0.1, 4.0, 1, 3, 3.0, 1.3, 10.0, 0, 1, "numpy")
SUM = "What is 47 + 85?"


def test_a_terminal_shows_calls_as_blocks_and_obeys_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    for stream in (out, err):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    call = ToolCall("f", {"city": "Zü\x9b1mrich", "n": 3, "code": "a\n\x1b[2Jb"})
    replies.print_reply(Done(0, [1], "x\x1b[2Jy", "t\x07", (call,), "tool_calls", STATS))
    assert out.getvalue() == (
        'x\ufffd[2Jy\ncall f\n  city: "Zü\ufffd1mrich"\n  n: 3\n  code:\n    a\n    \ufffd[2Jb\n'
    )
    assert "\x07" not in err.getvalue() and "t\ufffd" in err.getvalue()
    replies.answer_json({"a": "\x9b\x7f"})
    assert out.getvalue().endswith('{"a": "\\u009b\\u007f"}\n')


def test_ctrl_c_again_after_a_second_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    signal = SimpleNamespace(**vars(process.signal))
    handlers = [process._end]
    signal.getsignal = lambda number: handlers[-1]
    signal.signal = lambda number, handler: handlers.append(handler)
    now, ended, acted = [1.0], [], []
    monkeypatch.setattr(process, "signal", signal)
    monkeypatch.setattr(process.time, "monotonic", lambda: now[0])
    end = process._end
    monkeypatch.setattr(process, "_end", lambda *args: ended.append(args))
    handlers[-1] = process._end
    with process.interrupts(lambda: acted.append(1)):
        for now[0], count in ((1.0, 0), (1.9, 0), (2.1, 1)):
            handlers[-1](2, None)
            assert len(ended) == count and acted
    assert handlers[-1] is process._end is not end
    handlers.append(signal.SIG_IGN)
    with process.interrupts(lambda: None):
        assert handlers[-1] is signal.SIG_IGN


def test_lines_are_kept_for_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DGEMMA_HISTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_file() == tmp_path / ".local/state/dgemma/history"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = tmp_path / "state/dgemma/history"
    _history().append_string("one\ntwo")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert list(_history().load_history_strings()) == ["one\ntwo"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    monkeypatch.setenv("DGEMMA_HISTORY", "")
    assert history_file() is None and list(_history().load_history_strings()) == []
    os.mkfifo(tmp_path / "pipe")
    for bad in (tmp_path / "pipe", tmp_path):
        monkeypatch.setenv("DGEMMA_HISTORY", str(bad))
        _history().append_string("lost")
        assert f"{bad}: lines are not kept" in capsys.readouterr().err


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Any]:
    from tests.cli.terminals import Terminal

    shown: list[Terminal] = []

    def start(*args: str, **environment: str) -> Terminal:
        options = ["chat", "--backend", "numpy", "--seed", "1", *args]
        shown.append(Terminal(options, DGEMMA_HISTORY=str(tmp_path / "history"), **environment))
        return shown[-1]

    yield start
    for one in shown:
        one.close()


def prompted(shown: Any, after: int = 0) -> int:
    """Wait for the prompt behind a place of the output; the place behind it."""
    shown.wait_for(b"\x1b[?2004h", after)  # pasted text is told from typed text from here on
    return len(shown.output)


def test_a_talk_on_a_terminal(terminal: Any, tmp_path: Path) -> None:
    shown = terminal("--no-live", "--max-tokens", "8", "--steps", "2")
    modes = shown.modes()
    place = prompted(shown)
    shown.type("nonsense\x03")  # Ctrl-C clears the line
    shown.type("Add 3 \\\rand 4.\r")
    place = prompted(shown, place)
    shown.type("\x1b[200~Add 3\rand 4.\x1b[201~\x1b\r\r")  # pasted, then Alt-Enter
    place = prompted(shown, place)
    shown.type("/sava\r")
    shown.wait_for(b"the nearest is /save", place)
    place = prompted(shown, shown.output.rindex(b"/save"))
    shown.type(f"/save {tmp_path / 'talk.json'}\r")
    shown.wait_for(b"messages in", place)
    prompted(shown, shown.output.rindex(b"messages in"))
    shown.type("\x04")  # Ctrl-D
    assert shown.code() == 0 and shown.cursor and b"Traceback" not in shown.output
    assert shown.modes() == modes
    messages = json.loads((tmp_path / "talk.json").read_text("utf-8"))["messages"]
    asked = [message["content"] for message in messages if message["role"] == "user"]
    assert asked == ["Add 3 \nand 4.", "Add 3\nand 4.\n"]
    assert "nonsense" not in (tmp_path / "history").read_text("utf-8")


def test_a_terminal_that_cannot_move_its_cursor(terminal: Any) -> None:
    shown = terminal("--max-tokens", "8", "--steps", "2", TERM="dumb")
    shown.wait_for(b"\r\n> ")
    shown.type(f"{SUM}\n/quit\n")
    assert shown.code() == 0 and b"\x1b" not in shown.output
    assert shown.output.count(b"\r\n132\r\n> ") == 1


def test_ctrl_c_ends_a_reply_and_sigterm_the_program(terminal: Any) -> None:
    shown = terminal("--steps", "1000000", "--stability", "1000000", "--entropy-bound", "0")
    modes = shown.modes()
    prompted(shown)
    shown.type("Hi!\r")
    shown.wait_for(b"settled")
    shown.process.send_signal(process.signal.SIGINT)
    shown.wait_for(b"/retry asks again")
    prompted(shown, shown.output.rindex(b"/retry"))
    assert shown.cursor
    shown.process.send_signal(process.signal.SIGINT)  # at the prompt it clears the line
    shown.type("/stats\r")
    shown.wait_for(b"ended by cancelled")
    prompted(shown, shown.output.rindex(b"ended by"))
    shown.process.send_signal(process.signal.SIGTERM)
    assert shown.code() == 143 and shown.cursor
    assert shown.output.endswith(b"dgemma: terminated\r\n") and b"Traceback" not in shown.output
    assert shown.modes() == modes
