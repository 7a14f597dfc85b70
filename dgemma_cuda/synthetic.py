"""Random weights made on the device, at any geometry and in any format: a full-size model without a download.

Values are tame, so that a step computes ordinary numbers: activations keep their size through the layers,
and attention does not pick a single key. They mean nothing; bytes and products are those of a real model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dgemma.errors import BackendError
from dgemma.formats.quantized import FP8, NVFP4, Form, Quantized
from dgemma.network.build import build, constants
from dgemma.network.config import Config
from dgemma.network.memory import format_of, weight_bytes
from dgemma.network.ops import Array
from dgemma.network.spec import Param, text_parameters
from dgemma.network.weights import Weights
from dgemma.reports.tables import amount

from .ops import CudaOps

# What a format quantizes: the choices of the published checkpoints.
FORMATS: dict[str, Mapping[str, Form]] = {
    "bf16": {},
    "fp8": dict.fromkeys(("experts", "attention", "mlp"), FP8),
    "nvfp4": {"experts": NVFP4},
}
# Root mean square of a uniformly random E2M1 code.
_E2M1_RMS = 2.93


def check_room(ops: CudaOps, config: Config, form: str) -> None:
    """BackendError with the numbers if weights and a tenth more, for all else, exceed what is free."""
    stored = {p.name: FORMATS[form].get(p.group) for p in text_parameters(config) if len(p.shape) > 1}
    held = format_of(ops.dtype_name)
    needed, free = int(1.1 * weight_bytes(config, held, stored)), ops.free_memory()
    if free is not None and needed > free:
        raise BackendError(
            f"{form} weights of this geometry need {amount(needed)}, and {amount(free)} are free on "
            f"{ops.device}"
        )


def random_weights(
    ops: CudaOps, config: Config, forms: Mapping[str, Form], skew: float, seed: int
) -> Weights:
    """A text model with random weights; `forms` say by class what is a record.

    `skew` spreads the scales of the router's rows: every expert is as likely at 0, and a few are picked
    several times as often as others at 1.
    """
    generator = torch.Generator(ops.device).manual_seed(seed)

    def leaf(param: Param) -> Array:
        form = forms.get(param.group) if param.path[-1] not in ("q_norm", "k_norm") else None
        if form is not None and len(param.shape) > 1:
            return ops.arrange(random_record(ops, param, form, generator), str(param.path[-1]))
        return _array(ops, param, skew, generator)

    return build(config, text_parameters(config), leaf, constants(config, ops), ops)


def _normal(ops: CudaOps, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Normal numbers of `shape` [...] in the compute type."""
    return torch.randn(shape, generator=generator, device=ops.device, dtype=ops.dtype)


def _array(ops: CudaOps, param: Param, skew: float, generator: torch.Generator) -> Array:
    """A parameter of its shape: vectors are constant, the router float32, matrices of the compute type."""
    own = param.path[-1]
    if len(param.shape) == 1:
        # Nothing divides scores by the root of the head size: a small norm of q stands in for that.
        value = {"q_norm": 0.3, "scalar": 0.9, "encoder_scalar": 0.9}.get(str(own), 1.0)
        return torch.full(param.shape, value, device=ops.device, dtype=ops.dtype)
    if param.wide:
        rows = torch.randn(param.shape, generator=generator, device=ops.device) / param.shape[-1] ** 0.5
        spread = torch.randn(param.shape[0], 1, generator=generator, device=ops.device)
        return 3 * rows * (skew * spread).exp()
    return _normal(ops, param.shape, generator) / param.shape[-1] ** 0.5


def random_record(ops: CudaOps, param: Param, form: Form, generator: torch.Generator) -> Quantized:
    """A record on the device whose values have a variance of one over the row's length."""
    lead, inputs = param.shape[:-1], param.shape[-1]
    factor = torch.full((*lead[:-1], 1), inputs**-0.5, device=ops.device)
    if form == FP8:
        codes = torch.empty(param.shape, dtype=torch.uint8, device=ops.device)
        for part in codes if len(lead) > 1 else [codes]:  # an expert at a time: normal numbers are wide
            part.copy_(_normal(ops, part.shape, generator).to(torch.float8_e4m3fn).view(torch.uint8))
        return Quantized(form, codes, factor=factor.expand(lead).contiguous())
    octets: dict[str, Any] = {"dtype": torch.uint8, "device": ops.device, "generator": generator}
    codes = torch.randint(0, 256, (*lead, inputs // 2), **octets)
    scales = torch.randint(0x34, 0x3C, (*lead, inputs // form.group), **octets)  # 0.75 … 1.4
    return Quantized(form, codes, scales, factor=factor / _E2M1_RMS)
