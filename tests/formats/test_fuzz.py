"""Damaged, contradictory and malicious quantized checkpoints: one line of DgemmaError, never anything else.

Every layout's own small checkpoint is the start. What is damaged by chance may still load; what is damaged
on purpose must be refused with the file and the tensor.
"""

from __future__ import annotations

import copy
import json
import re
import struct
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dgemma.checkpoint.checkpoint import Checkpoint
from dgemma.checkpoint.folder import INDEX
from dgemma.errors import DgemmaError
from dgemma.network.numpy_ops import NumpyOps
from tests.checkpoints import Tensor, encode, write_json, write_raw
from tests.formats import writers
from tests.formats.writers import Written, entry, geometry

TINY = geometry(32, 32, 32, 8, 16, vocab=112)
TINY["text_config"] |= {"num_experts": 2, "top_k_experts": 1}
LAYOUTS: dict[str, Callable[[], Written]] = {
    "affine": lambda: writers.mlx(TINY, entry("affine", 4, 32), {"router": entry("affine", 8, 32)}),
    "mxfp4": lambda: writers.mlx(TINY, entry("mxfp4")),
    "mxfp8": lambda: writers.mlx(TINY, entry("mxfp8")),
    "nvfp4": lambda: writers.mlx(TINY, entry("nvfp4")),
    "nvfp4 with factors": lambda: writers.mlx(TINY, entry("nvfp4"), factor="row"),
    "modelopt": lambda: writers.modelopt(TINY),
    "modelopt apart": lambda: writers.modelopt(TINY, (1,), apart=True),
    "compressed nvfp4": lambda: writers.compressed_nvfp4(TINY),
    "compressed fp8": lambda: writers.compressed_fp8(TINY),
    "compressed int": lambda: writers.compressed_int(TINY, 4, 32),
}
SAFETENSORS = "model.safetensors"
# What an error may name: the file at fault, or the one that says what there should be.
FILES = (SAFETENSORS, INDEX, "config.json", "hf_quant_config.json", "generation_config.json")
FUZZ = settings(
    max_examples=120,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@cache
def _small(layout: str) -> Written:
    return LAYOUTS[layout]()


def small(layout: str) -> Written:
    """A small checkpoint of its own for every test."""
    return _small(layout).copy()


def attempt(folder: Path) -> str | None:
    """Open and load: the message of the error, which is one line and names a file, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # flipped factors overflow, and may
            Checkpoint.open(folder).load(NumpyOps())
    except DgemmaError as error:
        message = str(error)
        assert "\n" not in message
        assert any(name in message for name in FILES), message
        return message
    return None


def refused(folder: Path, *parts: str) -> str:
    message = attempt(folder)
    assert message is not None, "it was accepted"
    for part in parts:
        assert part in message, message
    return message


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_start_is_sound(layout: str, tmp_path: Path) -> None:
    assert attempt(small(layout).write(tmp_path)) is None


# ---- by chance ----------------------------------------------------------------------------------


def mutated(draw: st.DrawFn, whole: bytes, start: int, end: int) -> bytes:
    """`whole` with some bytes between `start` and `end` flipped, replaced, doubled or lost, or cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["flip", "digit", "replace", "cut", "lose", "double"]))
        at = draw(st.integers(start, min(end, len(data)) - 1))
        if kind == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "digit":  # the next digit, where there is one: shapes, offsets, bits
            while at < end - 1 and at < len(data) - 1 and not chr(data[at]).isdigit():
                at += 1
            data[at] = draw(st.sampled_from(list(b"0123456789-.e]")))
        elif kind == "replace":
            data[at] = draw(st.sampled_from(list(b'"\\{}[]:,\0\n' + b"\xff")))
        elif kind == "cut":
            del data[at:]
        elif kind == "lose":
            del data[at : at + draw(st.integers(1, 64))]
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        if len(data) <= start:
            break
    return bytes(data)


