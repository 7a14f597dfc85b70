"""`dgemma` as a user meets it: what goes to which stream, and how it fails."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

import dgemma
from dgemma.cli import main
from dgemma.commands.progress import progress_bar
from dgemma.commands.replies import print_reply
from dgemma.engine.events import Done, Stats
from dgemma.text.calls import ToolCall
from dgemma.text.reply import Unread

ROOT = Path(__file__).parents[2]
FRAMEWORKS = ("torch", "mlx", "transformers", "mlx_lm", "triton", "jax", "huggingface_hub", "prompt_toolkit")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
STATS = Stats(5, 0, 4, 1.0, 0.0, 0.5, 0.1, 4.0, 1, 3, 3.0, 1.3, 10.0, 0, 1, "numpy")
SHORT = ["--max-tokens", "20", "--steps", "3", "--backend", "numpy"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def call(*args: str | Path, stdin: str | bytes = "") -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def write(folder: Path, data: Any) -> Path:
    path = folder / "input.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def python(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env=ENVIRONMENT, timeout=120, **options
    )


# ---- help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["--version"],
        ["--help"],
        *([name, "--help"] for name in ("generate", "chat", "info", "verify", "convert")),
    ],
)
def test_help_imports_no_framework(args: Sequence[str]) -> None:
    program = f"""
import sys
from dgemma.cli import main
try:
    main({list(args)})
except SystemExit as end:
    assert end.code == 0, end.code
came = [name for name in {FRAMEWORKS} if name in sys.modules]
assert not came, came
"""
    result = python("-c", program)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_the_group_alone_prints_its_help() -> None:
    assert call().stdout == call("--help").stdout


def test_version() -> None:
    assert call("--version").stdout == f"dgemma {dgemma.__version__}\n"


@pytest.mark.parametrize("module", ["dgemma_mlx.generate", "dgemma_cuda.generate"])
def test_the_packages_have_the_same_command(module: str) -> None:
    text = python("-m", module, "--help").stdout
    usage, _, rest = text.partition("\n")
    assert usage == f"Usage: python -m {module} [OPTIONS] [PROMPT]..."
    assert rest == python("-m", "dgemma", "generate", "--help").stdout.partition("\n")[2]


def test_the_package_is_runnable() -> None:
    assert python("-m", "dgemma", "--help").stdout.startswith("Usage: python -m dgemma [OPTIONS]")


def test_the_mlx_command_runs_other_backends_without_mlx(model: Path) -> None:
    script = ROOT / "dgemma_mlx" / "generate.py"
    program = f"""
