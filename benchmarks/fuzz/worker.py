"""Runs cases one after the other and writes a line of JSON about each: the process that may die."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from random import Random
from typing import Any

import dgemma
from dgemma.reports.verify import inspect
from dgemma.tiny import MODEL_DIR

from .mutations import mutate

ASK = [{"role": "user", "content": 'Reverse "canvas" <turn|>.'}]
MEMORY = 6 << 30  # bytes that a worker may map


def case(seed: int, number: int) -> dict[str, Any]:
    """Make and try one case; its outcome is "answer", "refusal" or "fault"."""
    r = Random(f"{seed}/{number}")
    with tempfile.TemporaryDirectory(prefix="dgemma-fuzz-") as base:
        folder = Path(base) / "model"
        shutil.copytree(MODEL_DIR, folder)
        changed = mutate(folder, r)
        outcome, text = _try(folder)
    return {"case": number, "changed": changed, "outcome": outcome, "text": text[:300]}


def _try(folder: Path) -> tuple[str, str]:
    sound = False
    try:
        sound = inspect(folder)["ok"]
        model = dgemma.load(folder, backend="numpy")
        sound = False  # what verify knows nothing of, a prompt that is too long, may still be refused
        for _ in model.generate(ASK, seed=0, steps=1, max_new_tokens=2):
            pass
    except dgemma.DgemmaError as error:
        return ("fault", f"refused by load, sound to verify: {error}") if sound else _refusal(error)
    except Exception as error:  # the fault that is looked for
        return "fault", f"{type(error).__name__}: {error}"
    return "answer", ""


def _refusal(error: Exception) -> tuple[str, str]:
    text = str(error)
    return ("refusal" if text and "\n" not in text and len(text) < 2000 else "fault"), text


def main() -> None:
    seed, start, stop = map(int, sys.argv[1:])
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # What NumPy or a library would print on a user's screen is a fault, too. Weights beyond reason overflow,
    # and what they answer is as good as they are.
    warnings.simplefilter("error")
    beyond = ".*(overflow|invalid value|divide by zero)"
    warnings.filterwarnings("ignore", category=RuntimeWarning, message=beyond)
    out = os.fdopen(os.dup(1), "w")
    for number in range(start, stop):
        out.write(json.dumps({"begins": number}) + "\n")
        out.flush()
        out.write(json.dumps(case(seed, number)) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
