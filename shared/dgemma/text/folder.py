"""What a checkpoint's folder says of its text: tokenizer, tokens declared beside it, chat templates.

The files are read as transformers reads them, with three differences. Truncation, padding and dropout that a
training left in tokenizer.json are never applied. BOS is also found where only its id is given. A byte order
mark is no part of a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from dgemma.errors import CheckpointError
from dgemma.files import exists, is_folder, load_json, names, read_text
from dgemma.text.decoding import steps
from dgemma.text.template import ChatTemplate

TOKENIZER_BYTES = 1 << 29  # of tokenizer.json; the released one has 32 MB
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# transformers has renamed the second to the first.
_EXTRA = ("extra_special_tokens", "additional_special_tokens")

Token = tokenizers.AddedToken


def read(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, ChatTemplate]] | None:
    """The tokenizer, and the templates by name; None without tokenizer.json.

    CheckpointError names the file that cannot be read.
    """
    path = folder / "tokenizer.json"
    if not exists(path):
        return None
    config = _optional(folder / "tokenizer_config.json")
    named, extra = _declared(config, _optional(folder / "special_tokens_map.json"))
    raw = _library(path)
    before = {token.content for token in raw.get_added_tokens_decoder().values()}
    raw.add_tokens([token for token in _beside(folder, config) if token.content not in before])
    before = {token.content for token in raw.get_added_tokens_decoder().values()}
    raw.add_special_tokens([t for t in (*named.values(), *extra) if t.content not in before])
    specials = {name: token.content for name, token in named.items()}
    if "bos_token" not in specials and (bos := _bos(folder, raw)) is not None:
        specials["bos_token"] = bos
    templates = {
        name: ChatTemplate(source, specials, where)
        for name, (source, where) in _sources(folder, config).items()
    }
    for template in templates.values():
        if "bos_token" in template.variables and "bos_token" not in specials:
            raise CheckpointError(
                f"{folder}: its chat template begins with bos_token, which no file here names; add it to "
                "tokenizer_config.json"
            )
    return raw, templates


def said(error: BaseException) -> str:
    """One line of what the library says, which raises bare `Exception` and, for a panic, less than that."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _optional(path: Path) -> dict[str, Any]:
    return load_json(path) if exists(path) else {}


