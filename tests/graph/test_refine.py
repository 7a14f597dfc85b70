"""One denoising step at a time against transformers' sampler, always from the same state.

Free-running trajectories are chaotic: two correct implementations part within 24 steps. So the state
(canvas, soft embedding, temperature) comes from the oracle each time, and randomness is an input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
    LinearTemperatureScheduleLogitsProcessor,
    StableAndConfidentStoppingCriteria,
)

from dgemma.engine import sampler
from dgemma.engine.sampler import Step
from dgemma.errors import ConfigError
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.ops import Ops
from tests.compare import backends, close, make
from tests.oracle import GENERATION, Reference, entropies, oracle, our_model, softmax, tokens

STEPS = 24
CONFIG = replace(GENERATION, steps=STEPS)


@pytest.fixture(params=backends("float32", reference=True))
def ops(request: pytest.FixtureRequest) -> Ops:
    return make(request.param)


@dataclass(frozen=True)
class Moment:
    """One step of transformers' trajectory: what went in, and its processed logits."""

    canvas: np.ndarray
    previous: np.ndarray | None  # processed logits of the step before
    temperature: float
    uniforms: np.ndarray
    noise: np.ndarray
    processed: np.ndarray

    @property
    def sample(self) -> np.ndarray:
        """Inverse CDF in float64: the first token whose cumulative probability exceeds the uniform."""
        reach = np.cumsum(softmax(self.processed), -1)
        return (reach <= self.uniforms[..., None]).sum(-1)

    @property
    def accepted(self) -> np.ndarray:
        """Which positions transformers' own sampler accepts."""
        theirs = EntropyBoundSampler(
            EntropyBoundSamplerConfig(CONFIG.entropy_bound),
            self.canvas.shape[1],
            self.processed.shape[-1],
            STEPS,
        )
        canvas = torch.as_tensor(self.canvas)
        theirs.accept_canvas(canvas, canvas, torch.as_tensor(self.processed), 0)
        assert theirs.accepted_token_mask is not None
        return theirs.accepted_token_mask.numpy()

    @property
    def next_canvas(self) -> np.ndarray:
        return np.where(self.accepted, self.sample, self.noise)


PROMPT = tokens(0, 2, 30)


def noises(seed: int, vocab: int) -> list[sampler.Noise]:
    """The noise of the two rows of PROMPT."""
    return [sampler.Noise(seed, row, 0, vocab) for row in (0, 1)]


def drawn(rows: list[sampler.Noise], steps: list[int], length: int) -> list[np.ndarray]:
    """Uniforms and tokens [B, L] of rows, each at its step."""
    draws = [noise.draw(step, length) for noise, step in zip(rows, steps, strict=True)]
    return [np.stack(part) for part in zip(*draws, strict=True)]


def trajectory(name: str) -> Iterator[Moment]:
    """transformers' canvases for PROMPT, with our noise in place of its generator."""
    source = oracle(name)
    length = source.config.canvas_length
    reference = Reference(source.hf).encode(PROMPT)
    rows = noises(7, source.vocab)
    schedule = LinearTemperatureScheduleLogitsProcessor(CONFIG.t_min, CONFIG.t_max, STEPS)
    canvas, previous = np.stack([noise.start(STEPS, length) for noise in rows]), None
    for n in range(STEPS, 0, -1):
        logits = torch.as_tensor(reference.logits(canvas, previous))
        processed = schedule(None, logits, cur_step=n).numpy()
        uniforms, fresh = drawn(rows, [n, n], length)
        moment = Moment(canvas, previous, sampler.temperature(CONFIG, n), uniforms, fresh, processed)
        yield moment
        canvas, previous = moment.next_canvas, processed


