"""The data side of the embedded model: tokenizer, template, tasks and their judge."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from benchmarks.tiny import tasks, tokenizer

GEMMA_IDS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<|tool>": 46,
    "<tool|>": 47,
    "<|tool_call>": 48,
    "<tool_call|>": 49,
    "<|tool_response>": 50,
    "<tool_response|>": 51,
    '<|"|>': 52,
    "<|think|>": 98,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
}
EACH_TASK = pytest.mark.parametrize("task", list(tasks.TASKS))
CITY_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather in a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "The city"},
                "days": {"type": "integer"},
            },
            "required": ["city"],
        },
    },
}
DECLARED = (
    '<|tool>declaration:weather{description:<|"|>Weather in a city<|"|>,parameters:{properties:{'
    'city:{description:<|"|>The city<|"|>,type:<|"|>STRING<|"|>},days:{type:<|"|>INTEGER<|"|>}},'
    'required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>}}<tool|>'
)
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "function": {"name": "weather", "arguments": {"days": 3, "city": "Paris"}}}],
}
CALLED = '<|tool_call>call:weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>'


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return tokenizer.build_tokenizer()


@pytest.fixture(scope="module")
def render() -> Callable[..., str]:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = env.from_string(tokenizer.chat_template())

    def rendered(messages: list[Any], **options: Any) -> str:
        options = {"add_generation_prompt": True, "bos_token": "<bos>"} | options
        return template.render(messages=messages, **options)

    return rendered


def examples(task: str, count: int, seed: int = 0) -> list[tasks.Example]:
    rng = np.random.default_rng(seed)
    return [tasks.sample(rng, task) for _ in range(count)]


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


# --- tokenizer ---


def test_special_tokens_have_gemmas_ids(tok: Tokenizer) -> None:
    assert {token: tok.token_to_id(token) for token in GEMMA_IDS} == GEMMA_IDS
    assert all(tok.encode(token).ids == [i] for token, i in GEMMA_IDS.items())
    assert tok.get_vocab_size() == tokenizer.VOCAB_SIZE
    assert sorted(tok.get_vocab().values()) == list(range(tokenizer.VOCAB_SIZE))


@pytest.mark.parametrize(
    "text",
    [
        "".join(map(chr, range(32, 127))),
        "  leading and   many spaces  ",
        "\n\n a\nb \n",
        "What is 12 + 345? Reverb",
        '{"a": [1, {"b": "c d"}]}}, :{ }},',
        '<|turn>user\n<|"|>x<turn|>\n',
        "naïve ✓ 日本 🙂\t\r\x00",
    ],
)
def test_round_trip(tok: Tokenizer, text: str) -> None:
    ids = tok.encode(text, add_special_tokens=False).ids
    assert tok.decode(ids, skip_special_tokens=False) == text
    assert GEMMA_IDS["<unk>"] not in ids


def test_payload_and_numbers_are_single_characters(tok: Tokenizer) -> None:
    payload = 'Reverse the string "thesat".'
    assert tok.encode(payload).tokens == ["Reverse", "▁the", "▁string", '▁"', *"thesat", '"', "."]
    assert tok.encode("Count from 17 to 48.").tokens == ["Count", "▁from", "▁", *"17", "▁to", "▁", *"48", "."]
    assert tok.encode("name Reverb").tokens == ["name", "▁", *"Reverb"]


def test_written_files_load_again(tok: Tokenizer, tmp_path: Path) -> None:
    tokenizer.write(tmp_path / "new")
    loaded = Tokenizer.from_file(str(tmp_path / "new" / "tokenizer.json"))
    assert loaded.to_str() == tok.to_str() == tokenizer.build_tokenizer().to_str()
    assert json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())["eos_token"] == "<eos>"
    assert (tmp_path / "new" / "chat_template.jinja").read_text() == tokenizer.chat_template()


# --- template ---


def test_template_turns(render: Callable[..., str]) -> None:
    system = {"role": "system", "content": " Be brief. "}
    assert render([user(" Hi! ")]) == "<bos><|turn>user\nHi!<turn|>\n<|turn>model\n"
    assert render([user("Hi!")], add_generation_prompt=False) == "<bos><|turn>user\nHi!<turn|>\n"
    assert render([system, user("Hi!"), assistant("Yes"), user("Hi!")]) == (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi!<turn|>\n<|turn>model\nYes<turn|>\n"
        "<|turn>user\nHi!<turn|>\n<|turn>model\n"
    )
    parts = [{"type": "text", "text": "a "}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert render([user(parts)]) == "<bos><|turn>user\nab<turn|>\n<|turn>model\n"


def test_template_thinking(render: Callable[..., str]) -> None:
    history = [user("1 + 1 ="), assistant("<|channel>thought\n1+1=2\n<channel|>2"), user("2 + 2 =")]
    assert render(history, enable_thinking=True) == (
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\n1 + 1 =<turn|>\n<|turn>model\n2<turn|>\n"
        "<|turn>user\n2 + 2 =<turn|>\n<|turn>model\n"
    )


def test_template_tools(render: Callable[..., str]) -> None:
    head = f"<bos><|turn>system\n{DECLARED}<turn|>\n<|turn>user\nHow is it?<turn|>\n<|turn>model\n"
    asked = [user("How is it?")]
    assert render(asked, tools=[CITY_TOOL]) == head
    assert render([*asked, CALL], tools=[CITY_TOOL]) == head + CALLED + "<|tool_response>"

    response = {"role": "tool", "tool_call_id": "c1", "content": "21 C"}
    responded = head + CALLED + '<|tool_response>response:weather{value:<|"|>21 C<|"|>}<tool_response|>'
    assert render([*asked, CALL, response], tools=[CITY_TOOL]) == responded
    as_parts = response | {"content": [{"type": "text", "text": "21 C"}]}
    assert render([*asked, CALL, as_parts], tools=[CITY_TOOL]) == responded
    again = [*asked, CALL, response, assistant("Warm."), user("Hi!")]
    expected = responded + "Warm.<turn|>\n<|turn>user\nHi!<turn|>\n<|turn>model\n"
    assert render(again, tools=[CITY_TOOL]) == expected


def test_template_nested_arguments(render: Callable[..., str]) -> None:
    arguments = {"on": True, "list": [1, "x"], "map": {"k": 2.5}}
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    call = '<|tool_call>call:f{list:[1,<|"|>x<|"|>],map:{k:2.5},on:true}<tool_call|>'
    assert call in render([user("Hi!"), message])


# --- tasks ---


@EACH_TASK
def test_every_example_is_encodable_and_closed(task: str, tok: Tokenizer, render: Callable[..., str]) -> None:
    for example in examples(task, 200):
        prompt = render(example.messages, tools=example.tools, enable_thinking=example.thinking)
        ids = tok.encode(prompt).ids
        answer = tok.encode(example.answer).ids
        assert GEMMA_IDS["<unk>"] not in ids + answer
        assert tok.decode(ids, skip_special_tokens=False) == prompt
        assert tok.decode(answer, skip_special_tokens=False) == example.answer
        assert answer[-1] in (106, 50) and not {106, 50} & set(answer[:-1])
        assert (100 in answer) == example.thinking == (task == "think")
        assert len(ids) <= 220 and len(answer) <= 190


@EACH_TASK
def test_sampling_is_deterministic(task: str) -> None:
    assert examples(task, 20, seed=7) == examples(task, 20, seed=7)
    assert examples(task, 20, seed=7) != examples(task, 20, seed=8)


@EACH_TASK
def test_only_the_right_answer_is_correct(task: str) -> None:
    for example in examples(task, 200):
        stop = tasks.RESPONSE if example.answer.endswith(tasks.RESPONSE) else tasks.TURN_END
        body = example.answer.removesuffix(stop)
        assert tasks.correct(example, example.answer)
        assert tasks.correct(example, body)
        assert tasks.correct(example, example.answer + "<pad>")
        assert not tasks.correct(example, body + "x" + stop)
        assert not tasks.correct(example, body[:-1] + stop)
        assert not tasks.correct(example, stop)


def test_thoughts_are_there_when_asked_for_and_only_then() -> None:
    plain = tasks.Example("add", [user("1 + 1 =")], None, False, "2<turn|>")
    assert tasks.correct(plain, "<|channel>thought\n<channel|>2<turn|>")
    assert not tasks.correct(plain, "<|channel>thought\n1+1=2\n<channel|>2<turn|>")
    thinking = dataclasses.replace(
        plain, thinking=True, answer="<|channel>thought\n1+1=2\n<channel|>2<turn|>"
    )
    assert tasks.correct(thinking, "<|channel>thought\nother\n<channel|>2<turn|>")
    assert not tasks.correct(thinking, "<|channel>thought\n<channel|>2<turn|>")
    assert not tasks.correct(thinking, "2<turn|>")


def test_json_is_compared_by_value_and_type() -> None:
    example = tasks.Example("json", [user("…")], None, False, '{"name": "Ada", "age": 36}<turn|>')
    assert tasks.correct(example, '{"age":36, "name":"Ada"}<turn|>')
    assert not tasks.correct(example, '{"name": "Ada", "age": "36"}<turn|>')
    assert not tasks.correct(example, '{"name": "Ada", "age": 36.0}<turn|>')


@pytest.mark.parametrize(
    ("thought", "a", "b", "text"),
    [
        (tasks._add_thought, 99, 5, "9+5=14 9+0+1=10"),
        (tasks._add_thought, 0, 0, "0+0=0"),
        (tasks._subtract_thought, 32, 5, "12-5=7 3-0-1=2"),
        (tasks._subtract_thought, 100, 1, "10-1=9 10-0-1=9 1-0-1=0"),
    ],
)
def test_arithmetic_thoughts(thought: Callable[[int, int], str], a: int, b: int, text: str) -> None:
    assert thought(a, b) == text


def test_one_question_in_sixteen_is_held_out() -> None:
    questions = {tasks.prompt_key(e): tasks.held_out(e) for task in tasks.TASKS for e in examples(task, 2000)}
    assert 0.055 < sum(questions.values()) / len(questions) < 0.070


def test_held_out_ignores_what_stands_around_the_question() -> None:
    for example in examples("add", 300):
        alone = dataclasses.replace(example, messages=example.messages[-1:], tools=[CITY_TOOL])
        assert tasks.held_out(alone) == tasks.held_out(example)
    answered = [m["content"] for e in examples("add", 3000) for m in e.messages[:-1] if m["role"] == "user"]
    assert answered and not any(map(tasks._is_held_out, set(answered) - {q for q, _ in tasks.GREETINGS}))


@EACH_TASK
def test_a_tenth_has_context(task: str) -> None:
    drawn = examples(task, 2000)
    first_user = [next(i for i, m in enumerate(e.messages) if m["role"] == "user") for e in drawn]
    asked = [sum(m["role"] == "user" for m in e.messages) for e in drawn]
    share = np.mean([first > 0 or count > 1 for first, count in zip(first_user, asked, strict=True)])
    assert 0.07 < share < 0.13
    assert max(first_user) == 1 and max(asked) == 2


def test_count_spans_one_to_several_canvases(tok: Tokenizer) -> None:
    lengths = [len(tok.encode(e.answer).ids) for e in examples("count", 500)]
    assert min(lengths) < 32 and max(lengths) > 4 * 32
