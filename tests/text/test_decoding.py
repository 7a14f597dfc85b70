"""Text that comes piece by piece is the text of the whole, whatever the decoder and wherever it is cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.text.decoding import Decoder, TextStream
from tests.text.vocabularies import ALL, CONTROLS, STREAMED, TINY, WHOLE, spelled

DECODERS = {name: Decoder(raw) for name, raw in ALL.items()}


def streamed(decoder: Decoder, pieces: list[list[int]]) -> list[str]:
    stream = TextStream(decoder)
    return [*(stream.feed(piece) for piece in pieces), stream.close()]


def mapped(name: str, draws: list[int]) -> list[int]:
    """Ids of a vocabulary for numbers below 1000.

    Parts of characters beside each other are what matters, so most numbers are ids of the last 40.
    """
    raw = ALL[name]
    size = raw.get_vocab_size()
    rare = [*(raw.token_to_id(control) or 0 for control in CONTROLS[:9]), size + 5]
    return [
        rare[draw % 10] if draw < 50 else draw % size if draw < 500 else size - 1 - draw % min(size, 40)
        for draw in draws
    ]


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=150, deadline=None)
@given(draws=st.lists(st.integers(0, 999), max_size=24), cuts=st.lists(st.integers(0, 24), max_size=6))
def test_pieces_are_the_whole(name: str, draws: list[int], cuts: list[int]) -> None:
    ids = mapped(name, draws)
    cuts = sorted(min(cut, len(ids)) for cut in cuts)
    pieces = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    whole = ALL[name].decode(ids, skip_special_tokens=False)
    assert "".join(streamed(DECODERS[name], pieces)) == whole
    assert "".join(streamed(DECODERS[name], [[id] for id in ids])) == whole


@pytest.mark.parametrize("name", STREAMED)
def test_text_comes_before_the_end(name: str) -> None:
    """A word that is complete does not wait."""
    raw = STREAMED[name]
    (word,) = [id for token in ("call",) if (id := raw.token_to_id(token)) is not None]
    first, *rest = streamed(DECODERS[name], [[word], [word]])
    assert first == "call" and "".join(rest).strip() == "call"


@pytest.mark.parametrize("name", WHOLE)
def test_a_decoder_that_needs_all_gets_all(name: str) -> None:
    raw = WHOLE[name]
    word = raw.token_to_id("call")
    pieces = streamed(DECODERS[name], [[word], [word]])
    assert pieces == ["", "", raw.decode([word, word])]


@pytest.mark.parametrize("text", ["é", "€", "🙂", "日本", "👩‍👩‍👧", "a🙂b€"])
def test_no_half_character_is_shown(text: str) -> None:
    ids = spelled(text)
    for cut in range(len(ids)):
        first, second, last = streamed(DECODERS["tiny"], [ids[:cut], ids[cut:]])
        assert text.startswith(first) and first + second + last == text


def test_bytes_of_no_character_are_marked_as_the_tokenizer_marks_them() -> None:
    ids = [*spelled("€"), *spelled("€")[:1]]
    assert "".join(streamed(DECODERS["tiny"], [ids[:3], ids[3:]])) == TINY.decode(ids) == "�" * 4


def test_an_id_that_is_none_keeps_nothing_apart() -> None:
    first, *rest = spelled("€")
    unknown = TINY.get_vocab_size() + 5
    assert TINY.id_to_token(unknown) is None
    assert "".join(streamed(DECODERS["tiny"], [[first], [unknown], [*rest, unknown]])) == "€"


@pytest.mark.parametrize(
    "name", ["fallback, strip", "fallback, strip three", "metaspace", "metaspace, never first"]
)
def test_a_decoder_takes_blanks_from_the_beginning_alone(name: str) -> None:
    raw = ALL[name]
    blank, wide, word = (raw.token_to_id(token) for token in ("▁", "▁▁", "▁a"))
    for ids in (
        [blank, word, blank, word],
        [blank, blank, blank, blank, word],
        [wide, wide, word, wide, word],
    ):
        assert "".join(streamed(DECODERS[name], [[id] for id in ids])) == raw.decode(ids)


class Counting:
    """A tokenizer that counts the ids it decodes."""

    def __init__(self, raw: Any):
        self.raw, self.count = raw, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        self.count += len(ids)
        return self.raw.decode(ids, skip_special_tokens)


@pytest.mark.parametrize("name", ["tiny", "fallback, strip", "bytelevel", "metaspace", "bpe"])
@pytest.mark.parametrize("size", [1, 256])
def test_no_id_is_decoded_again_and_again(name: str, size: int) -> None:
    """Runs that cannot be cut anywhere, blanks and words: the cost is linear."""
    for token in ("<0x80>", "Ģ", "▁", "\n", "call"):
        id = ALL[name].token_to_id(token)
        if id is None:
            continue
        raw = Counting(ALL[name])
        decoder = Decoder(raw)
        pieces = [[id] * size] * (4096 // size)
        setup, text = raw.count, "".join(streamed(decoder, pieces))
        assert text == ALL[name].decode([id] * 4096, skip_special_tokens=False)
        assert raw.count - setup <= 2 * 4096 + 16