@pytest.mark.parametrize(("name", "tiled"), [("window", False), ("window", True), ("odd", False)])
def test_steps_from_transformers_state(ops: Ops, name: str, tiled: bool) -> None:
    """24 steps, each from transformers' state: argmax, entropy, acceptance, sample and next canvas."""
    if tiled:  # as a real vocabulary is read: in tiles, some rows at a time
        ops.vocab_tile, ops.vocab_rows = 33, 10
    model = our_model(ops, oracle(name), entropy_bound=CONFIG.entropy_bound)
    contexts, partly = model.encode(PROMPT), 0
    for index, moment in enumerate(trajectory(name)):
        soft = None if moment.previous is None else model.soft_embedding(softmax(moment.previous))
        step = model.refine(contexts, moment.canvas, soft, moment.temperature, moment.uniforms, moment.noise)
        np.testing.assert_array_equal(step.argmax, moment.processed.argmax(-1), f"step {index}: argmax")
        close(step.entropy, entropies(moment.processed), 1e-4, f"step {index}: entropy")
        np.testing.assert_array_equal(step.accepted, moment.accepted, f"step {index}: accepted")
        np.testing.assert_array_equal(step.canvas, moment.next_canvas, f"step {index}: canvas")
        probs = softmax(moment.processed)
        close(ops.to_numpy(step.soft), ops.to_numpy(model.soft_embedding(probs)), 1e-4, f"step {index}: soft")
        partly += 0 < step.accepted.sum() < step.accepted.size
    assert partly == STEPS, "the bound must accept some positions of every step, and not all"


@pytest.mark.parametrize("name", ["window", "deep"])
@pytest.mark.parametrize("backend", backends("float32"))
def test_steps_from_float64_state(backend: tuple[str, str], name: str) -> None:
    """24 steps, each from NumPy's float64 state: not one token differs in float32."""
    source = oracle(name)
    exact, model = our_model(NumpyOps(), source), our_model(make(backend), source)
    rows = noises(11, source.vocab)
    ours, theirs = model.encode(PROMPT), exact.encode(PROMPT)
    canvas, step = np.stack([noise.start(STEPS, 16) for noise in rows]), None
    for n in range(STEPS, 0, -1):
        arguments = sampler.temperature(CONFIG, n), *drawn(rows, [n, n], 16)
        before: Step | None = step
        step = exact.refine(theirs, canvas, before and before.soft, *arguments)
        other = model.refine(ours, canvas, before and before.soft, *arguments)
        for what in ("canvas", "argmax", "accepted"):
            np.testing.assert_array_equal(getattr(other, what), getattr(step, what), f"step {n}: {what}")
        close(other.entropy, step.entropy, 1e-4, f"step {n}: entropy")
        canvas = step.canvas


def test_only_a_bound_takes_the_vocabulary_out_of_the_compiled_step(ops: Ops) -> None:
    """And without one, the host reads a step once and its soft embedding is whole."""
    model, uniforms, canvas = our_model(ops, oracle("window")), np.full((2, 16), 0.5), tokens(4, 2, 16)
    contexts, reads, to_numpy = model.encode(PROMPT), [], ops.to_numpy
    ops.to_numpy = lambda x: reads.append(x.shape) or to_numpy(x)  # type: ignore
    before, seen = set(model._compiled), []
    for bound in (0.0, 1e-3):
        step = model.refine(contexts, canvas, None, 0.7, uniforms, canvas, soft_bound=bound)
        seen.append(step)
        assert reads.pop() == (5 if bound else 4, 32) and not reads
        assert set(model._compiled) - before == {"denoise" if bound else "refine"}
        before = set(model._compiled)
    whole, some = seen
    assert whole.missing is None and whole.dense.all()
    assert some.missing is not None and some.missing.max() <= 1e-3
    for what in ("canvas", "argmax", "accepted"):
        np.testing.assert_array_equal(getattr(some, what), getattr(whole, what))
    off = np.abs(to_numpy(some.soft) - to_numpy(whole.soft)).max(-1)
    largest = np.abs(to_numpy(model.weights.embed)).max()
    assert (off <= (some.missing + 1e-5) * largest).all()


def test_first_step_is_the_schedule_top() -> None:
    assert sampler.temperature(CONFIG, STEPS) == CONFIG.t_max
    theirs = LinearTemperatureScheduleLogitsProcessor(CONFIG.t_min, CONFIG.t_max, STEPS)
    for n in range(1, STEPS + 1):
        scaled = theirs(None, torch.ones(1, dtype=torch.float64), cur_step=n).item()
        assert sampler.temperature(CONFIG, n) == pytest.approx(1 / scaled, rel=1e-12)


