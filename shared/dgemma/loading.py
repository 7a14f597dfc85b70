"""`load`: from a folder or hub id to a `Model`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dgemma.backends import choose, make_ops
from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.hub import resolve
from dgemma.files import MAX_SIZE, Progress, load_json
from dgemma.model import Model
from dgemma.network.ops import Notices
from dgemma.text.tokenizer import Tokenizer
from dgemma.tiny import MODEL_DIR


def load(
    model: str | Path | None = None,
    backend: str = "auto",
    dtype: str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    *,
    activations: str | None = None,
    notices: Notices | None = None,
) -> Model:
    """A model ready to run. `model` is a folder or a hub id; None means the embedded one.

    `backend` is "mlx", "cuda", "numpy" or "auto", `dtype` "float32" or "bfloat16" (default: bfloat16 on a
    GPU, float32 on a CPU). `device` is a torch device. `activations` "nvfp4" quantizes the inputs of NVFP4
    experts, too, on Blackwell. `progress(done, total)` counts weight bytes. `notices` receives messages about
    the machine; the default is the logger "dgemma". DgemmaError says in one line what is wrong with the files
    or the machine.
    """
    backend = choose(backend, dtype, device, activations)
    checkpoint = Checkpoint.open(resolve(MODEL_DIR if model is None else model))
    tokenizer = Tokenizer.open(checkpoint.folder)
    # The files come first, as a framework takes seconds to import.
    ops = make_ops(backend, dtype, device, activations, notices)
    weights = checkpoint.load(ops, progress)
    generation = checkpoint.generation
    if not generation.stop_ids:
        generation = replace(generation, stop_ids=_stop_ids(checkpoint, tokenizer))
        if not generation.stop_ids:
            ops.notices.say(
                f"{checkpoint.folder} names no token that ends a reply, so max_new_tokens alone does"
            )
    return Model(ops, checkpoint.config, generation, weights, tokenizer)


def _stop_ids(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The ids that end a reply by the tokenizer's files: for a checkpoint whose configuration names none."""
    if tokenizer is None:
        return ()
    path = checkpoint.folder / "tokenizer_config.json"
    eos = load_json(path).get("eos_token") if path.exists() else None
    eos = eos.get("content") if isinstance(eos, dict) else eos
    known = tokenizer.raw.get_vocab()
    names = [name for name in (eos, "<turn|>", "<|tool_response>") if isinstance(name, str)]
    return tuple(known[name] for name in names if known.get(name, MAX_SIZE) < checkpoint.config.vocab_size)
