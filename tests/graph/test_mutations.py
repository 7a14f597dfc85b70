"""Planted graph bugs: each must move the logits away from transformers by far more than rounding does.

A copy of the package gets one textual edit each, and a subprocess that needs only NumPy compares all
copies with transformers' logits. This keeps the oracle honest: tame weights, prompts longer than the
window and a second canvas are there because without them some of these bugs do not show.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dgemma
from tests.oracle import Reference, oracle, softmax, tokens

PACKAGE = Path(dgemma.__file__).parent
LIMIT = 1e-3  # a bug moves the logits by at least this, relative to the largest


@dataclass(frozen=True)
class Bug:
    """An edit of the network's code, in which `old` occurs exactly once."""

    old: str
    new: str


BUGS = {
    "router fed the normed stream": Bug(
        "moe(run, w, y, routed)",
        "moe(run, w, y, y)",
    ),
    "encoder scalar is the decoder's": Bug(
        "(w.encoder_bias, w.encoder_scalar)", "(w.encoder_bias, w.scalar)"
    ),
    "encoder biases are the decoder's": Bug(
        "(w.encoder_bias, w.encoder_scalar)", "(w.bias, w.encoder_scalar)"
    ),
    "V after k_norm": Bug(
        "as_heads(self, v, C, None, eps, None)",
        "as_heads(self, v, C, w.k_norm if w.v is None else None, eps, None)",
    ),
    "V after k_norm and RoPE": Bug(
        "as_heads(self, v, C, None, eps, None)",
        "as_heads(self, v, C, *((None, eps, None) if w.v is not None else (w.k_norm, eps, rotary)))",
    ),
    "RoPE exponent over the rotated part": Bug(
        "(-2.0 * pairs / layer.head_dim)", "(-1.0 * pairs / layer.rope_pairs)"
    ),
    "RoPE rotates every pair": Bug("np.where(pairs < layer.rope_pairs, frequencies, 0.0)", "frequencies"),
    "decoder's sliding layers see all that is held": Bug(
        "last(kv, layer.past) for kv in pieces",
        "last(kv, layer.past + self.slack) for kv in pieces",
    ),
    "decoder sees window, not window - 1": Bug(
        "last(kv, layer.past) for kv in pieces",
        "last(kv, layer.window) for kv in pieces",
    ),
    "decoder's window is a band": Bug(
        "    if not mask.causal:\n        return None\n",
        "    if not mask.causal and mask.window is None:\n        return None\n"
        "    if not mask.causal:\n"
        "        return ops.arange(S)[None, :] > ops.arange(L)[:, None] + (S - L) - mask.window\n",
    ),
    "encoder sees one token too many": Bug("(key > query - mask.window)", "(key >= query - mask.window)"),
    "encoder without its window": Bug("seen = seen & (key > query - mask.window)", "pass"),
    "decoder is causal": Bug("Mask(run.causal, layer.window)", "Mask(True, layer.window)"),
    "self-conditioning without its last norm": Bug(
        "return run.norm(e + mlp(run.ops, w.self_conditioning, n), None)",
        "return e + mlp(run.ops, w.self_conditioning, n)",
    ),
    "last norm only where there is a signal": Bug(
        "return run.norm(e + mlp(run.ops, w.self_conditioning, n), None)",
        "return run.norm(e + mlp(run.ops, w.self_conditioning, n), None) if soft.any() else e",
    ),
    "soft embedding without √D and norm": Bug(
        "run.norm(soft * w.embed_scale, w.self_conditioning.pre_norm)",
        "soft * w.self_conditioning.pre_norm",
    ),
    "canvas embedding without √D": Bug(
        "embed(run.ops, w.embed, ids) * w.embed_scale", "embed(run.ops, w.embed, ids)"
    ),
    "prompt embedding without √D": Bug(
        "embed(ops, w.embed, row) * w.embed_scale", "embed(ops, w.embed, row)"
    ),
    # Leaving out the renormalisation changes no logit: the norm behind the experts cancels a token's
    # common factor. test_transformers.py compares the router's weights themselves.
    "experts weighted equally": Bug(
        "weights = weights / self.sum(weights, -1, keepdims=True)",
        "weights = weights * 0.0 + 1.0 / k",
    ),
    "no per-expert scale": Bug(
        "return weights * self.take(self.to_wide(expert_scale), ids), ids",
        "return weights, ids",
    ),
    "router without its scale": Bug(
        "self.rms_norm(self.to_wide(h), router, eps)", "self.rms_norm(self.to_wide(h), None, eps)"
    ),
    "router without 1/√D": Bug("router, eps) * h.shape[-1] ** -0.5", "router, eps)"),
    "experts' gate and up swapped": Bug(
        "geglu(self, y[:, :half], y[:, half:])", "geglu(self, y[:, half:], y[:, :half])"
    ),
    "scores scaled by 1/√C": Bug(
        "self.transpose(self.to_wide(k), 0, 2, 1))",
        "self.transpose(self.to_wide(k), 0, 2, 1) * C**-0.5)",
    ),
    "norms with 1 + weight": Bug("y = y * self.to_wide(weight)", "y = y * (1 + self.to_wide(weight))"),
    "no softcap": Bug(
        "return z if softcap is None else soft_cap(ops, z, softcap)",
        "return z",
    ),
    "V not normed": Bug(
        "as_heads(self, v, C, None, eps, None)",
        "self.transpose(v.reshape(x.shape[0], -1, C), 1, 0, 2)",
    ),
    "post-attention norms left out": Bug(
        "h = h + self.rms_norm(a, post, eps)",
        "h = h + a",
    ),
    "experts read the dense MLP's norm": Bug("moe(run, w, y, routed)", "moe(run, w, x, routed)"),
    "experts added behind the last norm": Bug(
        "(h + self.rms_norm(both, post, eps)) * scalar",
        "(h + self.rms_norm(m, post, eps) + self.rms_norm(e, post_experts, eps)) * scalar",
    ),
    "canvas positions start anew": Bug(
        "_rotary(ops, w, positions), False)",
        "_rotary(ops, w, positions - positions[0]), False)",
    ),
}

