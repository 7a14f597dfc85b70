"""A reply is read from its ids: visible text, thoughts and tool calls, piece by piece.

Only control ids have a meaning. What an answer spells in ordinary tokens is text, be it `<turn|>` or a whole
call. Special ids that mean nothing where they stand (closers of nothing, openers of nothing, `<unk>`,
`<|turn>`, images) are left out of the text, as transformers' `skip_special_tokens` does.

The text is what the tokenizer makes of the ids outside thoughts and calls, without white space around it. A
call that cannot be read is a part of the text, its control tokens written out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import tokenizers

from dgemma.text.calls import PREFIX, QUOTE, ToolCall, UnreadableCall, read_call
from dgemma.text.decoding import Decoder, TextStream

_ENDS = ("<turn|>", "<|tool_response>", "<eos>")
_HANDS_OVER = "<|tool_response>"  # where the model waits for the answers to its calls
_CHANNEL, _CHANNEL_END = "<|channel>", "<channel|>"
_CALL, _CALL_END, _QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_THOUGHT = "thought"  # the first line of the channel that templates write


@dataclass(frozen=True)
class Unread:
    """A call that could not be read: its text, which the reply's text has too, and why."""

    text: str
    reason: str


@dataclass(frozen=True)
class Reply:
    """A reply or the next piece of one. The user sees `text`; `thinking` is the thoughts' text."""

    text: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    unread: tuple[Unread, ...] = ()


def joined(pieces: Iterable[Reply]) -> Reply:
    """The reply that these pieces make."""
    pieces = list(pieces)
    return Reply(
        "".join(piece.text for piece in pieces),
        "".join(piece.thinking for piece in pieces),
        tuple(call for piece in pieces for call in piece.tool_calls),
        tuple(unread for piece in pieces for unread in piece.unread),
    )


