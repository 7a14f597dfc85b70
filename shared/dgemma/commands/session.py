"""A chat's state, and what a line of its user does to it: a turn, or a command that begins with a slash."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import NamedTuple

from rich.console import Console

from dgemma.commands.replies import print_reply, record, stats_block, watch
from dgemma.commands.requests import open_text, read_file, read_tools_file, write_json
from dgemma.commands.streams import answer_json, note
from dgemma.engine.conversation import Conversation, user
from dgemma.engine.engine import Engine
from dgemma.engine.events import Done
from dgemma.engine.handle import Handle
from dgemma.engine.request import Request
from dgemma.errors import PromptError, visible
from dgemma.model import Model
from dgemma.reports.tables import amount
from dgemma.settings import GenerationConfig, number
from dgemma.text.messages import Message


@dataclass(frozen=True)
class Output:
    """How replies are shown. `model` is the name that --json says."""

    model: str | None
    console: Console
    live: bool
    as_json: bool
    stats: bool


@dataclass(frozen=True)
class Wanted:
    """What replies are to be. Without a `seed` one is drawn for each."""

    sampler: GenerationConfig
    seed: int | None = None
    stop: tuple[str, ...] = ()
    deadline: float | None = None


class Session:
    """A conversation, and the settings of its next reply.

    `take` gets a line at a time; `open` says whether it wants more.
    """

    def __init__(
        self,
        engine: Engine,
        model: Model,
        output: Output,
        conversation: Conversation,
        wanted: Wanted,
    ):
        self._engine, self._model, self._output = engine, model, output
        self.conversation, self._wanted = conversation, wanted
        self._unanswered: tuple[Message, ...] = ()  # what was asked last, without a reply
        self._handle: Handle | None = None
        self._last: Done | None = None
        self._thoughts = True  # whether they are shown
        self.open = True

    def take(self, line: str) -> None:
        """A turn or a command. DgemmaError says what is wrong with it, and nothing has changed then."""
        if not line.strip():
            return
        if not line.startswith("/") or line.startswith("//"):
            self._ask(self.conversation.extended(user(line.removeprefix("/"))))
            return
        name, *rest = line[1:].split(maxsplit=1) or [""]
        if (command := COMMANDS.get(name)) is None:
            close = get_close_matches(name, COMMANDS, 1, 0.0)[0]
            raise PromptError(
                f"unknown command /{name[:40]}, the nearest is /{close}; a text that begins with a slash "
                "gets another in front"
            )
        command.run(self, rest[0].strip() if rest else "")

    def cancel(self) -> None:
        """End the reply under way, from a signal's handler or another thread."""
        handle = self._handle
        if handle:
            handle.cancel()

    # ---- a turn ---------------------------------------------------------------------------------

    def _ask(self, asked: Conversation) -> None:
        request = self._request(asked)
        # Room for this conversation and for one that it left, by /undo for example.
        self._engine.prefixes.limit = 2 * self._engine.needs(request)
        self._handle = self._engine.submit(request)
        self._unanswered = asked.messages[len(self.conversation.messages) :]
        show = self._output
        try:
            (done,) = watch(self._model, self._wanted.sampler, self._handle, 1, show.live, show.console)
        finally:
            self._handle.cancel()  # an interrupted one, too, leaves the engine
            self._handle = None
        self._last, answered = done, asked.answered(done)
        if answered:
            self.conversation, self._unanswered = answered, ()
        self._print(done)
        if not answered:
            note("dgemma: nothing of this turn is kept; /retry asks again")
        elif calls := answered.open_calls:
            note(f"dgemma: /result TEXT gives the result of {visible(calls[0]['function']['name'])}")

    def _request(self, asked: Conversation) -> Request:
        wanted = self._wanted
        seed = secrets.randbits(63) if wanted.seed is None else wanted.seed
        tokenizer, stop, deadline = self._model.tokenizer, wanted.stop, wanted.deadline
        return asked.request(tokenizer, wanted.sampler, seed, stop=stop, deadline=deadline)

    def _print(self, done: Done) -> None:
        show = self._output
        if show.as_json:
            answer_json(record(done, self._model, show.model))
        else:
            print_reply(done, self._thoughts)
        if show.stats:
            note(stats_block(done, self._model, 1, self._wanted.sampler))

    def result(self, text: str) -> None:
        given = self.conversation.with_result(text)
        if given.open_calls:
            self.conversation = given
            name = visible(given.open_calls[0]["function"]["name"])
            note(f"dgemma: calls that wait for a result: {len(given.open_calls)}, the next is {name}")
        else:
            self._ask(given)

    def retry(self, text: str) -> None:
        again = self.conversation.question()
        if self._unanswered:
            again = self.conversation.extended(*self._unanswered)
        if again is None:
            raise PromptError("nothing was asked yet")
        self._ask(again)

    def undo(self, text: str) -> None:
        undone = self.conversation.undone()
        if undone is None:
            raise PromptError("there is no turn to take back")
        self.conversation, self._unanswered = undone, ()
        note("dgemma: the last turn is taken back")

    # ---- settings -------------------------------------------------------------------------------

    def _adopt(self, conversation: Conversation) -> None:
        """Go on with this conversation, if the template takes it."""
        messages = conversation.messages
        asks = bool(messages) and messages[-1]["role"] == "user"
        probe = conversation if asks else conversation.extended(user("a"))
        self._request(probe)
        self.conversation = conversation

    def system(self, text: str) -> None:
        self._adopt(self.conversation.with_system(text))
        note(f"dgemma: the system message is {'set' if text else 'gone'}")

    def tools(self, path: str) -> None:
        found = []
        if path:
            with open_text(path) as file:
                found = read_tools_file(file)
        self._adopt(replace(self.conversation, tools=tuple(found)))
        names = ", ".join(visible(tool["function"]["name"]) for tool in found)
        note(f"dgemma: tools: {names or 'none'}")

    def thinking(self, word: str) -> None:
        if word not in ("on", "off", "hidden"):
            raise PromptError("/thinking takes on, off or hidden")
        self._adopt(replace(self.conversation, thinking=word != "off"))
        self._thoughts = word != "hidden"
        note(f"dgemma: thinking is {word}")

    def seed(self, text: str) -> None:
        if text and not (text.isascii() and text.isdecimal() and len(text) <= 40):
            raise PromptError(f"/seed takes a whole number, not {text[:40]!r}")
        self._wanted = replace(self._wanted, seed=number("seed", int(text)) if text else None)
        note("dgemma: replies are repeatable" if text else "dgemma: a seed is drawn for each reply")

    # ---- files ----------------------------------------------------------------------------------

    def save(self, path: str) -> None:
        if not path:
            raise PromptError("/save takes the name of a file")
        if not self.conversation.messages:
            raise PromptError("there is nothing to save yet")
        tools = {"tools": self.conversation.tools} if self.conversation.tools else {}
        write_json(path, {"messages": self.conversation.messages, **tools})
        note(f"dgemma: messages in {visible(path)}: {len(self.conversation.messages)}")

    def load(self, path: str) -> None:
        if not path:
            raise PromptError("/load takes the name of a file")
        with open_text(path) as file:
            request = read_file(file)
        given = dict(request.settings)
        ends = {key: given.pop(key) for key in ("seed", "stop") if key in given}
        if "seed" in ends:
            number("seed", ends["seed"])
        wanted = replace(self._wanted, sampler=self._wanted.sampler.override(**given), **ends)
        messages, tools = tuple(request.conversations[0]), tuple(request.tools or ())
        self._adopt(replace(self.conversation, messages=messages, tools=tools))
        self._wanted, self._unanswered = wanted, ()
        if request.ignored:
            note(f"dgemma: not used of the file: {visible(', '.join(request.ignored))}")
        waits = (
            "; /retry asks for a reply to the last"
            if self.conversation.question() == self.conversation
            else ""
        )
        note(f"dgemma: messages loaded: {len(messages)}{waits}")

    # ---- words ----------------------------------------------------------------------------------

    def stats(self, text: str) -> None:
        if self._last is None:
            raise PromptError("there is no reply yet")
        kept = amount(self._engine.prefixes.bytes)
        note(
            stats_block(self._last, self._model, 1, self._wanted.sampler)
            + f"\nkept    {kept} for the next turn"
        )

    def help(self, text: str) -> None:
        width = max(len(command.form) for command in COMMANDS.values())
        lines = [f"{command.form:<{width}}  {command.help}" for command in COMMANDS.values()]
        note("\n".join([*lines, "A text that begins with a slash goes behind another: //"]))

    def quit(self, text: str) -> None:
        self.open = False


