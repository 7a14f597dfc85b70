"""An engine's process: requests come as JSON lines on stdin, answers go to stdout, all else to stderr.

python -m benchmarks.peers.serve ENGINE FOLDER DTYPE DEVICE
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.engines import ENGINES, Engine


def serve(name: str, folder: Path, dtype: str, device: str) -> None:
    """Answer requests until stdin ends; an empty answer comes first, once the model is loaded."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what frameworks print must not come between
    engine = ENGINES[name](folder, dtype, device)
    if mx := sys.modules.get("mlx.core"):
        engine.weights = mx.get_active_memory()
    answers.write("{}\n")
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(_answer(engine, **request)) + "\n")


def _answer(
    engine: Engine,
    tokens: list[int],
    steps: int = 0,
    canvas: list[list[int]] | None = None,
    vocab: int = 0,
    out: str = "",
) -> dict[str, Any]:
    """Times of a call; or, with a canvas [1, L], nothing, and logits [2, L, V] in the file `out`."""
    if canvas is not None:
        # Given, as a random model amplifies rounding of its own first logits some hundred times a pass.
        before = 4 * np.random.default_rng(1).standard_normal((1, len(canvas[0]), vocab), np.float32)
        np.save(out, engine.logits(tokens, np.asarray(canvas), before))
        return {}
    times = engine.clock(tokens, steps)
    return {"times": times, "peak": engine.peak_memory(), "above": engine.above}


if __name__ == "__main__":
    name, folder, dtype, device = sys.argv[1:]
    serve(name, Path(folder), dtype, device)