class ReplyParser:
    """Reads the ids of one reply as they come.

    The reply ends at `<turn|>`, `<|tool_response>`, `<eos>` or one of `stop_ids`; what follows is ignored. A
    piece has what can no longer change. Held back are parts of characters, white space that may be the last,
    a call until it is closed, and the rest of a thought from a call on.

    A call counts once `<tool_call|>` closes it, or `<|tool_response>` ends the reply and it is whole. In it
    only the quote token has a meaning: any other control id makes it unreadable. Inside a thought that is
    closed, calls are thoughts. A reply that ends in a thought has left it for the calls in it. A thought cut
    by the limit is all thought. Every channel is one, whatever its name; a first line `thought` is left out.
    """

    def __init__(self, raw: tokenizers.Tokenizer, stop_ids: Collection[int] = ()):
        self._decoder = Decoder(raw)
        added = raw.get_added_tokens_decoder()
        self._roles: dict[int, str] = {id: token.content for id, token in added.items() if token.special}
        for name in (*_ENDS, _CHANNEL, _CHANNEL_END, _CALL, _CALL_END, _QUOTE):
            id = raw.token_to_id(name)
            if id is not None:
                self._roles[id] = name
        self._roles |= {id: _ENDS[0] for id in stop_ids if self._roles.get(id) not in _ENDS}
        self._text = _Part(self._decoder)
        self._thought: _Part | None = None
        self._thinks = False  # some thought had text
        self._run: list[int] = []  # ordinary ids that the text or the thought gets next
        self._call: list[int] | None = None  # ids of an open call, its opener included
        self._waiting: list[int] | None = None  # ids of a thought from a call on
        self._ended = False
        self._new = _New()

    def feed(self, ids: Sequence[int]) -> Reply:
        """The piece of the reply that these ids settle."""
        for id in ids:
            if self._ended:
                break
            self._take(id)
        self._write()
        return self._piece()

    def close(self) -> Reply:
        """The rest of the reply, after its last ids."""
        if not self._ended:
            self._end(None)
        return self._piece()

    def _take(self, id: int) -> None:
        role = self._roles.get(id)
        if self._waiting is not None and role != _CHANNEL_END and role not in _ENDS:
            self._waiting.append(id)
        elif self._thought is not None and self._waiting is None and role == _CALL:
            self._waiting = [id]
        elif role in _ENDS:
            self._end(role)
        elif role == _CHANNEL_END:
            self._end_call()
            self._end_thought()
        else:
            self._read(id, role)

    def _read(self, id: int, role: str | None) -> None:
        """Take in an id that neither ends a thought nor the reply."""
        if role == _CALL_END:
            self._end_call(id)
        elif role == _CALL:
            self._end_call()
            self._call = [id]
        elif role == _CHANNEL:
            self._end_call()
            if self._thought is None:
                self._write()
                self._thought = _Part(self._decoder, named=True)
        elif self._call is not None:
            self._call.append(id)
        elif role is None:
            self._run.append(id)

    def _end(self, role: str | None) -> None:
        """The reply ends, with a control token or, for None, cut by the limit."""
        self._ended = True
        waiting, self._waiting = self._waiting or [], None
        if role is None:
            self._run += self._ordinary(waiting)
        else:
            for id in waiting:
                self._read(id, self._roles.get(id))
        self._end_call(handed_over=role == _HANDS_OVER)
        self._end_thought(cut=role is None)
        self._new.text.append(self._text.close())

    def _end_call(self, closer: int | None = None, handed_over: bool = False) -> None:
        """Read the open call, if there is one. Without `closer` it is whole only where it is handed over."""
        if self._call is None:
            return
        ids, self._call = self._call, None
        content = self._content(ids[1:])
        if not content.lstrip().startswith(PREFIX):  # the opener of nothing
            self._run += self._ordinary(ids)
            return
        try:
            for id in ids[1:]:
                if self._roles.get(id, _QUOTE) != _QUOTE:
                    raise UnreadableCall(f"the control token {self._roles[id]} stands in it")
            if closer is None and not handed_over:
                raise UnreadableCall(f"no {_CALL_END} closes it")
            self._new.calls.append(read_call(content))
        except UnreadableCall as reason:
            ids = ids if closer is None else [*ids, closer]
            self._run += ids
            self._new.unread.append(Unread(self._decoder.text(ids), str(reason)))

    def _content(self, ids: Sequence[int]) -> str:
        """A call's text, with `QUOTE` for each quote token and without other control tokens."""
        parts, run = [], []
        for id in ids:
            role = self._roles.get(id)
            if role is None:
                run.append(id)
            elif role == _QUOTE:
                parts += [self._decoder.text_inside(run), QUOTE]
                run = []
        return "".join([*parts, self._decoder.text_inside(run)])

    def _ordinary(self, ids: Iterable[int]) -> list[int]:
        return [id for id in ids if id not in self._roles]

    def _write(self) -> None:
        """Give the ids of the run to the text or the thought."""
        run, self._run = self._run, []
        if self._thought is None:
            self._new.text.append(self._text.feed(run))
        else:
            first = not self._thought.shown
            self._think(self._thought.feed(run), first)

    def _end_thought(self, cut: bool = False) -> None:
        waiting, self._waiting = self._waiting or [], None
        self._run += self._ordinary(waiting)
        self._write()
        if self._thought is not None:
            first = not self._thought.shown
            self._think(self._thought.close(cut), first)
            self._thought = None

    def _think(self, text: str, first: bool) -> None:
        """Add to the thinking; a line break keeps a thought apart from the one before."""
        if text:
            self._new.thinking.append("\n" + text if first and self._thinks else text)
            self._thinks = True

    def _piece(self) -> Reply:
        new, self._new = self._new, _New()
        return Reply("".join(new.text), "".join(new.thinking), tuple(new.calls), tuple(new.unread))


@dataclass
class _New:
    """What was read since the last piece."""

    text: list[str] = field(default_factory=list)
    thinking: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)


class _Part:
    """The text or one thought of a reply, piece by piece, without white space around it.

    `named` leaves out the first line if it is the thought channel's name.
    """

    def __init__(self, decoder: Decoder, named: bool = False):
        self._stream = TextStream(decoder)
        self._line: str | None = "" if named else None  # what may become the name
        self._blanks: list[str] | None = None  # None before the first character that shows

    @property
    def shown(self) -> bool:
        """Whether it had any text yet."""
        return self._blanks is not None

    def feed(self, ids: Sequence[int]) -> str:
        """The text that these ids settle."""
        return self._trimmed(self._unnamed(self._stream.feed(ids)))

    def close(self, cut: bool = False) -> str:
        """The rest of the text. Where the limit cut a name in half, that is no text."""
        text = self._unnamed(self._stream.close())
        line, self._line = self._line or "", None
        is_name = _THOUGHT.startswith(line) if cut else line.strip() == _THOUGHT
        return self._trimmed(text if is_name else line + text)

    def _unnamed(self, text: str) -> str:
        if self._line is None:
            return text
        text, self._line = (self._line + text).lstrip(), None
        line, newline, rest = text.partition("\n")
        if newline:
            return rest if line.rstrip() == _THOUGHT else text
        if f"{_THOUGHT}\r".startswith(line):
            self._line = line
            return ""
        return text

    def _trimmed(self, text: str) -> str:
        if self._blanks is None:
            text = text.lstrip()
        shown = text.rstrip()
        if shown:
            blanks, self._blanks = self._blanks or [], [text[len(shown) :]]
            return "".join([*blanks, shown])
        if self._blanks is not None:
            self._blanks.append(text)
        return ""
