"""`dgemma chat`: turns of stdin, its commands, and what an early end leaves."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

import dgemma
from dgemma.cli import main
from dgemma.commands.chat import _talk
from dgemma.commands.session import COMMANDS, Output, Session, Wanted
from dgemma.engine.conversation import Conversation
from dgemma.engine.engine import Engine
from dgemma.errors import DgemmaError
from dgemma.model import Model

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
