"""Holes in texts: where marks, places and lines put them, and what stands around them as tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Raw
from tokenizers import decoders, models, normalizers

from dgemma.errors import PromptError
from dgemma.text.holes import Hole, Seams, at, emptied, in_order, lines, marked
from dgemma.text.tokenizer import Tokenizer
from tests.text.vocabularies import BYTES, CONTROLS, TINY


def merging() -> Raw:
    """A tokenizer with merges and byte fallback, as Gemma's: words are made of parts, and blanks join
    them."""
    letters = [*"abcdehlnortuw ▁\n(){}[]\"':,.;<>|"]
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("▁", "the"),
        ("▁", "a"),
        ("n", "d"),
        ("▁a", "nd"),
        ("\n", "\n"),
        ("(", ")"),
    ]
    tokens = list(dict.fromkeys([*CONTROLS, *BYTES, *letters, *("".join(pair) for pair in merges)]))
    raw = Raw(
        models.BPE(
            {token: id for id, token in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True
        )
    )
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.add_special_tokens(CONTROLS)
    return raw


def seams(raw: Raw) -> Seams:
    return Seams(Tokenizer(raw, None, "here"), raw.get_vocab_size())


MERGING, EMBEDDED = seams(merging()), seams(TINY)


# ---- where --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, mark, expected, holes",
    [
        ("a<<>>b", None, "ab", [Hole(1, 1)]),
        ("<<12>>b<<>>", None, "b", [Hole(0, 0, 12), Hole(1, 1)]),
        ("a << b >> <<x>> <<-1>>", None, "a << b >> <<x>> <<-1>>", []),
        ("a<<>>b.*c", ".*", "a<<>>bc", [Hole(6, 6)]),
    ],
)
def test_marks(text: str, mark: str | None, expected: str, holes: list[Hole]) -> None:
    assert marked(text, mark) == (expected, holes)


def test_places_and_lines() -> None:
    text = "\ufeffab\r\n\r\n\tcé\nlast"
    assert [text[: at(text, *place).start] for place in ((1, 1), (1, 3), (2, 1), (3, 3), (4, 5))] == [
        "\ufeff", "\ufeffab", "\ufeffab\r\n", "\ufeffab\r\n\r\n\tc", text,
    ]  # fmt: skip
    found = [lines(text, *some) for some in ((1, 1), (2, 2), (3, 4))]
    assert [text[hole.start : hole.stop] for hole in found] == ["ab", "", "\tcé\nlast"]
    assert lines("a\n", 1, 1) == Hole(0, 1)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: at("ab\n", 2, 1), "line 2 is beyond the text, which has 1 line"),
        (lambda: at("ab\nc", 1, 4), "line 1 has 2 columns"),
        (lambda: at("ab", 1, 0), "cannot be at column 0"),
        (lambda: lines("a\nb", 2, 1), "wrong order"),
        (lambda: lines("a\nb", 0, 1), "line 0 is beyond"),
        (lambda: in_order("ab", []), "no hole"),
        (lambda: in_order("ab", [Hole(1, 3)]), "not in 2 characters"),
        (lambda: in_order("ab", [Hole(1, 1, 0)]), "nothing to fill"),
        (lambda: in_order("abcd", [Hole(1, 3), Hole(2, 4)]), "overlap"),
        (lambda: in_order("abcd", [Hole(1, 1), Hole(1, 1)]), "touch"),
    ],
)
def test_what_is_no_hole(call: object, said: str) -> None:
    with pytest.raises(PromptError, match=said):
        call()  # type: ignore[operator]


def test_emptied() -> None:
    assert emptied("abcdef", [Hole(4, 5, 2), Hole(1, 3)]) == ("adf", [Hole(1, 1), Hole(2, 2, 2)])


# ---- tokens -------------------------------------------------------------------------------------

TEXTS = st.text(
    st.sampled_from("the a and\n\r\t(){}é漢🙂▁\ufeff\u2028�<|turn>x1") | st.characters(codec="utf-8"),
    max_size=30,
)


@given(TEXTS, st.data())
@settings(max_examples=150, deadline=None)
def test_a_gap_keeps_its_edges_whatever_stands_there(text: str, data: st.DataObject) -> None:
    """Every choice of allowed tokens leaves the text outside a hole as it is, and no token of it is lost."""
    for own in (EMBEDDED, MERGING):
        ends = data.draw(st.sets(st.integers(0, len(text)), min_size=1, max_size=4))
        holes = [Hole(a, b) for a, b in zip(*[iter(sorted(ends))] * 2, strict=False)]
        holes = holes or [Hole(min(ends), min(ends))]
        pieces, gaps = own.cut(text, holes, data.draw(st.sampled_from([(), ("left",), ("right",)])))
        assert len(pieces) == len(gaps) + 1
        for gap in gaps:
            ids = []
            for edge, side in ((gap.left, "left"), (None, ""), (gap.right, "right")):
                allowed = own.written if edge is None else own.allowed(edge, side)
                assert edge is None or allowed[edge]
                ids.append(data.draw(st.sampled_from(allowed.nonzero()[0].tolist())))
            ids = ids[gap.left is None : 3 - (gap.right is None)]
            inner = own.text(gap, ids)
            before, after = (own.texts[edge] if edge is not None else "" for edge in (gap.left, gap.right))
            assert before + inner + after == own.spelled(ids)
            # The tokens that stand there now leave nothing in the hole.
            assert own.text(gap, [edge for edge in (gap.left, gap.right) if edge is not None]) == ""
            assert text[: gap.hole.start].endswith(before) and text[gap.hole.stop :].startswith(after)


def test_edges_that_another_token_may_reach_over() -> None:
    pieces, (gap,) = MERGING.cut("a th()", [Hole(4, 4)])
    assert gap.left is not None and MERGING.texts[gap.left] == "th"
    assert {MERGING.texts[id] for id in MERGING.allowed(gap.left, "left").nonzero()[0]} == {"th", "the"}
    # No other token ends with "()", and so it stands.
    assert gap.right is None and [MERGING.texts[id] for id in pieces[1]] == ["()"]
    pieces, _ = MERGING.cut("a th()", [Hole(4, 4)], ("right",))
    assert [MERGING.texts[id] for id in pieces[1]] == ["(", ")"]


def test_no_control_token_is_written_and_none_is_made_of_text() -> None:
    for own in (EMBEDDED, MERGING):
        control = [own.tokenizer.raw.token_to_id(token) for token in own.tokenizer.control]
        assert not own.written[control].any()
        (before, after), _ = own.cut("<|turn>a<turn|>", [Hole(7, 8)])
        assert not set(control) & {*before, *after}
