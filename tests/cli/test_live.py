"""The live view on consoles of a fixed size, without colour unless a test is about colour."""

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks.tiny.tokenizer import build_tokenizer
from dgemma.engine.events import Committed, Done, Draft, Event, Prefill, Stats
from dgemma.settings import read_generation_config
from dgemma.text.tokenizer import Tokenizer
from dgemma.view.pieces import END, Mark, Spelling, marks, plain, printable
from dgemma.view.terminal import PlainScreen, TerminalScreen, View, follow, screen
from tests.checkpoints import SMALL_GENERATION

RAW = build_tokenizer()
TOKENIZER = Tokenizer(RAW, None, "tiny")
CONFIG = read_generation_config(SMALL_GENERATION, RAW.get_vocab_size())
SPELLING = Spelling(TOKENIZER, CONFIG.stop_ids)
EOS, TURN_END = 1, 106
STATS = Stats(5, 0, 4, 1.0, 0.0, 0.5, 0.1, 4.0, 1, 3, 3.0, 1.3, 10.0, 0, 1, "numpy")


def ids(text: str) -> list[int]:
    return RAW.encode(text, add_special_tokens=False).ids


def draft(tokens: list[int], accepted: str, row: int = 0, canvas: int = 0, step: int = 1) -> Draft:
    """`accepted` has an x for each accepted position."""
    flags = np.array([char == "x" for char in accepted])
    return Draft(row, canvas, step, np.array(tokens), flags, np.zeros(len(tokens), np.float32))


def done(row: int = 0, reason: str = "stop") -> Done:
    return Done(row, [1], "cat", "", (), reason, STATS)


def console(width: int = 80, height: int = 10, **options: Any) -> Console:
    return Console(file=io.StringIO(), width=width, height=height, legacy_windows=False, **options)


def rendered(view: View, **size: int) -> list[str]:
    target = console(**size)
    target.print(view)
    return target.file.getvalue().splitlines()  # type: ignore[attr-defined]


# ---- positions ----------------------------------------------------------------------------------


def test_marks_count_acceptance_and_constancy() -> None:
    assert list(marks(draft([7, 7, 7, 7], "xx.."), np.array([7, 8, 7, 8]))) == [2, 1, 1, 0]
    assert list(marks(draft([7, 7], "x."), None)) == [Mark.UNCERTAIN, Mark.NOISE]


def test_states_read_without_colour() -> None:
    tokens = ids("the cat sat on")
    pieces = SPELLING.pieces(tokens, [2, 1, 0, 1])
    assert plain(pieces) == "the ‹cat› ··· ‹on›"


def test_adjacent_uncertain_positions_are_one_group() -> None:
    assert plain(SPELLING.pieces(ids("the cat sat on"), [2, 1, 1, 2])) == "the ‹cat sat› on"


def test_filler_behind_the_stop_token_is_hidden() -> None:
    tokens = [*ids("the cat"), TURN_END, EOS, EOS, EOS]
    assert plain(SPELLING.pieces(tokens, [2, 2, 2, 2, 0, 1])) == f"the cat{END}"


def test_a_stop_token_that_is_noise_ends_nothing() -> None:
    tokens = [*ids("the"), TURN_END, *ids(" cat"), EOS]
    assert plain(SPELLING.pieces(tokens, [2, 0, 2, 1])) == f"the· cat‹{END}›"


@pytest.mark.parametrize("text", ["é", "→", "🙂", "日本"])
def test_characters_of_several_byte_tokens(text: str) -> None:
    tokens = ids(text)
    assert len(tokens) == len(text.encode())
    pieces = SPELLING.pieces(tokens, [Mark.SETTLED] * len(tokens))
    assert len(pieces) == len(tokens)
    assert plain(pieces) == text


def test_a_broken_character_is_marked() -> None:
    tokens = [*ids("é")[:1], *ids("the")]
    assert plain(SPELLING.pieces(tokens, [2, 2])) == "\ufffdthe"


