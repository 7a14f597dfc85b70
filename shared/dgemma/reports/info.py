"""A checkpoint's size, and the memory that running it takes, from its geometry.

Everything is arithmetic over config.json and the parameter table, so it works before a download. What an
interpreter with its framework takes is measured, when a run is asked for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.folder import has_weights
from dgemma.checkpoint.hub import resolve
from dgemma.errors import ConfigError, DgemmaError, visible
from dgemma.files import load_json
from dgemma.formats.quantized import Form
from dgemma.network.config import FULL, SLIDING, Config, read_config
from dgemma.network.memory import (
    FORMATS,
    NOTHING_QUANTIZED,
    Format,
    kv_bytes,
    predict,
    vocabulary_plane,
    weight_bytes,
)
from dgemma.network.ops import Notices
from dgemma.network.passes import BACKENDS, slot_bytes
from dgemma.network.spec import GROUPS, Param, parameters, text_parameters
from dgemma.reports.tables import amount, columns, count

CONTEXTS = (1024, 8192, 32768, 131072)

# ---- the arithmetic -----------------------------------------------------------------------------


def parameter_counts(config: Config) -> dict[str, int]:
    """Stored parameters by class, without empty classes."""
    return _by_group(parameters(config))


def active_parameters(config: Config) -> dict[str, int]:
    """Parameters that one token of text uses: the text model with `top_k` of its experts."""
    counts = _by_group(text_parameters(config))
    return counts | {"experts": counts["experts"] * config.top_k // config.num_experts}


def _by_group(table: Sequence[Param]) -> dict[str, int]:
    counts = {group: sum(param.size for param in table if param.group == group) for group in GROUPS}
    return {group: count for group, count in counts.items() if count}


def memory(
    config: Config, form: Format, stored: Mapping[str, Form | None] = NOTHING_QUANTIZED
) -> dict[str, Any]:
    """Bytes that one row of a batch needs in this format, by part and by context length."""
    contexts = [tokens for tokens in CONTEXTS if tokens <= config.max_positions]
    if config.max_positions < CONTEXTS[-1] and config.max_positions not in contexts:
        contexts.append(config.max_positions)
    weights, plane = weight_bytes(config, form, stored), vocabulary_plane(config, form)
    kv = {tokens: kv_bytes(config, form.compute, tokens) for tokens in contexts}
    return {
        "backends": form.backends,
        "dtype": form.dtype,
        "weights": weights,
        "vocabulary_plane": plane,
        "kv_per_1k_tokens_full": 1024
        * sum(slot_bytes(layer, form.compute) for layer in config.layers if not layer.window),
        "kv_sliding_at_most": sum(
            slot_bytes(layer, form.compute) * (layer.past + config.canvas_length)
            for layer in config.layers
            if layer.past is not None
        ),
        "kv": kv,
        "total": {tokens: weights + plane + kv[tokens] for tokens in contexts},
    }


# ---- a run --------------------------------------------------------------------------------------

# A process that has read the small files and run one product, but has no weights: its peak in bytes.
_BARE = """
import sys
from pathlib import Path
import numpy as np
from dgemma.backends import make_ops
from dgemma.errors import DgemmaError
from dgemma.loading import open_small
ops = make_ops(sys.argv[1], device=sys.argv[2] or None)
try:
    small = open_small(Path(sys.argv[3]))
except DgemmaError:
    pass
