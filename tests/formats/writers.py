"""Writers of every quantized layout, from the layouts' description and not from our code.

They share neither tables nor packing nor names with `dgemma.formats.quantized`, `dgemma.formats.nvfp4` and
`dgemma.checkpoint.layouts`, so that reader and writer check each other. A writer draws codes and scales at
random, keeps the decoded values tame (a matrix has unit gain) and says in float64 what each parameter decodes
to, by the definition of its format:

    affine                     code · scale + bias
    mxfp4, mxfp8, nvfp4        code · scale (· weight_scale_2)
    ModelOpt NVFP4             code · weight_scale · weight_scale_2
    compressed-tensors NVFP4   code · weight_scale / weight_global_scale
    compressed-tensors FP8     code · weight_scale
    compressed-tensors int     (code − 2^(bits − 1)) · weight_scale

    O outputs (rows)  I inputs  E experts  M expert size  D hidden
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dgemma.network.config import read_config
from dgemma.network.spec import Param, parameters
from tests.checkpoints import SMALL_GENERATION, Tensor, encode, small, tame, write_json, write_shards

# ---- number formats -----------------------------------------------------------------------------


def minifloat(exponent_bits: int, mantissa_bits: int, bias: int) -> np.ndarray:
    """Value of every code, float64: sign, exponent, mantissa; no infinity. NaN is left to the caller."""
    codes = np.arange(2 ** (1 + exponent_bits + mantissa_bits))
    mantissa = codes % 2**mantissa_bits
    exponent = codes // 2**mantissa_bits % 2**exponent_bits
    # Exponent 0 has no leading one and the step of exponent 1.
    significand = mantissa + np.where(exponent > 0, 2**mantissa_bits, 0)
    sign = np.where(codes >= len(codes) // 2, -1.0, 1.0)
    return sign * significand * 2.0 ** (np.maximum(exponent, 1) - bias - mantissa_bits)


E2M1 = minifloat(2, 1, 1)
E4M3 = minifloat(4, 3, 7)
E4M3[[0x7F, 0xFF]] = np.nan
E8M0 = np.array([2.0 ** (code - 127) for code in range(255)] + [np.nan])
FINITE_E4M3 = np.flatnonzero(np.isfinite(E4M3))


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """One little-endian stream of bits a row: bit k of code n is bit `n·bits + k` of the row."""
    single = np.unpackbits(codes.astype(np.uint8)[..., None], axis=-1, bitorder="little")[..., :bits]
    return np.packbits(single.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def floats(tensor: Tensor) -> np.ndarray:
    """The values of a tensor of floats, float64."""
    if tensor.dtype == "BF16":
        bits = np.frombuffer(tensor.raw, "<u2").astype("<u4") << 16
        return bits.view("<f4").astype(np.float64).reshape(tensor.shape)
    kind = {"F16": "<f2", "F32": "<f4"}[tensor.dtype]
    return np.frombuffer(tensor.raw, kind).astype(np.float64).reshape(tensor.shape)


def single(value: float, shape: tuple[int, ...] = ()) -> Tensor:
    return encode(np.full(shape, value, np.float32), "F32")


# ---- matrices -----------------------------------------------------------------------------------


@dataclass
class Matrix:
    """A quantized matrix [O, I] or stack [E, O, I]: tensors by the last part of their name, and values."""

    parts: dict[str, Tensor]
    values: np.ndarray  # float64


def root_mean_square(table: np.ndarray) -> float:
    return float(np.sqrt(np.nanmean(table**2)))


def spread(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Factors around 1, so that no two groups have the same scale."""
    return rng.uniform(0.6, 1.4, shape)