def test_an_id_outside_the_tokenizer_is_marked() -> None:
    assert plain(SPELLING.pieces([99999], [2])) == "\ufffd"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", "a↵b"),
        ("\t", "⇥"),
        ("\x1b[31m", "\ufffd[31m"),
        ("\u202e", ""),
        ("\u00a0", " "),
        ("\x7f", "\ufffd"),
    ],
)
def test_nothing_reaches_the_terminal_as_a_command(text: str, shown: str) -> None:
    assert printable(text) == shown


# ---- the view -----------------------------------------------------------------------------------


def test_a_generation_frame_by_frame() -> None:
    view = View(TOKENIZER, CONFIG)
    assert rendered(view) == ["reading the prompt"]
    view.update(Prefill(0, 3, 6))
    assert rendered(view) == ["reading the prompt 3/6"]
    tokens = [*ids("the cat sat"), TURN_END, EOS, EOS]
    view.update(draft(tokens, "x....."))
    assert rendered(view)[0] == "the ··· ······"
    view.update(draft(tokens, "xx.xxx", step=2), 0.02)
    assert rendered(view) == [
        f"the cat sat{END}",
        "━━━━━━━━──  75% settled · canvas 1 · step 2/48 · 1.5 tokens/forward · 20 ms/step",
    ]
    view.update(Committed(0, 0, tokens[:4], "the cat sat<turn|>"))
    view.update(done())
    assert rendered(view) == [f"the cat sat{END}", "done (stop) · 4 tokens · 2.0 tokens/forward"]


def test_uncertain_is_underlined_and_noise_dim_on_a_terminal_without_colour() -> None:
    view = View(TOKENIZER, CONFIG)
    tokens = ids("the cat sat")
    view.update(draft([0, *tokens[1:]], "..."))
    view.update(draft([tokens[0], tokens[1], 200], "xx.", step=2))
    target = console(force_terminal=True, no_color=True, color_system="truecolor")
    target.print(view)
    first = target.file.getvalue().splitlines()[0]  # type: ignore[attr-defined]
    assert "\x1b[4mthe\x1b[0m cat" in first
    assert "\x1b[2m" in first[first.index("cat") :]
    assert "\x1b[3" not in first


def test_committed_text_stays_above_the_next_canvas() -> None:
    view = View(TOKENIZER, CONFIG)
    view.update(Committed(0, 0, ids("the cat"), "the cat"))
    view.update(draft(ids(" sat on"), "x.", canvas=1))
    assert rendered(view)[0] == "the cat sat ··"


def test_a_settled_newline_breaks_the_line_and_no_other_does() -> None:
    view = View(TOKENIZER, CONFIG)
    tokens = ids("the\nmy\n")
    view.update(draft(tokens, "xxx."))
    assert rendered(view)[0] == "the↵my·"
    view.update(draft(tokens, "xxx.", step=2))
    assert rendered(view)[:2] == ["the↵", "my↵"]


@pytest.mark.parametrize("width", [12, 20, 40])
@pytest.mark.parametrize("height", [3, 6])
def test_a_frame_fits_the_terminal(width: int, height: int) -> None:
    view = View(TOKENIZER, CONFIG)
    text = ids("the cat sat on a mat. 日本語 " * 30)
    view.update(Committed(0, 0, text, ""))
    view.update(draft(ids("the end"), "." * len(ids("the end")), canvas=1))
    target = console(width=width, height=height)
    lines = target.render_lines(view, pad=False)
    assert len(lines) == height - 1
    assert all(sum(segment.cell_length for segment in line) <= width for line in lines)
    assert "·" in "".join(segment.text for segment in lines[-2])


def test_rows_are_stacked_and_those_without_room_counted() -> None:
    view = View(TOKENIZER, CONFIG, rows=3)
    for row, text in enumerate(("the cat", "the dog", "the cow")):
        view.update(draft(ids(text), "xx", row=row))
    lines = rendered(view)
    assert [line[:7] for line in lines[::2]] == ["the cat", "the dog", "the cow"]
    assert lines[1].endswith("row 1 · canvas 1 · step 1/48 · 0.0 tokens/forward")
    assert rendered(view, height=6)[-1] == "… and 1 more rows"


