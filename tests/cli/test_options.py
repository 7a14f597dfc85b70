"""Options and arguments: their ends, their text, and how prompts are given."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import dgemma
from dgemma.cli import main

SHORT = ["generate", "--backend", "numpy", "--max-tokens", "4", "--steps", "2", "--seed", "1", "--json"]
NUMBERS = {
    "--seed": ("0", "18446744073709551615", ["18446744073709551616", "-1", "1" + "0" * 30]),
    "--max-tokens": ("1", "2147483647", ["0", "2147483648", "9223372036854775808", "-5"]),
    "--steps": ("1", "1000000", ["0", "1000001", "2147483648", "1" + "0" * 29]),
    "--stability": ("0", "1000000", ["-1", "1000001", "1" + "0" * 29]),
    "--entropy-bound": ("0", "1000000000", ["-1", "1e10", "1e308", "-1e-320"]),
    "--t-max": ("1e-6", "1000000", ["0", "-0.0", "1e-320", "9.9e-7", "1e7", "1e308"]),
    "--t-min": ("1e-6", "1000000", ["0", "-0.0", "1e-320", "1e308"]),
    "--confidence": ("1e-320", "1000000000", ["0", "-0.0", "-1", "1e10", "1e308"]),
    "--soft-bound": ("0", "0.999999", ["1", "1.5", "-0.1", "0.99999999999999999"]),
}
WHOLE = ("--seed", "--max-tokens", "--steps", "--stability")
SENSELESS = [
    "",
    " ",
    "one",
    "1e400",
    "nan",
    "-inf",
    "Infinity",
    "1_000",
    "٣",
    "１",
    "0x10",
    "1,5",
    "9" * 5000 + "x",
]


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    def load(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded before the command line was checked")

    if "model" not in request.fixturenames:
        monkeypatch.setattr("dgemma.commands.opened.load", load)


def call(*args: str, stdin: str | bytes = "") -> Result:
    result = CliRunner().invoke(main, args, input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*args: str) -> str:
    """The one line of a command line that is wrong."""
    result = call(*args)
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("dgemma: error: ") and len(line) < 300
    return line


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", NUMBERS)
def test_numbers_beyond_reason(option: str) -> None:
    more = [*SENSELESS, *(["1e3", "1.0", "2.5"] if option in WHOLE else [])]
    for value in [*NUMBERS[option][2], *more]:
        assert f"'{option}'" in refused("generate", "a", f"{option}={value}"), value


@pytest.mark.parametrize("option", NUMBERS)
def test_the_ends_are_in_the_help(option: str) -> None:
    text = " ".join(call("generate", "--help").stdout.split())
    said = re.search(rf"{option} N [^\[]*(\[default: drawn anew\] )?\[([^\]]*)\]", text)
    assert said is not None
    least, most, _ = NUMBERS[option]
    ends = [float(end) for end in re.split("<=?x<=?", said[2])]
    assert ends[0] <= float(least) and float(most) <= ends[1]


@pytest.mark.parametrize("option", NUMBERS)
def test_the_ends_themselves_are_fine(option: str, model: Path) -> None:
    """A model answers at both ends; where an end takes long, or does not fit, its error is a later one."""
    for value in NUMBERS[option][:2]:
        other = (
            ["--t-min", value] if option == "--t-max" else ["--t-max", value] if option == "--t-min" else []
        )
        args = [*SHORT, "--max-tokens", "300", "a", "--model", str(model), option, value, *other]
        if (option, value) == ("--steps", "1000000"):
            args += ["--confidence", "1e9", "--stability", "0"]
        result = call(*args)
        if (option, value) == ("--max-tokens", "2147483647"):
            assert result.exit_code == 1 and "lower --max-tokens" in result.stderr
        else:
            assert result.exit_code == 0, result.stderr
            assert result.stderr == ""  # no warning of NumPy's either
            assert json.loads(result.stdout)["tokens"] > 0


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--context", ["0", "1000001", "9" * 30, "1_0"]),
        ("--rows", ["0", "10001"]),
        ("--steps", ["0", "10001", "1e3"]),
        ("--skew", ["-1", "11", "nan"]),
    ],
)
def test_numbers_of_the_benchmark(option: str, values: list[str]) -> None:
    for value in values:
        assert f"'{option}'" in refused("bench", "--random-weights", option, value)


def test_temperatures_that_contradict_each_other_on_the_command_line() -> None:
    line = refused("generate", "a", "--t-max", "0.1", "--t-min", "0.5")
    assert "--t-max 0.1 must not be below --t-min 0.5" in line


# ---- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--prompt", "{}"], ["{}"], ["a", "--system", "{}"], ["a", "{}"]], ids=str)
@pytest.mark.parametrize("text", ["caf\udce9", "\udcff", "half an emoji \ud83d", "\ud83d\ude00"], ids=ascii)
def test_text_that_is_no_utf8(args: list[str], text: str) -> None:
    """Bytes of the command line that are no UTF-8 come as half surrogate pairs."""
    assert "is not UTF-8 text" in refused("generate", *(arg.format(text) for arg in args))


@pytest.mark.parametrize(
    "args",
    [
        ["info", "{}"],
        ["verify", "{}"],
        ["generate", "a", "--model", "{}"],
        ["convert", "{}", "x", "--to", "mlx"],
    ],
)
@pytest.mark.parametrize("name", ["caf\udce9", "./caf\udce9", "x" * 5000, "a\nb", "\x1b[31m"], ids=ascii)
def test_names_of_files_in_errors(
    args: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dgemma.commands.opened.load", dgemma.load)
    monkeypatch.chdir(tmp_path)
    result = call(*(arg.replace("{}", name) for arg in args))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("dgemma: error: ")
    assert result.stderr.replace("\n", "").isprintable()


# ---- prompts ------------------------------------------------------------------------------------


def ids(*args: str, model: Path, stdin: str = "") -> list[list[int]]:
    out = call(*SHORT, "--model", str(model), *args, stdin=stdin).stdout
    return [json.loads(line)["token_ids"] for line in out.splitlines()]


def test_a_prompt_is_an_argument(model: Path) -> None:
    bare, option = ids("Reverse cat", model=model), ids("--prompt", "Reverse cat", model=model)
    assert bare == option == ids(model=model, stdin="Reverse cat\n")
    assert ids("--", "-x", model=model) == ids("--prompt", "-x", model=model)


def test_arguments_come_before_options_in_a_batch(model: Path) -> None:
    mixed = ids("--prompt", "three", "one", "--prompt", "four", "two", model=model)
    words = ["one", "two", "three", "four"]
    assert mixed == ids(*words, model=model) == [ids(word, model=model)[0] for word in words]


def test_headings_name_arguments(model: Path) -> None:
    args = [arg for arg in SHORT if arg != "--json"]
    out = call(*args, "--model", str(model), "one", "--prompt", "two").stdout
    assert [line for line in out.splitlines() if line.startswith("==>")] == [
        "==> 1: one <==",
        "==> 2: two <==",
    ]


def test_an_argument_and_messages_exclude_each_other() -> None:
    assert "exclude each other" in refused("generate", "a", "--messages", "-")


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        ("generte", "Did you mean 'generate'?"),
        ("Generate", "Did you mean 'generate'?"),
        ("verfy", "Did you mean 'verify'?"),
        ("conver", "Did you mean 'convert'?"),
        ("self-test", "Did you mean 'selftest'?"),
        ("What is 47 + 85?", "A prompt goes to 'generate'"),
        ("caf\udce9", "A prompt goes to 'generate'"),
        ("x" * 5000, "A prompt goes to 'generate'"),
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_a_mistyped_command(word: str, advice: str) -> None:
    assert advice in refused(word, "a")


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--max-token", "--max-tokens"),
        ("--max_tokens", "--max-tokens"),
        ("--step", "--steps"),
        ("--tmax", "--t-max"),
    ],
)
def test_a_mistyped_option(option: str, meant: str) -> None:
    assert f"'{meant}'" in refused("generate", "a", f"{option}=5")