def _library(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a file, without what cuts or fills the ids of a text."""
    text = read_text(path, TOKENIZER_BYTES)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({said(error)})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a tokenizer")
    left = [key for key in ("truncation", "padding") if data.get(key) is not None]
    if any(_lengths_of_zero(data.get("pre_tokenizer"))):  # a panic of the library, with a page on stderr
        raise CheckpointError(f"{path}: not a tokenizer (its pre_tokenizer cuts pieces of length 0)")
    try:
        raw = tokenizers.Tokenizer.from_str(json.dumps(data | dict.fromkeys(left)) if left else text)
        if getattr(raw.model, "dropout", None):
            raw.model.dropout = None  # a prompt would have other ids each time
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise CheckpointError(f"{path}: not a tokenizer ({said(error)})") from None
    return raw


def _lengths_of_zero(entry: Any) -> Iterable[bool]:
    if isinstance(entry, dict):
        yield entry.get("type") == "FixedLength" and not entry.get("length", 1)
        nested = entry.get("pretokenizers")
        for one in nested if isinstance(nested, list) else []:
            yield from _lengths_of_zero(one)


# ---- tokens -------------------------------------------------------------------------------------


def _token(value: Any, where: str, special: bool = True) -> Token:
    """A token as a file declares it: its text, or an object with its flags."""
    content = value.get("content") if isinstance(value, dict) else value
    # Half a surrogate pair is no text for the library.
    if not isinstance(content, str) or not content or content != content.encode(errors="ignore").decode():
        raise CheckpointError(f"{where}: {str(value)[:60]!r} is no token")
    if not isinstance(value, dict):
        return Token(content, special=special, normalized=not special)
    flags = {name: value[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in value}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise CheckpointError(f"{where}: {content!r} has unusable flags")
    return Token(content, special=special or value.get("special") is True, **flags)


def _declared(config: Mapping[str, Any], older: Mapping[str, Any]) -> tuple[dict[str, Token], list[Token]]:
    """Special tokens by the names that a template uses, and those without a name.

    special_tokens_map.json, which only older files have, fills in what tokenizer_config.json lacks.
    """
    named: dict[str, Token] = {}
    extra: list[Token] = []
    for source, where in ((config, "tokenizer_config.json"), (older, "special_tokens_map.json")):
        for key in _EXTRA:
            listed = source.get(key) or []
            if isinstance(listed, dict):
                own = {name: _token(value, f"{where}: {key}") for name, value in listed.items()}
                named = own | named
            elif isinstance(listed, list):
                extra += [_token(value, f"{where}: {key}") for value in listed]
            else:
                raise CheckpointError(f"{where}: {key} must be a list or an object")
        for key, value in source.items():
            ours = key in _NAMED or (key.endswith("_token") and isinstance(value, str | dict))
            if ours and value is not None and key not in named and value != "":
                named[key] = _token(value, f"{where}: {key}")
    return named, extra


def _beside(folder: Path, config: Mapping[str, Any]) -> list[Token]:
    """Tokens that tokenizer_config.json or added_tokens.json declares, by their ids."""
    where = "tokenizer_config.json: added_tokens_decoder"
    declared = config.get("added_tokens_decoder")
    if declared is None:
        where = "added_tokens.json"
        pairs = [(id, content) for content, id in _optional(folder / where).items()]
    elif isinstance(declared, dict):
        pairs = list(declared.items())
    else:
        raise CheckpointError(f"{where}: expected an object")
    found = {}
    for id, value in pairs:
        try:
            found[int(str(id))] = _token(value, where, special=False)
        except (TypeError, ValueError):
            raise CheckpointError(f"{where}: {str(id)[:20]!r} is no token's id") from None
    return [found[id] for id in sorted(found)]


def _bos(folder: Path, raw: tokenizers.Tokenizer) -> str | None:
    """BOS where no file names it: what tokenizer.json puts before a text, or by its id in a configuration."""
    if raw.post_processor is not None:
        for step in steps(json.loads(raw.post_processor.__getstate__()), "processors"):
            first = (step.get("single") or [{}])[0].get("SpecialToken")
            if first and raw.token_to_id(first["id"]) is not None:
                return str(first["id"])
    for name in ("config.json", "generation_config.json"):
        data = _optional(folder / name)
        text = data.get("text_config")
        for source in (data, text if isinstance(text, dict) else {}):
            id = source.get("bos_token_id")
            if type(id) is int and 0 <= id < 2**31 and (token := raw.id_to_token(id)):
                return token
    return None


# ---- templates ----------------------------------------------------------------------------------


def _sources(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The sources of the templates by name, each with its place; files come before tokenizer_config.json."""
    found: dict[str, tuple[str, str]] = {}
    path = folder / "chat_template.jinja"
    if exists(path):
        found["default"] = (read_text(path), str(path))
    more = folder / "additional_chat_templates"
    for name in names(more) if is_folder(more) else []:
        if name.endswith(".jinja"):
            found[name.removesuffix(".jinja")] = (read_text(more / name), str(more / name))
    if found:
        return found
    for name, key in (("tokenizer_config.json", "chat_template"), ("chat_template.json", "chat_template")):
        data = config if name == "tokenizer_config.json" else _optional(folder / name)
        if data.get(key) is not None:
            where = f"{folder / name}: {key}"
            return {name: (source, where) for name, source in _by_name(data[key], where).items()}
    return {}


def _by_name(value: Any, where: str) -> dict[str, str]:
    """One template, or several as an object or as a list of {"name", "template"}."""
    if isinstance(value, str):
        return {"default": value}
    pairs: list[Any] = []
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = [(e.get("name"), e.get("template")) if isinstance(e, dict) else (None, None) for e in value]
    if not pairs or not all(isinstance(name, str) and isinstance(source, str) for name, source in pairs):
        raise CheckpointError(f"{where} must be a template, or a list of objects with 'name' and 'template'")
    return dict(pairs)
