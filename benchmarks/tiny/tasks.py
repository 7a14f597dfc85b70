"""The toy tasks that `tiny` is trained on, and the check of its replies.

Every example is drawn from a seeded generator and its answer is computed, so there is no data set to keep and
the judge knows the one right reply. One question in sixteen is held out by the hash of its text, whatever
stands around it: training skips these, evaluation uses nothing else.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import Any

import numpy as np

Message = dict[str, Any]
Tool = dict[str, Any]

TURN_END = "<turn|>"
RESPONSE = "<|tool_response>"
QUOTE = '<|"|>'
LETTERS = "abcdefghijklmnopqrstuvwxyz"
BRACKETS = {"(": ")", "[": "]", "{": "}"}


def words(text: str) -> tuple[str, ...]:
    """A list that can be read as prose, and wraps like it."""
    return tuple(text.split())


DETERMINERS = ("the", "a", "my", "our", "one")
ADJECTIVES = ("big", "small", "old", "new", "red", "green", "blue", "happy")
NOUNS = words(
    "cat dog bird fish horse mouse cow fox man woman boy girl king queen house tree river road book table "
    "box car boat hat cup door mat garden apple cake"
)
VERBS = ("sat", "ran", "saw", "took", "found", "lost", "likes", "wants", "made", "left")
PREPOSITIONS = ("on", "in", "under", "near", "with", "behind", "over")
REPLACEABLE = {"noun": NOUNS, "adjective": ADJECTIVES, "verb": VERBS, "preposition": PREPOSITIONS}

NAMES = words(
    "Ada Alan Grace Tom Anna Ben Clara David Emma Felix Greta Hugo Ida Jack Kate Leo Mia Noah Olga Paul Rosa "
    "Sam Tina Uma Vera Will Yara Zoe"
)
CITIES = words(
    "Paris London Berlin Rome Madrid Oslo Tokyo Cairo Lima Delhi Vienna Prague Dublin Athens Boston Chicago "
    "Seoul Lisbon Warsaw Zurich Geneva Toronto Sydney Nairobi"
)
LONG_CITIES = ("New York", "Cape Town")
JOBS = ("nurse", "baker", "pilot", "teacher", "farmer", "doctor", "cook", "judge", "clerk", "engineer")
COLORS = ("red", "green", "blue", "yellow", "black", "white", "brown", "pink")
UNITS = ("miles", "feet", "meters", "pounds", "grams", "euros", "dollars")
LANGUAGES = ("French", "German", "Spanish", "Italian", "Dutch", "Greek")

NUMBER_FIELDS = {"age": (1, 99), "year": (1900, 2030), "size": (1, 200), "price": (1, 999)}
WORD_FIELDS = {"name": NAMES, "city": CITIES, "job": JOBS, "color": COLORS, "pet": NOUNS[:8]}
FIELDS = (*NUMBER_FIELDS, *WORD_FIELDS, "team", "code")

SYSTEMS = ("You are a helpful assistant.", "Answer briefly.", "Be brief.", "You are tiny.")
GREETINGS = (("Hi!", "Hello!"), ("Hello.", "Hello! How can I help?"), ("Thanks!", "You are welcome."))


@dataclass(frozen=True)
class Example:
    """One question with its right answer: raw model text, special tokens and the stop token included."""

    task: str
    messages: list[Message]
    tools: list[Tool] | None
    thinking: bool
    answer: str


Pair = tuple[str, str]  # a question and the visible answer
Builder = Callable[[Random], Example]


def _word(r: Random, low: int, high: int) -> str:
    return "".join(r.choices(LETTERS, k=r.randint(low, high)))


def _number(r: Random) -> int:
    """One to three digits, each length equally likely, or short numbers would hardly be seen."""
    return r.randrange((1, 10, 100)[r.randrange(3)] * 10)


# --- arithmetic, strings ---


def _add_question(r: Random, a: int, b: int) -> str:
    return r.choice((f"What is {a} + {b}?", f"{a} + {b} =", f"Add {a} and {b}.", f"Compute {a} + {b}."))


def _subtract_question(r: Random, a: int, b: int) -> str:
    forms = (f"What is {a} - {b}?", f"{a} - {b} =", f"Subtract {b} from {a}.", f"Compute {a} - {b}.")
    return r.choice(forms)


def _add(r: Random) -> Pair:
    a, b = _number(r), _number(r)
    return _add_question(r, a, b), str(a + b)


def _subtract(r: Random) -> Pair:
    b, a = sorted((_number(r), _number(r)))
    return _subtract_question(r, a, b), str(a - b)


def _reverse_question(r: Random, text: str) -> str:
    return r.choice((f'Reverse "{text}".', f'Reverse the string "{text}".', f'Write "{text}" backwards.'))


def _reverse(r: Random) -> Pair:
    text = _word(r, 3, 10)
    return _reverse_question(r, text), text[::-1]


def _sort_question(r: Random, text: str) -> str:
    kind = "digits" if text.isdigit() else "letters"
    return r.choice(
        (f'Sort "{text}".', f'Sort the {kind} "{text}".', f'Put the {kind} of "{text}" in order.')
    )


def _sort(r: Random) -> Pair:
    text = "".join(r.choices(LETTERS if r.random() < 0.7 else "0123456789", k=r.randint(3, 10)))
    return _sort_question(r, text), "".join(sorted(text))


def _count(r: Random) -> Pair:
    """Two to 45 numbers up to 200; a third begin low, as people count."""
    length = r.randint(2, 45)
    first = r.randint(0, 10 if r.random() < 0.33 else 201 - length)
    last = first + length - 1
    form = r.choice(("Count from {} to {}.", "Write the numbers from {} to {}.", "Count {} to {}."))
    return form.format(first, last), " ".join(map(str, range(first, last + 1)))


# --- JSON and brackets ---


def _made_up(r: Random) -> str:
    return _word(r, 3, 8).capitalize()


def _field_value(r: Random, key: str) -> str | int:
    if key in NUMBER_FIELDS:
        return r.randint(*NUMBER_FIELDS[key])
    if key in WORD_FIELDS and r.random() < 0.6:
        return r.choice(WORD_FIELDS[key])
    return _made_up(r) if key in ("name", "city") else _word(r, 3, 7)


def _record(r: Random, low: int, high: int) -> dict[str, str | int]:
    """Fields in random order; a name leads often, as people write it. One key in twenty is made up."""
    keys = r.sample(FIELDS, r.randint(low, high))
    if "name" not in keys and r.random() < 0.5:
        keys[0] = "name"
    if r.random() < 0.2:
        keys[-1] = _word(r, 3, 6)
    return {key: _field_value(r, key) for key in keys}


def _json_question(r: Random, record: dict[str, str | int]) -> str:
    text = ", ".join(f"{key} {value}" for key, value in record.items())
    return r.choice((f"Extract as JSON: {text}", f"Write as JSON: {text}", f"Turn into JSON: {text}"))


def _json(r: Random) -> Pair:
    record = _record(r, 2, 4)
    return _json_question(r, record), json.dumps(record)


def _repair_brackets(r: Random) -> Pair:
    """Opening brackets with a few already closed; what is still open is closed at the end."""
    text, still_open = "", ""
    for _ in range(r.randint(1, 9)):
        if still_open and r.random() < 0.2:
            text, still_open = text + BRACKETS[still_open[-1]], still_open[:-1]
        else:
            bracket = r.choice("([{")
            text, still_open = text + bracket, still_open + bracket
    if not still_open:
        text, still_open = text + "[", "["
    forms = (f"Close the brackets: {text}", f"Complete the brackets: {text}", f"Close all brackets: {text}")
    return r.choice(forms), text + "".join(BRACKETS[b] for b in reversed(still_open))


def _nested(r: Random) -> dict[str, Any]:
    record: dict[str, Any] = dict(_record(r, 1, 2))
    last = list(record)[-1]
    kind = r.random()
    if kind < 0.35:
        record[last] = [r.randrange(100) for _ in range(r.randint(1, 4))]
    elif kind < 0.6:
        record[last] = {r.choice(FIELDS): r.choice((r.randrange(100), r.choice(COLORS)))}
    return record


def _repair_json(r: Random) -> Pair:
    """Closers are missing at the end, from one to all of them, the quote of a last string among them."""
    whole = json.dumps(_nested(r))
    closers = len(whole) - len(whole.rstrip(']}"'))
    broken = whole[: -r.randint(1, closers)]
    forms = (f"Repair this JSON: {broken}", f"Fix this JSON: {broken}", f"Complete this JSON: {broken}")
    return r.choice(forms), whole


def _repair(r: Random) -> Pair:
    return _repair_brackets(r) if r.random() < 0.5 else _repair_json(r)


# --- replacing words ---


def _phrase(r: Random) -> list[tuple[str, str]]:
    words = [("determiner", r.choice(DETERMINERS))]
    if r.random() < 0.35:
        words.append(("adjective", r.choice(ADJECTIVES)))
    return [*words, ("noun", r.choice(NOUNS))]


def _sentence(r: Random) -> list[tuple[str, str]]:
    """Four to nine words, each with its kind."""
    words = [*_phrase(r), ("verb", r.choice(VERBS))]
    if r.random() < 0.3:
        words += [("noun", r.choice(NOUNS))] if r.random() < 0.3 else _phrase(r)
    if len(words) < 4 or (len(words) < 6 and r.random() < 0.5):
        words += [("preposition", r.choice(PREPOSITIONS)), *_phrase(r)]
    return words


def _targets(r: Random, words: list[tuple[str, str]]) -> tuple[str, str, list[str]]:
    """The word to replace, its replacement, and the sentence; a fifth of these have the word twice."""
    places = [i for i, (kind, _) in enumerate(words) if kind != "determiner"]
    kind, old = words[r.choice(places)]
    text = [word for _, word in words]
    same = [i for i in places if words[i][0] == kind and words[i][1] != old]
    if same and r.random() < 0.5:
        text[r.choice(same)] = old
    if r.random() < 0.15:
        made_up = _word(r, 3, 6)
        text = [made_up if word == old else word for word in text]
        old = made_up
    new = (
        _word(r, 3, 6) if r.random() < 0.15 else r.choice([word for word in REPLACEABLE[kind] if word != old])
    )
    return old, new, text


def _replace(r: Random) -> Pair:
    old, new, words = _targets(r, _sentence(r))
    text = " ".join(words)
    forms = (
        f"Replace {old} with {new}: {text}",
        f"Change {old} to {new}: {text}",
        f"Write {new} for {old}: {text}",
    )
    return r.choice(forms), " ".join(new if word == old else word for word in words)


# --- thinking ---


def _add_thought(a: int, b: int) -> str:
    """The columns from the right, a carry as a third term: 99 + 5 is `9+5=14 9+0+1=10`."""
    columns: list[str] = []
    carry = 0
    while a or b or not columns:
        total = a % 10 + b % 10 + carry
        columns.append(f"{a % 10}+{b % 10}{'+1' if carry else ''}={total}")
        a, b, carry = a // 10, b // 10, total // 10
    return " ".join(columns)


def _subtract_thought(a: int, b: int) -> str:
    """The columns from the right, a borrowed ten added above: 32 - 5 is `12-5=7 3-0-1=2`."""
    columns: list[str] = []
    borrow = 0
    while a or b or not columns:
        lend = a % 10 < b % 10 + borrow
        top = a % 10 + 10 * lend
        columns.append(f"{top}-{b % 10}{'-1' if borrow else ''}={top - b % 10 - borrow}")
        a, b, borrow = a // 10, b // 10, int(lend)
    return " ".join(columns)


def _think_arithmetic(r: Random) -> tuple[str, str, str]:
    b, a = sorted((_number(r), _number(r)))
    if r.random() < 0.5:
        return _subtract_question(r, a, b), _subtract_thought(a, b), str(a - b)
    a, b = (a, b) if r.random() < 0.5 else (b, a)
    return _add_question(r, a, b), _add_thought(a, b), str(a + b)


def _think_string(r: Random) -> tuple[str, str, str]:
    """Strings are spelled, one letter a word: the thought has the letters without the quotes around them."""
    question, answer = (_reverse if r.random() < 0.5 else _sort)(r)
    return question, " ".join(question.split('"')[1]), answer


def _think_json(r: Random) -> tuple[str, str, str]:
    record = _record(r, 2, 3)
    return _json_question(r, record), "fields: " + ", ".join(record), json.dumps(record)


def _think(r: Random) -> Example:
    question, thought, answer = r.choice((_think_arithmetic, _think_arithmetic, _think_string, _think_json))(
        r
    )
    reply = f"<|channel>thought\n{thought}\n<channel|>{answer}{TURN_END}"
    return Example("think", _context(r, question), None, True, reply)


# --- tools ---


def _tool(name: str, description: str, **arguments: str) -> Tool:
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in arguments.items()},
        "required": list(arguments),
    }
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


@dataclass(frozen=True)
class _Use:
    """A question that a tool answers: the call, what the tool gives back, and the sentence made of it."""

    question: str
    arguments: dict[str, str | int]
    result: str
    sentence: str


def _city(r: Random) -> str:
    return r.choice(CITIES + LONG_CITIES) if r.random() < 0.7 else _made_up(r)


def _use_weather(r: Random) -> _Use:
    city, degrees = _city(r), r.randint(0, 40)
    forms = (f"What is the weather in {city}?", f"How is the weather in {city}?", f"Weather in {city}?")
    result = r.choice((f"{degrees} C", f"{degrees} C", f'{{"temperature": {degrees}}}'))
    return _Use(r.choice(forms), {"city": city}, result, f"It is {degrees} C in {city}.")


def _use_time(r: Random) -> _Use:
    city, clock = _city(r), f"{r.randrange(24):02}:{r.randrange(60):02}"
    forms = (f"What time is it in {city}?", f"Tell me the time in {city}.")
    result = r.choice((clock, clock, f'{{"time": "{clock}"}}'))
    return _Use(r.choice(forms), {"city": city}, result, f"It is {clock} in {city}.")


def _use_add(r: Random) -> _Use:
    a, b = _number(r), _number(r)
    return _Use(_add_question(r, a, b), {"a": a, "b": b}, str(a + b), f"The sum is {a + b}.")


def _use_convert(r: Random) -> _Use:
    amount, unit, result = r.randint(1, 500), r.choice(UNITS), r.randint(1, 999)
    forms = (f"Convert {amount} to {unit}.", f"What is {amount} in {unit}?")
    return _Use(r.choice(forms), {"amount": amount, "unit": unit}, str(result), f"That is {result} {unit}.")


def _use_translate(r: Random) -> _Use:
    text, language, result = r.choice(NOUNS), r.choice(LANGUAGES), _word(r, 3, 8)
    forms = (f"Translate {text} to {language}.", f"What is {text} in {language}?")
    return _Use(r.choice(forms), {"text": text, "language": language}, result, f"In {language}: {result}.")


_CITY_ARGUMENT = {"city": "string"}
_USES: tuple[tuple[Callable[[Random], _Use], tuple[Tool, ...]], ...] = (
    (
        _use_weather,
        (
            _tool("weather", "Weather in a city", **_CITY_ARGUMENT),
            _tool("get_weather", "Get the weather in a city", **_CITY_ARGUMENT),
        ),
    ),
    (
        _use_time,
        (
            _tool("time", "Time in a city", **_CITY_ARGUMENT),
            _tool("get_time", "Get the time in a city", **_CITY_ARGUMENT),
        ),
    ),
    (_use_add, (_tool("add", "Add two numbers", a="integer", b="integer"),)),
    (_use_convert, (_tool("convert", "Convert to a unit", amount="integer", unit="string"),)),
    (_use_translate, (_tool("translate", "Translate a word", text="string", language="string"),)),
)


def _literal(value: str | int) -> str:
    return f"{QUOTE}{value}{QUOTE}" if isinstance(value, str) else str(value)


def call_text(name: str, arguments: dict[str, str | int]) -> str:
    """A tool call as the model writes it; the template sorts arguments by name, so the model must too."""
    listed = ",".join(f"{key}:{_literal(value)}" for key, value in sorted(arguments.items()))
    return f"<|tool_call>call:{name}{{{listed}}}<tool_call|>"


def _answer_turns(tool: Tool, use: _Use) -> list[Message]:
    function = {"name": tool["function"]["name"], "arguments": use.arguments}
    call = {"id": "call_1", "type": "function", "function": function}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": use.result},
    ]


def _tool_example(r: Random) -> Example:
    """Half call a tool, three in ten put its response in words; the rest ask what no tool here answers."""
    makers = r.sample(_USES, 2 if r.random() < 0.35 else 1)
    tools = [r.choice(versions) for _, versions in makers]
    kind = r.random()
    if kind < 0.2:
        adds = any(use is _use_add for use, _ in makers)
        others = (_reverse, _sort, _json) if adds else (_reverse, _sort, _json, _add)
        question, answer = r.choice(others)(r)
        return Example("tool", _context(r, question, short=True), tools, False, answer + TURN_END)
    chosen = r.randrange(len(tools))
    use = makers[chosen][0](r)
    messages = _context(r, use.question, short=True)
    if kind < 0.5:
        messages += _answer_turns(tools[chosen], use)
        return Example("tool", messages, tools, False, use.sentence + TURN_END)
    call = call_text(tools[chosen]["function"]["name"], use.arguments)
    return Example("tool", messages, tools, False, call + RESPONSE)


# --- examples ---


def _former_exchange(r: Random, short: bool) -> Pair:
    """An exchange to stand before the question; never a held-out one, or training would show its answer."""
    if short or r.random() < 0.3:
        return r.choice(GREETINGS)
    while True:
        question, answer = r.choice((_add, _reverse, _sort))(r)
        if not _is_held_out(question):
            return question, answer


def _context(r: Random, question: str, short: bool = False) -> list[Message]:
    """The question as a conversation: one in ten has a system message, a former exchange, or both.

    `short` keeps the former exchange to a greeting, where tools already make the prompt long.
    """
    messages: list[Message] = [{"role": "user", "content": question}]
    kind = r.random() * 30
    if kind < 2:
        asked, said = _former_exchange(r, short)
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}, *messages]
    if 1 < kind < 3:
        messages.insert(0, {"role": "system", "content": r.choice(SYSTEMS)})
    return messages


def _plain(task: str, pair: Callable[[Random], Pair]) -> Builder:
    def build(r: Random) -> Example:
        question, answer = pair(r)
        return Example(task, _context(r, question), None, False, answer + TURN_END)

    return build


_PLAIN: dict[str, Callable[[Random], Pair]] = {
    "add": _add,
    "subtract": _subtract,
    "reverse": _reverse,
    "sort": _sort,
    "json": _json,
    "repair": _repair,
    "replace": _replace,
    "count": _count,
}
TASKS: dict[str, Builder] = {
    **{task: _plain(task, pair) for task, pair in _PLAIN.items()},
    "think": _think,
    "tool": _tool_example,
}


def sample(rng: np.random.Generator, task: str) -> Example:
    """Draw one example from one number of `rng`: Python's own generator draws scalars ten times faster."""
    return TASKS[task](Random(int(rng.integers(1 << 62))))


