"""Where an answer goes: any encoding, a full disk, a closed or broken stream, for every command."""

import errno
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

import dgemma_cuda
from dgemma.cli import main
from dgemma.commands import process, streams
from dgemma.commands.errors import OneLine
from dgemma.commands.replies import print_reply
from dgemma.engine.events import Done, Stats
from dgemma.text.calls import ToolCall

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
SHORT = ["generate", "--backend", "numpy", "--max-tokens", "4", "--steps", "2", "--seed", "1"]
STATS = Stats(5, 0, 4, 1.0, 0.0, 0.5, 0.1, 4.0, 1, 3, 3.0, 1.3, 10.0, 0, 1, "numpy")
TEXT = "naïve → 🙂"
FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
UNIX = pytest.mark.skipif(sys.platform == "win32", reason="a shell's redirections")


def reply(text: str, **changes: Any) -> Done:
    return Done(0, [5, 106], text, "", changes.pop("calls", ()), "stop", STATS)


def stream(encoding: str, errors: str = "strict") -> Any:
    return io.TextIOWrapper(io.BytesIO(), encoding, errors)


def written(file: Any) -> bytes:
    file.flush()
    data: bytes = file.buffer.getvalue()
    return data


# ---- encodings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "errors", "wanted"),
    [
        ("utf-8", "strict", "naïve → 🙂"),
        ("utf-16", "strict", "naïve → 🙂"),
        ("latin-1", "strict", "naïve ? ?"),
        ("cp1252", "strict", "naïve ? ?"),
        ("cp437", "strict", "naïve ? ?"),
        ("gbk", "strict", "na?ve → ?"),
        ("shift_jis", "strict", "na?ve → ?"),
        ("ascii", "strict", "na?ve ? ?"),
        ("ascii", "surrogateescape", "na?ve ? ?"),  # the C locale's
        ("ascii", "backslashreplace", "na\\xefve \\u2192 \\U0001f642"),
        ("latin-1", "xmlcharrefreplace", "naïve &#8594; &#128578;"),
        ("ascii", "ignore", "nave  "),
        ("ascii", "no-such-handler", "na?ve ? ?"),
    ],
)
def test_what_an_encoding_lacks_is_replaced(
    encoding: str, errors: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = stream(encoding, errors)
    monkeypatch.setattr(sys, "stdout", out)
    print_reply(reply(TEXT))
    assert written(out).decode(encoding) == wanted + "\n"


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "cp1252", "gbk", "ascii", "cp037"])
@pytest.mark.parametrize("errors", ["strict", "replace", "ignore", "surrogateescape"])
@pytest.mark.parametrize("text", [TEXT, "plain", "half a pair \ud83d", "a byte \udcff"], ids=ascii)
def test_json_loses_nothing(encoding: str, errors: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = stream(encoding, errors)
    monkeypatch.setattr(sys, "stdout", out)
    streams.answer_json({"text": text})
    assert json.loads(written(out).decode(encoding)) == {"text": text}
    print_reply(reply("", calls=(ToolCall("f", {"x": text}),)))
    assert json.loads(written(out).decode(encoding).splitlines()[1])["arguments"] == {"x": text}


def test_half_a_surrogate_pair_in_an_answer_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    out = stream("utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    streams.answer("a\ud83db")
    assert written(out) == b"a?b\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_help_is_an_answer_like_any_other(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = stream(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    assert code_of(["generate", "--help"]) == 0
    assert "{" + '"messages": [?], "tools": [?]' + "}" in written(out).decode(encoding)


# ---- streams that take nothing ------------------------------------------------------------------


def code_of(args: Sequence[str]) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        main(list(args))
    return end.value.code


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`selftest` and `bench` without a framework."""
    report = {"device": "none", "ok": None, "why": "it is not there", "checks": []}
    fake = SimpleNamespace(check_all=lambda device, update: report)
    monkeypatch.setattr("dgemma.commands.selftest.choose", lambda *args: "mlx")
    monkeypatch.setattr("dgemma.commands.selftest.part", lambda *args: fake)
    monkeypatch.setattr("dgemma_cuda.command.make_ops", lambda *args: None)
    bench = SimpleNamespace(run=lambda *args: report, text=lambda report: "text")
    monkeypatch.setitem(sys.modules, "dgemma_cuda.bench", bench)
    monkeypatch.setattr(dgemma_cuda, "bench", bench, raising=False)


def commands(model: Path) -> list[list[str]]:
    folder = str(model)
    bench = ["bench", "--random-weights", "--geometry", "tiny"]
    convert = ["convert", folder, "--to", "mlx", "--plan"]
    return [
        *[[*SHORT, "--model", folder, "a", *more] for more in ([], ["--json"])],
        *[["info", folder, *more] for more in ([], ["--json"])],
        *[["verify", folder, *more] for more in ([], ["--json"])],
        *[[*start, *more] for start in (convert, ["selftest"], bench) for more in ([], ["--json"])],
        *[[*name, option] for name in ([], ["generate"], ["bench"]) for option in ("-h", "--help")],
        [],
        ["--version"],
    ]


def full() -> Any:
    return open("/dev/full", "w")


def read_only() -> Any:
    return open(os.open(os.devnull, os.O_RDONLY), "w")


def without_reader() -> Any:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def closed() -> Any:
    with open(os.devnull, "w") as file:
        return file


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: None, "stdout is closed, so the answer has nowhere to go"),
        (closed, "stdout is closed, so the answer has nowhere to go"),
        pytest.param(read_only, os.strerror(errno.EBADF), marks=UNIX),
        pytest.param(full, os.strerror(errno.ENOSPC), marks=FULL),
        pytest.param(without_reader, None, marks=UNIX),
    ],
    ids=["none", "closed", "read-only", "full disk", "no reader"],
)
def test_stdout_that_takes_nothing(
    make: Any, said: str | None, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for args in commands(model):
        out, err = make(), stream("utf-8")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            assert code_of(args) == 1, args
        lines = written(err).decode().splitlines()
        assert len(lines) == (said is not None), (args, lines)
        if said is not None:
            assert lines[0].startswith("dgemma: error: ") and said in lines[0]
        if out is not None:
            out.close()  # Python flushes it when it ends: what is left must not fail again


@pytest.mark.parametrize("make", [lambda: None, closed], ids=["none", "closed"])
def test_work_without_an_answer_needs_no_stdout(
    make: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", make())
    assert code_of(["convert", str(model), str(tmp_path / "out"), "--to", "mlx"]) == 0
    assert (tmp_path / "out" / "config.json").exists()


def test_a_closed_stdout_is_found_before_the_work(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded for nothing")

    monkeypatch.setattr("dgemma.commands.opened.load", load)
    monkeypatch.setattr(sys, "stdout", None)
    assert code_of([*SHORT, "a"]) == 1


@pytest.mark.parametrize("error", [OSError(errno.EIO, "bad sector"), BrokenPipeError(errno.EPIPE, "peer")])
def test_an_error_of_a_file_is_not_one_of_stdout(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a bug of ours that nothing named the file, and keeps its traceback."""

    def read() -> None:
        raise error

    with pytest.raises(type(error)):
        OneLine("read", callback=read).main([])


def test_the_end_of_a_file_is_no_interrupt() -> None:
    def read() -> None:
        raise EOFError("a file is short")

    with pytest.raises(EOFError):
        OneLine("read", callback=read).main([])


@UNIX
def test_a_pipe_that_does_not_wait_gets_all_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    text, got = "x" * 1_000_000, []
    saved = os.dup(1)
    thread = threading.Thread(target=lambda: got.append(Path(f"/dev/fd/{reader}").read_text()))
    try:
        os.dup2(writer, 1)
        os.close(writer)
        process._fill_descriptors()
        out = os.fdopen(1, "w", closefd=False)
        monkeypatch.setattr(sys, "stdout", out)
        thread.start()
        streams.answer(text)
    finally:
        monkeypatch.undo()
        os.dup2(saved, 1)
        os.close(saved)
    thread.join()
    os.close(reader)
    assert [len(part) for part in got] == [len(text) + 1]


# ---- stderr costs nothing -----------------------------------------------------------------------


@pytest.fixture(params=["none", "full disk", "read-only", "no reader"])
def broken_stderr(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "full disk" and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    makers = {"full disk": full, "read-only": read_only, "no reader": without_reader}
    file = makers[request.param]() if request.param in makers else None
    monkeypatch.setattr(sys, "stderr", file)
    streams.prepare()
    yield
    sys.stderr.flush()
    monkeypatch.undo()
    if file is not None:
        file.close()


@UNIX
@pytest.mark.usefixtures("broken_stderr")
@pytest.mark.parametrize("color", ["", "1"])  # with it a pipe counts as a terminal: bars, the view in place
@pytest.mark.parametrize("more", [["--no-live"], ["--live", "--stats"], ["--json", "--stats"]], ids=str)
def test_stderr_never_costs_the_answer(
    more: list[str], color: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", color)
    out = stream("utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    assert code_of([*SHORT, "--model", str(model), "a", *more]) == 0
    assert len(written(out).splitlines()) == 1


@UNIX
@pytest.mark.usefixtures("broken_stderr")
def test_errors_without_stderr_keep_their_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    out = stream("utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    assert code_of(["generate", "--nope"]) == 2
    assert code_of(["info", "./nope"]) == 1
    assert written(out) == b""


def test_notes_without_stderr_go_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    out = stream("utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    for err in (None, closed()):
        monkeypatch.setattr(sys, "stderr", err)
        streams.note("something", dim=True)
    assert written(out) == b""


# ---- a process of its own -----------------------------------------------------------------------


def shell(command: str, **env: str) -> tuple[int, bytes, bytes]:
    """Run a shell's command line, in which "dgemma" is this one."""
    line = command.replace("dgemma", f'"{sys.executable}" -m dgemma', 1)
    done = subprocess.run(["sh", "-c", line], capture_output=True, env=ENVIRONMENT | env, timeout=120)
    return done.returncode, done.stdout, done.stderr


RUN = f"dgemma {' '.join(SHORT)} a"


@UNIX
@pytest.mark.parametrize(
    ("command", "code", "lines"),
    [
        pytest.param("dgemma info nope/nope/nope <&- >&- 2>&-", 1, (0, 0), id="nothing open"),
        pytest.param(f"{RUN} --live --stats 2>&-", 0, (1, 0), id="no stderr"),
        pytest.param("dgemma generate <&-", 1, (0, 1), id="no stdin"),
        pytest.param("dgemma generate 0>/dev/null", 1, (0, 1), id="stdin that cannot be read"),
        pytest.param("dgemma --help >/dev/full", 1, (0, 1), marks=FULL, id="full disk"),
        pytest.param("dgemma generate --nope 2>/dev/full", 2, (0, 0), marks=FULL, id="full stderr"),
    ],
)
def test_streams_as_a_shell_sets_them(command: str, code: int, lines: tuple[int, int]) -> None:
    got, out, err = shell(command)
    assert (got, (len(out.splitlines()), len(err.splitlines()))) == (code, lines), err


@UNIX
def test_text_is_utf8_in_every_locale(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = stream("utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    assert code_of([*SHORT, "--model", str(model), "--json", "é"]) == 0
    count = json.loads(written(out))["prompt_tokens"]
    bare = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for command in (f"{RUN[:-1]} --json é", f"printf é | {RUN[:-1]} --json"):
        assert json.loads(shell(command, **bare)[1])["prompt_tokens"] == count
    for env in (bare, {"LC_ALL": "C"}):
        code, _, err = shell("printf 'caf\\351' | dgemma generate", **env)
        assert code == 1 and b"stdin is not text" in err and err.count(b"\n") == 1


# ---- terminals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["COLUMNS", "LINES"])
@pytest.mark.parametrize(
    ("value", "kept"),
    [("80", True), ("1", True), ("0", False), ("", False), ("abc", False), ("-5", False), ("²", False)]
    + [("9" * 99, False), ("80.5", False), ("٣", False), (" 8", False)],
)
def test_sizes_of_a_terminal(name: str, value: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    process.check_sizes()
    assert (os.environ.get(name) == value) == kept


@pytest.mark.parametrize("size", [(1, 1), (1, 25), (80, 1), (2, 2), (10_000, 3)], ids=str)
def test_terminals_of_odd_sizes(size: tuple[int, int], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(size[0]))
    monkeypatch.setenv("LINES", str(size[1]))
    out, err = stream("utf-8"), stream("utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert code_of([*SHORT, "--model", str(model), "a", "--live"]) == 0
    assert written(out).count(b"\n") == 1
    shown = written(err)
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l") >= 0


@pytest.mark.parametrize("width", ["1", "10", "100000"])
def test_help_on_terminals_of_odd_widths(width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    out = stream("utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    assert code_of(["generate", "--help"]) == 0
    assert written(out).startswith(b"Usage: ")


def test_an_exit_of_a_command_is_no_error() -> None:
    def leave() -> None:
        click.get_current_context().exit(3)

    with pytest.raises(SystemExit) as end:
        OneLine("leave", callback=leave).main([])
    assert end.value.code == 3
