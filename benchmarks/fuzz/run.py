"""Workers, and what came of their cases."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

SECONDS = 60.0  # that a case may take; the bounds of a template are 5 of them


def run(cases: int, seed: int = 0, first: int = 0) -> Iterator[dict[str, Any]]:
    """The results of `cases` cases from number `first` on. A worker that ends early is a fault."""
    next_case, end = first, first + cases
    while next_case < end:
        for result in _worker(seed, next_case, end):
            next_case = result["case"] + 1
            yield result


def _worker(seed: int, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """The results of one worker, to its end or its death."""
    command = [sys.executable, "-m", "benchmarks.fuzz.worker", str(seed), str(start), str(stop)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env) as worker:
        assert worker.stdout
        number, left = start, b""
        end = time.monotonic() + SECONDS
        while True:
            ready = select.select([worker.stdout], [], [], max(0.0, end - time.monotonic()))[0]
            data = os.read(worker.stdout.fileno(), 1 << 16) if ready else b""
            if not data:
                break
            *lines, left = (left + data).split(b"\n")
            for line in lines:
                result = json.loads(line)
                end = time.monotonic() + SECONDS
                if "begins" in result:
                    number = result["begins"]
                else:
                    number = result["case"] + 1
                    yield result
        hung = worker.poll() is None and not ready
        worker.kill()
        code = worker.wait()
        if number < stop:
            text = f"no end after {SECONDS:g} s" if hung else f"the process ended with {code}"
            yield {"case": number, "changed": [], "outcome": "fault", "text": text}
