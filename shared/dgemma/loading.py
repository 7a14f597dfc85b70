"""`load`: from a folder or hub id to a `Model`, the cheap checks first.

The order: options, small files, memory, headers of the weights, the framework, the weights. The weights of a
hub id are fetched after the framework has said that its device is there and large enough.
"""

from __future__ import annotations

import os
import reprlib
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dgemma import machine
from dgemma.backends import choose, make_ops
from dgemma.checkpoint.checkpoint import Checkpoint, read_configs
from dgemma.checkpoint.faults import expected_parameters, find_announcement
from dgemma.checkpoint.folder import INDEX
from dgemma.checkpoint.hub import SMALL_FILES, resolve
from dgemma.checkpoint.layouts import detect
from dgemma.checkpoint.presets import PRESETS, preset_forms
from dgemma.errors import BackendError, CheckpointError, ConfigError
from dgemma.files import MAX_SIZE, Progress, exists, load_json
from dgemma.formats.quantized import Form
from dgemma.model import Model
from dgemma.network.config import Config
from dgemma.network.memory import predict
from dgemma.network.ops import Notices
from dgemma.network.passes import BACKENDS, Backend, backend_of, find
from dgemma.network.spec import text_parameters
from dgemma.settings import GenerationConfig
from dgemma.text.tokenizer import Tokenizer
from dgemma.tiny import MODEL_DIR

Forms = Mapping[str, Form | None]  # of parameters by name

# Tokens of context with which a model must at least run.
LEAST_CONTEXT = 1024
# The target of a conversion that each backend runs best.
TARGETS = {"mlx": "mlx", "cuda": "nvfp4", "numpy": "mlx"}


def load(
    model: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    dtype: str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    *,
    activations: str | None = None,
    notices: Notices | None = None,
    check: Callable[[Small], None] | None = None,
    force: bool = False,
) -> Model:
    """A model ready to run. `model` is a folder or a hub id; None means the embedded one.

    `backend` is "mlx", "cuda", "numpy" or "auto", `dtype` "float32" or "bfloat16" (default: bfloat16 on a
    GPU, float32 on a CPU). `device` is the name of a torch device. `activations` "nvfp4" quantizes the inputs
    of NVFP4 experts, too, on Blackwell. `progress(done, total)` counts weight bytes. `notices` receives
    messages about the machine and the files; the default is the logger "dgemma". `check` is called with the
    small files before anything large is fetched or read, and may raise. DgemmaError says in one line
    what is wrong with an argument, the files or the machine. A model that exceeds all memory, with a row of a
    small context, is refused before its weights are fetched, unless `force` is set.
    """
    if progress is not None and not callable(progress):
        raise ConfigError(f"progress must be a function of done and total, not {type(progress).__name__}")
    if check is not None and not callable(check):
        raise ConfigError(f"check must be a function of the small files, not {type(check).__name__}")
    if notices is not None and not callable(getattr(notices, "say", None)):
        raise ConfigError(
            f"notices must have a method say, as Notices has; {type(notices).__name__} has none"
        )
    backend = choose(backend, dtype, device, activations)
    given = _model(model)
    folder = resolve(given, files=SMALL_FILES, notices=notices)
    small = open_small(folder)
    if check:
        check(small)
    forms = announced_forms(folder, small.config)
    held = _on_host(backend, dtype, device)

    def check_memory(backend: Backend, forms: Forms | None, most: int | None) -> int:
        needed = 0 if forms is None else least_memory(small.config, backend, forms)
        if most is not None and needed > most and not force:
            raise BackendError(too_large(given, small.config, backend, needed, most))
        return needed

    if held:
        check_memory(held, forms, machine.total_memory())
    checkpoint = Checkpoint.open(folder) if os.path.isdir(os.path.expanduser(given)) else None
    if checkpoint and held:
        check_memory(held, _forms(checkpoint), machine.total_memory())
    # The files come first, as a framework takes seconds to import; a download of the weights takes longer.
    ops = make_ops(backend, dtype, device, activations, notices)
    running = backend_of(ops)
    check_memory(running, forms, ops.total_memory())
    if checkpoint is None:
        whole = resolve(given, notices=notices)
        small = small if whole == folder else open_small(whole)  # a branch of the hub may have moved on
        checkpoint = Checkpoint.open(whole)
    for note in small.notes:
        ops.notices.say(note)
    free = ops.free_memory()
    needed = check_memory(running, _forms(checkpoint), ops.total_memory())
    if free is not None and needed > free:
        ops.notices.say(f"the model takes {_gb(needed)}, and {_gb(free)} are free: memory may run out")
    weights = checkpoint.load(ops, progress)
    return Model(ops, checkpoint.config, small.generation, weights, small.tokenizer)


def _model(model: object) -> str | Path:
    """The folder or hub id; CheckpointError for anything else. A path is never a hub id."""
    try:
        name = model if isinstance(model, str) else os.fspath(MODEL_DIR if model is None else model)  # type: ignore[call-overload]
    except TypeError:
        name = None
    if not isinstance(name, str):
        raise CheckpointError(f"the model must be a folder or a hub id, not {type(model).__name__}")
    return name if isinstance(model, str) else Path(name)


# ---- small files --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Small:
    """What a folder says beside its weights. `notes` are sentences about what is odd, but works."""

    config: Config
    generation: GenerationConfig
    tokenizer: Tokenizer | None
    notes: tuple[str, ...] = ()