mutants = st.composite(mutated)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A sound folder of every layout, which a test leaves as it was."""
    done: dict[str, Path] = {}

    def get(layout: str) -> Path:
        if layout not in done:
            done[layout] = small(layout).write(tmp_path_factory.mktemp("fuzz"))
        return done[layout]

    return get


def fuzz(folders: Callable[[str], Path], layout: str, name: str, header: bool) -> None:
    """Mutations of one file: most must be refused, or they miss what is checked."""
    folder = folders(layout)
    whole = (folder / name).read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0] if header else len(whole)
    outcomes: list[str | None] = []

    @FUZZ
    @given(st.data())
    def once(data: st.DataObject) -> None:
        (folder / name).write_bytes(data.draw(mutants(whole, 0, end)))
        outcomes.append(attempt(folder))

    try:
        once()
    finally:
        (folder / name).write_bytes(whole)
    assert sum(outcome is not None for outcome in outcomes) > len(outcomes) / 3


def test_mutated_headers(folders: Any, layout: str) -> None:
    fuzz(folders, layout, SAFETENSORS, header=True)


def test_mutated_configs(folders: Any, layout: str) -> None:
    fuzz(folders, layout, "config.json", header=False)


def test_mutated_hf_quant_config(folders: Any) -> None:
    fuzz(folders, "modelopt apart", "hf_quant_config.json", header=False)


JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 4, 8, 16, 32, 4.0, 32.0, 1.5, float("nan"), float("inf"), 2**31 - 1, 2**70,
    "", "x", "*", "re:(", "re:.*", "[z-a]", "a\nb", "\ud800", [], [[]], ["*"], ["re:.*"], [None, 3, {}], {},
    {"a": 1}, {"bits": 4}, {"bits": 4.0, "group_size": 32.0}, {"bits": [4], "mode": []}, "nvfp4", "affine",
    "mxfp4", "modelopt", "compressed-tensors", "mlx", "float-quantized", "nvfp4-pack-quantized",
]  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every value of a JSON document."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    document = copy.deepcopy(document)
    node = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return document


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json"])
def test_announcements_with_junk_in_every_place(folders: Any, layout: str, name: str) -> None:
    """Every value of an announcement is replaced by every kind of junk, one at a time."""
    folder = folders(layout)
    if not (folder / name).exists():
        return
    whole = (folder / name).read_text()
    document = json.loads(whole)
    # MLX's files say everything twice, and lists of patterns are long.
    said = "quantization" if "quantization" in document else "quantization_config"
    own = [path for path in places(document) if path[0] == said and path[-1] not in range(1, 99)]
    escaped = []
    for path in own:
        for junk in JUNK:
            (folder / name).write_text(json.dumps(changed(document, path, junk)))
            try:
                attempt(folder)
            except Exception as error:
                where = ".".join(map(str, path))
                escaped.append(f"{where} = {junk!r}: {type(error).__name__}: {error}")
    (folder / name).write_text(whole)
    assert not escaped, "\n".join(escaped)


def test_configs_with_junk(folders: Any, layout: str) -> None:
    """Any value of the rest of config.json, by chance. The number of experts has a test of its own."""
    folder = folders(layout)
    whole = (folder / "config.json").read_text()
    document = json.loads(whole)
    rest = [
        path
        for path in places(document)
        if not str(path[0]).startswith("quantization") and path[-1] != "num_experts"
    ]

    @FUZZ
    @given(st.sampled_from(rest), st.sampled_from(JUNK))
    def once(path: tuple[Any, ...], junk: Any) -> None:
        (folder / "config.json").write_text(json.dumps(changed(document, path, junk)))
        attempt(folder)

    try:
        once()
    finally:
        (folder / "config.json").write_text(whole)


# ---- headers, on purpose ------------------------------------------------------------------------


def of_each_role(written: Written) -> list[str]:
    """A tensor of every last part of a name, the last of its kind: other experts, another layer."""
    last = {name.rpartition(".")[2]: name for name in sorted(written.tensors)}
    return sorted(last.values())


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    whole = file.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    return json.loads(whole[8:end]), whole[end:]


ABSURD: dict[str, Any] = {
    "huge": {"shape": [2**62, 2**62]},
    "beyond 64 bits": {"shape": [2**70, 1]},
    "large": {"shape": [2**40], "data_offsets": [0, 2**40]},
    "negative": {"shape": [-4, 4]},
    "bool": {"shape": [True, 4]},
    "fraction": {"shape": [4.0, 4]},
    "text": {"shape": ["4"]},
    "deep": {"shape": [1] * 9},
    "no shape": {"shape": None},
    "zero": {"shape": [0, 4]},
    "overlap": {"data_offsets": [0, 8]},
    "out of range": {"data_offsets": [2**50, 2**50 + 8]},
    "backwards": {"data_offsets": [16, 8]},
    "foreign type": {"dtype": "F4_E2M1"},
    "type of a wrong type": {"dtype": {"U": 32}},
}


@pytest.mark.parametrize("fault", ABSURD)
def test_absurd_entries_name_file_and_tensor(layout: str, tmp_path: Path, fault: str) -> None:
    """For a tensor of every role; whatever a header claims, nothing of that size is asked for."""
    written = small(layout)
    file = written.write(tmp_path) / SAFETENSORS
    header, data = header_of(file)
    for name in of_each_role(written):
        write_raw(file, json.dumps(header | {name: header[name] | ABSURD[fault]}), data)
        tracemalloc.start()
        try:
            message = refused(tmp_path, SAFETENSORS)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        # What an overlap or a hole hits first may be the neighbour.
        assert repr(name) in message or "data_offsets" in ABSURD[fault], message
        assert re.search(r"tensor 'model\.[\w.]+'", message), message
        assert peak < 5_000_000


def test_a_name_twice(layout: str, tmp_path: Path) -> None:
    written = small(layout)
    file = written.write(tmp_path) / SAFETENSORS
    header, data = header_of(file)
    name = of_each_role(written)[-1]
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    write_raw(file, text, data)
    refused(tmp_path, SAFETENSORS, repr(name), "twice")


def test_cut_files(layout: str, tmp_path: Path) -> None:
    """At every power of two of the file, in its header or in its data."""
    file = small(layout).write(tmp_path) / SAFETENSORS
    whole = file.read_bytes()
    for length in [2**k for k in range(len(whole).bit_length())] + [len(whole) - 1]:
        file.write_bytes(whole[:length])
        refused(tmp_path, SAFETENSORS, "truncated")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/tmp/model.safetensors", "..", "a/b.safetensors"])
def test_an_index_must_not_leave_its_folder(layout: str, tmp_path: Path, shard: str) -> None:
    written = small(layout)
    written.write(tmp_path / "in", shards=2)
    written.write(tmp_path)  # what the path leads to is there
    data = json.loads((tmp_path / "in" / INDEX).read_text())
    name = of_each_role(written)[0]
    data["weight_map"][name] = shard
    write_json(tmp_path / "in" / INDEX, data)
    refused(tmp_path / "in", INDEX, repr(name), repr(shard))


# ---- tensors that are not what is announced -------------------------------------------------------


def announcement(written: Written) -> dict[str, Any]:
    return {key: value for key, value in written.config.items() if key.startswith("quantization")}


FORMATS = [
    "affine",
    "mxfp4",
    "mxfp8",
    "nvfp4",
    "modelopt",
    "compressed nvfp4",
    "compressed fp8",
    "compressed int",
]
PAIRS = [(says, has) for says in FORMATS for has in [*FORMATS, "plain"] if says != has]


@pytest.mark.parametrize(("says", "has"), PAIRS)
def test_an_announcement_over_tensors_of_another_layout(tmp_path: Path, says: str, has: str) -> None:
    written = small("affine" if has == "plain" else has)
    if has == "plain":
        written.write_decoded(tmp_path)
        config = {**TINY, **announcement(small(says))}
        write_json(tmp_path / "config.json", config)
    else:
        written.config = {**TINY, **announcement(small(says))}
        written.write(tmp_path)
    message = refused(tmp_path, SAFETENSORS)
    assert re.search(r"'model\.[\w.]+'", message), message


def test_nothing_is_announced(layout: str, tmp_path: Path) -> None:
    written = small(layout)
    written.config, written.files = dict(TINY), {}
    refused(written.write(tmp_path), SAFETENSORS, "does not announce")


UNREAD = ("input_scale", "input_global_scale", "weight_shape")


def test_any_missing_tensor_is_named(layout: str, tmp_path: Path) -> None:
    """One tensor of every role is gone: it is named, or its module's where that is no longer quantized."""
    written = small(layout)
    for name in of_each_role(written):
        less = written.copy()
        del less.tensors[name]
        if name.endswith("weight_scale_2") and layout == "nvfp4 with factors":
            continue  # MLX's files need no factor, so one that is gone leaves no trace
        if name.rpartition(".")[2] in UNREAD:
            assert attempt(less.write(tmp_path)) is None
            continue
        refused(less.write(tmp_path), SAFETENSORS, f"'{name.rpartition('.')[0]}.")


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    """All tensors of one expert and projection, in each layout that takes stacks apart."""
    for layout in ("modelopt", "compressed nvfp4", "compressed fp8", "compressed int"):
        written = small(layout)
        root = "model.decoder.layers.1.experts.1.up_proj."
        gone = [name for name in written.tensors if name.startswith(root)]
        for name in gone:
            del written.tensors[name]
        gone = [name for name in gone if name.rpartition(".")[2] not in UNREAD]
        refused(written.write(tmp_path), SAFETENSORS, f"{len(gone)} tensors missing", repr(gone[0]))


