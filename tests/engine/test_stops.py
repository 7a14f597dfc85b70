"""Texts before which a reply ends, however it comes in pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dgemma.engine.stops import StopTexts
from dgemma.text.calls import ToolCall
from dgemma.text.reply import Reply, joined

TEXT = st.text("ab", max_size=20)


@given(st.lists(TEXT, max_size=6), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_any_cut_is_the_cut_of_the_whole(pieces: list[str], stops: list[str]) -> None:
    """What is shown at any time is a beginning of the end result, and as much as is sure."""
    whole = "".join(pieces)
    places = [place for stop in stops if (place := whole.find(stop)) >= 0]
    expected = whole[: min(places)] if places else whole
    reader, shown = StopTexts(stops), ""
    for piece in pieces:
        before = reader.found
        shown += reader.feed(Reply(piece)).text
        assert expected.startswith(shown) and reader.found >= before
    assert len(whole) - len(shown) < max(map(len, stops), default=1) or reader.found
    assert shown + reader.close().text == expected
    assert reader.found == bool(places)


def test_thoughts_are_not_searched_and_calls_behind_the_text_go_with_it() -> None:
    call = ToolCall("f", {})
    reader = StopTexts(["x"])
    pieces = [reader.feed(Reply("a", "x", (call,))), reader.feed(Reply("bxc", "y", (call,)))]
    pieces += [reader.feed(Reply("d", "z", (call,))), reader.close()]
    assert joined(pieces) == Reply("ab", "xy", (call,))
    assert reader.found


def test_without_texts_everything_passes() -> None:
    piece = Reply("a", "b", (ToolCall("f", {}),))
    assert StopTexts([]).feed(piece) is piece
