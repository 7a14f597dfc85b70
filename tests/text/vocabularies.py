"""Small tokenizers of every kind of decoder, each with the control tokens of the chat format."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models

from dgemma.tiny import MODEL_DIR

CONTROLS = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>"]
CONTROLS += ["<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"]
CONTROLS += ['<|"|>', "<|image|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁a", "b", "▁▁", "call", ":", "{", "}", "\n", "é", "�", "thought", "▁the", "x", "1", ","]


def _bytelevel() -> list[str]:
    """The alphabet of byte-level tokens, and tokens that begin, end or hold parts of characters."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in shown]
    alphabet = {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(rest)}
    parts = [b"\xf0\x9f", b"\x98\x80", b"\xf0\x9f\x98", b"\x80a", b"a\xe2", b"\x82\xac", b"\xef\xbf\xbd"]
    parts += [b"a\xe2\x82", b"\xac b", b" the", b"call", b"thought", "é".encode()]
    return [*alphabet.values(), *("".join(alphabet[byte] for byte in part) for part in parts)]


def _made(tokens: list[str], decoder: object, kind: str = "wordlevel") -> tokenizers.Tokenizer:
    tokens = list(dict.fromkeys([*CONTROLS, *tokens]))
    if kind == "unigram":
        model = models.Unigram([(token, 0.0) for token in tokens], 3, True)
    else:
        model = models.WordLevel({token: id for id, token in enumerate(tokens)}, "<unk>")
    made = tokenizers.Tokenizer(model)
    made.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in CONTROLS])
    if decoder is not None:
        made.decoder = decoder
    return made


def _llama(*more: object) -> object:
    replace = decoders.Replace("▁", " ")
    return decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), *more])


# Decoders whose text comes piece by piece, and those that need all of the ids.
STREAMED = {
    "tiny": tokenizers.Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json")),
    "fallback": _made(WORDS + BYTES, _llama()),
    "fallback, strip": _made(WORDS + BYTES, _llama(decoders.Strip(" ", 1, 0)), "unigram"),
    "fallback, strip three": _made(WORDS + BYTES, _llama(decoders.Strip(" ", 3, 0))),
    "bytelevel": _made(_bytelevel(), decoders.ByteLevel()),
    "bytelevel in a sequence": _made(_bytelevel(), decoders.Sequence([decoders.ByteLevel()])),
    "metaspace": _made(WORDS, decoders.Metaspace(), "unigram"),
    "metaspace, never first": _made(WORDS, decoders.Metaspace(prepend_scheme="never")),
    "wordpiece": _made([*WORDS, "##ing", "##s", "do", "n't", "."], decoders.WordPiece()),
    "none": _made(WORDS, None),
}
WHOLE = {
    "bpe": _made([*WORDS, "a</w>", "b</w>"], decoders.BPEDecoder()),
    "ctc": _made([*WORDS, "|"], decoders.CTC()),
    "replace in the text": _made(WORDS, decoders.Sequence([decoders.Fuse(), decoders.Replace("bx", "y")])),
}
ALL = STREAMED | WHOLE
TINY = STREAMED["tiny"]


def spelled(text: str, raw: tokenizers.Tokenizer = TINY) -> list[int]:
    """Ids of text letter by letter, so that no control token comes of it."""
    return [id for letter in text for id in raw.encode(letter, add_special_tokens=False).ids]


def ids_of(*parts: str, raw: tokenizers.Tokenizer = TINY) -> list[int]:
    """Ids of parts: the name of a control token is that token, every other part is spelled."""
    controls = {part: raw.token_to_id(part) for part in parts if part in CONTROLS}
    return [id for part in parts for id in ([controls[part]] if part in controls else spelled(part, raw))]