x = ops.asarray(np.ones((512, 512), np.float32))
ops.to_numpy(ops.linear(x, x))
print(ops.peak_memory())
"""


@cache
def bare_process(backend: str, folder: Path) -> int | None:
    """Bytes that a process on a backend takes on a CPU without weights; None if it is not installed."""
    device = "cpu" if backend == "cuda" else ""
    command = [sys.executable, "-c", _BARE, backend, device, str(folder)]
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    return int(done.stdout) or None if done.returncode == 0 else None


def runs(
    config: Config, folder: Path, rows: int, context: int, stored: Mapping[str, Form | None]
) -> list[dict[str, Any]]:
    """The peak of a run of so many rows and tokens of context each, by backend, device and type, in bytes."""
    found = []
    for backend in BACKENDS:
        process = bare_process(backend.name, folder) if backend.whole_process else 0
        memory = predict(config, backend, rows, context, stored, process)
        where = {"backend": backend.name, "device": backend.place, "dtype": backend.dtype}
        found.append(where | asdict(memory) | {"total": memory.total})
    return found


# ---- a checkpoint's report ----------------------------------------------------------------------


def describe(
    model: str | Path, notices: Notices | None = None, run: tuple[int, int] | None = None
) -> dict[str, Any]:
    """All that `dgemma info` knows of a folder or hub id, ready for JSON.

    config.json alone is enough, and nothing else of a hub id is downloaded. `stored_bytes` is null if no
    weights are at hand, or if they do not open, as "weights_fault" then says; memory is that of an
    unquantized checkpoint in both cases. `run` are rows and tokens of context of a run to predict;
    ConfigError if the model has fewer positions.
    """
    folder = resolve(model, files=["config.json"], notices=notices)
    path = folder / "config.json"
    config = read_config(load_json(path), str(path))
    if run and run[1] > config.max_positions:
        raise ConfigError(f"--context {run[1]} exceeds the {config.max_positions} positions in {path}")
    counts, active = parameter_counts(config), active_parameters(config)
    checkpoint, fault = _weights(folder)
    forms = {name: source.form for name, source in checkpoint.sources.items()} if checkpoint else {}
    return {
        "model": str(model),
        "format": checkpoint.layout.name if checkpoint else None,
        "geometry": geometry(config),
        "parameters": {"total": sum(counts.values()), "active": sum(active.values()), "by_class": counts},
        "tensors": len(checkpoint.entries) if checkpoint else len(parameters(config)),
        "bfloat16_bytes": {
            "total": 2 * sum(counts.values()),
            "by_class": {k: 2 * n for k, n in counts.items()},
        },
        "stored_bytes": stored_bytes(checkpoint) if checkpoint else None,
        "weights_fault": fault,
        "memory": [memory(config, form, forms) for form in FORMATS],
        "run": {"rows": run[0], "context": run[1], "peaks": runs(config, folder, *run, forms)}
        if run
        else None,
    }


def _weights(folder: Path) -> tuple[Checkpoint | None, str | None]:
    """The checkpoint in a folder with weights, or why it does not open."""
    try:
        return (Checkpoint.open(folder), None) if has_weights(folder) else (None, None)
    except DgemmaError as error:
        return None, " ".join(str(error).split())


def geometry(config: Config) -> dict[str, Any]:
    """The sizes of the model as its paper lists them."""
    kinds = {layer.kind: layer for layer in config.layers}
    return {
        "layers": len(config.layers),
        "full_attention_layers": [index for index, layer in enumerate(config.layers) if layer.kind == FULL],
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "canvas_length": config.canvas_length,
        "max_positions": config.max_positions,
        "query_heads": config.heads,
        "kv_heads": {kind: layer.kv_heads for kind, layer in kinds.items()},
        "head_dim": {kind: layer.head_dim for kind, layer in kinds.items()},
        "window": config.window,
        "mlp_size": config.mlp_size,
        "experts": config.num_experts,
        "experts_per_token": config.top_k,
        "expert_size": config.expert_size,
        "vision_layers": config.vision.layers if config.vision else 0,
    }


def stored_bytes(checkpoint: Checkpoint) -> dict[str, Any]:
    """Bytes of a checkpoint's tensors by class."""
    by_class = dict.fromkeys(GROUPS, 0) | {"other": 0}
    for name, source in checkpoint.sources.items():
        by_class[source.param.group] += checkpoint.nbytes(name)
    by_class["other"] = sum(entry.nbytes for entry in checkpoint.entries.values()) - sum(by_class.values())
    return {"total": sum(by_class.values()), "by_class": {k: n for k, n in by_class.items() if n}}


# ---- as text ------------------------------------------------------------------------------------