def test_an_extra_expert_is_named(tmp_path: Path) -> None:
    for layout in ("modelopt", "compressed nvfp4", "compressed fp8", "compressed int"):
        written = small(layout)
        old, new = "layers.1.experts.1.up_proj.", "layers.1.experts.2.up_proj."
        extra = {name.replace(old, new): t for name, t in written.tensors.items() if old in name}
        assert extra
        written.tensors |= extra
        refused(
            written.write(tmp_path), SAFETENSORS, f"{len(extra)} tensors unknown", repr(next(iter(extra)))
        )


def test_a_fused_stack_has_one_expert_too_many(tmp_path: Path) -> None:
    for layout in ("affine", "mxfp4", "mxfp8", "nvfp4", "nvfp4 with factors"):
        written = small(layout)
        for part in ("weight", "scales"):
            more = written.copy()
            name = f"model.decoder.layers.0.experts.down_proj.{part}"
            old = written.tensors[name]
            raw = old.raw + old.raw[: len(old.raw) // 2]
            more.tensors[name] = Tensor(old.dtype, (3, *old.shape[1:]), raw)
            refused(more.write(tmp_path), SAFETENSORS, repr(name), "(3, 32", "not (2, 32")


# Another type of the same width, so that nothing but the type is wrong.
SWAPPED = {
    "U32": "I32",
    "I32": "U32",
    "I64": "F64",
    "U8": "I8",
    "F8_E4M3": "U8",
    "F32": "I32",
    "BF16": "I16",
    "F16": "U16",
}


def test_any_wrong_type_is_named(layout: str, tmp_path: Path) -> None:
    written = small(layout)
    for name in of_each_role(written):
        wrong, old = written.copy(), written.tensors[name]
        wrong.tensors[name] = Tensor(SWAPPED[old.dtype], old.shape, old.raw)
        refused(wrong.write(tmp_path), SAFETENSORS, f"{name!r} is {SWAPPED[old.dtype]}, not {old.dtype}")


def test_any_wrong_shape_is_named(layout: str, tmp_path: Path) -> None:
    """The same bytes in another shape: turned round, flat, or with an axis more."""
    written = small(layout)
    for name in of_each_role(written):
        old = written.tensors[name]
        count = len(old.raw) // {"U32": 4, "F32": 4, "I32": 4, "I64": 8, "BF16": 2}.get(old.dtype, 1)
        for shape in ({old.shape[::-1], (count,), (1, *old.shape, 1), (count, 1, 1)}) - {old.shape}:
            if "scale" in name and count == 1 and shape in ((), (1,)):
                continue  # scalars are written both ways
            if name.endswith("weight_scale") and layout == "compressed fp8" and shape == (count,):
                continue  # and so are scales a row
            wrong = written.copy()
            wrong.tensors[name] = Tensor(old.dtype, shape, old.raw)
            refused(wrong.write(tmp_path), SAFETENSORS, f"{name!r} is {shape}, not")


# ---- announcements that contradict the tensors ----------------------------------------------------

MODULE = "model.decoder.layers.1.self_attn.o_proj"


def mlx_with(tmp_path: Path, layout: str = "affine", **own: Any) -> Path:
    written = small(layout)
    for key in ("quantization", "quantization_config"):
        written.config[key] = {**written.config[key], **own}
    return written.write(tmp_path)


@pytest.mark.parametrize(
    ("bits", "group"), [(4, 64), (8, 32), (2, 64), (3, 32), (5, 32), (8, 64), (8, 128), (2, 32), (6, 32)]
)
def test_wrong_bits_or_groups(tmp_path: Path, bits: int, group: int) -> None:
    """Also (8, 64) and (2, 32), whose words or scales alone would fit."""
    refused(mlx_with(tmp_path, bits=bits, group_size=group), SAFETENSORS, "'model.decoder.")


@pytest.mark.parametrize("how", [{"bits": 7}, {"bits": 4.5}, {"group_size": "32"}, {"group_size": 16}])
def test_numbers_that_affine_does_not_have(tmp_path: Path, how: dict[str, Any]) -> None:
    refused(mlx_with(tmp_path, **how), "config.json", "affine quantization")
    override = {"group_size": 32, "bits": 4, **how}
    refused(mlx_with(tmp_path, **{MODULE: override}), "config.json", MODULE, "affine quantization")


def test_whole_floats_are_integers(tmp_path: Path) -> None:
    """Also beside a mode that is null, and in an override."""
    whole = {"bits": 4.0, "group_size": 32.0, "mode": None}
    assert attempt(mlx_with(tmp_path, **whole, **{MODULE: whole})) is None


def test_an_override_for_a_module_without_scales(tmp_path: Path) -> None:
    written = writers.mlx(TINY, entry("affine", 4, 32), {r"1\.self_attn\.o_proj": False})
    del written.config["quantization"][MODULE]
    assert attempt(written.write(tmp_path)) is None  # the tensors say so
    written.config["quantization"][MODULE] = entry("affine", 4, 32)
    refused(written.write(tmp_path), SAFETENSORS, f"'{MODULE}.scales'")


@pytest.mark.parametrize("module", [MODULE, "model.decoder.layers.0.experts.gate_up_proj"])
def test_override_false_for_a_quantized_module(tmp_path: Path, module: str) -> None:
    for layout in ("affine", "mxfp4", "mxfp8", "nvfp4"):
        refused(mlx_with(tmp_path, layout, **{module: False}), SAFETENSORS, f"'{module}.")


def test_an_override_of_another_width(tmp_path: Path) -> None:
    other = entry("affine", 8, 32)
    refused(mlx_with(tmp_path, **{MODULE: other}), SAFETENSORS, f"'{MODULE}.weight' is (32, 8)")


@pytest.mark.parametrize(
    ("layout", "key", "pattern"),
    [
        ("modelopt", "ignore", "*experts*"),
        ("modelopt", "ignore", "model.decoder.layers.1"),
        ("compressed nvfp4", "ignore", "re:.*mlp"),
        ("compressed nvfp4", "ignore", "re:.*experts"),
        ("compressed fp8", "ignore", MODULE),
        ("compressed fp8", "ignore", "re:.*experts"),
    ],
)
def test_excluded_modules_that_are_quantized(tmp_path: Path, layout: str, key: str, pattern: str) -> None:
    written = small(layout)
    written.config["quantization_config"][key].append(pattern)
    message = refused(written.write(tmp_path), SAFETENSORS)
    assert re.search(r"'model\.decoder\.layers\.[01]\.[\w.]+'", message), message


def test_excluded_experts_of_hf_quant_config(tmp_path: Path) -> None:
    written = small("modelopt apart")
    written.files["hf_quant_config.json"]["quantization"]["exclude_modules"].append("*experts*")
    refused(written.write(tmp_path), SAFETENSORS, "'model.decoder.layers.0.")


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"quantization": []}', '{"quantization": null}', "\xff"]
)
def test_unusable_hf_quant_config(tmp_path: Path, content: str) -> None:
    folder = small("modelopt apart").write(tmp_path)
    (folder / "hf_quant_config.json").write_text(content, encoding="latin-1")
    refused(folder, "hf_quant_config.json")