def words(codes: np.ndarray, bits: int) -> Tensor:
    """Codes as MLX's 32-bit words."""
    packed = stream(codes, bits)
    return Tensor("U32", (*codes.shape[:-1], packed.shape[-1] // 4), packed.tobytes())


def affine(
    rng: np.random.Generator, shape: tuple[int, ...], gain: float, bits: int, group: int, dtype: str
) -> Matrix:
    """MLX's affine mode: uniform codes, a scale of either sign, a bias near the middle of the range."""
    codes = rng.integers(0, 2**bits, shape)
    grouped = (*shape[:-1], shape[-1] // group)
    step = gain * np.sqrt(12) / 2**bits * spread(rng, grouped) * rng.choice([-1, 1], grouped)
    scales = encode(step.astype(np.float32), dtype)
    middle = -step * (2**bits - 1) / 2 + 0.1 * gain * rng.standard_normal(grouped)
    biases = encode(middle.astype(np.float32), dtype)
    values = codes.reshape(*grouped, group) * floats(scales)[..., None] + floats(biases)[..., None]
    parts = {"weight": words(codes, bits), "scales": scales, "biases": biases}
    return Matrix(parts, values.reshape(shape))


def exponents(rng: np.random.Generator, shape: tuple[int, ...], target: float) -> np.ndarray:
    """E8M0 codes of powers of two around `target`."""
    return np.clip(np.rint(np.log2(target)) + 127 + rng.integers(-1, 2, shape), 0, 254).astype(np.uint8)


def nearest_e4m3(x: np.ndarray) -> np.ndarray:
    """Codes of the positive E4M3 values nearest to `x`; ties do not matter to a writer."""
    return np.abs(x[..., None] - E4M3[:127]).argmin(-1).astype(np.uint8)


def floating(
    rng: np.random.Generator, shape: tuple[int, ...], gain: float, mode: str, factor: str | None = None
) -> Matrix:
    """MLX's mxfp4, mxfp8 and nvfp4. `factor`: nvfp4's `weight_scale_2` is one a "matrix" or one a "row"."""
    table, bits, group = {"mxfp4": (E2M1, 4, 32), "mxfp8": (E4M3, 8, 32), "nvfp4": (E2M1, 4, 16)}[mode]
    valid = np.flatnonzero(np.isfinite(table))
    codes = rng.choice(valid, shape)
    grouped = (*shape[:-1], shape[-1] // group)
    target = gain / root_mean_square(table)
    multipliers = np.ones((*shape[:-2], 1))
    parts: dict[str, Tensor] = {}
    if factor:
        own = (*shape[:-2], 1) if factor == "matrix" else shape[:-1]
        parts["weight_scale_2"] = encode((target / 50 * spread(rng, own)).astype(np.float32), "F32")
        multipliers, target = floats(parts["weight_scale_2"]), 50
    if mode == "nvfp4":
        scales = nearest_e4m3(target * spread(rng, grouped))
        decoded = E4M3[scales]
    else:
        scales = exponents(rng, grouped, target)
        decoded = E8M0[scales]
    values = (table[codes].reshape(*grouped, group) * decoded[..., None]).reshape(shape)
    parts |= {"weight": words(codes, bits), "scales": Tensor("U8", grouped, scales.tobytes())}
    return Matrix(parts, values * multipliers[..., None])


def nvfp4_codes(
    rng: np.random.Generator, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Random E2M1 bytes and E4M3 scales of a matrix, code · scale, and the root mean square of that."""
    codes = rng.integers(0, 16, shape)
    scales = rng.integers(0x40, 0x7F, (shape[0], shape[1] // 16)).astype(np.uint8)  # 2 … 448
    values = E2M1[codes] * np.repeat(E4M3[scales], 16, axis=-1)
    return stream(codes, 4), scales, values, root_mean_square(values)


def bytes_of(dtype: str, data: np.ndarray) -> Tensor:
    return Tensor(dtype, data.shape, data.astype(np.uint8).tobytes())


def modelopt_linear(
    rng: np.random.Generator, shape: tuple[int, int], gain: float, scalar: tuple[int, ...] = ()
) -> Matrix:
    """One linear of ModelOpt's NVFP4. Every one has a second scale of its own."""
    packed, scales, values, size = nvfp4_codes(rng, shape)
    second = single(gain / size * rng.uniform(0.5, 2), scalar)
    parts = {
        "weight": bytes_of("U8", packed),
        "weight_scale": bytes_of("F8_E4M3", scales),
        "weight_scale_2": second,
        "input_scale": single(0.01, scalar),
    }
    return Matrix(parts, values * floats(second).item())


def packed_linear(
    rng: np.random.Generator, shape: tuple[int, int], gain: float, scalar: tuple[int, ...] = (1,)
) -> Matrix:
    """One linear of compressed-tensors' NVFP4, whose global scale divides."""
    packed, scales, values, size = nvfp4_codes(rng, shape)
    whole = single(size / gain * rng.uniform(0.5, 2), scalar)
    parts = {
        "weight_packed": bytes_of("U8", packed),
        "weight_scale": bytes_of("F8_E4M3", scales),
        "weight_global_scale": whole,
        "input_global_scale": single(100.0, scalar),
    }
    return Matrix(parts, values / floats(whole).item())


def fp8_linear(rng: np.random.Generator, shape: tuple[int, int], gain: float, dtype: str = "BF16") -> Matrix:
    """One linear of compressed-tensors' FP8 with a scale a row, [O, 1]."""
    codes = rng.choice(FINITE_E4M3, shape)
    own = gain / root_mean_square(E4M3) * spread(rng, (shape[0], 1))
    scales = encode(own.astype(np.float32), dtype)
    return Matrix(
        {"weight": bytes_of("F8_E4M3", codes), "weight_scale": scales}, E4M3[codes] * floats(scales)
    )


def int_linear(
    rng: np.random.Generator, shape: tuple[int, int], gain: float, bits: int, group: int | None, dtype: str
) -> Matrix:
    """One linear of compressed-tensors' pack-quantized integers, symmetric.

    An integer q of −2^(bits − 1) … 2^(bits − 1) − 1 is stored as q + 2^(bits − 1). 32/bits adjacent ones of a
    row make one int32, the first in its lowest bits. Each `group` of inputs has a scale; None: each row has.
    `weight_shape` is [O, I].
    """
    half = 2 ** (bits - 1)
    integers = rng.integers(-half, half, shape)
    grouped = (shape[0], shape[1] // (group or shape[1]))
    scales = encode((gain * np.sqrt(12) / 2**bits * spread(rng, grouped)).astype(np.float32), dtype)
    packed = np.zeros((shape[0], shape[1] * bits // 32), np.uint32)
    for place in range(32 // bits):
        packed |= (integers[:, place :: 32 // bits] + half).astype(np.uint32) << np.uint32(place * bits)
    parts = {
        "weight_packed": Tensor("I32", packed.shape, packed.tobytes()),
        "weight_scale": scales,
        "weight_shape": Tensor("I64", (2,), np.array(shape, "<i8").tobytes()),
    }
    return Matrix(parts, integers * np.repeat(floats(scales), shape[1] // grouped[1], -1))


# ---- checkpoints --------------------------------------------------------------------------------


@dataclass
class Written:
    """A checkpoint: what goes to its files, and what every parameter decodes to."""

    config: dict[str, Any]  # config.json
    tensors: dict[str, Tensor] = field(default_factory=dict)
    decoded: dict[str, np.ndarray] = field(default_factory=dict)  # float64 by Hugging Face's name
    quantized: set[str] = field(default_factory=set)  # parameters that are
    files: dict[str, Any] = field(default_factory=dict)  # further JSON files

    def write(self, folder: Path, shards: int = 1) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        files = {"config.json": self.config, "generation_config.json": SMALL_GENERATION} | self.files
        for name, data in files.items():
            write_json(folder / name, data)
        write_shards(folder, self.tensors, shards)
        return folder

    def write_decoded(self, folder: Path) -> Path:
        """The same model with nothing quantized: the decoded values, rounded to float32."""
        config = {key: value for key, value in self.config.items() if not key.startswith("quantization")}
        tensors = {name: encode(x.astype(np.float32), "F32") for name, x in self.decoded.items()}
        return Written(config, tensors).write(folder)

    def copy(self) -> Written:
        return copy.deepcopy(self)

    def add(self, param: Param, parts: Mapping[str, Tensor], values: np.ndarray) -> None:
        self.tensors |= parts
        self.decoded[param.name] = values
        self.quantized.add(param.name)

    def keep(self, param: Param, rng: np.random.Generator, name: str | None = None) -> None:
        """A parameter as it is, in bfloat16."""
        tensor = encode(tame(param, rng), "BF16")
        self.tensors[name or param.name] = tensor
        self.decoded[param.name] = floats(tensor)


def geometry(
    hidden: int, mlp: int, expert: int, head: int, full_head: int, heads: int = 4, vocab: int = 131
) -> dict[str, Any]:
    """A model of two layers, one of each kind, with four experts; a vocabulary that is a prime."""
    return small(
        hidden_size=hidden,
        intermediate_size=mlp,
        moe_intermediate_size=expert,
        head_dim=head,
        global_head_dim=full_head,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        num_experts=4,
        vocab_size=vocab,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
    )


EVEN = geometry(128, 128, 128, 32, 64)  # every row divides by 128
BY_32 = geometry(96, 160, 32, 24, 40)  # attention's outputs have rows of 96 and 160
BY_16 = geometry(80, 112, 48, 20, 28)
BY_4 = geometry(68, 52, 20, 14, 22)  # float-quantized has no groups


def gain(param: Param) -> float:
    """Root mean square of tame values: rows of unit length, routers that are decided."""
    return (20 if param.group == "router" else 1) * param.shape[-1] ** -0.5


def is_matrix(param: Param) -> bool:
    """Whether exporters take the parameter for a linear layer, an embedding or a stack of experts."""
    return len(param.shape) > 1


def path_of(param: Param) -> str:
    """The module of a parameter. MLX takes each stack of experts for one."""
    return param.name.removesuffix(".weight")


def table(config: Mapping[str, Any]) -> list[Param]:
    return parameters(read_config(config))


Entry = Mapping[str, Any]
BITS = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


def entry(mode: str, bits: int = 0, group: int = 0) -> dict[str, Any]:
    """An entry of MLX's announcement; the floating modes have one width each."""
    bits, group = BITS.get(mode, (bits, group))
    return {"group_size": group, "bits": bits, "mode": mode}


def mlx(
    config: Mapping[str, Any],
    default: Entry,
    overrides: Mapping[str, Entry | bool] | None = None,
    dtype: str = "BF16",
    factor: str | None = None,
    prefix: str = "",
    seed: int = 0,
) -> Written:
    """MLX's layout. `overrides` by a pattern of module paths (the last that matches holds): an entry or
    False. `factor`: "matrix", "row", or "mixed" for one a matrix where experts have one an expert and
    down_proj one a row.
    """
    rng, own = np.random.default_rng(seed), dict(default)
    written = Written(copy.deepcopy(dict(config)))
    for param in table(config):
        path, form = path_of(param), default
        if not is_matrix(param):
            written.keep(param, rng)
            continue
        for pattern, override in (overrides or {}).items():
            if re.search(pattern, path):
                own[prefix + path] = form = override
        if form is False:
            # Experts are modules in MLX, so their one parameter has a name of its own.
            written.keep(param, rng, f"{path}.weight")
            continue
        matrix = mlx_matrix(rng, param, form, dtype, factor)
        written.add(param, {f"{path}.{name}": tensor for name, tensor in matrix.parts.items()}, matrix.values)
    written.config["quantization"] = own
    written.config["quantization_config"] = own  # mlx-lm writes both
    return written


def mlx_matrix(rng: np.random.Generator, param: Param, form: Entry, dtype: str, factor: str | None) -> Matrix:
    mode = form.get("mode", "affine")
    if mode == "affine":
        return affine(rng, param.shape, gain(param), form["bits"], form["group_size"], dtype)
    if factor == "mixed":
        factor = "row" if "down_proj" in param.name else "matrix"
    return floating(rng, param.shape, gain(param), mode, factor if mode == "nvfp4" else None)


EIGHT = r"embed_tokens|self_attn\.\w_proj|\.mlp\.\w+_proj|router\.proj"  # mlx-community's 8 bit


def linears(param: Param) -> Iterator[tuple[str, tuple[Any, ...], tuple[int, int]]]:
    """The linear layers that exporters take a parameter apart into: module, place in the stack, shape."""
    if param.group != "experts":
        yield path_of(param), (), param.shape  # type: ignore[misc]
        return
    experts, rows, inputs = param.shape
    root, stack = param.name.rsplit(".", 1)
    for expert in range(experts):
        if stack == "down_proj":
            yield f"{root}.{expert}.down_proj", (expert,), (rows, inputs)
        else:
            half = rows // 2
            yield f"{root}.{expert}.gate_proj", (expert, slice(None, half)), (half, inputs)
            yield f"{root}.{expert}.up_proj", (expert, slice(half, None)), (half, inputs)


Linear = Callable[[np.random.Generator, tuple[int, int], float], Matrix]


def by_linear(config: Mapping[str, Any], choose: Callable[[Param], Linear | None], seed: int = 0) -> Written:
    """A layout that quantizes layer by layer: `choose` says how a parameter is, None for not at all."""
    rng = np.random.default_rng(seed)
    written = Written(copy.deepcopy(dict(config)))
    for param in table(config):
        linear = choose(param) if is_matrix(param) else None
        if linear is None:
            written.keep(param, rng)
            continue
        values = np.full(param.shape, np.nan)
        parts: dict[str, Tensor] = {}
        for path, place, shape in linears(param):
            matrix = linear(rng, shape, gain(param))
            parts |= {f"{path}.{name}": tensor for name, tensor in matrix.parts.items()}
            values[place] = matrix.values
        written.add(param, parts, values)
    return written


def grouped(groups: Iterable[str], linear: Linear) -> Callable[[Param], Linear | None]:
    """Quantizes the parameters of these classes."""
    return lambda param: linear if param.group in tuple(groups) else None


EXCLUDED = [  # NVIDIA's list, in the dialects that exporters mix
    "lm_head",
    "model.encoder.embed_vision*",
    "model.encoder.vision_tower*",
    "model.decoder.layers.0.mlp*",
    "model.decoder.layers.1.mlp.gate_proj",
    "*router*",
    "*.self_attn.*",
    "model.decoder.self_conditioning",
    "embed_tokens",
]


def spare(choose: Callable[[Param], Linear | None]) -> Callable[[Param], Linear | None]:
    """Leaves the experts of the first layer as they are."""
    return lambda param: None if "layers.0.experts" in param.name else choose(param)


def modelopt(
    config: Mapping[str, Any],
    scalar: tuple[int, ...] = (),
    apart: bool = False,
    groups: str = "experts",
    spared: bool = False,
) -> Written:
    """ModelOpt's NVFP4. `apart`: announced in hf_quant_config.json only, as older exports do.

    `spared`: the list excludes the experts of the first layer.
    """

    def linear(rng: np.random.Generator, shape: tuple[int, int], gain: float) -> Matrix:
        return modelopt_linear(rng, shape, gain, scalar)

    choose = grouped(groups.split(), linear)
    written = by_linear(config, spare(choose) if spared else choose)
    excluded = [pattern for pattern in EXCLUDED if "mlp" not in pattern or "mlp" not in groups]
    excluded += ["model.decoder.layers.0.experts"] * spared
    if apart:
        own = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": excluded}
        producer = {"name": "modelopt", "version": "0.39.0"}
        written.files["hf_quant_config.json"] = {"producer": producer, "quantization": own}
    else:
        own = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": excluded}
        written.config["quantization_config"] = own
    return written


def compressed_nvfp4(
    config: Mapping[str, Any], scalar: tuple[int, ...] = (1,), spared: bool = False
) -> Written:
    """compressed-tensors' NVFP4: experts and dense MLP; `spared` as in `modelopt`."""

    def linear(rng: np.random.Generator, shape: tuple[int, int], gain: float) -> Matrix:
        return packed_linear(rng, shape, gain, scalar)

    choose = grouped(("experts", "mlp"), linear)
    written = by_linear(config, spare(choose) if spared else choose)
    weights = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}
    ignored = ["lm_head", "re:.*self_attn.*", "re:.*router", "re:.*self_conditioning", "re:.*embed_tokens$"]
    ignored += [r"re:.*\.layers\.0\.experts\..*"] * spared
    written.config["quantization_config"] = announced("nvfp4-pack-quantized", weights, ignored)
    return written


def compressed_fp8(config: Mapping[str, Any], dtype: str = "BF16") -> Written:
    """compressed-tensors' FP8-dynamic: linears and experts, with one linear that is ignored by its path."""

    def linear(rng: np.random.Generator, shape: tuple[int, int], gain: float) -> Matrix:
        return fp8_linear(rng, shape, gain, dtype)

    kept = "model.decoder.layers.0.self_attn.o_proj"
    choose = grouped(("experts", "mlp", "attention", "self_conditioning"), linear)
    written = by_linear(config, lambda param: None if path_of(param) == kept else choose(param))
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False}
    ignored = ["lm_head", "re:.*router.proj$", "re:.*embed_tokens", kept]
    written.config["quantization_config"] = announced("float-quantized", weights, ignored)
    return written


def compressed_int(
    config: Mapping[str, Any],
    bits: int,
    group: int | None,
    dtype: str = "BF16",
    groups: str = "experts mlp attention self_conditioning",
) -> Written:
    """compressed-tensors' W4A16 or W8A16 without a shift: linears and experts."""

    def linear(rng: np.random.Generator, shape: tuple[int, int], gain: float) -> Matrix:
        return int_linear(rng, shape, gain, bits, group, dtype)

    written = by_linear(config, grouped(groups.split(), linear))
    weights = {
        "num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, "actorder": None,
        "group_size": group, "strategy": "group" if group else "channel",
    }  # fmt: skip
    ignored = ["lm_head", "re:.*router.*", "re:.*embed_tokens"]
    written.config["quantization_config"] = announced("pack-quantized", weights, ignored)
    return written


def compressed_three(config: Mapping[str, Any]) -> Written:
    """NVFP4 experts, an MLP of 4-bit and an attention of 8-bit integers, told apart by their targets."""
    chosen: dict[str, Linear] = {
        "experts": packed_linear,
        "mlp": lambda rng, shape, gain: int_linear(rng, shape, gain, 4, 32, "F16"),
        "attention": lambda rng, shape, gain: int_linear(rng, shape, gain, 8, None, "BF16"),
    }
    written = by_linear(config, lambda param: chosen.get(param.group))
    four = {"num_bits": 4, "type": "int", "group_size": 32.0, "strategy": "group", "actorder": "static"}
    eight = {"num_bits": 8, "type": "int", "group_size": -1, "strategy": "channel", "symmetric": True}
    fp4 = {
        "num_bits": 4,
        "type": "float",
        "group_size": 16,
        "scale_dtype": "torch.float8_e4m3fn",
        "zp_dtype": None,
    }
    own = {
        "a": {"format": "pack-quantized", "targets": ["Linear"], "weights": four},
        "b": {
            "format": "pack-quantized",
            "targets": [r"re:.*self_attn\.[qkvo]_proj$", "*.self_attn.*"],
            "weights": eight,
        },
        "c": {"format": "nvfp4-pack-quantized", "targets": ["re:.*experts.*"], "weights": fp4},
        "d": {"targets": ["re:.*self_attn"], "weights": None, "output_activations": {"num_bits": 8}},
    }
    written.config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": own,
        "ignore": ["lm_head", "router"],
        "transform_config": {"config_groups": {}},
        "sparsity_config": {"format": "dense", "global_sparsity": 0.1},
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False},
    }
    return written


def without(written: Written, ending: str, keep: str = "") -> Written:
    """Without the tensors of this last name, but for those whose name has `keep` in it."""
    gone = [name for name in written.tensors if name.endswith(ending) and not (keep and keep in name)]
    assert gone
    for name in gone:
        del written.tensors[name]
    return written


CACHE_SCALES = (  # a layer's, as exporters spell them
    "k_proj.k_scale", "v_proj.v_scale", "k_scale", "v_scale", "q_scale", "kv_cache.k_scale", "attn.v_scale",
    "v_proj.output_scale", "k_zero_point",
)  # fmt: skip


def with_cache_scales(written: Written, **announcement: Any) -> Written:
    """With calibrated scales of an 8-bit KV cache in every spelling."""
    for layer, name in ((layer, name) for layer in (0, 1) for name in CACHE_SCALES):
        written.tensors[f"model.decoder.layers.{layer}.self_attn.{name}"] = single(0.01)
    written.config.setdefault("quantization_config", {}).update(announcement)
    return written


def weight_only(written: Written) -> Written:
    """As exported without quantized activations: announced by another algorithm, or by a null."""
    own = written.config["quantization_config"]
    if own["quant_method"] == "modelopt":
        own["quant_algo"] = "W4A16_NVFP4"
        return without(written, ".input_scale")
    own["config_groups"]["group_0"]["input_activations"] = None
    return without(written, ".input_global_scale")


def by_groups(written: Written) -> Written:
    """ModelOpt's newer announcement: no algorithm but the numbers of a group, and whole floats."""
    own = written.config["quantization_config"]
    del own["quant_algo"]
    four = {"dynamic": False, "num_bits": 4.0, "type": "float", "group_size": 16.0}
    own["config_groups"] = {"group_0": {"input_activations": four, "weights": four, "targets": ["Linear"]}}
    own["group_size"] = 16.0
    return written


def compressed_mixed(config: Mapping[str, Any]) -> Written:
    """NVFP4 experts beside FP8 attention in one announcement of two groups."""
    chosen: dict[str, Linear] = {"experts": packed_linear, "attention": fp8_linear}
    written = by_linear(config, lambda param: chosen.get(param.group))
    four = {"num_bits": 4, "type": "float", "group_size": 16}
    eight = {"num_bits": 8, "type": "float", "strategy": "channel"}
    written.config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {
            "group_0": {"format": "nvfp4-pack-quantized", "targets": ["re:.*experts.*"], "weights": four},
            "group_1": {"format": "float-quantized", "targets": ["re:.*self_attn.*"], "weights": eight},
        },
        "ignore": ["re:.*mlp.*", "lm_head"],
    }
    return written


def announced(format: str, weights: Mapping[str, Any], ignored: list[str]) -> dict[str, Any]:
    """compressed-tensors' announcement of one group."""
    group = {"targets": ["Linear"], "weights": dict(weights), "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "quantization_status": "compressed",
    }


# ---- the cases ----------------------------------------------------------------------------------

SCALES = ("BF16", "F16", "F32")
WIDTHS = [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]

# Every width with every type of scale, every group with every type.
AFFINE = {
    f"affine {bits}bit g{group}": (bits, group, SCALES[(index + index // 3) % 3])
    for index, (bits, group) in enumerate(WIDTHS)
}


def affine_case(bits: int, group: int, dtype: str) -> Callable[[], Written]:
    return lambda: mlx(BY_32 if group == 32 else EVEN, entry("affine", bits, group), dtype=dtype)


CASES: dict[str, Callable[[], Written]] = {name: affine_case(*how) for name, how in AFFINE.items()}
CASES |= {
    "mlx community": lambda: mlx(EVEN, entry("affine", 4, 64), {EIGHT: entry("affine", 8, 64)}),
    # Keys with the wrapper's name in front, no mode, and modules that stay as they are.
    "mlx exceptions": lambda: mlx(
        EVEN,
        {"group_size": 64, "bits": 4},
        {
            EIGHT: {"group_size": 32, "bits": 8},
            r"0\.experts\.gate_up|self_conditioning|1\.self_attn\.o_proj": False,
            r"1\.router": False,
        },
        prefix="language_model.",
    ),
    "mlx plain embedding": lambda: mlx(BY_32, entry("mxfp4"), {"embed_tokens|router": False}),
    "mlx mixed modes": lambda: mlx(
        BY_32, entry("mxfp8"), {"experts": entry("nvfp4"), "embed": entry("affine", 6, 32)}, factor="mixed"
    ),
    "mlx mxfp4": lambda: mlx(BY_32, entry("mxfp4")),
    "mlx mxfp8": lambda: mlx(BY_32, entry("mxfp8")),
    "mlx nvfp4": lambda: mlx(BY_16, entry("nvfp4")),
    "mlx nvfp4 factor a matrix": lambda: mlx(BY_16, entry("nvfp4"), factor="matrix"),
    "mlx nvfp4 factor a row": lambda: mlx(BY_16, entry("nvfp4"), factor="row"),
    "modelopt": lambda: modelopt(BY_16),
    "modelopt apart": lambda: modelopt(BY_16, (1,), apart=True),
    "modelopt mlp": lambda: modelopt(BY_16, groups="experts mlp"),
    "modelopt spared": lambda: modelopt(BY_16, spared=True),
    "modelopt apart, spared": lambda: modelopt(BY_16, apart=True, spared=True),
    "compressed nvfp4": lambda: compressed_nvfp4(BY_16),
    "compressed nvfp4 scalars": lambda: compressed_nvfp4(BY_16, ()),
    "compressed nvfp4 spared": lambda: compressed_nvfp4(BY_16, spared=True),
    "compressed fp8 BF16": lambda: compressed_fp8(BY_32),
    "compressed fp8 F32": lambda: compressed_fp8(BY_4, "F32"),
    "compressed mixed": lambda: compressed_mixed(BY_16),
    "compressed int4 g32 BF16": lambda: compressed_int(BY_32, 4, 32),
    "compressed int4 g128 F16": lambda: compressed_int(EVEN, 4, 128, "F16"),
    "compressed int4 row F32": lambda: compressed_int(BY_32, 4, None, "F32"),
    "compressed int8 g64 BF16": lambda: compressed_int(EVEN, 8, 64),
    "compressed int8 row BF16": lambda: compressed_int(EVEN, 8, None),
    "compressed three kinds": lambda: compressed_three(BY_32),
    # What exporters add to the two NVFP4 layouts, or leave out.
    "modelopt weight-only": lambda: weight_only(modelopt(BY_16)),
    "modelopt partly calibrated": lambda: without(modelopt(BY_16), ".input_scale", "experts.1."),
    "modelopt with cache scales": lambda: with_cache_scales(
        modelopt(BY_16), kv_cache_scheme={"num_bits": 8, "type": "float", "dynamic": False}
    ),
    "modelopt by groups": lambda: by_groups(modelopt(BY_16)),
    "compressed nvfp4 weight-only": lambda: weight_only(compressed_nvfp4(BY_16)),
    "compressed nvfp4 with cache scales": lambda: with_cache_scales(
        compressed_nvfp4(BY_16), kv_cache_scheme={"num_bits": 8}
    ),
    "plain with cache scales": lambda: with_cache_scales(
        by_linear(BY_16, lambda param: None),
        quant_method="modelopt",
        quant_algo=None,
        kv_cache_quant_algo="FP8",
    ),
}

# One case of every layout and mode.
LAYOUTS = [
    "affine 4bit g32",
    "mlx mxfp4",
    "mlx mxfp8",
    "mlx nvfp4 factor a row",
    "modelopt",
    "compressed nvfp4",
    "compressed fp8 BF16",
    "compressed int4 g32 BF16",
]