# What the subprocess runs: one argument a copy of the package; prints {copy: error}, or why it broke.
SCRIPT = """
import json, sys
import numpy as np

folder, *copies = sys.argv[1:]
data = np.load(folder + "/oracle.npz")
config_json = json.load(open(folder + "/config.json"))

def error():
    from dgemma.model import Model
    from dgemma.network import build, config, numpy_ops, spec
    ops, geometry = numpy_ops.NumpyOps(), config.read_config(config_json)
    frequencies = {layer.kind: build.rope_frequencies(layer) for layer in geometry.layers}
    constants = {"embed_scale": geometry.hidden_size**0.5, "frequencies": frequencies}
    table = spec.text_parameters(geometry)
    tree = build.build(geometry, table, lambda param: ops.asarray(data[param.name]), constants, ops)
    model = Model(ops, geometry, None, tree, None)
    worst, context = 0.0, None
    for index in range(2):
        context = model.encode(data[f"tokens{index}"], context)
        for soft, name in ((None, "first"), (model.soft_embedding(data[f"probs{index}"]), "second")):
            expected = data[f"{name}{index}"]
            difference = np.abs(model.logits(context, data["canvas"], soft) - expected)
            worst = max(worst, float(difference.max() / np.abs(expected).max()))
    return worst

report = {}
for copy in copies:
    for name in [name for name in sys.modules if name.split(".")[0] == "dgemma"]:
        del sys.modules[name]
    sys.path.insert(0, folder + "/" + copy)
    try:
        import dgemma
        assert dgemma.__file__.startswith(folder + "/" + copy + "/"), dgemma.__file__
        report[copy] = error()
    except (ValueError, KeyError, IndexError, TypeError) as broken:
        report[copy] = f"{type(broken).__name__}: {broken}"
    sys.path.pop(0)
assert "torch" not in sys.modules and "mlx" not in sys.modules
print(json.dumps(report))
"""


def _write_oracle(folder: Path) -> None:
    source = oracle("bias")
    reference = Reference(source.hf)
    arrays: dict[str, Any] = dict(source.state)
    arrays["canvas"] = canvas = tokens(1, 1, 16)
    for index, length in enumerate((30, 16)):
        arrays[f"tokens{index}"] = piece = tokens(index + 2, 1, length)
        reference.encode(piece)
        arrays[f"first{index}"] = first = reference.logits(canvas)
        arrays[f"probs{index}"] = softmax(first / 0.7)
        arrays[f"second{index}"] = reference.logits(canvas, first / 0.7)
    np.savez(folder / "oracle.npz", **arrays)
    (folder / "config.json").write_text(json.dumps(source.hf.config.to_dict(), default=str))


def _write_copy(folder: Path, bug: Bug | None) -> None:
    heavy = shutil.ignore_patterns("__pycache__", "*.safetensors", "tokenizer.json")
    shutil.copytree(PACKAGE, folder / "dgemma", ignore=heavy)
    if bug is not None:
        modules = sorted((folder / "dgemma" / "network").rglob("*.py"))
        texts = {path: path.read_text(encoding="utf-8") for path in modules}
        (found,) = [path for path, text in texts.items() for _ in range(text.count(bug.old))]
        found.write_text(texts[found].replace(bug.old, bug.new), encoding="utf-8")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float | str]:
    """Error of every copy by the bug's name, of the unedited one as "none"."""
    folder = tmp_path_factory.mktemp("mutations")
    _write_oracle(folder)
    copies = {"none": "copy"} | {name: f"copy{index}" for index, name in enumerate(BUGS)}
    for name, copy in copies.items():
        _write_copy(folder / copy, BUGS.get(name))
    command = [sys.executable, "-c", SCRIPT, str(folder), *copies.values()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    return {name: errors[copy] for name, copy in copies.items()}


def test_unedited_copy_is_right(report: dict[str, float | str]) -> None:
    error = report["none"]
    assert isinstance(error, float), error
    print(f"max error {error:.1e}")
    assert error <= 1e-5


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_found(report: dict[str, float | str], bug: str) -> None:
    error = report[bug]
    assert isinstance(error, float), f"the edit breaks the program instead of its result: {error}"
    print(f"{bug}: {error:.1e}")
    assert not error < LIMIT  # NaN counts as found
