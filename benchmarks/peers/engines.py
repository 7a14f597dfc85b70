"""The engines: one implementation each, with the checkpoint loaded."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from dgemma.network.ops.runtime import process_peak

# Each of ours, and the peer that it is measured against.
PAIRS = {"dgemma-cuda": "transformers", "dgemma-mlx": "mlx-vlm"}
# The distribution that must be installed for an engine to run.
NEEDS = {"dgemma-cuda": "torch", "dgemma-mlx": "mlx", "transformers": "transformers", "mlx-vlm": "mlx-vlm"}
MLX = ("dgemma-mlx", "mlx-vlm")
NEVER = 1e-9  # nats: a mean entropy that no random model reaches


class Engine:
    """One implementation with the checkpoint loaded. Frameworks are imported in here only."""

    def __init__(self, folder: Path, dtype: str, device: str):
        raise NotImplementedError

    def logits(self, tokens: list[int], canvas: np.ndarray, before: np.ndarray) -> np.ndarray:
        """Softcapped logits [2, L, V]: of a first step, and conditioned on logits `before` [1, L, V]."""
        raise NotImplementedError

    def clock(self, tokens: list[int], steps: int) -> list[float]:
        """Times at which a generate call began, had its prefill, and showed the draft of each step."""
        raise NotImplementedError

    weights = 0  # bytes that MLX has in use when all is loaded
    # Most bytes in use above them, of the last call: until its prefill was done, and from then on.
    above: tuple[int, ...] = ()

    def peak_memory(self) -> int:
        """Bytes."""
        return process_peak()


class Watch:
    """Times of a call from its start on; and what MLX, if it runs, had in use above the weights."""

    def __init__(self, weights: int):
        self.mx, self.weights = sys.modules.get("mlx.core"), weights
        self.times: list[float] = []
        self.above: list[int] = []
        self.tick()

    def tick(self) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) <= 2:
            self.lap()

    def lap(self) -> None:
        if self.mx:
            self.above.append(self.mx.get_peak_memory() - self.weights)
            self.mx.reset_peak_memory()

    def stop(self) -> tuple[list[float], tuple[int, ...]]:
        """All times, and the bytes until the prefill was done and from then on."""
        self.lap()
        return self.times, tuple(self.above[1:])


class Dgemma(Engine):
    """Ours, through `dgemma.load` and `Model.generate`."""

    backend = ""

    def __init__(self, folder: Path, dtype: str, device: str):
        import dgemma

        place = device if self.backend == "cuda" else None
        self.model = dgemma.load(folder, backend=self.backend, dtype=dtype, device=place)

    def logits(self, tokens: list[int], canvas: np.ndarray, before: np.ndarray) -> np.ndarray:
        context = self.model.encode([tokens])
        p = np.exp(before - before.max(-1, keepdims=True))
        soft = self.model.soft_embedding(p / p.sum(-1, keepdims=True))
        signals = (None, soft)
        return np.concatenate([self.model.logits(context, canvas, signal) for signal in signals])

    def clock(self, tokens: list[int], steps: int) -> list[float]:
        from dgemma.engine.events import Draft, Prefill

        length = self.model.config.canvas_length
        watch = Watch(self.weights)
        for event in self.model.generate(tokens, steps=steps, max_new_tokens=length, confidence=NEVER):
            if isinstance(event, Draft) or (isinstance(event, Prefill) and event.done == event.total):
                watch.tick()
        times, self.above = watch.stop()
        return times

    def peak_memory(self) -> int:
        return self.model.ops.peak_memory()


class DgemmaCuda(Dgemma):
    backend = "cuda"


class DgemmaMlx(Dgemma):
    backend = "mlx"

    def peak_memory(self) -> int:
        return _mlx_peak(self)


class Transformers(Engine):
    """`generate` with a streamer that is shown every draft, as `benchmarks.bench_transformers` drives it."""

    def __init__(self, folder: Path, dtype: str, device: str):
        import torch

        from benchmarks import bench_transformers as peer

        self.torch, self.peer = torch, peer.Transformers.load(folder, dtype, device)

    def logits(self, tokens: list[int], canvas: np.ndarray, before: np.ndarray) -> np.ndarray:
        model = self.peer.model
        inputs = {"input_ids": self.tensor([tokens]), "decoder_input_ids": self.tensor(canvas)}
        signals = None, self.tensor(before).to(model.dtype)
        with self.torch.no_grad():
            planes = [model(**inputs, self_conditioning_logits=signal).logits for signal in signals]
        return self.torch.cat(planes).float().cpu().numpy()

    def clock(self, tokens: list[int], steps: int) -> list[float]:
        return self.peer.clock([tokens], steps)

    def tensor(self, rows: Any) -> Any:
        return self.torch.as_tensor(np.asarray(rows)).to(self.peer.model.device)

    def peak_memory(self) -> int:
        device = self.peer.model.device
        return (
            self.torch.cuda.max_memory_allocated(device) if device.type == "cuda" else super().peak_memory()
        )


class MlxVlm(Engine):
    """`stream_diffusion_generate`, asked to show every draft; draft 0 comes right after the prefill."""

    def __init__(self, folder: Path, dtype: str, device: str):
        import mlx.core as mx
        from mlx_vlm.utils import load_model

        self.model = load_model(folder, lazy=True)
        self.model.set_dtype(getattr(mx, dtype))
        mx.eval(self.model.parameters())
        settings = json.loads((folder / "generation_config.json").read_text())
        self.model.config.generation_config = settings | {"confidence_threshold": NEVER}

    def logits(self, tokens: list[int], canvas: np.ndarray, before: np.ndarray) -> np.ndarray:
        import mlx.core as mx

        model = self.model
        inputs = {"input_ids": mx.array([tokens]), "canvas_ids": mx.array(canvas)}
        table = model.diffusion_prepare_self_conditioning()
        signal = model.diffusion_self_conditioning(mx.array(before), table)
        name = "logits" if model.prefers_logits_self_conditioning else "embeddings"
        signals: tuple[dict[str, Any], ...] = {}, {f"self_conditioning_{name}": signal}
        return np.concatenate([np.array(model(**inputs, **signal).logits) for signal in signals])

    def clock(self, tokens: list[int], steps: int) -> list[float]:
        import mlx.core as mx
        from mlx_vlm.generate.diffusion import stream_diffusion_generate

        ids, text, watch = mx.array([tokens]), _NoTokenizer(), Watch(self.weights)
        for result in stream_diffusion_generate(
            self.model,
            text,
            text,
            ids,
            None,
            None,
            max_tokens=self.model.config.canvas_length,
            skip_special_token_ids=[],
            temperature=1.0,
            max_denoising_steps=steps,
            diffusion_full_canvas=True,
            diffusion_sampler="entropy-bound",
            diffusion_show_unmasking=True,
        ):
            if result.is_draft:
                watch.tick()
        times, self.above = watch.stop()
        return times

    def peak_memory(self) -> int:
        return _mlx_peak(self)


def _mlx_peak(engine: Engine) -> int:
    """Bytes: a GPU's in the last call, or those of the process on a CPU."""
    import mlx.core as mx

    on_gpu = mx.default_device().type == mx.gpu
    return engine.weights + max(engine.above) if on_gpu else Engine.peak_memory(engine)


class _NoTokenizer:
    """Enough of a tokenizer for mlx-vlm's loop on a checkpoint without one; text is empty."""

    last_segment = ""

    def __init__(self) -> None:
        self.stopping_criteria = _NoStop()

    @property
    def detokenizer(self) -> _NoTokenizer:
        return self

    def reset(self) -> None:
        pass

    def finalize(self) -> None:
        pass

    def add_token(self, token: int, **_: Any) -> None:
        pass

    def decode(self, tokens: list[int], **_: Any) -> str:
        return ""


class _NoStop:
    def add_eos_token_ids(self, ids: Any) -> None:
        pass

    def __call__(self, token: int) -> bool:
        return False


ENGINES: dict[str, type[Engine]] = {
    "dgemma-cuda": DgemmaCuda,
    "transformers": Transformers,
    "dgemma-mlx": DgemmaMlx,
    "mlx-vlm": MlxVlm,
}
