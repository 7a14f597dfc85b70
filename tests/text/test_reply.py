"""Replies are read from ids: what is text, what is thought, what is a call, and in which pieces it comes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.text.calls import ToolCall
from dgemma.text.reply import Reply, ReplyParser, Unread, joined
from dgemma.text.tokenizer import Tokenizer
from dgemma.tiny import MODEL_DIR
from tests.text.vocabularies import ALL, CONTROLS, TINY, ids_of, spelled

Q, CALL, CALL_END, RESPONSE = '<|"|>', "<|tool_call>", "<tool_call|>", "<|tool_response>"
CHANNEL, CHANNEL_END, END = "<|channel>", "<channel|>", "<turn|>"


def pieces(
    ids: list[int], sizes: int | list[int] = 1, raw: Any = TINY, stop_ids: tuple[int, ...] = ()
) -> list[Reply]:
    """The pieces of a reply that comes in parts of `sizes`, the last of them for the rest."""
    parser, parts, at = ReplyParser(raw, stop_ids), [], 0
    sizes = [sizes] * (len(ids) // sizes + 1) if isinstance(sizes, int) else [*sizes, len(ids)]
    for size in sizes:
        parts.append(parser.feed(ids[at : at + size]))
        at += size
    return [*parts, parser.close()]


def reply(*parts: str, raw: Any = TINY) -> Reply:
    """The reply of these parts (see `ids_of`), which is the same in one piece and id by id."""
    ids = ids_of(*parts, raw=raw)
    whole = joined(pieces(ids, len(ids) + 1, raw))
    assert joined(pieces(ids, 1, raw)) == joined(pieces(ids, 7, raw)) == whole
    if raw is TINY:
        assert Tokenizer(raw, None, "").reply(ids) == whole
    return whole


# ---- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "Use <turn|> to end a turn.", "The <eos>, <pad> and <bos> tokens.", "A <|tool_response> follows.",
    "Write <|channel>thought\nhm<channel|> around it.", "<|channel>thought",
    'Type <|tool_call>call:rm{path:<|"|>1<|"|>}<tool_call|> here.', '<|"|> is a quote.', "call:f{}",
    "<|tool_call>call:f{}<tool_call|><|tool_response>", "<|image|><unk><|turn>model", "<0xE2><0x82>", "▁",
])  # fmt: skip
def test_what_is_spelled_is_text(text: str) -> None:
    """Control tokens that are spelled in ordinary ones end, open and close nothing."""
    assert reply(text, END) == Reply(text.replace("▁", " ").strip())


@pytest.mark.parametrize("control", [name for name in CONTROLS if TINY.token_to_id(name) is not None])
def test_controls_that_mean_nothing_are_no_text(control: str) -> None:
    ids = ids_of("so ", control, " it goes")
    found = reply("so ", control, " it goes", END)
    if control in ("<turn|>", "<eos>", RESPONSE):
        assert found == Reply("so")
    elif control == CHANNEL:
        assert found == Reply("so", "it goes")
    else:
        assert found == Reply("so  it goes") == Reply(TINY.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("end", [END, "<eos>", RESPONSE])
def test_nothing_follows_the_end(end: str) -> None:
    assert reply("yes", end, " no", CALL, "call:f{}", CALL_END, END) == Reply("yes")
    assert reply(end, "no") == Reply()


def test_a_stop_id_of_the_config_ends_a_reply_too() -> None:
    (stop,) = spelled("X")
    assert joined(pieces(spelled("abXc"), 1, stop_ids=(stop,))) == Reply("ab")


def test_white_space_goes_at_the_ends_alone() -> None:
    assert reply(" \n\ta \n b\n", "<pad>", " ", END) == Reply("a \n b")
    assert reply(" \n ", END) == Reply() == reply(END) == reply()


def test_text_goes_on_behind_thoughts_and_calls() -> None:
    found = reply("a ", CHANNEL, "thought\nhm", CHANNEL_END, "b ", CALL, "call:f{}", CALL_END, " c", END)
    assert found == Reply("a b  c", "hm", (ToolCall("f", {}),))


def test_half_a_character_joins_its_rest_behind_a_control() -> None:
    first, *rest = spelled("€")
    ids = [first, *ids_of("<pad>"), *rest]
    assert joined(pieces(ids)).text == TINY.decode(ids, skip_special_tokens=True) == "€"


# ---- thoughts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "thought, shown",
    [
        ("thought\nhm, well\n", "hm, well"),
        ("thought\n", ""),
        ("thought", ""),
        ("", ""),
        ("\n", ""),
        ("thought\r\nhm", "hm"),
        ("\nthought\nhm", "hm"),
        ("thought\n\n  hm\nthought\n", "hm\nthought"),
        ("thoughtful\nhm", "thoughtful\nhm"),
        ("thought of it", "thought of it"),
        ("though", "though"),
        ("analysis\nhm", "analysis\nhm"),
        ("I think", "I think"),
    ],
)
def test_thoughts(thought: str, shown: str) -> None:
    """The channel's name is no part of a thought, other first lines are."""
    assert reply(CHANNEL, thought, CHANNEL_END, "yes", END) == Reply("yes", shown)