def text(report: dict[str, Any]) -> str:
    """The report of `describe` as text."""
    parts = [_geometry_text(report), _parameters_text(report), _memory_text(report["memory"])]
    if report["run"]:
        parts.append(_run_text(report["run"]))
    if fault := report["weights_fault"]:
        parts.append(["The weights do not open, so the numbers are those of unquantized ones:", f"  {fault}"])
    return "\n\n".join("\n".join(part) for part in parts)


def _geometry_text(report: dict[str, Any]) -> list[str]:
    g = report["geometry"]
    full = ", ".join(str(index) for index in g["full_attention_layers"]) or "none"
    heads = [
        f"{g['kv_heads'][kind]} × {g['head_dim'][kind]} in {name} layers"
        for kind, name in ((SLIDING, "sliding"), (FULL, "full"))
        if kind in g["kv_heads"]
    ]
    window = f", the others slide over {g['window']:,} tokens" if g["window"] else ""
    facts = {
        "layers": f"{g['layers']}; full attention in {full}{window}",
        "hidden, vocabulary": f"{g['hidden_size']:,}, {g['vocab_size']:,}",
        "canvas": f"{g['canvas_length']} tokens; context up to {g['max_positions']:,}",
        "attention": f"{g['query_heads']} query heads; KV heads: {', '.join(heads)}",
        "feed-forward": f"dense {g['mlp_size']:,}, beside {g['experts']} experts of {g['expert_size']:,}, "
        f"{g['experts_per_token']} a token",
    }
    if g["vision_layers"]:
        facts["vision"] = f"{g['vision_layers']} layers, not run by this program yet"
    if report["format"]:
        facts["format"] = report["format"]
    width = max(map(len, facts))
    return [visible(report["model"]), *(f"  {name.ljust(width)}  {fact}" for name, fact in facts.items())]


def _parameters_text(report: dict[str, Any]) -> list[str]:
    p, bf16, stored = report["parameters"], report["bfloat16_bytes"], report["stored_bytes"]
    size = stored or bf16
    rows = [["parameters", "", "on disk" if stored else "in bf16"]]
    classes = [*p["by_class"], *(["other"] if "other" in size["by_class"] else [])]
    rows += [
        [f"  {name}", count(p["by_class"].get(name, 0)), amount(size["by_class"].get(name, 0))]
        for name in classes
    ]
    rows.append(["  total", count(p["total"]), amount(size["total"])])
    rows.append(["  active per token", count(p["active"]), ""])
    return columns(rows)


def _memory_text(memories: list[dict[str, Any]]) -> list[str]:
    rows = [["memory of one row", *(f"{m['dtype']} ({m['backends']})" for m in memories)]]
    parts = {
        "weights, without vision": "weights",
        "vocabulary plane": "vocabulary_plane",
        "KV, full layers, per 1k tokens": "kv_per_1k_tokens_full",
        "KV, sliding layers, at most": "kv_sliding_at_most",
    }
    rows += [[f"  {name}", *(amount(m[key]) for m in memories)] for name, key in parts.items()]
    for tokens in memories[0]["kv"]:
        rows.append([f"  KV at {_context(tokens)}", *(amount(m["kv"][tokens]) for m in memories)])
    for tokens in memories[0]["total"]:
        rows.append([f"  all at {_context(tokens)}", *(amount(m["total"][tokens]) for m in memories)])
    return [*columns(rows), "Temporaries and the framework's own memory come on top: see --context."]


def _run_text(run: dict[str, Any]) -> list[str]:
    parts = ("weights", "contexts", "canvases", "temporaries", "process", "total")
    rows = [[f"peak of {run['rows']} × {run['context']:,} tokens", *parts, "widest"]]
    for peak in run["peaks"]:
        sizes = ("?" if peak[part] is None else amount(peak[part]) for part in parts)
        name = f"{peak['backend']}, {peak['device']}, {peak['dtype']}"
        rows.append([f"  {name}", *sizes, peak["widest"]])
    notes = [
        "A GPU's driver takes memory of its own; what the process takes counts where it shares the memory."
    ]
    if any(peak["process"] is None for peak in run["peaks"]):
        notes.append("? is the process of a framework that is not installed here; the total is without it.")
    return [*columns(rows), *notes]


def _context(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
