"""`dgemma chat`: turns of stdin and of a terminal, its commands, and what an early end leaves."""

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
from click.testing import CliRunner, Result
from rich.console import Console

import dgemma
from dgemma.cli import main
from dgemma.commands import process, replies
from dgemma.commands.chat import _talk
from dgemma.commands.lines import _history, history_file
from dgemma.commands.session import COMMANDS, Output, Session, Wanted
from dgemma.engine.conversation import Conversation
from dgemma.engine.engine import Engine
from dgemma.engine.events import Done, Stats
from dgemma.errors import DgemmaError
from dgemma.model import Model
from dgemma.text.calls import ToolCall

STATS = Stats(5, 0, 4, 1.0, 0.0, 0.5, 0.1, 4.0, 1, 3, 3.0, 1.3, 10.0, 0, 1, "numpy")
WEATHER = {
    "name": "weather",
    "description": "Weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
SUM, ANSWER = "What is 47 + 85?", "132"


def call(*args: str | Path, stdin: str | bytes = "") -> Result:
    command = ["--backend", "numpy", "--seed", "1", *(str(arg) for arg in args[1:])]
    result = CliRunner().invoke(main, [str(args[0]), *command], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def loaded() -> Model:
    return dgemma.load(backend="numpy")


@pytest.fixture
def session(loaded: Model) -> Iterator[Session]:
    output = Output(None, Console(file=io.StringIO()), live=False, as_json=False, stats=False)
    with Engine(loaded, loaded.tokenizer, max_rows=1) as engine:
        yield Session(engine, loaded, output, Conversation(), Wanted(loaded.generation, 1))


def roles(session: Session) -> list[str]:
    return [message["role"] for message in session.conversation.messages]


# ---- lines of stdin -------------------------------------------------------------------------------


def test_each_line_of_stdin_is_a_turn(tmp_path: Path) -> None:
    kept = tmp_path / "talk.json"
    stdin = f"\ufeff{SUM}\r\n\n/save {kept}\n/stats\nAdd 3 \\\nand 4.\n/quit\nHi!\n"
    result = call("chat", "--json", "--max-tokens", "16", stdin=stdin)
    assert result.exit_code == 0
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["cached_tokens"] > 0 for record in records] == [False, True]
    assert records[0]["text"] == ANSWER
    assert f"messages in {kept}: 2" in result.stderr and "for the next turn" in result.stderr
    messages = [
        *json.loads(kept.read_text("utf-8"))["messages"],
        {"role": "user", "content": "Add 3 \nand 4."},
    ]
    kept.write_text(json.dumps(messages), "utf-8")
    fresh = json.loads(call("generate", "--json", "--max-tokens", "16", "--messages", kept).stdout)
    assert fresh.keys() == records[1].keys()
    same = ("token_ids", "text", "prompt_tokens", "steps", "seed", "model", "dtype")
    assert [fresh[key] for key in same] == [records[1][key] for key in same]


@pytest.mark.parametrize(
    ("stdin", "code", "part"),
    [
        ("", 0, None),
        ("Add 3 and 4.\\", 0, None),  # ends where a line goes on
        (b"\xff\n", 1, "stdin is not text"),
        ("/nope\n", 1, "unknown command /nope"),
        ("a " * 5_000, 1, "or lower --max-tokens"),
        ("Hi \ud800!\n".encode("utf-8", "surrogatepass"), 1, "stdin is not text"),
    ],
)  # fmt: skip
def test_the_end_of_stdin(
    stdin: str | bytes, code: int, part: str | None, loaded: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dgemma.commands.chat.open_model", lambda *args, **options: loaded)
    result = call("chat", stdin=stdin)
    *_, line = ["", *result.stderr.splitlines()]
    assert result.exit_code == code, result.stderr
    assert part is None or (line.startswith("dgemma: error: ") and part in line)
    assert result.stdout == ("7\n" if "Add" in str(stdin) else "")


def test_options_are_checked_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dgemma.loading.announced_forms", None)
    (tmp_path / "tools.json").write_text("[1]")
    for args, code, part in (
        (["--tools", "-"], 2, "--tools cannot be stdin"),
        (["--tools", tmp_path / "tools.json"], 1, "tools.json: tool 0"),
        (["--t-max", "0.1", "--t-min", "1"], 2, "--t-max 0.1 must not be below --t-min 1"),
        (["--max-tokens", "2000000000"], 1, "lower --max-tokens"),
    ):
        result = call("chat", *args)
        assert result.exit_code == code and part in result.stderr.splitlines()[-1]


# ---- commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("/sava x", "unknown command /sava, the nearest is /save"),
        ("/", "unknown command /,"),
        ("/" + "\x1b" * 99, "unknown command"),
        ("/seed x", "/seed takes a whole number, not 'x'"),
        ("/seed -1", "/seed takes a whole number"),
        ("/seed 99999999999999999999999", "seed must be at least 0 and at most"),
        ("/thinking maybe", "/thinking takes on, off or hidden"),
        ("/result 1", "no call of a tool waits"),
        ("/retry", "nothing was asked yet"),
        ("/undo", "there is no turn to take back"),
        ("/stats", "there is no reply yet"),
        ("/save x", "there is nothing to save yet"),
        ("/save", "/save takes the name of a file"),
        ("/load", "/load takes the name of a file"),
        ("/load nope.json", "nope.json: cannot be read (No such file"),
        ("/load /", "/: cannot be read (Is a directory"),
        ("/load a\0b", "cannot be read (embedded null byte"),
        ("/tools nope.json", "nope.json: cannot be read (No such file"),
        ("/load bad.json", "bad.json: message 0"),
        ("/load system.json", "system.json: message 0"),
        ("/tools bad.json", "bad.json: tool 0"),
        ("half a pair \ud800", "U+D800, which is no character"),
        ("a " * 5_000, "positions"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_and_changes_nothing(
    line: str, part: str, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text('[{"role": "nobody"}]')
    Path("system.json").write_text('[{"role": "system", "content": {"a": 1}}]')
    before = dict(vars(session))
    with pytest.raises(DgemmaError) as error:
        session.take(line)
    assert part in str(error.value)
    assert vars(session) == before and session.open


def test_turns_can_be_taken_back_and_asked_again(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    session.take(SUM)
    first = session.conversation
    session.take("/retry")
    assert session.conversation == first
    session.take("//add 1")
    assert session.conversation.messages[2]["content"] == "/add 1"
    session.take("/undo")
    assert session.conversation == first
    session.take("/seed")
    session.take("/retry")
    assert roles(session) == ["user", "assistant"]
    session.take("/undo")
    assert session.conversation == Conversation()
    assert capsys.readouterr().out.splitlines()[:2] == [ANSWER, ANSWER]


def test_the_system_message_and_thoughts(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    session.take("/thinking on")
    session.take("/system  Be brief.\nYou are tiny.")
    session.take(SUM)
    assert session.conversation.messages[0] == {"role": "system", "content": "Be brief.\nYou are tiny."}
    thought = session.conversation.messages[-1]["reasoning_content"]
    out, err = capsys.readouterr()
    assert thought in err and thought not in out
    session.take("/thinking hidden")
    session.take("/retry")
    assert session.conversation.messages[-1]["reasoning_content"] not in capsys.readouterr().err
    session.take("/system")
    session.take("/thinking off")
    assert roles(session) == ["user", "assistant"] and not session.conversation.thinking


def test_a_tool_is_called_and_given_its_result(
    session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
    session.take(f"/tools {tmp_path / 'tools.json'}")
    session.take("What is the weather in Paris?")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"name": "weather", "arguments": {"city": "Paris"}}
    assert err.endswith("dgemma: /result TEXT gives the result of weather\n")
    session.take("/result sunny")
    assert roles(session) == ["user", "assistant", "tool", "assistant"]
    assert "Paris" in capsys.readouterr().out
    session.take(f"/save {tmp_path / 'talk.json'}")
    other = session.conversation
    session.take("/undo")
    session.take("/tools")
    session.take(f"/load {tmp_path / 'talk.json'}")
    assert session.conversation.messages == other.messages and session.conversation.tools == other.tools
    session.take("/retry")
    assert session.conversation == other


def test_a_file_is_replaced_whole(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session.take(SUM)
    target, link = tmp_path / "target.json", tmp_path / "talk.json"
    link.symlink_to(target)
    session.take(f"/save {link}")
    before = target.read_text("utf-8")
    assert link.is_symlink() and json.loads(before)["messages"][1]["content"] == ANSWER

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for path, why in ((link, "No space left on device"), (tmp_path, "not a regular file")):
        with pytest.raises(DgemmaError, match=f"{path}: cannot be written .{why}"):
            session.take(f"/save {path}")
    assert target.read_text("utf-8") == before and len(list(tmp_path.iterdir())) == 2


def test_a_file_of_a_whole_request(
    session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "request.json"
    asked = {"messages": [{"role": "user", "content": SUM}]}
    path.write_text(json.dumps(asked | {"max_tokens": 30, "seed": 5, "stop": "2", "user": "me"}))
    session.take(f"/load {path}")
    assert capsys.readouterr().err.splitlines() == [
        "dgemma: not used of the file: user",
        "dgemma: messages loaded: 1; /retry asks for a reply to the last",
    ]
    session.take("/retry")
    assert roles(session) == ["user", "assistant"]
    session.take("/stats")
    out, err = capsys.readouterr()
    assert out == "13\n" and "seed 5, ended by stop" in err


def test_help_names_every_command(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    session.take("/help")
    text = capsys.readouterr().err
    assert [name for name in COMMANDS if f"\n/{name}" not in f"\n{text}"] == []
    session.take("/quit")
    assert not session.open


def test_a_cancelled_turn_can_be_asked_again(
    session: Session, loaded: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    see = loaded.see

    def cancelled(*args: Any) -> Any:
        session.cancel()
        return see(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loaded, "see", cancelled)
        session.take(SUM)
    assert session.conversation == Conversation()
    assert "/retry asks again" in capsys.readouterr().err
    session.cancel()  # nothing is under way
    session.take("/retry")
    assert roles(session) == ["user", "assistant"] and capsys.readouterr().out == f"{ANSWER}\n"


def test_a_terminal_gets_an_error_as_a_line_and_goes_on(
    session: Session, loaded: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["/sava", SUM, "/retry", SUM, "/undo"])
    see, failing = loaded.see, [True, True]

    def short(*args: Any) -> Any:
        if failing and failing.pop():
            raise MemoryError("17 GB")
        return see(*args)

    def read() -> str:
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr(loaded, "see", short)
    _talk(session, read)
    out, err = capsys.readouterr()
    said = [line.removeprefix("dgemma: error: ") for line in err.splitlines() if "error" in line]
    assert [line.split()[0] for line in said] == ["unknown", "out", "out"]
    assert out == f"{ANSWER}\n" and session.conversation == Conversation()


# ---- terminals ------------------------------------------------------------------------------------


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
