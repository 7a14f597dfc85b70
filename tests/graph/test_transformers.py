"""The graph against transformers, its oracle: the same random weights, the same tokens, the same logits.

Errors are relative to the largest logit. transformers computes in float32, so its own rounding is in
them: about 1e-6, also where ours is float64. A wrong graph is off by 1e-3 and more (test_mutations.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dgemma.model import Model
from dgemma.network.config import read_config
from dgemma.network.numpy_ops import NumpyOps
from dgemma.network.ops import Ops
from tests.compare import backends, close, load, make
from tests.oracle import (
    CONFIGS,
    TOLERANCE,
    Oracle,
    Reference,
    entropies,
    oracle,
    our_model,
    released_spelling,
    softmax,
    tokens,
)

PROMPT = 30  # longer than every window but that of "wide"


@pytest.fixture(params=backends("float32", reference=True))
def ops(request: pytest.FixtureRequest) -> Ops:
    return make(request.param)


def same(model: Model, source: Oracle, pieces: Sequence[Any], what: str) -> None:
    """Encode the pieces one after another in both, then compare a first and a self-conditioned step."""
    limit, length = TOLERANCE[model.ops.name], source.config.canvas_length
    reference, contexts = Reference(source.hf), None
    for piece in pieces:
        reference.encode(piece)
        contexts = model.encode(piece, contexts)
    assert contexts is not None
    canvas, second = tokens(1, 2, len(pieces[0]), length)
    first = reference.logits(canvas)
    close(model.logits(contexts, canvas), first, limit, f"{what}, first step")
    soft = model.soft_embedding(softmax(first / 0.7))
    ours = model.logits(contexts, second, soft)
    close(ours, reference.logits(second, first / 0.7), limit, f"{what}, self-conditioned")


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(ops: Ops, name: str) -> None:
    source = oracle(name)
    same(our_model(ops, source), source, [tokens(0, 1, PROMPT)], name)


@pytest.mark.parametrize("length", [1, 4, 5, 11, 12, 13, 27, 28])
def test_around_the_window(ops: Ops, length: int) -> None:
    """Windows of 12 and 5: prompts one shorter, equal, one longer, and one window plus canvas."""
    for name in ("window", "deep"):
        source = oracle(name)
        same(our_model(ops, source), source, [tokens(length, 1, length)], f"{name}, {length} tokens")


@pytest.mark.parametrize("name", ["window", "wide", "full", "odd", "deep"])
def test_after_two_committed_canvases(ops: Ops, name: str) -> None:
    source = oracle(name)
    prompt, canvases = tokens(2, 1, 9), tokens(3, 2, 1, source.config.canvas_length)
    same(our_model(ops, source), source, [prompt, *canvases], f"{name}, third canvas")


def test_far_past_the_window(ops: Ops) -> None:
    """Twenty-five windows of context, in the default prefill chunks on our side."""
    source = oracle("window")
    same(our_model(ops, source), source, [tokens(4, 1, 300), tokens(5, 1, 16)], "316 tokens")


@pytest.mark.parametrize("name", ["window", "odd", "deep"])
def test_rows_of_unequal_lengths(ops: Ops, name: str) -> None:
    """Each row of a pass is transformers' answer to that row alone, also after two commits in pieces."""
    source, lengths = oracle(name), (PROMPT, 23, 3, 1)
    ops.piece_slots = 11
    model, limit = our_model(ops, source), TOLERANCE[ops.name]
    rows = [tokens(row, length) for row, length in enumerate(lengths)]
    *commits, canvas = tokens(6, 3, len(rows), source.config.canvas_length)
    prompts = model.encode(rows)
    contexts = model.encode(commits[1], model.encode(commits[0], prompts))
    for row, ids in enumerate(rows):
        reference = Reference(source.hf).encode(ids[None])
        mine = slice(row, row + 1)
        first = reference.logits(canvas[mine])
        close(model.logits(prompts, canvas)[mine], first, limit, f"{name}, {len(ids)} tokens")
        for commit in commits:
            reference.encode(commit[mine])
        soft = model.soft_embedding(np.repeat(softmax(first), len(rows), 0))
        ours = model.logits(contexts, canvas, soft)[mine]
        close(ours, reference.logits(canvas[mine], first), limit, f"{name}, {len(ids)} tokens, committed")


@pytest.mark.parametrize("name", ["window", "odd"])
def test_chunked_prefill(ops: Ops, name: str) -> None:
    source, limit = oracle(name), {"numpy": 1e-6, "cuda": 1e-5, "mlx": 1e-4}[ops.name]
    model = our_model(ops, source)
    rows = [tokens(0, 40), tokens(1, 33), tokens(2, 2)]
    canvas = tokens(3, 3, source.config.canvas_length)
    whole = model.logits(model.encode(rows, chunk=64), canvas)
    for chunk in (1, 5, 7, 512):
        close(model.logits(model.encode(rows, chunk=chunk), canvas), whole, limit, f"chunks of {chunk}")


@pytest.mark.parametrize("name", ["window", "odd", "deep"])
def test_router(ops: Ops, name: str) -> None:
    """Weights and experts themselves: the norm behind the experts hides a common factor from the logits."""
    source, layer = oracle(name), 1
    theirs = source.hf.model.decoder.layers[layer].router
    h = np.random.default_rng(0).normal(0, 3, (64, source.config.hidden_size)).astype(np.float32)
    with torch.no_grad():
        _, weights, ids = theirs(torch.as_tensor(h))
    w, config = our_model(ops, source).weights.layers[layer].router, source.config
    norm, stream = ops.asarray(np.ones(config.hidden_size)), ops.asarray(h)
    *_, routed = ops.open_branches(stream, stream * 0.0, norm, norm, norm, w.scale, config.rms_eps)
    ours = ops.router(routed, w.proj, w.expert_scale, config.top_k)
    np.testing.assert_array_equal(ops.to_numpy(ours[1]), ids.numpy())
    close(ops.to_numpy(ours[0]), weights.numpy(), TOLERANCE[ops.name], f"{name}, router weights")