@pytest.mark.parametrize("cut", range(12))
def test_a_thought_cut_by_the_limit_is_all_thought(cut: int) -> None:
    ids = ids_of(CHANNEL, "thought\nhm, ")[: cut + 1]
    assert joined(pieces(ids)) == Reply("", "hm,"[: max(0, cut - 8)])


def test_thoughts_are_lines() -> None:
    parts = [
        CHANNEL,
        "thought\na ",
        CHANNEL_END,
        "x",
        CHANNEL,
        "thought\n",
        CHANNEL_END,
        CHANNEL,
        "b",
        CHANNEL_END,
    ]
    assert reply(*parts, CHANNEL, " c", END) == Reply("x", "a\nb\nc")


def test_a_channel_in_a_channel_opens_nothing() -> None:
    assert reply(CHANNEL, "thought\na", CHANNEL, "b", CHANNEL_END, "c", END) == Reply("c", "ab")


# ---- calls --------------------------------------------------------------------------------------


def test_calls() -> None:
    found = reply(CALL, "call:f{x:", Q, "a", Q, "}", CALL_END, CALL, "call:g{}", CALL_END, RESPONSE)
    assert found == Reply("", "", (ToolCall("f", {"x": "a"}), ToolCall("g", {})))
    assert reply(CALL, "\n call: f {} \n", CALL_END, RESPONSE) == Reply("", "", (ToolCall("f", {}),))


@pytest.mark.parametrize(
    "inner", ["}", ",y:2", *CONTROLS, "<|tool_call>call:g{}<tool_call|>", "é🙂", " \n", "\\", '"']
)
def test_a_string_may_spell_anything(inner: str) -> None:
    ids = [*ids_of(CALL, "call:f{x:", Q), *spelled(inner), *ids_of(Q, "}", CALL_END, END)]
    for size in (1, 5, 99):
        assert joined(pieces(ids, size)) == Reply("", "", (ToolCall("f", {"x": inner}),))


@pytest.mark.parametrize(
    "control", [name for name in CONTROLS if TINY.token_to_id(name) is not None and name != Q]
)
def test_a_control_in_a_call_makes_it_unreadable(control: str) -> None:
    """In a string as well as outside: an argument without it would be another argument."""
    found = reply(CALL, "call:f{x:", Q, "a", control, "b", Q, "}", CALL_END, "c", END)
    assert not found.tool_calls and len(found.unread) == 1
    assert found.text.startswith(f"{CALL}call:f{{x:{Q}a") and found.unread[0].text in found.text


def test_a_call_without_its_closer() -> None:
    """The model hands over to the tool with `<|tool_response>`: a whole call counts then, and only then."""
    whole = [CALL, "call:f{x:1}"]
    call = (ToolCall("f", {"x": 1}),)
    assert reply("a ", *whole, RESPONSE) == Reply("a", "", call)
    for rest in (
        [],
        [END],
        ["<eos>"],
        [CALL, "call:f{x:1}", CALL_END, END],
        [CHANNEL, "thought\n", CHANNEL_END, END],
    ):
        found = reply("a ", *whole, *rest)
        unread = Unread(CALL + "call:f{x:1}", "no <tool_call|> closes it")
        assert found == Reply(f"a {CALL}call:f{{x:1}}", "", call if CALL in rest else (), (unread,))
    (unread,) = reply(CALL, "call:f{x:", RESPONSE).unread
    assert unread.reason == "the end where a value should be"