def test_steps_are_timed_without_the_encoding_before_a_canvas() -> None:
    view = View(TOKENIZER, CONFIG, rows=2)
    for canvas in (0, 1):
        for step in (1, 2, 3):
            for row in (0, 1):
                seconds = 9.0 if step == 1 else 0.03 if row == 0 else 0.0
                view.update(draft(ids("the cat"), "xx", row, canvas, step), seconds)
    assert "30 ms/step" in rendered(view)[1]


# ---- screens ------------------------------------------------------------------------------------


def events(steps: int) -> list[Event]:
    tokens = ids("the cat")
    drafts = [draft(tokens, "xx", step=step) for step in range(1, steps + 1)]
    return [Prefill(0, 2, 2), *drafts, Committed(0, 0, tokens, "the cat"), done()]


def test_no_terminal_gets_one_plain_line_a_step() -> None:
    target = console()
    view = View(TOKENIZER, CONFIG)
    assert isinstance(screen(view, target), PlainScreen)
    replies = follow(events(2), screen(view, target))
    assert [reply.text for reply in replies] == ["cat"]
    assert target.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "canvas 1 step 1/48   0%  ‹the cat›",
        "canvas 1 step 2/48 100%  the cat",
    ]


def test_a_dumb_terminal_gets_plain_lines() -> None:
    target = console(force_terminal=True, _environ={"TERM": "dumb"})
    assert isinstance(screen(View(TOKENIZER, CONFIG), target), PlainScreen)


def test_the_terminal_is_drawn_in_place_and_left_as_it_was() -> None:
    target = console(force_terminal=True, color_system=None)
    follow(events(3), TerminalScreen(View(TOKENIZER, CONFIG), target))
    output = target.file.getvalue()  # type: ignore[attr-defined]
    assert output.index("\x1b[?25l") < output.index("step 1/48") < output.index("step 2/48")
    assert "done (stop)" in output
    assert output.index("\x1b[?25h") > output.rindex("done (stop)")
    assert output.endswith("\x1b[2K")


def test_the_terminal_is_restored_when_interrupted() -> None:
    target = console(force_terminal=True)

    def interrupted() -> Any:
        yield draft(ids("the cat"), "xx")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow(interrupted(), TerminalScreen(View(TOKENIZER, CONFIG), target))
    assert "\x1b[?25h" in target.file.getvalue()  # type: ignore[attr-defined]


def test_drawing_neither_holds_the_engine_up_nor_falls_far_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgemma.view.terminal.FRAME", 0.005)
    target = console(force_terminal=True)
    frames: list[int] = []

    def fast() -> Any:
        yield from events(500)
        frames.append(target.file.getvalue().count("tokens/forward"))  # type: ignore[attr-defined]

    follow(fast(), TerminalScreen(View(TOKENIZER, CONFIG), target))
    frames.append(target.file.getvalue().count("tokens/forward"))  # type: ignore[attr-defined]
    assert frames[0] < 24
    assert 24 <= frames[1] < 150


def test_a_cancelled_reply_is_not_drawn_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgemma.view.terminal.FRAME", 20)  # what is left would take minutes
    target = console(force_terminal=True)
    (reply,) = follow(
        [*events(9)[:-2], done(reason="cancelled")], TerminalScreen(View(TOKENIZER, CONFIG), target)
    )
    assert reply.finish_reason == "cancelled"
    assert "step" not in target.file.getvalue()  # type: ignore[attr-defined]


def test_a_frame_takes_one_step_of_every_row() -> None:
    shown = TerminalScreen(View(TOKENIZER, CONFIG, rows=2), console(force_terminal=True))
    for step in (1, 2):
        for row in (0, 1):
            shown.feed(draft(ids("the cat"), "xx", row=row, step=step), 0.0)
    shown._take()
    assert [row.step for row in shown._view._rows] == [1, 1]


def test_replies_come_in_the_order_of_their_rows() -> None:
    replies = follow([done(1), done(0)], PlainScreen(View(TOKENIZER, CONFIG, rows=2), console()))
    assert [reply.row for reply in replies] == [0, 1]
