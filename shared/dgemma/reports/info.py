"""A checkpoint's size, and the memory that running it takes, from its geometry.

Everything is arithmetic over config.json and the parameter table, so it works before a download. The numbers
leave out a framework's own memory (activations, compiled kernels), which is small beside them at full size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.folder import has_weights
from dgemma.checkpoint.hub import resolve
from dgemma.errors import DgemmaError, visible
from dgemma.files import load_json
from dgemma.formats.quantized import Form
from dgemma.network.config import FULL, SLIDING, Config, read_config
from dgemma.network.memory import (
    FORMATS,
    NOTHING_QUANTIZED,
    Format,
    kv_bytes,
    kv_slot_bytes,
    vocabulary_bytes,
    weight_bytes,
)
from dgemma.network.ops import Notices
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
    weights, plane = weight_bytes(config, form, stored), vocabulary_bytes(config, form)
    kv = {tokens: kv_bytes(config, form, tokens) for tokens in contexts}
    return {
        "backends": form.backends,
        "dtype": form.dtype,
        "weights": weights,
        "vocabulary_plane": plane,
        "kv_per_1k_tokens_full": 1024
        * sum(kv_slot_bytes(layer, form) for layer in config.layers if not layer.window),
        "kv_sliding_at_most": sum(
            kv_slot_bytes(layer, form) * (layer.past + config.canvas_length)
            for layer in config.layers
            if layer.past is not None
        ),
        "kv": kv,
        "total": {tokens: weights + plane + kv[tokens] for tokens in contexts},
    }


# ---- a checkpoint's report ----------------------------------------------------------------------


def describe(model: str | Path, notices: Notices | None = None) -> dict[str, Any]:
    """All that `dgemma info` knows of a folder or hub id, ready for JSON.

    config.json alone is enough, and nothing else of a hub id is downloaded. `stored_bytes` is null if no
    weights are at hand, or if they do not open, as "weights_fault" then says; memory is that of an
    unquantized checkpoint in both cases.
    """
    folder = resolve(model, files=["config.json"], notices=notices)
    path = folder / "config.json"
    config = read_config(load_json(path), str(path))
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
    return [*columns(rows), "Activations and the framework's own memory come on top."]


def _context(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