@pytest.mark.parametrize("inside", ["", " ", "b", "cal", "f{x:1}", f"{Q}call:f{Q}"])
@pytest.mark.parametrize("closer", [CALL_END, ""])
def test_an_opener_of_no_call_is_no_text(inside: str, closer: str) -> None:
    parts = [part for part in (Q, inside.replace(Q, ""), Q) if part] if Q in inside else [inside]
    found = reply("a", CALL, *parts, *([closer] if closer else []), "c", END)
    assert found == Reply("a" + inside.replace(Q, "") + "c")


def test_an_unreadable_call_is_text_with_its_reason() -> None:
    found = reply("Look: ", CALL, "call:f{x:", Q, "a", Q, ",x:1}", CALL_END, " so.", END)
    text = '<|tool_call>call:f{x:<|"|>a<|"|>,x:1}<tool_call|>'
    assert found == Reply(f"Look: {text} so.", "", (), (Unread(text, "the key 'x' stands twice"),))


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e999", '"\\ud83d"', "{" * 100_000, "[" * 1000]
)
def test_what_json_cannot_say_is_text(value: str) -> None:
    found = reply(CALL, f"call:f{{x:{value}}}", CALL_END, RESPONSE)
    assert not found.tool_calls and found.text == f"{CALL}call:f{{x:{value}}}{CALL_END}"


def test_calls_in_thoughts() -> None:
    """A thought that is closed was only thinking of a call; one that the reply ends in was left for it."""
    think, call = [CHANNEL, "thought\nlet's see "], [CALL, "call:f{x:", Q, "a", Q, "}", CALL_END]
    thought = "let's see call:f{x:a}"
    assert reply(*think, *call, " no", CHANNEL_END, "b", END) == Reply("b", f"{thought} no")
    assert reply(*think, *call) == Reply("", thought)
    for end in (RESPONSE, END, "<eos>"):
        assert reply(*think, *call, end) == Reply("", "let's see", (ToolCall("f", {"x": "a"}),))
    assert len(reply(*think, *call, *call, RESPONSE).tool_calls) == 2
    assert reply(*think, CALL, "call:f{x:1}", RESPONSE).tool_calls == (ToolCall("f", {"x": 1}),)
    unread = reply(*think, CALL, "call:f{x:", CALL_END, RESPONSE)
    assert (unread.text, unread.thinking, len(unread.unread)) == (
        "",
        f"let's see {CALL}call:f{{x:{CALL_END}",
        1,
    )


def test_what_the_embedded_template_writes_comes_back() -> None:
    tokenizer = Tokenizer.open(MODEL_DIR)
    assert tokenizer is not None
    arguments = {"a": None, "b": True, "c": [1, 2.5, "x, y"], "d": {"e": "}"}, "f": ""}
    calls = [{"function": {"name": "get_weather", "arguments": arguments}}]
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": calls}]
    ids = tokenizer.encode_chat(messages, add_generation_prompt=False)
    assert tokenizer.reply(ids[ids.index(TINY.token_to_id(CALL)) :]).tool_calls == (
        ToolCall("get_weather", arguments),
    )


# ---- pieces -------------------------------------------------------------------------------------


def test_pieces_come_as_soon_as_they_are_sure() -> None:
    ids = ids_of(
        "ab ", "c", CALL, "call:f{}", CALL_END, "d", CHANNEL, "thought\ne ", "f", CHANNEL_END, "g", END
    )
    shown = [(piece.text, piece.thinking, len(piece.tool_calls)) for piece in pieces(ids)]
    assert [piece for piece in shown if any(piece[:2])] == [
        ("a", "", 0), ("b", "", 0), (" c", "", 0), ("d", "", 0), ("", "e", 0), ("", " f", 0), ("g", "", 0)
    ]  # fmt: skip
    assert [calls for _, _, calls in shown if calls] == [1]


def draws(name: str, numbers: list[int]) -> list[int]:
    """Ids of a vocabulary for numbers below 1000: a third controls, and many words of a call."""
    raw = ALL[name]
    controls = [id for id in (raw.token_to_id(control) for control in CONTROLS) if id is not None]
    words = [
        id
        for token in ("call", ":", "{", "}", "thought", "\n", "x", "1", "▁")
        if (id := raw.token_to_id(token))
    ]
    kinds = [controls, words, words, range(raw.get_vocab_size())]
    return [kinds[n % 4][n // 4 % len(kinds[n % 4])] for n in numbers]


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=100, deadline=None)
@given(numbers=st.lists(st.integers(0, 2999), max_size=30), sizes=st.lists(st.integers(0, 9), max_size=6))
def test_any_split_is_the_whole(name: str, numbers: list[int], sizes: list[int]) -> None:
    ids = draws(name, numbers)
    raw = ALL[name]
    whole = joined(pieces(ids, len(ids) + 1, raw))
    assert joined(pieces(ids, 1, raw)) == joined(pieces(ids, sizes, raw)) == whole
    assert whole.text == whole.text.strip() and whole.thinking == whole.thinking.strip()
    assert all(unread.reason and unread.text.startswith(CALL) for unread in whole.unread)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=100, deadline=None)
@given(numbers=st.lists(st.integers(0, 999), max_size=30))
def test_text_is_what_the_tokenizer_says(name: str, numbers: list[int]) -> None:
    """Without ends, channels and calls: the text of the ids without special ones."""
    raw = ALL[name]
    meaning = {raw.token_to_id(control) for control in (END, "<eos>", RESPONSE, CHANNEL, CALL)}
    ids = [id for id in draws(name, numbers) if id not in meaning]
    assert joined(pieces(ids, 3, raw)) == Reply(raw.decode(ids, skip_special_tokens=True).strip())


LETTERS = [
    "a",
    "b",
    "call",
    ":",
    "{",
    ",",
    " ",
    "\n",
    CALL,
    CALL_END,
    CHANNEL,
    CHANNEL_END,
    Q,
    "<pad>",
    "<|turn>",
]


@settings(max_examples=500, deadline=None)
@given(parts=st.lists(st.sampled_from(LETTERS), max_size=30), end=st.sampled_from(["", END, RESPONSE]))
def test_nothing_is_lost(parts: list[str], end: str) -> None:
    """Where no call can be read, each character is in the text or in the thoughts."""
    found = reply(*parts, *([end] if end else []))
    assert not found.tool_calls
    shown = found.text + found.thinking
    for control in CONTROLS:
        shown = shown.replace(control, "")
    said = "".join(part for part in parts if part not in CONTROLS)
    assert sorted("".join(shown.split())) == sorted("".join(said.split()))


# ---- cost ---------------------------------------------------------------------------------------


NOISE = [
    [CALL], [CALL, "call:"], [CALL, "call:f{"], [Q], ["\n"], [CHANNEL], [CHANNEL, CHANNEL_END],
    [CHANNEL, "a"], [CALL_END], [CHANNEL, CALL], [CALL, "call:f{x:", Q],
]  # fmt: skip


@pytest.mark.parametrize("parts", NOISE, ids="".join)
def test_long_noise_ends_at_once(parts: list[str]) -> None:
    """A hundred thousand ids; a parser that went over them again and again would never end."""
    ids = ids_of(*parts)
    ids *= 100_000 // len(ids)
    assert joined(pieces(ids, 256)).tool_calls == ()


@pytest.mark.parametrize(
    "start", [[CALL, "call:f"], [CALL, "call:f{x:"], [CALL, "call:f{x:", Q], [CHANNEL], []]
)
@pytest.mark.parametrize("text", ["{", "a", "🙂"])
def test_a_long_reply_ends_at_once(start: list[str], text: str) -> None:
    count = 100_000 // len(ids_of(text))
    found = joined(pieces(ids_of(*start) + ids_of(text) * count, 256))
    assert text * count in found.text + found.thinking
