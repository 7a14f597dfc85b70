"""Random changes of a checkpoint's files."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:05e9\nsize 17477929\n"
WORDS = ["", "a", "sliding_attention", "bfloat16", "nvfp4", "modelopt", "compressed-tensors", "\ud800", "\x1b[31m", "../x", "é" * 300, "<bos>", "gelu"]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 3, 7, 255, 256.0, 0.5, 1e-300, 1e300, -0.0, 2**31, 2**40, 2**63, 10**30, True, False]
COMPONENTS = [
    {"type": "FixedLength", "length": 0}, {"type": "FixedLength", "length": 3}, {"type": "Whitespace"}, {"type": "NFC"},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}, {"type": "Lowercase"},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}, {"type": "Fuse"},
    {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
    {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<x>"}, {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0},
    {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9},
    {"max_length": 3, "strategy": "LongestFirst", "stride": 5, "direction": "Right"}, {"type": "Strip", "content": "a", "start": 1, "stop": 9},
    {"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
]  # fmt: skip
SNIPPETS = [
    "{{ 1 / 0 }}", "{% for i in range(99999) %}", "{% endfor %}", "{{ messages }}", "{{ x }}", "{{ 'a' * 10 ** 9 }}", "{% if ",
    "{{ raise_exception('no') }}", "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{# ", "\x1b[2J", "\ud83d"[:0] + "🙂", "{{ messages[0].content.x.y }}", "{{ bos_token }}",
    "{% for a in messages %}{% for b in messages %}{{ loop.index }}{% endfor %}{% endfor %}", "{{ tools | tojson }}", "{% break %}", "}}", "{{",
    "{{ '%9999999999d' % 1 }}", "{{ lipsum(n=10 ** 6) }}", "{% generation %}", "{{ strftime_now('%Y') }}", "<|turn>", "{{ messages | map('upper') | list }}",
]  # fmt: skip


def mutate(folder: Path, r: Random) -> list[str]:
    """Change one to three files of a folder; says what was changed."""
    done = []
    for _ in range(1 if r.random() < 0.8 else r.randint(2, 3)):
        path = folder / r.choice(NAMES)
        change = r.choice(CHANGES[path.suffix])
        if r.random() < 0.1 or not path.is_file():
            change = r.choice(FILE_CHANGES if path.is_file() else FILE_CHANGES[1:])
        try:
            change(path, r)
        except (ValueError, RecursionError, FileNotFoundError, IsADirectoryError, KeyError, TypeError):
            continue  # an earlier change has left nothing to change so
        done.append(f"{path.name}: {change.__name__.strip('_')}")
    return done


NAMES = (
    ["config.json"] * 4
    + ["tokenizer.json"] * 4
    + ["chat_template.jinja"] * 4
    + ["model.safetensors"] * 5
    + ["generation_config.json", "tokenizer_config.json"] * 2
    + ["model.safetensors.index.json", "special_tokens_map.json", "hf_quant_config.json", "added_tokens.json"]
)


# ---- any file -----------------------------------------------------------------------------------


def _flip(path: Path, r: Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(r.choice([1, 1, 4, 100])):
        data[_place(data, r)] = r.randrange(256)
    path.write_bytes(data)


def _place(data: bytes | bytearray, r: Random) -> int:
    """Mostly near the beginning: headers are there."""
    return r.randrange(min(len(data), r.choice([8, 2000, len(data)])))


def _cut(path: Path, r: Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: _place(data, r)])


def _drop(path: Path, r: Random) -> None:
    data = path.read_bytes()
    start = _place(data, r)
    path.write_bytes(data[:start] + data[start + r.choice([1, 10, 1000]) :])


def _insert(path: Path, r: Random) -> None:
    data = path.read_bytes()
    start = _place(data, r)
    junk = r.choice([b"\0" * 9, b"\xff\xfe", b"[" * 5000, b'{"a":' * 300, b" ", b"9" * 5000, r.randbytes(20)])
    path.write_bytes(data[:start] + junk + data[start:])


def _zeros(path: Path, r: Random) -> None:
    data = path.read_bytes()
    start = r.randrange(len(data))
    path.write_bytes(data[:start] + bytes(len(data) - start))


def _mark(path: Path, r: Random) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def _pointer(path: Path, r: Random) -> None:
    path.unlink(missing_ok=True)
    path.write_text(POINTER)


def _missing(path: Path, r: Random) -> None:
    path.unlink()


def _pipe(path: Path, r: Random) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _folder(path: Path, r: Random) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def _link(path: Path, r: Random) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(r.choice(["nowhere", path.name, "/dev/zero", "/dev/full", ".", "config.json"]))


def _other(path: Path, r: Random) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(r.choice([b"", b"{}", b"[]", b"null", b"5", b"x" * 100000, b'{"a": 1}']))


# ---- JSON ---------------------------------------------------------------------------------------


def _junk(r: Random, depth: int = 0) -> Any:
    kind = r.randrange(7 if depth < 3 else 4)
    if kind == 4:
        return [_junk(r, depth + 1) for _ in range(r.randrange(3))]
    if kind == 5:
        return {r.choice(WORDS): _junk(r, depth + 1) for _ in range(r.randrange(3))}
    return [
        None,
        r.choice(NUMBERS),
        r.choice(WORDS),
        r.random() * 10 ** r.randint(-9, 40),
        0,
        0,
        r.choice(COMPONENTS),
    ][kind]


def _holders(data: Any, found: list[Any]) -> list[Any]:
    if isinstance(data, dict | list) and data:
        found.append(data)
        for value in list(data.values() if isinstance(data, dict) else data)[:200]:
            _holders(value, found)
    return found


def _json(path: Path, r: Random) -> None:
    data = json.loads(path.read_text())
    for _ in range(r.choice([1, 1, 2, 5])):
        _edit(data, r)
    path.write_text(json.dumps(data))


def _edit(data: Any, r: Random) -> None:
    """Replace, remove, copy or add one value."""
    holder = r.choice(_holders(data, [])[: r.choice([1, 8, 10**6])])
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    key, what = r.choice(keys), r.random()
    if what < 0.6:
        holder[key] = _near(holder[key], r) if r.random() < 0.5 else _junk(r)
    elif what < 0.75:
        del holder[key]
    elif what < 0.85:
        holder[key] = copy.deepcopy(holder[r.choice(keys)])
    elif isinstance(holder, dict):
        known = [
            "quantization",
            "quantization_config",
            "per_layer_config",
            "truncation",
            "padding",
            "chat_template",
            "extra_special_tokens",
            "added_tokens_decoder",
            "eos_token_id",
            "sampler_config",
        ]
        holder[r.choice(known)] = _junk(r)
    else:
        holder.extend([_junk(r)] * r.choice([1, 100]))


def _near(value: Any, r: Random) -> Any:
    """A value like this one."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return r.choice([value + 1, value - 1, -value, value * 2, float(value), str(value), value * 10**9, 0])
    if isinstance(value, str):
        return r.choice([value + "x", value[:-1], value.upper(), value * 1000, ""])
    return copy.deepcopy(value)[: len(value) // 2] if isinstance(value, list) else {}


def _component(path: Path, r: Random) -> None:
    data = json.loads(path.read_text())
    places = ["normalizer", "pre_tokenizer", "model", "decoder", "post_processor", "truncation", "padding"]
    data[r.choice(places)] = copy.deepcopy(r.choice(COMPONENTS))
    path.write_text(json.dumps(data))


# ---- templates and weights ----------------------------------------------------------------------


def _template(path: Path, r: Random) -> None:
    text = path.read_text()
    for _ in range(r.choice([1, 1, 3])):
        at = r.randrange(len(text) + 1)
        text = text[:at] + r.choice(SNIPPETS) + text[at:]
    path.write_text(text)


def _lines(path: Path, r: Random) -> None:
    lines = path.read_text().splitlines(keepends=True)
    for _ in range(r.choice([1, 2, 5])):
        lines.insert(r.randrange(len(lines)), lines.pop(r.randrange(len(lines))))
    path.write_text("".join(lines))


def _header(path: Path, r: Random) -> None:
    """The JSON of a safetensors file's header, with its length."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    _edit(header, r)
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])


def _tensor(path: Path, r: Random) -> None:
    """The bytes of one tensor: zeros, ones (NaN in floats) or noise."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    start, stop = r.choice([e for name, e in header.items() if name != "__metadata__"])["data_offsets"]
    size = stop - start
    data[8 + length + start : 8 + length + stop] = r.choice([bytes(size), b"\xff" * size, r.randbytes(size)])
    path.write_bytes(data)


Change = Callable[[Path, Random], None]
_BYTES: list[Change] = [_flip, _cut, _drop, _insert, _zeros]
FILE_CHANGES: list[Change] = [_mark, _pointer, _missing, _pipe, _folder, _link, _other]
CHANGES: dict[str, list[Change]] = {
    ".json": [*_BYTES, _json, _json, _json, _json, _component],
    ".jinja": [*_BYTES, _template, _template, _template, _lines],
    ".safetensors": [*_BYTES, _header, _header, _header, _tensor, _tensor],
}
