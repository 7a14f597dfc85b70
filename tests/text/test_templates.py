"""Forms of chat templates beside transformers, and templates that fail, never end or eat memory."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.errors import CheckpointError, DgemmaError, PromptError
from dgemma.text import sandbox
from dgemma.text.template import ChatTemplate
from dgemma.text.tokenizer import Tokenizer
from tests.text.folders import make

pytest.importorskip("transformers")
from transformers import AutoTokenizer

MESSAGES = [
    {"role": "system", "content": "hé <b> & 'c'"},
    {"role": "user", "content": " q "},
    {"role": "assistant", "content": "yo", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"b": 1, "a": [True, None, "é"]}}}]},
    {"role": "tool", "tool_call_id": "1", "content": "r"},
    {"role": "user", "content": [{"type": "text", "text": "p<q"}]},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d<é", "parameters": {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "string"}}}}}]  # fmt: skip
EACH = "{% for m in messages %}"
FORMS = {
    "break": EACH + "{% if m.role == 'user' %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "continue": EACH + "{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": EACH + "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "generation with blanks": EACH + "\n  {%- generation -%}\n {{ m.role }}\n {% endgeneration %}x{% endfor %}",
    "loop": EACH + "{{ loop.index0 }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{{ loop.previtem is defined }}{{ loop.nextitem is defined }}{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{% endfor %}",
    "loop with a condition": "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.content }}{% else %}none{% endfor %}",
    "recursive": "{% for x in [[1, [2]], [3]] recursive %}{{ loop(x) if x is sequence else x }},{{ loop.depth }};{% endfor %}",
    "unpacking": "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{{ loop.index }}{% endfor %}",
    "over text and a range": "{% for c in 'abc' %}{{ c }}{% endfor %}{% for i in range(3, 0, -1) %}{{ i }}{% endfor %}",
    "slices": "{{ messages[1:][::-1] | map(attribute='role') | join('|') }}{{ messages[-1].role[:2] }}",
    "tojson": "{{ tools | tojson }}",
    "tojson separators": "{{ tools | tojson(separators=(',', ':')) }}",
    "tojson sorted, indented, ASCII": "{{ tools | tojson(sort_keys=true, indent=2, ensure_ascii=true) }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ mask_token }}{{ image_token }}{{ sep_token is defined }}",
    "what is defined": "{{ documents is none }}{{ tools is defined }}{{ add_generation_prompt }}{{ foo is defined }}",
    "namespace": "{% set ns = namespace(n=0, t='') %}" + EACH + "{% set ns.n = ns.n + 1 %}{% set ns.t = ns.t ~ m.role %}{% endfor %}{{ ns.n }}{{ ns.t }}",
    "macro and caller": "{% macro f(x, y='d') %}{{ caller(x) }}{{ y }}{{ varargs }}{{ kwargs }}{% endmacro %}{% call(z) f(1, 2, 3, q=4) %}<{{ z }}>{% endcall %}",
    "set block and filter block": "{% set x %}a{{ 1 }}b{% endset %}{% filter upper %}{{ x }}{% endfilter %}{{ x | length }}",
    "blanks": "  {% if true %}\n  a\n  {% endif %}\n\n {{- ' x ' -}} \n b",
    "methods of text": "{{ 'a-b'.split('-') }}{{ ' x '.strip() }}{{ 'abc'.replace('b', 'x') }}{{ 'x'.join(['1', '2']) }}{{ '{}{a}'.format(1, a=2) }}{{ 'a' * 3 }}{{ '%s %d' % ('a', 2) }}{{ 'ab'.startswith('a') }}{{ 'x'.center(5) }}",
    "arithmetic": "{{ 7 // 2 }}{{ 7 % 3 }}{{ 2 ** 10 }}{{ 1 / 4 }}{{ 3 * 4 - 5 }}{{ [1] + [2] }}{{ -3 | abs }}{{ 1.5 | round }}",
    "comparisons": "{{ 1 < 2 < 3 }}{{ 'a' in 'abc' }}{{ 'a' not in ['b'] }}{{ messages[0] == messages[0] }}{{ tools[0].type != 'x' }}{{ 1 is eq(1) }}",
    "filters": "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 'b,a' | upper }}{{ [3, 1, 2] | sort | join }}{{ {'b': 1, 'a': 2} | dictsort }}{{ ['a', 'a'] | unique | list }}{{ 'a b' | title }}{{ 'a\nb' | indent(2) }}{{ x | default('d') }}{{ '<' | e }}{{ [1, 2, 3] | batch(2) | list }}{{ 'long text here' | truncate(8) }}{{ ' x ' | trim }}{{ [[1, 2], [3]] | map('length') | sum }}{{ 'a' | string }}{{ '3' | int + 1 }}",
    "tests": "{{ 1 is number }}{{ 'a' is string }}{{ [] is sequence }}{{ {} is mapping }}{{ none is none }}{{ x is undefined }}{{ true is boolean }}{{ 'a' is in(['a']) }}{{ 4 is divisibleby(2) }}",
    "arguments": EACH + "{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{{ c.function.arguments.a }}{% endfor %}{% endfor %}",
    "dict and items": "{{ dict(a=1) }}{{ {'a': {'b': [1, {'c': none}]}} }}{% for k, v in messages[0] | items %}{{ k }}{% endfor %}",
    "strftime_now": "{{ strftime_now('%Y') | length }}",
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_rendered_as_in_transformers(form: str, tmp_path: Path) -> None:
    extra = {"extra_special_tokens": {"image_token": "<|think|>"}, "mask_token": "<unk>"}
    folder = make(tmp_path / "m", FORMS[form], config=lambda config: config.update(extra))
    want = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        MESSAGES, tools=TOOLS, add_generation_prompt=True, tokenize=False
    )
    tokenizer = Tokenizer.open(folder)
    assert tokenizer is not None and tokenizer.template is not None
    assert tokenizer.template.render(MESSAGES, TOOLS) == want


OWN = "own {{ messages | length }}"
NAMED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda c: c.update(chat_template=[{"name": "default", "template": OWN}]),
    "an object": lambda c: c.update(chat_template={"default": OWN, "rag": "no"}),
    "tool_use": lambda c: c.update(
        chat_template=[
            {"name": "tool_use", "template": "T{{ tools | length }}"},
            {"name": "default", "template": OWN},
        ]
    ),
    "text": lambda c: c.update(chat_template=OWN),
}


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("named", [*NAMED, "files", "files beside"])
def test_templates_by_name(named: str, tools: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "m", **({"config": NAMED[named]} if named in NAMED else {}))
    if named in NAMED:
        (folder / "chat_template.jinja").unlink()
    else:
        more = folder / "additional_chat_templates"
        more.mkdir()
        (more / "tool_use.jinja").write_text("T{{ tools | length }}")
        if named == "files beside":
            (more / "rag.jinja").write_text("R")
    oracle = AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer.open(folder)
    assert tokenizer is not None and tokenizer.template is not None
    want = oracle.apply_chat_template(MESSAGES, tools=tools, tokenize=False, add_generation_prompt=True)
    assert tokenizer.template.render(MESSAGES, tools) == want


def test_a_template_for_tools_alone(tmp_path: Path) -> None:
    """transformers refuses a conversation without tools then, and names the templates; so do we."""
    only = {"chat_template": [{"name": "tool_use", "template": "T"}]}
    folder = make(tmp_path / "m", config=lambda config: config.update(only))
    (folder / "chat_template.jinja").unlink()
    tokenizer = Tokenizer.open(folder)
    assert tokenizer is not None and tokenizer.template and tokenizer.template.render(MESSAGES, TOOLS) == "T"
    with pytest.raises(PromptError, match="default; known: tool_use"):
        tokenizer.encode_chat(MESSAGES)


@pytest.mark.parametrize(
    "value", [[], [{}], ["x"], [{"name": "a"}], {"a": 1}, 5, True, [{"name": 1, "template": "x"}]]
)
def test_templates_that_are_none(value: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "m", config=lambda config: config.update(chat_template=value))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: chat_template must be"):
        Tokenizer.open(folder)


# ---- templates that fail -----------------------------------------------------------------------------

FAILING = {
    "division": "{{ 1 / 0 }}",
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "many nested loops": "{% for a in [1] %}" * 25 + "{% endfor %}" * 25,
    "many nested conditions": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep attributes": "{{ a" + ".b" * 5000 + " }}",
    "an assertion of jinja2's": "{{ 'xxxx' | truncate(-5) }}",
    "half a character": "{{ '\\ud800' }}",
    "a float beyond range": "{{ 10.0 ** 400 }}",
    "an integer too long to write": "{{ 10 ** 5000 }}",
    "undefined": "{{ a.b.c }}",
    "unknown filter": "{{ 1 | nope }}",
    "unknown tag": "{% nope %}",
    "not closed": "{% for x in y %}",
    "include": "{% include 'x' %}",
    "import": "{% import '/etc/passwd' as x %}",
    "a class": "{{ ''.__class__.__mro__ }}",
    "its own word": "{{ raise_exception('no') }}",
    "a wrong call": "{{ range() }}",
    "unpacking": "{% set a, b = 1 %}",
    "too much source": "x" * (1 << 21),
}
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops with calls": "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'a'.upper() }}{% endfor %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "wordwrap": "{{ ('x' * 1000000) | wordwrap(1) | length }}",
    "lipsum": "{{ lipsum(n=10000000) }}",
    "slices": "{% for i in range(99999) %}{{ [i] | slice(99999) | list | length }}{% endfor %}",
    "source": "{% set a = 1 %}" * 60000,
}
DOUBLED = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x | length }}"


def doubled(step: str, start: str = "'ab'") -> str:
    return DOUBLED.replace("START", start).replace("STEP", step)


NESTED = "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}"
HUGE = {
    "power": "{{ 10 ** (10 ** 8) }}",
    "product of integers": doubled("ns.x * ns.x", "9") + "{{ ns.x }}",
    "product": "{{ 'x' * 2500000000 }}",
    "product of a list": "{{ [1] * 2500000000 }}",
    "+": doubled("ns.x + ns.x"),
    "~": doubled("ns.x ~ ns.x"),
    "+ of lists": doubled("ns.x + ns.x", "[1]"),
    "%": doubled("'%s%s' % (ns.x, ns.x)"),
    "join": doubled("[ns.x, ns.x] | join"),
    "tojson": doubled("ns.x | tojson", "'\"'"),
    "replace": "{{ ('x' * 1000000).replace('x', 'y' * 1000000) | length }}",
    "replace, the filter": "{{ ('x' * 1000000) | replace('x', 'y' * 1000000) | length }}",
    "join of many": "{{ ('y' * 1000000).join(range(99999) | map('string') | list) | length }}",
    "join of many, the filter": "{{ range(99999) | join('y' * 1000000) | length }}",
    "set blocks": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
    "nested lists": NESTED + "{{ ns.x }}",
    "nested lists as JSON": NESTED + "{{ ns.x | tojson }}",
    "nested lists in a format": NESTED + "{{ '{}'.format(ns.x) }}{{ '%s' % (ns.x,) }}",
    "nested lists compared": NESTED + "{{ ns.x == ns.y }}",
    "nested lists sorted": NESTED + "{{ [ns.x, ns.y] | sort }}",
    "nested lists tested": NESTED + "{{ ns.x is eq(ns.y) }}",
    "nested lists searched": NESTED + "{{ [ns.x].index(ns.y) }}",
    "center": "{{ 'x' | center(10 ** 9) }}",
    "center, the method": "{{ 'x'.center(999999999) }}",
    "ljust by name": "{{ 'x'.ljust(width=999999999) }}",
    "zfill": "{{ 'x'.zfill(999999999) }}",
    "expandtabs": "{{ ('\t' * 1000000).expandtabs(1000000) }}",
    "translate": "{{ ('x' * 1000000).translate({120: 'y' * 1000000}) }}",
    "width in a format": "{{ '%999999999d' % 1 }}",
    "width beside a format": "{{ '%*d' % (999999999, 1) }}",
    "width in braces": "{{ '{:>999999999}'.format(1) }}",
    "width beside braces": "{{ '{:>{}}'.format(1, 999999999) }}",
    "indent": "{{ 'x' | indent(10 ** 9) }}",
    "batch": "{{ [1] | batch(10 ** 9, 'x') | list | length }}",
    "indent of JSON": "{{ [1] | tojson(indent=10 ** 9) }}",
    "round": "{{ 1.5 | round(10 ** 9, 'floor') }}",
    "many lists": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x, range(99999) | list] %}{% endfor %}",
    "strftime_now": "{{ strftime_now('%Y' * 10000000) }}",
}  # fmt: skip


def refusal(source: str) -> str:
    with pytest.raises(DgemmaError) as caught:
        ChatTemplate(source, {"bos_token": "<bos>"}, "t.jinja").render(MESSAGES)
    text = str(caught.value)
    assert text.startswith("t.jinja: ") and "\n" not in text and len(text) < 400
    return text


@pytest.mark.parametrize("name", FAILING)
def test_a_template_that_fails_is_one_line(name: str) -> None:
    refusal(FAILING[name])


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_never_ends_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    before = time.thread_time()
    assert "it takes more than" in refusal(ENDLESS[name])
    assert time.thread_time() - before < 10  # of processor time: no matter how busy the machine is


@pytest.mark.parametrize("name", HUGE)
def test_a_template_that_eats_memory_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 60.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(HUGE[name])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (1 << 10)
    assert grown < 1500, f"{grown} MB"


def test_a_tracer_of_the_caller_is_put_back() -> None:
    import sys

    def tracer(frame: Any, event: str, arg: Any) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        ChatTemplate("{{ 'a b' | title }}", {}).render(MESSAGES)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


def test_what_a_template_says_of_itself_is_cut() -> None:
    assert len(refusal("{{ raise_exception('x' * 100000) }}")) < 400


EXPRESSIONS = st.recursive(
    st.sampled_from(["1", "0", "-1", "'a'", "''", "none", "true", "messages", "tools", "x", "[]", "{}", "1.5", "m.content"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(inner, st.sampled_from(["length", "upper", "trim", "join", "first", "list", "tojson", "int", "sort", "string", "default(1)", "center(9)", "replace('a','b')", "round", "sum", "items", "dictsort", "e", "title"])).map(lambda t: f"({t[0]} | {t[1]})"),
        st.tuples(inner, st.sampled_from(["string", "mapping", "sequence", "defined", "none", "number", "eq(1)", "in([1])"])).map(lambda t: f"({t[0]} is {t[1]})"),
        st.tuples(inner, inner).map(lambda t: f"[{t[0]}, {t[1]}]"),
        st.tuples(inner, inner).map(lambda t: f"({t[0]})[{t[1]}]"),
        inner.map(lambda e: f"({e}).strip()"),
        inner.map(lambda e: f"range({e})"),
    ),
    max_leaves=8,
)  # fmt: skip
STATEMENTS = st.recursive(
    EXPRESSIONS.map(lambda e: "{{ " + e + " }}"),
    lambda inner: st.one_of(
        st.tuples(EXPRESSIONS, inner).map(lambda t: "{% for m in " + t[0] + " %}" + t[1] + "{% endfor %}"),
        st.tuples(EXPRESSIONS, inner).map(lambda t: "{% if " + t[0] + " %}" + t[1] + "{% endif %}"),
        st.tuples(EXPRESSIONS, inner).map(lambda t: "{% set x = " + t[0] + " %}" + t[1]),
        st.tuples(inner, inner).map("".join),
    ),
    max_leaves=4,
)


@settings(max_examples=1000, deadline=None)
@given(STATEMENTS)
def test_a_random_template_renders_or_is_one_line(source: str) -> None:
    """And renders as in a plain environment of jinja2's, where that renders within bounds."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        text = ChatTemplate(source, {"x": "X"}).render(MESSAGES, TOOLS)
    except DgemmaError as error:
        assert "\n" not in str(error)
        return
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    plain.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    from dgemma.text.messages import read_messages, read_tools

    variables = {"messages": read_messages(MESSAGES), "tools": read_tools(TOOLS), "x": "X"}
    if " at 0x" not in text:  # an address
        assert text == plain.from_string(source).render(variables)
