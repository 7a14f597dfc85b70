"""The PyTorch backend: CUDA where there is a GPU, CPU elsewhere, float32 or bfloat16.

Plain but not naive: scaled-dot-product attention, grouped expert products, fused norms. PyTorch's own
operations are differentiable, so that the same graph also trains; our kernels are not.
"""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dgemma.errors import BackendError
from dgemma.formats.quantized import NVFP4, Quantized
from dgemma.formats.stored import Stored
from dgemma.network.ops import KV, Array, Bias, Mask, Notices, Ops, Past, Prediction
from dgemma.network.ops.decoding import dense
from dgemma.network.ops.layers import visible

from .graphs import Graphed, Replay, record_cuda
from .kernels import attention, compiling, fp4, linear, moe, vocabulary
from .kernels.launch import supported
from .kernels.layout import Order, Tiled, fits, untile
from .staging import Staging


class CudaOps(Ops):
    """The compute type is `dtype`, the wide one float32. Integers from the host are int64."""

    name = "cuda"
    # Rows of the kernels' plane of logits, which is bfloat16: twice those of the definition's float32 one.
    kernel_rows = vocabulary.ROWS
    # A piece grows by being copied: at each commit half of it on average, 80 MB of traffic in the release and
    # 0.03 % of a canvas's time. Pieces cost a kernel next to nothing, but each doubling of them a recording.
    # Four hold 16k.
    piece_slots = 4096

    def __init__(
        self,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        w4a4: bool = False,
        kernels: bool | None = None,
        notices: Notices | None = None,
    ):
        """`kernels`: whether ours run; by default on a GPU that has them, in bfloat16."""
        super().__init__(notices)
        self.device, self.dtype = torch.device(device), dtype
        self.on_gpu = self.device.type == "cuda"
        self.dtype_name = str(dtype).removeprefix("torch.")
        self._kernels = kernels
        self.w4a4 = w4a4  # experts in NVFP4 have their activations quantized, too
        self.activations = "nvfp4" if w4a4 else None
        self.reads_host = False  # whether some expert product had to: such steps cannot be recorded

    def asarray(self, x: np.ndarray) -> Array:
        x = np.asarray(x)
        kind = self.dtype if x.dtype.kind == "f" else torch.int64
        return torch.as_tensor(x).to(self.device, kind)

    def aswide(self, x: np.ndarray) -> Array:
        return torch.as_tensor(np.asarray(x)).to(self.device, torch.float32)

    def load(self, stored: Stored, wide: bool = False) -> Array:
        kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[stored.dtype]
        x = self.raw(stored.data).reshape(-1).view(kind).reshape(stored.data.shape)
        return x.to(torch.float32 if wide else self.dtype)

    def raw(self, x: np.ndarray) -> Array:
        """The bytes of x [..., n] as uint8 [..., ·]; a copy, as a file's map is read-only and goes away."""
        octets = (*x.shape[:-1], -1) if x.size else (*x.shape[:-1], 0)
        return self.staging.upload(x).reshape(octets)

    @cached_property
    def staging(self) -> Staging:
        return Staging(self.device)

    def asclasses(self, x: np.ndarray) -> Array:
        return torch.as_tensor(x.astype(np.int16)).to(self.device)

    def integer(self, x: Array) -> Array:
        return x.int()

    def to_numpy(self, x: Array) -> np.ndarray:
        x = x.detach()
        return (x.float() if x.is_floating_point() else x).cpu().numpy()

    def rounded(self, x: float) -> float:
        return float(torch.tensor(x, dtype=self.dtype))

    def to_wide(self, x: Array) -> Array:
        return x.float()

    def to_compute(self, x: Array) -> Array:
        return x.to(self.dtype)

    def like(self, x: Array, reference: Array) -> Array:
        return x.to(reference.dtype)

    def transpose(self, x: Array, *axes: int) -> Array:
        return x.permute(axes)

    def concat(self, parts: Sequence[Array], axis: int) -> Array:
        return torch.cat(list(parts), axis)

    def take(self, x: Array, ids: Array) -> Array:
        return F.embedding(ids, x) if x.ndim == 2 else x[ids]

    def arange(self, stop: int) -> Array:
        return torch.arange(stop, device=self.device)

    def where(self, condition: Array, x: Array, y: Array | float) -> Array:
        return torch.where(condition, x, y)

    def exp(self, x: Array) -> Array:
        return torch.exp(x)

    def log(self, x: Array) -> Array:
        return torch.log(x)

    def tanh(self, x: Array) -> Array:
        return torch.tanh(x)

    def cos(self, x: Array) -> Array:
        return torch.cos(x)

    def sin(self, x: Array) -> Array:
        return torch.sin(x)

    def maximum(self, x: Array, y: Array) -> Array:
        return torch.maximum(x, y)

    def sum(self, x: Array, axis: int, keepdims: bool = False) -> Array:
        return torch.sum(x, axis, keepdim=keepdims)

    def max(self, x: Array, axis: int, keepdims: bool = False) -> Array:
        return torch.amax(x, axis, keepdim=keepdims)

    def argmax(self, x: Array, axis: int) -> Array:
        return torch.argmax(x, axis)

    def argsort(self, x: Array, axis: int) -> Array:
        return torch.argsort(x, dim=axis, stable=True)

    def take_along(self, x: Array, ids: Array, axis: int) -> Array:
        return torch.take_along_dim(x, ids.long(), axis)

    def cumsum(self, x: Array, axis: int) -> Array:
        return torch.cumsum(x, axis)

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        if isinstance(weight, Tiled):
            y = linear.linear(x, weight)
            return y if bias is None else y + bias
        return F.linear(x, dense(self, weight), bias)

    def expert_linear(self, x: Array, weight: Array, experts: Array) -> Array:
        ends = torch.searchsorted(experts, torch.arange(len(weight), device=x.device), right=True)
        if self._groupable(weight):
            return F.grouped_mm(x, weight.transpose(1, 2), offs=ends.int())
        # This reads the host. It is for records, which are widened one expert at a time, for comparisons in
        # float32 on a GPU and for odd test sizes.
        self.reads_host = True
        counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        parts = [
            F.linear(rows, dense(self, weight[expert]))
            for expert, rows in enumerate(x.split(counts))
            if len(rows)
        ]
        return torch.cat(parts)

    def _groupable(self, weight: Array) -> bool:
        """Whether `F.grouped_mm` takes a stack: no record, rows of whole 16 bytes, only bfloat16 on a GPU."""
        if isinstance(weight, Quantized):
            return False
        whole = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
        return whole and (not weight.is_cuda or weight.dtype == torch.bfloat16)

    # ---- what a backend may do differently ------------------------------------------------------

    def free_memory(self) -> int | None:
        if self.device.type != "cuda":
            return super().free_memory()
        return torch.cuda.mem_get_info(self.device)[0]

    def total_memory(self) -> int | None:
        if self.device.type != "cuda":
            return super().total_memory()
        return torch.cuda.mem_get_info(self.device)[1]

    def compile(self, fn: Callable[..., Any], repeats: bool = False) -> Callable[..., Any]:
        """Steps with our kernels are recorded as CUDA graphs, unless a prefill showed host reads in them."""
        if self.device.type != "cuda":
            return fn
        if not repeats:
            return self._announced(fn)
        if not self.kernels:
            return fn  # only attention's kernel finds contexts by a table
        graphed = Graphed(fn, self._record)
        return lambda *args: fn(*args) if self.reads_host else graphed(*args)

    def _announced(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, whose first call says that it compiles kernels."""
        todo = ["compiling kernels for this GPU; they are kept for the next run"]

        def run(*args: Any) -> Any:
            with self.notices.working(todo.pop(), compiling.progress) if todo else nullcontext():
                return fn(*args)

        return run

    def _record(self, run: Callable[[], Any]) -> tuple[Replay, Any]:
        what = "recording a denoising step; once for each number of rows"
        with self.notices.working(what, compiling.progress):
            return record_cuda(run)

    @cached_property
    def kernels(self) -> bool:
        """Whether our kernels run."""
        if self._kernels is not None:
            return self._kernels
        if self.device.type != "cuda" or self.dtype != torch.bfloat16:
            return False
        if reason := supported(self.device):
            self.notices.say(f"{reason}; PyTorch's own operations run instead, slower")
        else:
            compiling.watch()
        return reason is None

    def arrange(self, record: Quantized, name: str) -> Quantized | Tiled:
        if not self.kernels or not fits(record):
            return record
        if len(record.shape) == 2:
            return linear.tile_matrix(record)
        return (fp4 if self.w4a4 and record.form == NVFP4 else moe).tile_stack(record, name)

    # ---- composites with something better than the definition -----------------------------------

    def experts(self, x: Array, weights: Array, ids: Array, gate_up: Array, down: Array) -> Array:
        if self.w4a4:
            return fp4.experts(x, weights, ids, _in_fp4(gate_up), _in_fp4(down))
        if isinstance(gate_up, Tiled) and isinstance(down, Tiled):
            return moe.experts(x, weights, ids, gate_up, down)
        # The two may be stored in different forms, and no kernel does one without the other.
        return super().experts(x, weights, ids, self._stack(gate_up), self._stack(down))

    def _stack(self, weight: Array) -> Array:
        """A stack [E, O, I] for `expert_linear`: tiles become an array in the compute type."""
        return self.to_compute(untile(weight)) if isinstance(weight, Tiled) else weight

    def softmax(self, x: Array, axis: int) -> Array:
        return torch.softmax(x, axis)

    def rms_norm(self, x: Array, weight: Array | None, eps: float) -> Array:
        y = F.rms_norm(x.float(), x.shape[-1:], None if weight is None else weight.float(), eps)
        return y.to(x.dtype)

    def gelu(self, x: Array) -> Array:
        return F.gelu(x, approximate="tanh")

    def attention(self, q: Array, k: Array, v: Array, mask: Mask) -> Array:
        L, S = q.shape[1], k.shape[1]
        square = mask.causal and L == S and (mask.window is None or mask.window >= S)
        seen = None if square else visible(self, L, S, mask)
        # Four axes, as PyTorch's kernels take no fewer.
        return F.scaled_dot_product_attention(
            q[None], k[None], v[None], seen, is_causal=square, scale=1.0, enable_gqa=len(q) != len(k)
        )[0]

    def pasts(self, layers: Sequence[Sequence[Past]], lengths: Sequence[int]) -> Any:
        return attention.table(layers, lengths, self.device) if self.kernels else layers

    def attend(self, q: Array, own: KV, past: Any, lengths: Sequence[int], mask: Mask) -> Array:
        if self.kernels:
            return attention.attend(q, own, past, lengths, mask)
        return super().attend(q, own, past, lengths, mask)

    def rows_at_once(self, table: Array) -> int:
        return self.kernel_rows if self._has_kernel(table) else self.vocab_rows

    def _has_kernel(self, table: Array) -> bool:
        """Whether the vocabulary's kernel runs: it reads no record."""
        return self.kernels and isinstance(table, torch.Tensor)

    def vocabulary_rows(
        self,
        h: Array,
        table: Array,
        softcap: float | None,
        temperature: Array,
        uniforms: Array,
        soft_bound: float = 0.0,
        bias: Bias | None = None,
    ) -> Prediction:
        if softcap is None or not self._has_kernel(table):
            return super().vocabulary_rows(h, table, softcap, temperature, uniforms, soft_bound, bias)
        if not soft_bound:
            return vocabulary.vocabulary(h, table, softcap, temperature, uniforms, bias)
        sparse = vocabulary.Sparse(missing=soft_bound)
        return vocabulary.sparse_vocabulary(h, table, softcap, temperature, uniforms, sparse, bias)

    def peak_memory(self) -> int:
        return (
            torch.cuda.max_memory_allocated(self.device)
            if self.device.type == "cuda"
            else super().peak_memory()
        )


def _in_fp4(weight: Array) -> Tiled:
    """The stack [E, O, I] itself; BackendError unless it is tiled for products in FP4."""
    if not isinstance(weight, Tiled) or weight.order is not Order.UNSIGNED:
        raise BackendError(
            "activations in NVFP4 need experts in NVFP4, and this model has them in another format"
        )
    return weight


def make(
    dtype: str | None = None,
    device: str | None = None,
    activations: str | None = None,
    notices: Notices | None = None,
) -> CudaOps:
    """CudaOps on `device`, by default the first GPU, else the CPU with a notice.

    `dtype` None means bfloat16 on a GPU and float32 on a CPU. `activations` "nvfp4" quantizes what goes into
    experts in NVFP4, too: see `kernels.fp4`. BackendError if the device, or what is asked of it, is not
    there.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            (notices or Notices()).say("no CUDA device found, the cuda backend runs on the CPU")
    place = _place(device)
    if activations and dtype == "float32":
        raise BackendError("activations in NVFP4 need bfloat16 beside them, not float32")
    if activations and (missing := fp4.unsupported(place)):
        raise BackendError(f"activations in NVFP4 are not possible here: {missing}")
    if dtype is None:
        dtype = "bfloat16" if activations or place.type != "cpu" else "float32"
    # A soft embedding sums over the whole vocabulary, for which cuBLAS may else use bfloat16.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return CudaOps(place, getattr(torch, dtype), activations is not None, notices=notices)


def _place(name: str) -> torch.device:
    """The device of this name; BackendError in one line if it is not there or holds no data."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that PyTorch once had a use for
            place = torch.device(name)
            torch.zeros(1, device=place).tolist()  # "meta" can make it, but not read it
    # PyTorch was built without it; its driver; a plug-in of another package.
    except (RuntimeError, AssertionError, ImportError, AttributeError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0][:200]
        raise BackendError(f"device {reprlib.repr(name)} is not usable: {reason}") from None
    if place.type == "cpu" and place.index:
        raise BackendError(f"device {reprlib.repr(name)} is not usable: there is one cpu, cpu:0")
    return place
