"""What stands between the braces of a tool call."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.text.calls import DEPTH, QUOTE, ToolCall, UnreadableCall, read_call

Q = QUOTE


def arguments(text: str) -> dict[str, Any]:
    """The arguments of `call:f{text}`, which are always JSON."""
    call = read_call("call:f{" + text + "}")
    assert call.name == "f"
    assert json.loads(json.dumps(call.arguments, allow_nan=False)) == call.arguments
    json.dumps(call.arguments, ensure_ascii=False).encode()
    return call.arguments


def reason(text: str) -> str:
    with pytest.raises(UnreadableCall) as error:
        read_call(text)
    assert len(str(error.value).splitlines()) == 1 and QUOTE not in str(error.value)
    return str(error.value)


WRITTEN = {  # as the released template writes it
    "": {},
    f"city:{Q}Paris{Q},n:3": {"city": "Paris", "n": 3},
    f"s:{Q}{Q}": {"s": ""},
    f"s:{Q} a\n}},:[\"'\\u00e9<|\"|>{{ {Q}": {"s": " a\n},:[\"'\\u00e9<|\"|>{ "},
    "a:None": {"a": None},
    "a:[1,None]": {"a": [1, None]},
    "o:{a:None}": {"o": {"a": None}},
    "t:true,u:false": {"t": True, "u": False},
    "l:[],o:{},d:[[],[{}]]": {"l": [], "o": {}, "d": [[], [{}]]},
    "x:-1.5,y:1e-05,z:1e+16,w:-0.0,v:1E5": {"x": -1.5, "y": 1e-05, "z": 1e16, "w": -0.0, "v": 1e5},
    "n:123456789012345678901234567890": {"n": 123456789012345678901234567890},
    f"{Q}a b{Q}:1,o:{{{Q}:}},{Q}:{Q}x{Q}}}": {"a b": 1, "o": {":},": "x"}},
    "Basic LLM Chain:1,$ref:2,a-b.c/d:3,é:4,it's:5": {
        "Basic LLM Chain": 1, "$ref": 2, "a-b.c/d": 3, "é": 4, "it's": 5,
    },
    "1:2": {"1": 2},
}  # fmt: skip
TAKEN = {  # as models write it besides
    f"\n  city : {Q}Paris{Q} ,\r\n\tn: 3\n": {"city": "Paris", "n": 3},
    " ": {},
    f"l:[ {Q}a{Q} , {Q}b{Q} ], m:[ ], o:{{ }}": {"l": ["a", "b"], "m": [], "o": {}},
    '"city":"Paris","n":3': {"city": "Paris", "n": 3},
    '"a b" : {"c": ["d", null, true]}': {"a b": {"c": ["d", None, True]}},
    r'"k\u00e9\"":"\ud83d\ude00 \\ \n \/"': {'ké"': "😀 \\ \n /"},
    'content:"a,b"': {"content": "a,b"},
    'content:"has } brace, [ok]: {"': {"content": "has } brace, [ok]: {"},
    'content:"two\nlines"': {"content": "two\nlines"},
    "'a':'b, c'": {"a": "b, c"},
    f"a='x.docx',b=\"y\",c={Q}z{Q},d= 'w'": {"a": "x.docx", "b": "y", "c": "z", "d": "w"},
    '{"command":"ls -la"}': {"command": "ls -la"},
    ' { "a":{"b":[1, {"c":null}]} } ': {"a": {"b": [1, {"c": None}]}},
    "{}": {},
    f"{{a:{Q}b{Q}}}": {"a": "b"},
    f"command:{Q}look{Q}angle:90": {"command": "look", "angle": 90},
    f"a:{Q}x{Q} {Q}b{Q}:{Q}y{Q}\nl:[{Q}x{Q}{Q}y{Q}]": {"a": "x", "b": "y", "l": ["x", "y"]},
    "a:1,": {"a": 1},
    "l:[1,2,],": {"l": [1, 2]},
    "a:True,b:False,c:null": {"a": True, "b": False, "c": None},
    "city:Paris": {"city": "Paris"},
    "city:New York , n:1": {"city": "New York", "n": 1},
    "d:2026-11-28": {"d": "2026-11-28"},
    "d:2026-11-28 12:30,t:12:30:45": {"d": "2026-11-28 12:30", "t": "12:30:45"},
    "d:2026-11-28T12:30:00Z": {"d": "2026-11-28T12:30:00Z"},
    "u:http://x.y:80/z?a=b&c=d#e": {"u": "http://x.y:80/z?a=b&c=d#e"},
    "m:a@b.c,ip:10.0.0.1": {"m": "a@b.c", "ip": "10.0.0.1"},
    "p:C:\\x\\y,r:/usr/bin": {"p": "C:\\x\\y", "r": "/usr/bin"},
    "l:[Paris,None,5 km]": {"l": ["Paris", None, "5 km"]},
    "v:it's,w:rock 'n' roll": {"v": "it's", "w": "rock 'n' roll"},
}  # fmt: skip
NO_NUMBERS = [
    "007",
    "+5",
    ".5",
    "5.",
    "1_000",
    "0x10",
    "1e",
    "--1",
    "- 1",
    "1.2.3",
    "٣",
    "５",
    "1/2",
    "1e5x",
    "-",
]
REFUSED = {
    "a:NaN": "no number",
    "a:Infinity": "no number",
    "l:[-Infinity]": "no number",
    "a:nan,b:1": "no number",
    "a:inf": "no number",
    "a:-inf": "no number",
    "a:1e999": "beyond every number",
    "l:[-1e999]": "beyond every number",
    "a:1" + "0" * 5000: "5001 digits",
    "a:1,a:2": "'a' stands twice",
    f"a:1,{Q}a{Q}:2": "'a' stands twice",
    'o:{"b":1, b : 1}': "'b' stands twice",
    r'a:"\ud83d"': "surrogate",
    r'"\ude00":1': "surrogate",
    r'a:"\ud83d x \ude00"': "surrogate",
    f'a:"x{Q}y"': "quote token",
    r'a:"\q"': "no JSON",
    'a:"x': "no JSON",
    f"a:{Q}x": "without an end",
    "a:'x": "without an end",
    r"a:'C:\new'": "without an end",
    "a:'it's'": "where ',' or '}'",
    "a:": "a value",
    "a:,b:1": "a value",
    "l:[,]": "a value",
    ",": "a key",
    "a": "':'",
    "hello, world": "':'",
    ":1": "a key",
    "a:1,x\ny:2": "a key",
    "{a:1},b:2": "'}'",
    "{{a:1}}": "a key",
    "[1,2]": "a key",
    "o:{{a:1}}": "a key",
    "a=1": "a quoted string",
    "a=b:1": "a quoted string",
    "a:1 b:2": "more than one argument",
    "a:1\nb:2": "more than one argument",
    "a:x b=2": "more than one argument",
    'h:5"': "where ',' or '}'",
    "q:a[0]": "where ',' or '}'",
    "q:f{x}": "where ',' or '}'",
    'a:"x" "y"': "where ',' or '}'",
    f"a:x{Q}y{Q}": "where ',' or '}'",
    f"a{Q}b{Q}:1": "':'",
    "l:[1}": "where ',' or ']'",
    "o:{a:1]": "where ',' or '}'",
    "l:[1": "where ',' or ']'",
    "a:1}": "follows its arguments",
    "a:1} and more {": "follows its arguments",
}


@pytest.mark.parametrize("text", WRITTEN)
def test_what_the_template_writes_comes_back(text: str) -> None:
    assert arguments(text) == WRITTEN[text]


@pytest.mark.parametrize("text", TAKEN)
def test_what_models_write_besides_is_taken(text: str) -> None:
    assert arguments(text) == TAKEN[text]


@pytest.mark.parametrize("word", NO_NUMBERS)
def test_what_is_no_number_in_json_is_a_word(word: str) -> None:
    assert arguments(f"a:{word},l:[{word}]") == {"a": word, "l": [word]}


def test_types_are_those_of_json() -> None:
    values = arguments("i:1,f:1.0,e:1e2,t:true,z:0,n:-0")
    assert [type(value) for value in values.values()] == [int, float, float, bool, int, int]


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:30])
def test_what_cannot_be_read_says_why(text: str) -> None:
    assert REFUSED[text] in reason("call:f{" + text + "}")


@pytest.mark.parametrize(
    "name", ["f", "ns:create", "srv/tool", "a.b-c_d", "погода", "get weather", "f1", "call:f"]
)
def test_names(name: str) -> None:
    assert read_call(f"call:{name}{{a:1}}") == ToolCall(name, {"a": 1})
    assert read_call(f"\n call: {name} {{}} \n") == ToolCall(name, {})


@pytest.mark.parametrize(
    "text", ["call:", "call:f", "call:{}", "call: {a:1}", "call:f(a=1)", "call:f(a){}", "call:a\nb{}", "f{}",
             "", "{}", f"call:{Q}f{Q}{{}}", 'call:"f"{}', "call:f}{"],
)  # fmt: skip
def test_no_names(text: str) -> None:
    reason(text)


@pytest.mark.parametrize("opener, closer", ["{}", "[]"])
def test_brackets_have_a_limit(opener: str, closer: str) -> None:
    one = "a:{" if opener == "{" else "["
    for depth in (DEPTH - 1, DEPTH):
        text = ("" if opener == "{" else "a:") + one * depth + closer * depth
        if depth < DEPTH:
            arguments(text)
        else:
            assert str(DEPTH) in reason("call:f{" + text + "}")


@pytest.mark.parametrize(
    "text", ["{", "[", "a:{", "a:[", f"a:{Q}", '"', "'", ":", ",", "a:1,", "=", "\n", "a b:", Q]
)
def test_a_long_call_ends_at_once(text: str) -> None:
    with pytest.raises(UnreadableCall):
        read_call("call:f{" + text * 100_000)


def test_a_long_call_is_read() -> None:
    numbers = list(range(50_000))
    assert arguments(f"l:[{','.join(map(str, numbers))}]") == {"l": numbers}
    assert arguments(f"s:{Q}{'}' * 500_000}{Q}") == {"s": "}" * 500_000}


# ---- random arguments, written as the template does ------------------------------------------------------


def written(value: Any, keys: str = "bare") -> str:
    """A value as the released template writes it; JSON's own notation for keys `json`."""
    if isinstance(value, str):
        return f"{Q}{value}{Q}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        mark = {"bare": "", "quoted": Q}[keys]
        return "{" + ",".join(f"{mark}{k}{mark}:{written(v, keys)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(written(item, keys) for item in value) + "]"
    return str(value)


TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("{}[],:=\"'\\ \n"), max_size=12)
BARE = st.text(
    st.characters(exclude_categories=["Cs", "Z", "Cc"], exclude_characters="{}[],:=\"'"), min_size=1
)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
LEAVES = st.none() | st.booleans() | NUMBERS | TEXT


def objects(keys: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    values = st.recursive(
        LEAVES,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=12,
    )
    return st.dictionaries(keys, values, max_size=5)


@settings(max_examples=150, deadline=None)
@given(value=objects(BARE))
def test_bare_keys_come_back(value: dict[str, Any]) -> None:
    assert read_call("call:f" + written(value)).arguments == value


@settings(max_examples=150, deadline=None)
@given(value=objects(TEXT))
def test_quoted_keys_come_back(value: dict[str, Any]) -> None:
    assert read_call("call:f" + written(value, "quoted")).arguments == value


@settings(max_examples=150, deadline=None)
@given(value=objects(TEXT), indent=st.sampled_from([None, 1]), ascii=st.booleans(), twice=st.booleans())
def test_json_comes_back(value: dict[str, Any], indent: int | None, ascii: bool, twice: bool) -> None:
    """As it is, and pasted inside further braces."""
    text = json.dumps(value, indent=indent, ensure_ascii=ascii)
    assert read_call(f"call:f{{{text}}}" if twice else f"call:f{text}").arguments == value


PIECES = [
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "=",
    Q,
    '"',
    "'",
    " ",
    "\n",
    "a",
    "b",
    "1",
    "-",
    "e9",
    ".",
    "None",
    "\\",
    "NaN",
]


@settings(max_examples=1000, deadline=None)
@given(text=st.lists(st.sampled_from(PIECES), max_size=24).map("".join))
def test_noise_is_read_as_json_or_refused(text: str) -> None:
    try:
        read_call("call:f{" + text + "}")
    except UnreadableCall as error:
        assert "\n" not in str(error)
    else:
        arguments(text)
