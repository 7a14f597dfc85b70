"""Commands on a pseudo-terminal."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import pytest

pty = pytest.importorskip("pty", reason="there are no pseudo-terminals here")
termios = pytest.importorskip("termios", reason="there are no pseudo-terminals here")

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "xterm"}
ENDS = {"SIGINT": (130, "interrupted"), "SIGTERM": (143, "terminated"), "SIGHUP": (129, "hung up")}
SHOW, HIDE = b"\x1b[?25h", b"\x1b[?25l"


def listen(*ignored: signal.Signals) -> None:
    """Whoever runs the tests in the background may have had signals ignored, which is inherited."""
    for name in ENDS:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


class Terminal:
    """A command on a pseudo-terminal, and all that it wrote there."""

    def __init__(self, args: Sequence[str], **environment: str):
        self._side, other = pty.openpty()
        self.output = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dgemma", *args],
            stdin=other,
            stdout=other,
            stderr=other,
            env=ENVIRONMENT | environment,
            preexec_fn=listen,
            process_group=0,
        )
        os.close(other)

    def read(self, seconds: float = 0.05) -> None:
        if select.select([self._side], [], [], seconds)[0]:
            try:
                self.output += os.read(self._side, 1 << 16)
            except OSError:  # Linux, when the last writer has gone
                time.sleep(seconds)

    def type(self, keys: str) -> None:
        os.write(self._side, keys.encode())

    def modes(self) -> list[Any]:
        """The terminal's modes, as termios gives them."""
        return termios.tcgetattr(self._side)

    def wait_for(self, part: bytes, start: int = 0) -> None:
        end = time.monotonic() + 60
        while part not in self.output[start:]:
            assert time.monotonic() < end and self.process.poll() is None, self.output[-500:]
            self.read()

    def code(self) -> int:
        end = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < end:
            self.read()
        code = self.process.wait(timeout=1)
        self.read()
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._side)

    @property
    def cursor(self) -> bool:
        return self.output.rfind(SHOW) >= self.output.rfind(HIDE)
