"""mlx-vlm's step: a turn of its loop, put together from its own functions."""

from __future__ import annotations

from typing import Any
from unittest import mock

import mlx.core as mx

from benchmarks.launches.metal import Region
from benchmarks.launches.step import Step, arrays_of, mapped, released


def peer_model(form: str) -> Any:
    """mlx-vlm's model of the released geometry, in bfloat16 or quantized as its own predicate says."""
    with mock.patch.object(mx, "compile", Region):
        import mlx.nn
        from mlx_vlm.models.diffusion_gemma import Model as Peer
        from mlx_vlm.models.diffusion_gemma import ModelConfig, language

        assert isinstance(language.geglu, Region), "mlx-vlm was imported before"
        model = Peer(ModelConfig.from_dict(released()[0]))
    model.set_dtype(mx.bfloat16)
    if form == "4bit":
        predicate = model.language_model.quant_predicate
        mlx.nn.quantize(  # type: ignore[attr-defined]
            model, group_size=64, bits=4, class_predicate=predicate
        )
    mx.random.seed(0)  # or the first key of the step would be the last of some hundred
    return model


def peer_caches(model: Any, context: int) -> list[Any]:
    """The caches as a prefill of `context` tokens in one go leaves them."""
    caches = model.make_cache()
    for layer, cache in zip(model.layers, caches, strict=True):
        own = layer.self_attn
        shape = (1, own.n_kv_heads, context, own.head_dim)
        cache.keys, cache.values = (mx.zeros(shape, mx.bfloat16) for _ in "kv")
        cache.offset = cache._idx = context
    return caches


def peer(context: int, form: str) -> Step:
    """A turn of mlx-vlm's loop."""
    from mlx.utils import tree_flatten, tree_unflatten

    model = peer_model(form)
    text, length = model.config.text_config, model.config.canvas_length
    weights, caches = dict(tree_flatten(model.parameters())), peer_caches(model, context)
    canvas, before = (mx.zeros((1, length), mx.int32) for _ in range(2))
    masks = model.diffusion_decoder_masks(canvas, caches, None)
    # A mask is one row for all queries, made once a canvas.
    rows = {kind: mask[:, :, :1] for kind, mask in masks.items() if mask is not None}
    # A quantized model keeps the logits for the next step, any other the soft embedding.
    width, dtype = (text.vocab_size, mx.float32) if form == "4bit" else (text.hidden_size, mx.bfloat16)
    signal = mx.zeros((1, length, width), dtype)
    given = (weights, [(cache.keys, cache.values) for cache in caches], rows, signal, canvas, before)

    def function(*arrays: mx.array) -> list[mx.array]:
        source = iter(arrays)
        weights, keys, rows, *rest = mapped(given, lambda _: next(source))
        model.update(tree_unflatten(list(weights.items())))
        for cache, pair in zip(caches, keys, strict=True):
            cache.keys, cache.values = pair
        full = {kind: mx.broadcast_to(row, masks[kind].shape) for kind, row in rows.items()}
        return peer_turn(model, caches, {kind: full.get(kind) for kind in masks}, *rest)

    arrays = arrays_of(given)
    table = {id(x) for name, x in weights.items() if "embed_tokens" in name}
    return Step(function, arrays, {i for i, x in enumerate(arrays) if id(x) in table}, compiled=False)


def peer_turn(
    model: Any, caches: Any, masks: Any, signal: mx.array, canvas: mx.array, before: mx.array
) -> list[mx.array]:
    """What `stream_diffusion_generate` computes from one canvas to the next, in its order."""
    from mlx_vlm.generate import diffusion

    context = model.diffusion_prepare_self_conditioning()
    logits = model.diffusion_decoder_logits(
        canvas, cache=caches, self_conditioning=signal, decoder_attention_mask=masks
    )
    logits = logits / diffusion._diffusion_linear_temperature(24, 48, {"t_min": 0.4, "t_max": 0.8})
    argmax = mx.argmax(logits, axis=-1).astype(canvas.dtype)
    sample = diffusion._diffusion_sample_canvas(logits, canvas.dtype, 1.0)
    entropy = diffusion._diffusion_token_entropy(logits)
    following = model.diffusion_self_conditioning(logits, context)
    accepted = diffusion._diffusion_entropy_transfer_mask(entropy, 0.1)
    kept = mx.where(accepted, sample, canvas)
    vocabulary = model.config.text_config.vocab_size
    noise = diffusion._diffusion_initialize_canvas(*canvas.shape, vocabulary, canvas.dtype)
    stable = mx.all(argmax == before)
    return [mx.where(accepted, kept, noise), following, argmax, stable]