def test_rows_that_groups_do_not_divide(tmp_path: Path) -> None:
    """The table of parameters says 48 inputs where groups are of 32: no division may round."""
    written = small("affine")
    written.config["text_config"]["moe_intermediate_size"] = 48
    refused(written.write(tmp_path), SAFETENSORS, "experts.down_proj'", "rows of 48")


# ---- what would cost memory or time ---------------------------------------------------------------


@pytest.mark.parametrize("layout", ["affine", "modelopt", "compressed nvfp4", "compressed fp8"])
def test_a_config_of_countless_experts_costs_nothing(tmp_path: Path, layout: str) -> None:
    """A list of the tensors that a config asks for must not outgrow what the files can hold."""
    written = small(layout)
    written.config["text_config"]["num_experts"] = 2000
    folder = written.write(tmp_path)
    size = (folder / SAFETENSORS).stat().st_size
    tracemalloc.start()
    try:
        refused(folder, "experts")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000 + size


@pytest.mark.parametrize(
    "pattern",
    ["re:(", "re:a{4294967295}", "re:" + "(" * 5000 + ")" * 5000, "re:(?P<a", "re:(?:[a-z_.0-9]+)+!"],
)
def test_expressions_are_never_run(tmp_path: Path, pattern: str) -> None:
    """One from a file may be none, or keep a matcher busy for ever; the tensors say what it left out."""
    for layout in ("compressed nvfp4", "compressed fp8"):
        written = small(layout)
        written.config["quantization_config"]["ignore"].append(pattern)
        assert attempt(written.write(tmp_path)) is None