import runpy, sys
sys.modules["mlx"] = None
sys.argv[1:] = {["--model", str(model), *SHORT, "--json", "--prompt", "a"]}
runpy.run_path({str(script)!r}, run_name="__main__")
"""
    result = python("-c", program)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["backend"] == "numpy"


# ---- answers ------------------------------------------------------------------------------------


def test_json_is_one_object_a_row_and_nothing_else(model: Path) -> None:
    args = ["--prompt", "Reverse cat", "--prompt", "Add 3 and 4.", "--json", "--seed", "5"]
    result = call("generate", "--model", model, *SHORT, *args)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["row"] for record in records] == [0, 1]
    for record in records:
        assert record["seed"] == 5
        assert (record["backend"], record["dtype"]) == ("numpy", "float64")
        assert record["model"] == str(model)
        assert record["tokens"] == len(record["token_ids"]) <= 20
        assert record["finish_reason"] in ("stop", "length", "tool_calls")
        assert record["seconds"] >= record["seconds_to_first_token"] > 0
    wanted = "text thinking tool_calls tokens_per_second canvases steps steps_per_canvas tokens_per_forward"
    assert set(wanted.split()) | {"ms_per_step", "peak_memory", "prompt_tokens"} <= set(records[0])


def test_a_seed_repeats_a_reply_and_another_does_not(model: Path) -> None:
    def tokens(seed: int) -> Any:
        # A bound this wide accepts nearly every sample, so the reply hangs on the seed.
        args = ["--prompt", "Tell me", "--json", "--entropy-bound", "99", "--t-max", "3", "--t-min", "3"]
        result = call("generate", "--model", model, *SHORT, *args, "--seed", str(seed))
        return json.loads(result.stdout)["token_ids"]

    assert tokens(1) == tokens(1)
    assert len({tuple(tokens(seed)) for seed in range(4)}) > 1


def test_a_row_answers_the_same_alone_and_in_a_batch(model: Path) -> None:
    def answers(*prompts: str) -> list[Any]:
        args = [part for prompt in prompts for part in ("--prompt", prompt)]
        out = call("generate", "--model", model, *SHORT, *args, "--json", "--seed", "3").stdout
        return [json.loads(line)["token_ids"] for line in out.splitlines()]

    assert answers("Reverse cat", "Add 3 and 4.")[1] == answers("Add 3 and 4.")[0]


def test_a_batch_is_separated_by_headings(model: Path) -> None:
    result = call("generate", "--model", model, *SHORT, "--prompt", "Reverse\ncat", "--prompt", "b" * 99)
    lines = result.stdout.splitlines()
    assert lines[0] == "==> 1: Reverse cat <=="
    second = lines.index(f"==> 2: {'b' * 59}… <==")
    assert lines[second - 1] == ""


def test_the_prompt_comes_from_stdin(model: Path) -> None:
    args = ["generate", "--model", model, *SHORT, "--seed", "1", "--json"]
    piped, given = call(*args, stdin="Reverse cat\n"), call(*args, "--prompt", "Reverse cat")
    assert json.loads(piped.stdout)["token_ids"] == json.loads(given.stdout)["token_ids"]


def test_messages_come_from_a_file_or_stdin(model: Path, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    args = ["generate", "--model", model, *SHORT, "--seed", "1", "--json"]
    counts = []
    for data in (conversation[1:], conversation, {"messages": conversation, "tools": [tool]}):
        piped = json.loads(call(*args, "--messages", "-", stdin=json.dumps(data)).stdout)
        filed = json.loads(call(*args, "--messages", write(tmp_path, data)).stdout)
        assert piped["token_ids"] == filed["token_ids"]
        counts.append(piped["prompt_tokens"])
    assert counts == sorted(set(counts))
    brief = json.loads(call(*args, "--prompt", "Hi", "--system", "Be brief.").stdout)
    assert brief["prompt_tokens"] == counts[1]
    tools = write(tmp_path, [tool])
    full = json.loads(call(*args, "--prompt", "Hi", "--system", "Be brief.", "--tools", tools).stdout)
    assert full["prompt_tokens"] == counts[2]


def test_a_whole_request_for_openai_is_taken(model: Path) -> None:
    """Its tokens and seed count, what changes nothing here is named on stderr."""
    asked = {"messages": [{"role": "user", "content": 'Reverse "canvas".'}], "model": "m", "stream": True}
    data = asked | {"max_tokens": 3, "seed": 5, "n": 1, "stop": None, "response_format": {"type": "text"}}
    args = ("generate", "--model", str(model), "--backend", "numpy", "--json", "--messages", "-")
    result = call(*args, stdin=json.dumps(data | {"top_p": 0.9}))
    reply = json.loads(result.stdout)
    assert (reply["tokens"], reply["seed"]) == (3, 5)
    assert_one_line(call(*args, stdin=json.dumps({"messages": data["messages"], "top_p": 2})), 1, "top_p")
    assert "not used of the request: model, stream" in result.stderr
    options = call(*args, "--max-tokens", "4", "--seed", "6", stdin=json.dumps(data))
    reply = json.loads(options.stdout)
    assert (reply["tokens"], reply["seed"]) == (4, 6)


def test_stop_texts(tmp_path: Path) -> None:
    """By option and by request, before the load where they cannot be used."""
    args = ("generate", "--backend", "numpy", "--seed", "0")
    asked = {"messages": [{"role": "user", "content": 'Reverse "canvas".'}]}
    assert call(*args, 'Reverse "canvas".', "--stop", "zz", "--stop", "na").stdout == "sav\n"
    for stop, expected in (("v", "sa"), (["na", "x"], "sav"), (["", "c"], "savna"), ([], "savnac")):
        request = write(tmp_path, asked | {"stop": stop})
        assert call(*args, "--messages", request).stdout == expected + "\n"
    assert_one_line(call(*args, "x", "--stop", ""), 2, "an empty text ends nothing")
    for stop in (5, ["a", 5], {"a": 1}):
        result = call(*args, "--messages", write(tmp_path, asked | {"stop": stop}))
        assert_one_line(result, 1, "'stop' must be a text or a list of texts")


def test_rows_that_run_together() -> None:
    """Fewer at a time give the same replies, in the order of the prompts."""
    args = (
        "generate",
        "--backend",
        "numpy",
        "--seed",
        "0",
        "--json",
        'Reverse "abc".',
        "What is 1 + 2?",
        "x",
    )
    replies = [call(*args, "--max-rows", str(rows)).stdout.splitlines() for rows in (8, 2, 1)]
    found = [[json.loads(line)["token_ids"] for line in lines] for lines in replies]
    assert found[0] == found[1] == found[2] and len(found[0]) == 3
    assert_one_line(call(*args, "--max-rows", "0"), 2, "--max-rows")


def test_a_deadline() -> None:
    args = ("generate", "--backend", "numpy", 'Reverse "canvas".')
    result = call(*args, "--deadline", "0.000001", "--json")
    assert json.loads(result.stdout)["finish_reason"] == "deadline"
    assert "as --deadline wants" in call(*args, "--deadline", "0.000001").stderr
    assert_one_line(call(*args, "--deadline", "0"), 2, "--deadline")


def test_an_answer_is_continued(model: Path) -> None:
    data = [{"role": "user", "content": 'Reverse "canvas".'}, {"role": "assistant", "content": "sav"}]
    args = ("generate", "--model", str(model), "--backend", "numpy", "--seed", "0", "--messages", "-")
    counts = []
    for more in ((), ("--continue",)):
        result = call(*args, "--json", *more, stdin=json.dumps(data))
        counts.append(json.loads(result.stdout)["prompt_tokens"])
    assert counts[1] < counts[0]  # without the end of that turn and the beginning of another
    assert_one_line(call(*args, "--continue", stdin=json.dumps(data[:1])), 1, "can be continued")


def test_thinking_changes_the_prompt(model: Path) -> None:
    args = ["generate", "--model", model, *SHORT, "--json", "--prompt", "Hi"]
    plain, thinking = (
        json.loads(call(*args, flag).stdout)["prompt_tokens"] for flag in ("--no-thinking", "--thinking")
    )
    assert thinking > plain


def test_stats_and_the_live_view_stay_off_stdout(model: Path) -> None:
    args = ["generate", "--model", model, *SHORT, "--prompt", "Hi", "--seed", "1"]
    bare, full = call(*args), call(*args, "--stats", "--live")
    assert full.stdout == bare.stdout
    lines = full.stderr.splitlines()
    assert lines[0].startswith("canvas 1 step 1/3 ")
    names = [line.split()[0] for line in lines[-6:]]
    assert names == ["prompt", "reply", "time", "speed", "memory", "run"]
    assert "numpy float64, seed 1, ended by" in lines[-1]


def test_stats_of_a_batch_name_their_row(model: Path) -> None:
    result = call("generate", "--model", model, *SHORT, "--prompt", "a", "--prompt", "b", "--stats", "--json")
    assert [line.split(";")[0] for line in result.stderr.splitlines()[::7]] == [
        "row     1 of 2",
        "row     2 of 2",
    ]
    assert len(result.stdout.splitlines()) == 2


def test_stats_say_what_soft_embeddings_left_out(model: Path) -> None:
    args = ["generate", "--model", model, *SHORT, "--prompt", "a", "--stats", "--json"]
    bare, full = call(*args), call(*args, "--soft-bound", "0.9")
    assert "left out" not in bare.stderr
    line = full.stderr.splitlines()[-1]
    assert line.startswith("soft    ") and line.endswith("% dense")
    assert json.loads(bare.stdout)["soft_dense"] == 1 and json.loads(bare.stdout)["soft_missing"] == 0
    assert 0 < json.loads(full.stdout)["soft_missing"] <= 0.9


def test_without_a_model_a_notice_says_who_answers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgemma.loading.MODEL_DIR", model)
    result = call("generate", *SHORT, "--prompt", "Hi", "--json")
    assert result.stderr.splitlines() == [
        "dgemma: no --model given, so the embedded model answers; it knows toy tasks only"
    ]
    assert json.loads(result.stdout)["model"] == "embedded"


def reply(**changes: Any) -> Done:
    return replace(Done(0, [5, 106], "the answer", "", (), "stop", STATS), **changes)


def test_thoughts_go_to_stderr_and_calls_are_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    calls = (ToolCall("get_weather", {"city": "Zürich"}), ToolCall("get_time", {}))
    print_reply(reply(text="", thinking="hm", tool_calls=calls, finish_reason="tool_calls"))
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == [
        {"name": "get_weather", "arguments": {"city": "Zürich"}},
        {"name": "get_time", "arguments": {}},
    ]
    assert "Zürich" in out
    assert err == "hm\n"


def test_a_call_that_cannot_be_read_is_the_answer_and_the_reason_a_notice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_reply(reply(text="call:f{", unread=(Unread("call:f{", "it has no end"),)))
    out, err = capsys.readouterr()
    assert (out, err) == ("call:f{\n", "dgemma: a tool call stays text: it has no end\n")


@pytest.mark.parametrize(
    ("changes", "notice"),
    [
        ({"finish_reason": "length"}, "dgemma: cut at 2 tokens; --max-tokens allows more\n"),
        ({"text": ""}, "dgemma: the model ended its turn without an answer\n"),
        ({}, ""),
    ],
)
def test_notices(changes: dict[str, Any], notice: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_reply(reply(**changes))
    assert capsys.readouterr().err == notice


def test_an_answer_is_written_as_it_is_where_no_terminal_obeys_it(capsys: pytest.CaptureFixture[str]) -> None:
    print_reply(reply(text="a\x1b[31mb"))
    assert capsys.readouterr().out == "a\x1b[31mb\n"


# ---- bad input ----------------------------------------------------------------------------------


def assert_one_line(result: Result, code: int, part: str) -> None:
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    *notices, line = result.stderr.splitlines()
    assert line.startswith("dgemma: error: ")
    assert part in line
    assert all("no --model given" in notice for notice in notices)


NUMPY = ["--backend", "numpy"]
COMMAND_LINES = {
    "nothing": ([], "stdin is empty", 1),
    "unknown option": (["--nope"], "No such option", 2),
    "unknown backend": (["--backend", "tpu"], "'tpu' is not one of", 2),
    "unknown dtype": (["--dtype", "int1"], "'int1' is not one of", 2),
    "zero tokens": (["--max-tokens", "0"], "'--max-tokens': 0 is not in the range 1<=x<=2147483647", 2),
    "negative steps": (["--steps", "-1"], "'--steps': -1 is not in the range", 2),
    "negative bound": (
        ["--entropy-bound", "-0.1"],
        "-0.1 is not in the range 0<=x<=1000000000;",
        2,
    ),
    "NaN": (["--t-min", "nan"], "'nan' is not a finite number", 2),
    "infinity": (["--confidence", "inf"], "'inf' is not a finite number", 2),
    "no number": (["--seed", "one"], "'one' is not a valid integer", 2),
    "negative seed": (["--seed", "-1"], "-1 is not in the range 0<=x<=18446744073709551615", 2),
    "missing messages": (["--messages", "nope.json"], "'nope.json': No such file", 2),
    "missing folder": (["--prompt", "a", *NUMPY, "--model", "./nope"], "'./nope': no such folder", 1),
    "bad hub id": (["--prompt", "a", *NUMPY, "--model", "a b"], "'a b' is neither a folder nor a hub id", 1),
    "unreachable hub": ([*NUMPY, "--prompt", "a", "--model", "no-such-org/none"], "'no-such-org/none': ", 1),
    "numpy has no device": (
        ["--prompt", "a", *NUMPY, "--device", "cpu"],
        "cuda backend only",
        1,
    ),
    "both sources": (["--prompt", "a", "--messages", "-"], "exclude each other", 2),
    "stdin twice": (["--messages", "-", "--tools", "-"], "cannot both be stdin", 2),
}


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_bad_command_lines(case: str) -> None:
    args, part, code = COMMAND_LINES[case]
    assert_one_line(call("generate", *args), code, part)


def test_unknown_command() -> None:
    assert_one_line(call("generat"), 2, "No such command 'generat'")


ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": 'Reverse "canvas".'}]}
MESSAGES = {
    "not JSON": ("[{", "not readable as JSON"),
    "deep": ("[" * 100_000, "not readable as JSON"),
    "a string": ('"hi"', "messages must be a non-empty list"),
    "empty": ([], "messages must be a non-empty list"),
    "no messages": ({"tools": []}, "has no 'messages'"),
    "messages of no kind": ({"messages": [], "temperature": 1}, "messages must be a non-empty list"),
    "another form of answer": (ASKED | {"response_format": {"type": "json_object"}}, "'response_format'"),
    "several answers": (ASKED | {"n": 2}, "'n' 2 is not supported"),
    "no number": ('[{"role": "user", "content": "a", "x": NaN}]', "NaN is no number"),
    "a picture": ([{"role": "user", "content": [{"type": "image_url"}]}], "part 0 is of type"),
    "no role": ([{"content": "hi"}], "message 0: expected an object with a 'role'"),
    "wrong role": ([{"role": "wizard", "content": "hi"}], "message 0: unknown role 'wizard'; known: system"),
    "wrong content": ([{"role": "user", "content": 5}], "message 0: content must be text"),
    "tools no list": ({"messages": [{"role": "user", "content": "hi"}], "tools": {}}, "tools must be a list"),
    "tool no function": ({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tool 0 must have"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_bad_messages(case: str, tmp_path: Path) -> None:
    data, part = MESSAGES[case]
    path = write(tmp_path, data)
    result = call("generate", "--messages", path)
    assert_one_line(result, 1, part)
    assert str(path) in result.stderr


def test_messages_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "input.json"
    path.write_bytes(b'["\xff"]')
    assert_one_line(call("generate", "--messages", path), 1, "not readable as JSON")
    assert_one_line(call("generate", stdin=b"\xff\xfe"), 1, "stdin is not text")


def test_two_systems_and_two_lists_of_tools(tmp_path: Path) -> None:
    message = {"role": "user", "content": "hi"}
    both = write(tmp_path, {"messages": [{"role": "system", "content": "a"}, message], "tools": []})
    assert_one_line(call("generate", "--messages", both, "--system", "b"), 1, "a system message of its own")
    tools = tmp_path / "tools.json"
    tools.write_text("[]")
    assert_one_line(call("generate", "--messages", both, "--tools", tools), 1, "tools are given twice")


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--t-max", "0.1"], "--t-max 0.1 must not be below --t-min 0.4"),
        (["--t-min", "7"], "--t-max 0.8 must not be below --t-min 7.0"),
        (["--max-tokens", "999999"], "prompt and --max-tokens need"),
    ],
)
def test_settings_that_the_model_refuses(args: list[str], part: str, model: Path) -> None:
    result = call("generate", "--model", model, "--backend", "numpy", "--prompt", "a", *args)
    assert_one_line(result, 1, part)


@pytest.mark.parametrize(("backend", "package"), [("mlx", "mlx"), ("cuda", "torch")])
def test_a_backend_that_is_not_installed(backend: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgemma.backends.find_spec", lambda name: None)
    result = call("generate", "--prompt", "a", "--backend", backend)
    assert_one_line(result, 1, f"needs {package}, which is not installed: pip install 'dgemma[{backend}]'")


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr("dgemma.commands.opened.load", broken)
    with pytest.raises(AssertionError, match="ours"):
        call("generate", "--prompt", "a")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[metal::malloc] Attempting to allocate 9 GB")]
)
def test_running_out_of_memory_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("dgemma.commands.opened.load", broken)
    assert_one_line(call("generate", "--prompt", "a"), 1, "out of memory")


# ---- signals and pipes --------------------------------------------------------------------------


def start(model: Path, *args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dgemma", "generate", "--model", str(model), "--backend", "numpy", *args]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=_listen,
    )


def _listen() -> None:
    """Whoever runs the tests in the background may have had interrupts ignored, which is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupt_ends_in_one_line(model: Path) -> None:
    endless = [
        "--steps",
        "100000",
        "--entropy-bound",
        "0",
        "--stability",
        "100000",
        "--live",
        "--prompt",
        "a",
    ]
    process = start(model, *endless)
    assert process.stderr and process.stderr.readline().startswith("canvas 1 step 1/")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "dgemma: interrupted"
    assert "Traceback" not in err


def test_a_reader_that_went_away_is_no_error_to_report(model: Path) -> None:
    process = start(model, *SHORT[:4], "--json", "--prompt", "a")
    assert process.stdout
    process.stdout.close()
    process.stdout = None
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert err == ""


# ---- progress -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "terminal", "shown"), [(5, True, True), (0, True, False), (5, False, False)]
)
def test_a_bar_appears_for_work_that_takes_long(
    seconds: float, terminal: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, *[seconds] * 9])
    monkeypatch.setattr("dgemma.commands.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    with progress_bar(console, "loading weights") as bar:
        for done in range(5):
            bar(done, 4)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("loading weights" in output) == shown
    assert bool(output) == shown


def test_a_terminal_that_cannot_move_its_cursor_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = 0.0
    monkeypatch.setattr("dgemma.commands.progress.time", SimpleNamespace(monotonic=lambda: seconds))
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with progress_bar(console, "reading the prompt") as bar:
        for seconds in (0.5, 1.5, 6.0, 12.0, 13.0):
            bar(int(seconds), 100, "writing canvas 1")
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == ["dgemma: writing canvas 1, 1%", "dgemma: writing canvas 1, 12%"]