def prompt_key(example: Example) -> str:
    """The question alone, so that it is held out in every context, or in none."""
    return str(next(m["content"] for m in reversed(example.messages) if m["role"] == "user"))


def _is_held_out(question: str) -> bool:
    return blake2b(question.encode(), digest_size=1).digest()[0] % 16 == 0


def held_out(example: Example) -> bool:
    """Whether the question is kept from training: one in sixteen, by a hash that no seed changes."""
    return _is_held_out(prompt_key(example))


# --- the judge ---

_CHANNEL = re.compile(r"<\|channel>thought\n?(.*?)<channel\|>", re.DOTALL)
_STOP = re.compile(r"(<turn\|>|<eos>|(?<=<tool_call\|>)<\|tool_response>).*", re.DOTALL)


def visible(reply_text: str) -> str:
    """The reply without its stop token and its thoughts."""
    return _CHANNEL.sub("", _STOP.sub("", reply_text)).strip()


def _thoughts(reply_text: str) -> str:
    return "".join(_CHANNEL.findall(reply_text)).strip()


def _canonical_json(text: str) -> str | None:
    """JSON with sorted keys: equal texts mean equal values of equal types (1, 1.0 and true all differ)."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else None


def correct(example: Example, reply_text: str) -> bool:
    """Whether the visible reply is the right one; thoughts must be there exactly when they were asked for."""
    if bool(_thoughts(reply_text)) != example.thinking:
        return False
    expected, got = visible(example.answer), visible(reply_text)
    wanted = _canonical_json(expected)
    return got == expected or (wanted is not None and _canonical_json(got) == wanted)
