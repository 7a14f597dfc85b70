"""What is told of a setting: numbers, ratios to the peers, and what they hold for."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.peers.engines import MLX, PAIRS
from benchmarks.peers.worker import Setting, Worker


def report(workers: Sequence[Worker]) -> list[dict[str, Any]]:
    """Each engine's numbers; ours also carry the ratios to their peer's, if that ran."""
    by_name = {worker.name: worker for worker in workers}
    reports = []
    for worker in workers:
        one, peer = worker.report(), by_name.get(PAIRS.get(worker.name, ""))
        if peer and not worker.failure and not peer.failure:
            one |= compared(worker, peer)
        reports.append(one)
    return reports


def compared(worker: Worker, peer: Worker) -> dict[str, Any]:
    # Ratios go by round: what is compared was measured side by side.
    rounds = zip(worker.steps, peer.steps, strict=True)
    ratios = [statistics.median(a) / statistics.median(b) for a, b in rounds]
    above = [a / b for a, b in zip(worker.above, peer.above, strict=True)]
    above += [max(worker.above) / max(peer.above)] if worker.above and peer.above else []
    return {
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "above_ratios": above,
    }


def table(title: str, reports: Sequence[dict[str, Any]]) -> Table:
    grid = Table(title=title, title_justify="left")
    grid.add_column("engine", no_wrap=True)
    grid.add_column("version", no_wrap=True)
    headings = ["prefill", "step ms", "min–max", "÷ peer", "min–max", "peak MB"]
    memory = any(one.get("above_bytes") for one in reports)
    headings += ["+prefill", "÷", "+steps", "÷", "both ÷"] if memory else []
    for heading in headings:
        grid.add_column(heading, justify="right", no_wrap=True)
    for one in reports:
        grid.add_row(one["engine"], one["version"], *_cells(one))
    return grid


def _cells(one: dict[str, Any]) -> list[str]:
    if "failure" in one:
        return ["fails"]
    cells = [f"{one['prefill_ms']:.0f}", f"{one['step_ms']:.1f}"]
    cells += [f"{one['step_ms_min']:.1f}–{one['step_ms_max']:.1f}"]
    paired = "ratio" in one
    cells += [f"{one['ratio']:.2f}", f"{one['ratio_min']:.2f}–{one['ratio_max']:.2f}"] if paired else ["", ""]
    cells += [f"{one['peak_bytes'] / 1e6:.0f}"]
    if one["above_bytes"]:
        first, then, both = [f"{ratio:.2f}" for ratio in one.get("above_ratios", ())] or [""] * 3
        before, after = (f"{size / 1e6:.0f}" for size in one["above_bytes"])
        cells += [before, first, after, then, both]
    return cells


def facts(setting: Setting, names: Sequence[str], apart: float | None) -> dict[str, str]:
    """What the numbers of one setting hold for."""
    config, text = setting.config, setting.config["text_config"]
    blas = (
        setting.blas.resolve()
        if setting.blas
        else "the wheel's own, which is slow: " + ("apt-get install libopenblas0-pthread")
    )
    found = {
        "model": f"hidden {text['hidden_size']}, {text['num_hidden_layers']} layers, {text['num_experts']} "
        f"experts top-{text['top_k_experts']}, vocabulary {text['vocab_size']}, "
        f"{setting.form}, {setting.dtype}",
        "run": f"canvas {config['canvas_length']}, context {setting.context}, {setting.rounds} rounds of "
        f"{setting.steps} steps, the first of each left out",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, PyTorch on "
        f"{setting.device}, Python {platform.python_version()}",
        "same model": "not compared"
        if apart is None
        else f"logits, without and with self-conditioning, differ by at most {apart:.1e} (relative, float32)",
    }
    return found | ({"MLX's BLAS": str(blas)} if sys.platform == "linux" and set(names) & set(MLX) else {})


def show(results: Sequence[dict[str, Any]], console: Console) -> None:
    for result in results:
        console.print(table(f"Prefill and one denoising step: {result['setting']}", result["engines"]))
        for one in result["engines"]:
            if "failure" in one:
                console.print(
                    f"{one['engine']} does not run: {one['failure']}", highlight=False, soft_wrap=True
                )
        for key, value in result["facts"].items():
            console.print(f"{key}: {value}", highlight=False, soft_wrap=True)