def open_small(folder: Path) -> Small:
    """The small files of a folder; DgemmaError names the first that cannot be used.

    `dgemma verify` opens them by this function, too, so that it finds what a load refuses.
    """
    config, generation = read_configs(folder)
    tokenizer = Tokenizer.open(folder)
    notes = []
    if not generation.stop_ids:
        generation = replace(generation, stop_ids=_stop_ids(folder, tokenizer, config.vocab_size))
        if not generation.stop_ids:
            notes.append(f"{folder} names no token that ends a reply, so max_new_tokens alone does")
    if tokenizer and (beyond := _beyond(tokenizer, config.vocab_size)):
        notes.append(f"{folder / 'tokenizer.json'}: {beyond}")
    # A page of an error saved in a template's place is a template, too: of a text that never changes.
    if tokenizer and tokenizer.template and "messages" not in tokenizer.template.variables:
        notes.append(
            f"{folder}: its chat template reads no messages, so what is asked is no part of the prompt"
        )
    return Small(config, generation, tokenizer, tuple(notes))


def _stop_ids(folder: Path, tokenizer: Tokenizer | None, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a reply by the tokenizer's files: for a checkpoint whose configuration names none."""
    if tokenizer is None:
        return ()
    path = folder / "tokenizer_config.json"
    eos = load_json(path).get("eos_token") if exists(path) else None
    eos = eos.get("content") if isinstance(eos, dict) else eos
    known = tokenizer.raw.get_vocab()
    names = [name for name in (eos, "<turn|>", "<|tool_response>") if isinstance(name, str)]
    return tuple(known[name] for name in names if known.get(name, MAX_SIZE) < vocab_size)


def _beyond(tokenizer: Tokenizer, vocab_size: int) -> str | None:
    """A sentence on the tokens that the model has no row for; None without any."""
    ids = {id: token for token, id in tokenizer.raw.get_vocab(with_added_tokens=True).items()}
    found = sorted(id for id in ids if id >= vocab_size)
    if not found:
        return None
    return (
        f"{len(found):,} of its tokens have ids beyond the model's vocabulary of {vocab_size:,}, the first "
        f"is {found[0]} ({reprlib.repr(ids[found[0]])}); a prompt with one of them is refused"
    )


# ---- memory -------------------------------------------------------------------------------------


def announced_forms(folder: Path, config: Config) -> Forms | None:
    """How parameters are stored, from the files beside the weights; None if only the weights tell."""
    announcement, announcer = find_announcement(folder, config)
    if announcement is None:
        return {}
    index = folder / INDEX
    names = load_json(index).get("weight_map") if exists(index) else None
    if not isinstance(names, Mapping):
        return None
    layout = detect(announcement, announcer, names)
    return {param.name: layout.form(param) for param in expected_parameters(config, names)}


def _forms(checkpoint: Checkpoint) -> Forms:
    return {name: source.form for name, source in checkpoint.sources.items()}


def _on_host(backend: str, dtype: str | None, device: str | None) -> Backend | None:
    """The backend if it is sure to take the host's memory; None where only its framework knows."""
    if backend == "numpy":
        return find("numpy", "CPU", "float64")
    if backend == "mlx" and sys.platform == "darwin":
        return find("mlx", "GPU", dtype or "bfloat16")
    if backend == "cuda" and device is not None and device.partition(":")[0] == "cpu":
        return find("cuda", "CPU", dtype or "float32")
    return None


def least_memory(config: Config, backend: Backend, forms: Forms) -> int:
    """Bytes that a model needs to run at all: weights, one row of a small context, a pass."""
    return predict(config, backend, 1, min(LEAST_CONTEXT, config.max_positions), forms).total


def too_large(model: str | Path, config: Config, backend: Backend, needed: int, most: int) -> str:
    """Why a model is refused that needs more than `most` bytes, and what would fit: a type, or a preset."""
    fault = (
        f"{model}: it takes {_gb(needed)} in {backend.dtype} with a context of "
        f"{min(LEAST_CONTEXT, config.max_positions):,} tokens, and all memory is {_gb(most)}"
    )
    return f"{fault}; {_remedy(model, config, backend, most)}; --force tries it all the same"


def _remedy(model: str | Path, config: Config, backend: Backend, most: int) -> str:
    """What fits `most` bytes: the largest preset of a conversion, as a command."""
    target, params = TARGETS[backend.name], text_parameters(config)
    # Half the bytes beside records, too, where the backend has such a type on this device.
    halved = next(
        (b for b in BACKENDS if (b.name, b.place) == (backend.name, backend.place) and b.compute == 2),
        backend,
    )
    for kind in dict.fromkeys([backend, halved]):
        option = "" if kind is backend else f" and --dtype {kind.dtype}"
        sizes = {
            name: least_memory(config, kind, preset_forms(words, params))
            for name, words in PRESETS[target].items()
        }
        fitting = {name: size for name, size in sizes.items() if size <= most}
        if fitting:
            best = max(fitting, key=lambda name: fitting[name])
            command = f"dgemma convert {shlex.quote(str(model))} DEST --to {target} --preset {best}"
            return f"{command}{option} makes one of {_gb(fitting[best])}"
    return f"no preset of dgemma convert fits, as the smallest takes {_gb(min(sizes.values()))}"


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
