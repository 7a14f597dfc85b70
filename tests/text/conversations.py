"""Random conversations, in the forms in which programs write them."""

from __future__ import annotations

import json
from random import Random
from typing import Any

WORDS = [
    "hi", "  two words ", "é漢🙂", "\n\nlines\n", "<b>", "a<c", "1 < 2 > 0", "{x}", "[1]", "", " ", "\t",
    "it's", '"q"', "%s", "{{x}}",
]  # fmt: skip
NAMES = ["f", "get_weather", "ns.do-it", "a_b"]


def text(r: Random, spelled: list[str]) -> str:
    """Words, some of which spell a token of `spelled`."""
    some = [
        r.choice(spelled) if spelled and r.random() < 0.3 else r.choice(WORDS) for _ in range(r.randint(1, 4))
    ]
    return r.choice(["", " "]).join(some)


def value(r: Random, spelled: list[str], depth: int = 0) -> Any:
    """A JSON value."""
    kind = r.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [value(r, spelled, depth + 1) for _ in range(r.randint(0, 3))]
    if kind == 7:
        return arguments(r, spelled, depth + 1)
    return [None, True, False, r.randint(-9, 999), r.random(), text(r, spelled)][kind]


def arguments(r: Random, spelled: list[str], depth: int = 0) -> dict[str, Any]:
    return {
        r.choice(["a", "b", "city", "Z", "é", "x_1"]): value(r, spelled, depth)
        for _ in range(r.randint(0, 3))
    }


def content(r: Random, spelled: list[str]) -> Any:
    if r.random() < 0.7:
        return text(r, spelled)
    return [{"type": "text", "text": text(r, spelled)} for _ in range(r.randint(1, 3))]


def conversation(r: Random, spelled: list[str]) -> list[dict[str, Any]]:
    """Turns as OpenAI's API has them, with system messages, answers, thoughts, calls and their results."""
    messages: list[dict[str, Any]] = []
    if r.random() < 0.4:
        messages.append({"role": r.choice(["system", "developer"]), "content": content(r, spelled)})
    for _ in range(r.randint(1, 4)):
        messages.append({"role": "user", "content": content(r, spelled)})
        if r.random() < 0.4:
            calls = [
                {
                    "id": f"c{i}",
                    "type": "function",
                    "function": {"name": r.choice(NAMES), "arguments": arguments(r, spelled)},
                }
                for i in range(r.randint(1, 3))
            ]
            answer = {
                "role": "assistant",
                "content": r.choice([None, "", text(r, spelled)]),
                "tool_calls": calls,
            }
            if r.random() < 0.5:
                answer[r.choice(["reasoning", "reasoning_content", "thinking"])] = text(r, spelled) or "x"
            messages.append(answer)
            for call in calls:
                result = r.choice([text(r, spelled), content(r, spelled), 5, 5.5, True, None])
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        if r.random() < 0.7:
            said = text(r, spelled)
            if r.random() < 0.3:
                said = f"<|channel>thought\n{r.choice(WORDS)}<channel|>{said}"
            messages.append({"role": "assistant", "content": said})
    if messages[-1]["role"] == "assistant" and r.random() < 0.7:
        messages.append({"role": "user", "content": content(r, spelled)})
    return messages


def tools(r: Random, spelled: list[str]) -> list[dict[str, Any]] | None:
    if r.random() < 0.6:
        return None
    return [
        {
            "type": "function",
            "function": {
                "name": r.choice(NAMES),
                "description": text(r, spelled),
                "parameters": {
                    "type": "object",
                    "properties": {
                        key: {"type": "string", "description": text(r, spelled)}
                        | ({"enum": [text(r, spelled)]} if r.random() < 0.3 else {})
                        for key in r.sample(["a", "b", "city"], r.randint(1, 3))
                    },
                    "required": ["a"],
                },
            },
        }
        for _ in range(r.randint(1, 2))
    ]


def as_openai_writes(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with the arguments of calls as JSON in a string."""
    changed: list[dict[str, Any]] = json.loads(json.dumps(messages))
    for message in changed:
        for call in message.get("tool_calls") or []:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return changed