class Command(NamedTuple):
    """A command as it is typed, in words, and what it does with the rest of the line."""

    form: str
    help: str
    run: Callable[[Session, str], None]


COMMANDS = {
    "system": Command(
        "/system TEXT", "Begin with this system message; without a text, with none.", Session.system
    ),
    "thinking": Command(
        "/thinking on|off|hidden", "Think before answering; hidden: without showing it.", Session.thinking
    ),
    "tools": Command(
        "/tools FILE", "Let the model call the tools of a JSON list; without a file, none.", Session.tools
    ),
    "result": Command(
        "/result TEXT", "Give the result of a call; after the last one the model goes on.", Session.result
    ),
    "retry": Command(
        "/retry", "Ask for the last reply once more; with a seed, for the same one.", Session.retry
    ),
    "undo": Command("/undo", "Take the last turn back.", Session.undo),
    "seed": Command("/seed N", "Make replies repeatable; without a number, draw anew.", Session.seed),
    "save": Command("/save FILE", "Write the conversation as --messages reads it.", Session.save),
    "load": Command("/load FILE", "Go on with a conversation from a file.", Session.load),
    "stats": Command("/stats", "Say what the last reply cost.", Session.stats),
    "help": Command("/help", "List the commands.", Session.help),
    "quit": Command("/quit", "Leave, as Ctrl-D does.", Session.quit),
}
