"""Signals end a command in one line and with the conventional code, and leave the terminal as it was.

No test waits for a moment: a process sends the signal to itself at a point of its program, or is sent it once
its terminal shows something.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.terminals import ENDS, ENVIRONMENT, HIDE, SHOW, Terminal, listen

# Sends itself a signal when a module is first looked for.
AT_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *rest):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.{name})
sys.meta_path.insert(0, Finder())
from dgemma.__main__ import main
main()
"""

# A command in the place of `info`.
COMMAND = """
import os, signal, sys, time
def callback(**options):
{body}
from dgemma.commands.info import info
info.callback = callback
from dgemma.__main__ import main
main()
"""


def program(
    code: str, args: Sequence[str], ignored: Sequence[signal.Signals] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
        preexec_fn=lambda: listen(*ignored),
    )


def command(body: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """A command with this body, and the seconds that it took."""
    began = time.monotonic()
    done = program(COMMAND.format(body=body), ["info", "x"])
    return done, time.monotonic() - began


# ---- from the first moments on ------------------------------------------------------------------


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("module", ["click", "numpy"])
def test_a_signal_before_the_command_runs(name: str, module: str) -> None:
    code, word = ENDS[name]
    done = program(AT_IMPORT.format(module=module, name=name), ["info", "x"])
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"dgemma: {word}\n")


@pytest.mark.parametrize(("backend", "module"), [("cuda", "torch.nn"), ("mlx", "mlx.core")])
def test_a_signal_while_a_framework_is_imported(backend: str, module: str) -> None:
    pytest.importorskip(module.partition(".")[0])
    args = ["generate", "--backend", backend, "a"]
    done = program(AT_IMPORT.format(module=module, name="SIGINT"), args)
    assert done.returncode == 130
    assert done.stderr.splitlines()[1:] == ["dgemma: interrupted"]  # after who answers


@pytest.mark.parametrize("module", ["dgemma_mlx.generate", "dgemma_cuda.generate", "dgemma_convert"])
def test_the_packages_commands_look_after_signals_first(module: str) -> None:
    code = AT_IMPORT.format(module="numpy", name="SIGINT")
    start = f"import runpy\nrunpy.run_module({module!r}, run_name='__main__')"
    done = program(code.replace("from dgemma.__main__ import main\nmain()", start), ["--help"])
    assert (done.returncode, done.stderr) == (130, "dgemma: interrupted\n")


def test_an_ignored_hangup_stays_ignored() -> None:
    """As under nohup."""
    done = program(AT_IMPORT.format(module="numpy", name="SIGHUP"), ["info", "./no"], [signal.SIGHUP])
    assert done.returncode == 1
    assert done.stderr == "dgemma: error: './no': no such folder\n"


# ---- a command that runs ------------------------------------------------------------------------

KILL = "os.kill(os.getpid(), signal.SIGTERM)"


def test_a_signal_that_a_library_swallows() -> None:
    body = f"    try: {KILL}\n    except BaseException: pass"
    done, _ = command(body)
    assert (done.returncode, done.stderr) == (143, "dgemma: terminated\n")


def test_a_signal_that_a_library_turns_into_another_error() -> None:
    body = f"    try: {KILL}\n    except BaseException: raise ValueError('half a module')"
    done, _ = command(body)
    assert (done.returncode, done.stderr) == (143, "dgemma: terminated\n")


def test_a_thread_that_is_busy_is_not_waited_for() -> None:
    body = f"""
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor() as pool:  # as a download: its end waits for the threads
        pool.submit(time.sleep, 50)
        {KILL}
"""
    done, seconds = command(body)
    assert (done.returncode, done.stderr) == (143, "dgemma: terminated\n")
    assert seconds < 30


def test_a_second_signal_ends_what_still_unwinds() -> None:
    body = f"""
    import dgemma.commands.process as process
    process.GRACE = 50
    try: {KILL}
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(50)
"""
    done, seconds = command(body)
    assert (done.returncode, done.stderr) == (143, "dgemma: terminated\n")
    assert seconds < 30


def test_the_cursor_comes_back_where_nothing_unwinds() -> None:
    body = f"""
    os.environ["FORCE_COLOR"] = "1"  # the pipe counts as a terminal
    from dgemma.commands.progress import stderr_console
    with stderr_console().status("working"):
        try: {KILL}
        finally: time.sleep(50)
"""
    done, seconds = command(body)
    assert done.returncode == 143 and seconds < 30
    assert done.stderr.rfind(SHOW.decode()) > done.stderr.rfind(HIDE.decode()) >= 0


def test_a_signal_after_the_command() -> None:
    body = f"    import atexit\n    atexit.register(lambda: {KILL})"
    done, _ = command(body)
    assert (done.returncode, done.stderr) == (143, "dgemma: terminated\n")


def test_a_conversion_that_is_terminated_goes_on_later(model: Path, tmp_path: Path) -> None:
    code = """
import os, signal
from dgemma_convert import stream
write = stream._write_whole
def terminated(*args):
    write(*args)
    os.kill(os.getpid(), signal.SIGTERM)
stream._write_whole = terminated
from dgemma.__main__ import main
main()
"""
    dest = tmp_path / "out"
    args = ["convert", str(model), str(dest), "--to", "bf16"]
    done = program(code, args)
    assert (done.returncode, done.stderr) == (143, "dgemma: terminated\n")
    assert not dest.exists()
    done = program("from dgemma.__main__ import main\nmain()", args)
    assert done.returncode == 0, done.stderr
    assert json.loads((dest / "config.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- on a terminal ------------------------------------------------------------------------------


@contextmanager
def terminal(model: Path, *args: str) -> Iterator[Terminal]:
    """A generation that never ends by itself."""
    endless = ["--steps", "1000000", "--stability", "1000000", "--entropy-bound", "0", "--seed", "1"]
    shown = Terminal(["generate", "--model", str(model), "--backend", "numpy", *endless, "a", *args])
    try:
        yield shown
    finally:
        shown.close()


@pytest.mark.parametrize(
    ("name", "args", "part"),
    [
        ("SIGINT", [], b"settled"),
        ("SIGTERM", [], b"settled"),
        ("SIGHUP", [], b"settled"),
        ("SIGTERM", ["--no-live"], b"writing canvas 1"),  # a bar says that it is no hang
        ("SIGINT", ["--json"], b"writing canvas 1"),
    ],
)
def test_the_terminal_is_as_before(name: str, args: list[str], part: bytes, model: Path) -> None:
    with terminal(model, *args) as shown:
        shown.wait_for(part)
        assert not shown.cursor
        shown.process.send_signal(getattr(signal, name))
        code, word = ENDS[name]
        assert shown.code() == code
        assert shown.cursor
        assert shown.output.endswith(f"\r\ndgemma: {word}\r\n".encode())
        assert b"Traceback" not in shown.output


def test_ctrl_z_shows_the_cursor_until_the_command_goes_on(model: Path) -> None:
    with terminal(model) as shown:
        shown.wait_for(b"settled")
        shown.process.send_signal(signal.SIGTSTP)
        _, status = os.waitpid(shown.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        for _ in range(5):
            shown.read()
        assert shown.cursor
        so_far = len(shown.output)
        shown.process.send_signal(signal.SIGCONT)
        shown.wait_for(HIDE, so_far)
        shown.wait_for(b"settled", so_far)
        shown.process.send_signal(signal.SIGINT)
        assert shown.code() == 130
        assert shown.cursor