# ---- configurations -----------------------------------------------------------------------------


def test_logits_without_a_cap(ops: Ops) -> None:
    """transformers reads a null and fails to divide by it: it gets a cap that float32 cannot see."""
    source = oracle("window", final_logit_softcapping=None)
    assert source.config.softcap is None
    source.hf.final_logit_softcapping = 1e6
    model = our_model(ops, source)
    same(model, source, [tokens(0, 1, PROMPT)], "no cap")
    prompt, canvas = tokens(0, 1, PROMPT), tokens(1, 1, source.config.canvas_length)
    uniforms = np.random.default_rng(0).random(canvas.shape)
    ops.vocab_tile, ops.vocab_rows = 64, 5  # several tiles, the last of another width
    for bound in (0.0, 1e-3):
        seen = model.see(model.encode(prompt), canvas, None, 0.7, uniforms, bound)
        z = Reference(source.hf).encode(prompt).logits(canvas)[0] / 0.7
        limit = TOLERANCE[ops.name]
        np.testing.assert_array_equal(seen.argmax[0], z.argmax(-1))
        close(seen.entropy[0], entropies(z), 10 * limit, f"entropy, bound {bound}")
        soft = softmax(z) @ source.state["model.decoder.embed_tokens.weight"]
        close(ops.to_numpy(seen.soft).reshape(soft.shape), soft, max(10 * limit, 2 * bound), f"soft, {bound}")


@pytest.mark.parametrize("name", CONFIGS)
def test_both_spellings(name: str) -> None:
    """`global_head_dim` and `per_layer_config` read as the same geometry, alone and side by side."""
    source = oracle(name)
    released = released_spelling(source.hf)
    assert read_config(released) == source.config
    both = json.loads(json.dumps(source.hf.config.to_dict(), default=str))
    for key in ("global_head_dim", "num_global_key_value_heads"):
        both["text_config"][key] = released["text_config"][key]
    assert read_config(both) == source.config


def test_spelling_of_the_released_file() -> None:
    """A model whose configuration was read from the released spelling computes the same."""
    source = oracle("deep")
    model = our_model(NumpyOps(), source, read_config(released_spelling(source.hf)))
    assert [layer.kv_heads for layer in model.config.layers] == [2] * 7
    same(model, source, [tokens(0, 1, PROMPT)], "released spelling")


@pytest.mark.parametrize("backend", backends("float32", reference=True))
def test_saved_folder(backend: tuple[str, str], tmp_path: Path) -> None:
    """`dgemma.load` on what `save_pretrained` writes, biases of the encoder's own included."""
    source = oracle("bias")
    source.save(tmp_path)
    model = load(backend, tmp_path)
    assert model.config == source.config
    same(model, source, [tokens(0, 1, PROMPT)], "saved folder")


# ---- bfloat16 -----------------------------------------------------------------------------------


def errors(ours: list[np.ndarray], reference: list[np.ndarray]) -> tuple[float, float]:
    """Maximum and RMS difference over several logits."""
    difference = np.concatenate([(a - b).ravel() for a, b in zip(ours, reference, strict=True)])
    return float(np.abs(difference).max()), float(np.sqrt(np.mean(difference.astype(np.float64) ** 2)))


@cache
def _bfloat16_case(name: str) -> tuple[list[tuple[Any, Any, Any]], list[np.ndarray], list[np.ndarray]]:
    """Inputs (prompt, canvas, previous logits), transformers' float32 logits and its bfloat16 ones."""
    source = oracle(name, bfloat16=True)
    half = source.bfloat16()
    inputs: list[tuple[Any, Any, Any]] = []
    single, theirs = [], []
    for seed in range(12):
        prompt, canvas = tokens(seed, 1, PROMPT), tokens(seed + 50, 1, source.config.canvas_length)
        reference, rounded = Reference(source.hf).encode(prompt), Reference(half).encode(prompt)
        first = reference.logits(canvas)
        inputs += [(prompt, canvas, None), (prompt, canvas, first)]
        single += [first, reference.logits(canvas, first)]
        theirs += [rounded.logits(canvas), rounded.logits(canvas, first)]
    return inputs, single, theirs


@pytest.mark.parametrize("backend", backends("bfloat16"))
@pytest.mark.parametrize("name", ["deep", "window"])
def test_bfloat16(backend: tuple[str, str], name: str) -> None:
    """No further from float32 than 1.5 times transformers' own bfloat16, in maximum and RMS.

    "deep" routes to all experts, so its error is smooth. In "window" a rounding may flip a pick, which
    moves a logit by 3 and more: the maximum takes many inputs to mean anything.
    """
    model = our_model(make(backend), oracle(name, bfloat16=True))
    inputs, single, theirs = _bfloat16_case(name)
    ours = []
    for prompt, canvas, previous in inputs:
        soft = None if previous is None else model.soft_embedding(softmax(previous))
        ours.append(model.logits(model.encode(prompt), canvas, soft))
    (their_max, their_rms), (our_max, our_rms) = errors(theirs, single), errors(ours, single)
    print(f"{name} {backend}: max {our_max:.3f} of {their_max:.3f}, RMS {our_rms:.4f} of {their_rms:.4f}")
    assert our_max <= 1.5 * their_max
    assert our_rms <= 1.5 * their_rms