@pytest.mark.parametrize(
    "pattern", ["re:.*experts.*", r"re:model\.decoder\.layers\.\d+\.experts.*", "experts"]
)
def test_ignored_experts_may_be_stored_whole(tmp_path: Path, pattern: str) -> None:
    """Whether an expression is understood or not; what is neither ignored nor quantized is an error."""
    written = small("compressed nvfp4")
    stacks = [name for name in written.decoded if ".experts." in name]
    for name in [name for name in written.tensors if ".experts." in name]:
        del written.tensors[name]
    written.tensors |= {name: encode(written.decoded[name].astype(np.float32), "BF16") for name in stacks}
    refused(written.write(tmp_path), "experts")
    written.config["quantization_config"]["ignore"].append(pattern)
    assert attempt(written.write(tmp_path)) is None


@pytest.mark.parametrize("layout", ["modelopt", "compressed nvfp4"])
@pytest.mark.parametrize("pattern", ["*" * 2000, "*a" * 500, "[" * 3000, "?" * 3000, "[!" * 500 + "]" * 500])
def test_wildcards_that_would_take_long(tmp_path: Path, layout: str, pattern: str) -> None:
    """Patterns without end: refused or read, but not searched for ever."""
    written = small(layout)
    written.config["quantization_config"]["ignore"].append(pattern)
    attempt(written.write(tmp_path))