# ---- the stop rule ------------------------------------------------------------------------------


def stop_sequence(seed: int, rows: int, steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Argmax canvases [B, 3] that often repeat, and logits [B, 3, 5] about as often confident."""
    rng = np.random.default_rng(seed)
    canvas = rng.integers(0, 5, (rows, 3))
    for _ in range(steps):
        moves = rng.random(rows) < 0.3
        canvas = np.where(moves[:, None], rng.integers(0, 5, (rows, 3)), canvas)
        sharp = rng.choice([3.0, 12.0], (rows, 1, 1), p=[0.3, 0.7])
        logits = rng.normal(0, 0.3, (rows, 3, 5))
        np.put_along_axis(logits, canvas[..., None], sharp + logits[..., :1], -1)
        yield canvas, logits.astype(np.float32)


@pytest.mark.parametrize("stability", [0, 1, 2, 3])
def test_stop_rule(stability: int) -> None:
    stopped = 0
    for seed in range(20):
        theirs = StableAndConfidentStoppingCriteria(stability, 0.005)
        rows = [sampler.Stop(replace(CONFIG, stability=stability, confidence=0.005)) for _ in range(4)]
        for step, (canvas, logits) in enumerate(stop_sequence(seed, 4, 12)):
            expected = theirs(torch.as_tensor(canvas), torch.as_tensor(logits)).numpy()
            entropy = entropies(logits).astype(np.float32)
            done = [stop(*of, np.ones(3, bool)) for stop, *of in zip(rows, canvas, entropy, strict=True)]
            np.testing.assert_array_equal(done, expected, f"seed {seed}, step {step}")
            stopped += sum(done)
    assert 50 < stopped < 900, stopped


def test_stability_of_zero_is_a_setting() -> None:
    """transformers takes 0 (confidence alone decides); the same setting must not be refused here."""
    try:
        assert GENERATION.override(stability=0).stability == 0
    except ConfigError as error:
        pytest.fail(f"stability 0 is refused: {error}")


def test_rows_are_alone_in_company(ops: Ops) -> None:
    """With contexts, temperatures and signals of their own: one row is at its first step, two are not.

    And a step is what is seen and what the sampler makes of it.
    """
    model = our_model(ops, oracle("window"))
    rows = [sampler.Noise(3, row, at, model.config.vocab_size) for row, at in ((5, 0), (6, 2), (7, 1))]
    canvas = np.stack([noise.start(STEPS, 16) for noise in rows])
    uniforms, fresh = drawn(rows, [9, 2, 5], 16)
    heat = np.array([0.45, 0.8, 0.6])
    contexts = model.encode([PROMPT[0], PROMPT[1][:7], PROMPT[1][:21]])
    signal = np.random.default_rng(0).normal(0, 0.3, (2, 16, model.config.hidden_size))
    soft = [signal[0], None, ops.asarray(signal[1])]
    seen = model.see(contexts, canvas, soft, heat, uniforms)
    step = model.refine(contexts, canvas, soft, heat, uniforms, fresh, entropy_bound=0.5)
    made = sampler.refined(seen, fresh, 0.5)
    for name in ("canvas", "argmax", "entropy", "accepted"):
        np.testing.assert_array_equal(getattr(step, name), getattr(made, name), name)
    for row, (context, own) in enumerate(zip(contexts, (signal[:1], None, signal[1:]), strict=True)):
        at = slice(row, row + 1)
        alone = model.see([context], canvas[at], own, float(heat[row]), uniforms[at])
        np.testing.assert_array_equal(seen.argmax[at], alone.argmax)
        np.testing.assert_array_equal(seen.sample[at], alone.sample)
        close(seen.entropy[at], alone.entropy, 1e-5, f"row {row}: entropy")
        close(ops.to_numpy(seen.soft)[at], ops.to_numpy(alone.soft), 1e-5, f"row {row}: soft")
