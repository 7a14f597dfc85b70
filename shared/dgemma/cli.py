"""The `dgemma` command: it parses and calls, the work is in the library.

Standard output carries the answer and nothing else; notices, thoughts, the live view and statistics go
to standard error. Wrong input ends in one line and exit code 1, a wrong command line in one line and
exit code 2, Ctrl-C in 130. Anything else that escapes is a bug of ours and keeps its traceback. Library
modules are imported by the commands that need them, so that help is quick and imports no framework.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import isfinite
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from dgemma import __version__
from dgemma.errors import CheckpointError, DgemmaError, PromptError
from dgemma.loading import BACKENDS, DTYPES

if TYPE_CHECKING:
    from rich.console import Console

    from dgemma.checkpoint.checkpoint import Checkpoint
    from dgemma.engine.run import Done, Event
    from dgemma.model import Model
    from dgemma.network.config import Config, GenerationConfig
    from dgemma.network.ops import Ops

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PATIENCE = 1.0  # seconds that work may take before anything is said about it
AGAIN = 10.0  # and until it is said how far it has come


# ---- errors -------------------------------------------------------------------------------------


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"dgemma: error: {' '.join(message.split())}", err=True)
    sys.exit(code)


# Each framework has its own exception for it, and importing one to name it would cost seconds.
_OUT_OF_MEMORY = ("out of memory", "insufficient memory", "[metal::malloc]", "not enough memory")
_MEMORY_ADVICE = "take a shorter prompt, fewer rows or --dtype bfloat16; `dgemma info` says what is needed"


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in _OUT_OF_MEMORY)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__


class _OneLine(click.Command):
    """A command whose errors are one line each."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        run: Callable[..., Any] = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **extra)
        try:
            code = run(*args, standalone_mode=False, **extra)
        except click.Abort:
            click.echo("dgemma: interrupted", err=True)
            sys.exit(INTERRUPTED)
        except DgemmaError as error:
            _fail(str(error), 1)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            _fail(f"out of memory ({_first_line(error)}); {_MEMORY_ADVICE}", 1)
        except click.UsageError as error:
            hint = f"; see {error.ctx.command_path} --help" if error.ctx else ""
            _fail(error.format_message().rstrip(".") + hint, error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        sys.exit(code if isinstance(code, int) else 0)


class _Group(_OneLine, click.Group):
    command_class = _OneLine


# ---- the group ----------------------------------------------------------------------------------

_HELP = {"help_option_names": ["-h", "--help"]}


@click.group(cls=_Group, context_settings=_HELP, invoke_without_command=True)
@click.version_option(__version__, prog_name="dgemma", message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Run DiffusionGemma: text written a canvas at a time, by denoising.

    Without --model a small embedded model answers, which knows a few toy tasks and needs no download.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


class _Number(click.FloatRange):
    """A finite number; click lets NaN and infinity pass any range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


_F = TypeVar("_F", bound=Callable[..., Any])


def _options(*options: Callable[[_F], _F]) -> Callable[[_F], _F]:
    """Several decorators as one, the first on top."""

    def decorate(function: _F) -> _F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_AT_LEAST_1 = click.IntRange(min=1)
_NOT_NEGATIVE = _Number(min=0)
_POSITIVE = _Number(min=0, min_open=True)
_SHARE = _Number(min=0, max=1, max_open=True)
_JSON_FILE = click.File(encoding="utf-8")

_prompt_options = _options(
    click.option(
        "--prompt",
        "prompts",
        multiple=True,
        metavar="TEXT",
        help="What to answer. Given several times, the prompts run as one batch. Without it and "
        "--messages, text is read from stdin.",
    ),
    click.option(
        "--messages",
        type=_JSON_FILE,
        metavar="FILE",
        help='A conversation in JSON: a list of messages, or {"messages": […], "tools": […]}. "-" is stdin.',
    ),
    click.option("--system", metavar="TEXT", help="A system message to begin with."),
    click.option(
        "--tools", type=_JSON_FILE, metavar="FILE", help="A JSON list of tools that the model may call."
    ),
    click.option(
        "--thinking/--no-thinking",
        default=False,
        help="Think before answering; thoughts go to stderr.  [default: off]",
    ),
)

_model_options = _options(
    click.option(
        "--model",
        metavar="MODEL",
        help="A checkpoint's folder or a hub id org/name[@revision].  [default: the embedded model]",
    ),
    click.option(
        "--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="What to run on."
    ),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="Type of weights and activations.  [default: bfloat16 on a GPU, float32 on a CPU] With nvfp4, "
        "experts in NVFP4 get activations in it, too, and answers change; on Blackwell only.",
    ),
    click.option("--device", metavar="NAME", help="A torch device, such as cuda:1; cuda backend only."),
)


def _number(name: str, kind: click.ParamType, help: str, *field: str) -> Callable[[_F], _F]:
    return click.option(name, *field, type=kind, metavar="N", help=help)


# Named as the fields of GenerationConfig; where one is not given, the checkpoint's number holds.
_sampler_options = _options(
    _number("--max-tokens", _AT_LEAST_1, "Tokens of a reply at most.", "max_new_tokens"),
    _number("--steps", _AT_LEAST_1, "Denoising steps a canvas at most."),
    _number("--entropy-bound", _NOT_NEGATIVE, "Nats of doubt that one step may accept."),
    _number("--t-max", _POSITIVE, "Temperature that a canvas begins with."),
    _number("--t-min", _POSITIVE, "Temperature that its last steps approach."),
    _number("--confidence", _POSITIVE, "Mean entropy in nats below which a stable canvas is done."),
    _number("--stability", _AT_LEAST_1, "Steps for which a canvas must not have changed."),
    _number("--soft-bound", _SHARE, "Probability that a soft embedding may leave out; 0 keeps all."),
)

_output_options = _options(
    click.option(
        "--live/--no-live",
        default=None,
        help="Show the canvas on stderr while it settles.  [default: on a terminal, without --json]",
    ),
    click.option("--stats", is_flag=True, help="Print what the reply cost, on stderr."),
    click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Print each reply and its statistics as one JSON object a line.",
    ),
)


# ---- generate -----------------------------------------------------------------------------------


@main.command(context_settings=_HELP)
@_prompt_options
@_model_options
@_number("--seed", click.IntRange(min=0), "Makes the reply repeatable.  [default: drawn anew]")
@_sampler_options
@_output_options
def generate(
    prompts: tuple[str, ...],
    messages: IO[str] | None,
    system: str | None,
    tools: IO[str] | None,
    thinking: bool,
    model: str | None,
    backend: str,
    dtype: str | None,
    device: str | None,
    seed: int | None,
    live: bool | None,
    stats: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write a reply to a prompt, a batch of prompts or a conversation.

    Numbers that are not given come from the checkpoint's generation_config.json.

    \b
    dgemma generate --prompt 'Reverse "canvas".'
    dgemma generate --model google/diffusiongemma-26B-A4B-it --stats < question.txt
    """
    conversations, functions = _request(prompts, messages, system, tools)
    console = _console()
    with _progress(console, "loading weights") as progress:
        loaded = _load(model, backend, dtype, device, progress)
    loaded.ops.waiting = partial(_notice, console, loaded.ops.progress)
    events = loaded.generate(conversations, tools=functions, thinking=thinking, seed=seed, **settings)
    sampler = loaded.generation.override(**settings)
    replies = _watch(loaded, sampler, events, len(conversations), _is_live(live, as_json, console), console)
    for reply in replies:
        if as_json:
            click.echo(json.dumps(_record(reply, loaded, model), ensure_ascii=False))
        else:
            if len(replies) > 1:
                click.echo(_heading(reply.row, prompts[reply.row]))
            _print_reply(reply)
        if stats:
            click.echo(_stats_block(reply, loaded, len(replies), sampler), err=True)


def _load(model: str | None, backend: str, dtype: str | None, device: str | None, progress: Any) -> Model:
    from dgemma import load

    if model is None:
        click.echo(
            "dgemma: no --model given, so the embedded model answers; it knows toy tasks only", err=True
        )
    return load(model, backend, dtype, device, progress)


# ---- generate: input ----------------------------------------------------------------------------


def _request(
    prompts: Sequence[str], messages: IO[str] | None, system: str | None, tools: IO[str] | None
) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]] | None]:
    """Conversations, one a row, and the tools, from whichever options were given."""
    if prompts and messages:
        raise click.UsageError("--prompt and --messages exclude each other.", click.get_current_context())
    if messages and tools and messages.name == tools.name == "<stdin>":
        raise click.UsageError("--messages and --tools cannot both be stdin.", click.get_current_context())
    given = None
    if messages:
        conversation, given = _conversation(messages)
        conversations = [conversation]
    else:
        conversations = [[{"role": "user", "content": text}] for text in prompts or [_stdin()]]
    if tools and given is not None:
        raise PromptError(
            f"tools are given twice, in {tools.name} and in {messages.name if messages else ''}"
        )
    if system is not None:
        conversations = [_with_system(conversation, system) for conversation in conversations]
    return conversations, _check_tools(_json(tools), tools.name) if tools else given


def _stdin() -> str:
    ctx = click.get_current_context()
    if sys.stdin is None or sys.stdin.isatty():
        raise click.UsageError("Nothing to answer: give --prompt or --messages, or pipe a text in.", ctx)
    try:
        text = sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise PromptError(f"stdin is not text: {error}") from None
    if not text.strip():
        raise PromptError("stdin is empty; give --prompt or --messages, or pipe a text in")
    return text


def _json(file: IO[str]) -> Any:
    try:
        return json.loads(file.read())
    except (ValueError, RecursionError) as error:  # ValueError: what is no UTF-8, too
        raise PromptError(f"{file.name}: not readable as JSON ({error})") from None


def _conversation(file: IO[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """The messages and tools of a file."""
    from dgemma.text.chat import check_messages

    data, tools = _json(file), None
    if isinstance(data, dict):
        if unknown := sorted(set(data) - {"messages", "tools"}):
            raise PromptError(f"{file.name}: unknown key {unknown[0]!r}; known: messages, tools")
        if data.get("tools") is not None:
            tools = _check_tools(data["tools"], file.name)
        data = data.get("messages")
    try:
        check_messages(data)
    except PromptError as error:
        raise PromptError(f"{file.name}: {error}") from None
    return data, tools


def _check_tools(tools: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise PromptError(f"{name}: tools must be a list of objects")
    for index, tool in enumerate(tools):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            form = '{"type": "function", "function": {"name": …, "parameters": …}}'
            raise PromptError(f"{name}: tool {index} must have the form {form}")
    return tools


def _with_system(messages: list[dict[str, Any]], system: str) -> list[dict[str, Any]]:
    if messages[0]["role"] in ("system", "developer"):
        raise PromptError("--system is given, and the conversation has a system message of its own")
    return [{"role": "system", "content": system}, *messages]


# ---- generate: while it runs --------------------------------------------------------------------


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _is_live(live: bool | None, as_json: bool, console: Console) -> bool:
    from dgemma.view.terminal import moves_cursor

    return moves_cursor(console) and not as_json if live is None else live


def _watch(
    model: Model, sampler: GenerationConfig, events: Iterator[Event], rows: int, live: bool, console: Console
) -> list[Done]:
    from dgemma import Done, Prefill
    from dgemma.view.terminal import View, follow, screen

    if live:
        return follow(events, screen(View(model.tokenizer, sampler, rows), console))
    replies = []
    with _progress(console, "reading the prompt") as bar:
        for event in events:
            if isinstance(event, Prefill):
                bar(event.done, event.total)
            elif isinstance(event, Done):
                replies.append(event)
    return sorted(replies, key=lambda done: done.row)


@contextmanager
def _progress(console: Console, label: str, in_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, from the second that the work has taken one; gone when it is done."""
    from rich import progress as rich

    began = time.monotonic()
    amount = (rich.DownloadColumn(), rich.TransferSpeedColumn()) if in_bytes else (rich.TaskProgressColumn(),)
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), *amount, rich.TimeRemainingColumn())
    bar = rich.Progress(*columns, console=console, transient=True)
    task = bar.add_task(label, total=None)

    def update(done: int, total: int) -> None:
        if not bar.live.is_started:
            if time.monotonic() - began < PATIENCE or done >= total or not console.is_terminal:
                return
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        if bar.live.is_started:  # else `stop` prints an empty line
            bar.stop()


@contextmanager
def _notice(console: Console, progress: Callable[[], str], what: str) -> Iterator[None]:
    """A line on a terminal once the work has taken a second, then how far it is every ten.

    From a thread, as the work is a single call; and no bar, as a live canvas may be on the screen already.
    """
    if not console.is_terminal:
        yield
        return
    over, began = threading.Event(), time.monotonic()

    def tell() -> None:
        if over.wait(PATIENCE):
            return
        console.print(f"dgemma: {what} …")
        while not over.wait(AGAIN):
            console.print(f"dgemma: … {time.monotonic() - began:.0f} s{progress()}", highlight=False)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


# ---- generate: output ---------------------------------------------------------------------------


def _heading(row: int, prompt: str) -> str:
    text = " ".join(prompt.split())
    return "\n" * (row > 0) + f"==> {row + 1}: {text if len(text) <= 60 else text[:59] + '…'} <=="


def _print_reply(reply: Done) -> None:
    """The answer on stdout; thoughts, and what a reader may wonder about, on stderr."""
    if reply.thinking:
        click.secho(_safe(reply.thinking, sys.stderr), dim=True, err=True)
    if reply.text:
        click.echo(_safe(reply.text, sys.stdout), color=True)  # else click drops what looks like a colour
    for call in reply.tool_calls:
        click.echo(json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False))
    if reply.finish_reason == "length":
        click.echo(f"dgemma: cut at {len(reply.tokens)} tokens; --max-tokens allows more", err=True)
    elif not reply.text and not reply.tool_calls:
        click.echo("dgemma: the model ended its turn without an answer", err=True)


def _safe(text: str, stream: IO[str]) -> str:
    """Text as it is, but without control characters where a terminal would obey them."""
    if not stream.isatty():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() or ord(c) > 0x9F else "\ufffd" for c in text)


def _record(reply: Done, model: Model, name: str | None) -> dict[str, Any]:
    return {"row": reply.row} | reply.json() | {"model": name or "embedded", "dtype": _dtype(model)}


def _dtype(model: Model) -> str:
    """The backend's compute type by its plain name: frameworks write "torch.bfloat16"."""
    name = str(getattr(model.ops, "dtype", "float64")).rpartition(".")[2]
    return "nvfp4" if getattr(model.ops, "w4a4", False) else name


def _stats_block(reply: Done, model: Model, rows: int, sampler: GenerationConfig) -> str:
    from dgemma.reports.info import amount

    s = reply.stats
    canvases = f"{s.canvases} canvas" + "es" * (s.canvases != 1)
    lines = {
        "prompt": f"{s.prompt_tokens} tokens, read in {s.prefill_seconds:.2f} s",
        "reply": f"{s.tokens} tokens in {canvases}, {s.steps} steps ({s.steps_per_canvas:.1f} a canvas)",
        "time": f"{s.seconds:.2f} s, first token after {s.seconds_to_first_token:.2f} s",
        "speed": f"{s.tokens_per_second:.1f} tokens/s by wall clock, "
        f"{s.tokens_per_forward:.2f} tokens/forward, {s.ms_per_step:.1f} ms/step",
        "memory": f"{amount(s.peak_memory)} at the peak",
        "run": f"{s.backend} {_dtype(model)}, seed {s.seed}, ended by {reply.finish_reason}",
    }
    if sampler.soft_bound:
        lines["soft"] = f"{s.soft_missing:.1e} of the probability left out at most, {s.soft_dense:.0%} dense"
    head = {"row": f"{reply.row + 1} of {rows}; the rows of a batch share the clock"} if rows > 1 else {}
    return "\n".join(f"{name:<8}{line}" for name, line in (head | lines).items())


# ---- info ---------------------------------------------------------------------------------------


@main.command(context_settings=_HELP, short_help="Show a model's size and the memory it needs.")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(model: str, as_json: bool) -> None:
    """Show the size of MODEL, a folder or a hub id, and the memory it needs.

    Only config.json is needed; of a hub id nothing else is downloaded.
    """
    from dgemma.reports import info as library

    report = library.describe(model)
    click.echo(json.dumps(report, ensure_ascii=False) if as_json else library.text(report))


# ---- verify -------------------------------------------------------------------------------------


@main.command(context_settings=_HELP, short_help="Check a checkpoint, or compare two.")
@click.argument("model")
@click.option(
    "--against",
    metavar="OTHER",
    help="Compare the weights, class by class, and the logits with this checkpoint's; a folder or a hub id.",
)
@click.option(
    "--logits/--no-logits", default=True, help="Compare logits too.  [default: where both run here]"
)
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="What to make the logits on.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(model: str, against: str | None, logits: bool, backend: str, as_json: bool) -> int:
    """Check MODEL, a folder or a hub id, down to every stored value.

    Names, types and shapes are held against config.json, the quantization against what it announces; values
    that are not finite, scales of zero and tied copies that differ are listed. The exit code is 1 if anything
    is wrong. Differences from --against change no exit code.

    \b
    dgemma verify google/diffusiongemma-26B-A4B-it
    dgemma verify ./converted --against ./original
    """
    from dgemma.checkpoint.checkpoint import resolve
    from dgemma.loading import make_ops
    from dgemma.reports import against as comparison
    from dgemma.reports import verify as library

    folder, console = resolve(model), _console()
    # What is wrong with the other checkpoint or the backend is said before minutes of reading.
    pair = comparison.pair(folder, against) if against is not None else None
    ops = make_ops(backend) if pair and pair[0] and logits else None
    with _progress(console, "checking values", in_bytes=True) as progress:
        report = {"model": model} | library.inspect(folder, progress)
    if pair:
        report["against"] = {"model": against} | _against(*pair, ops, console)
    click.echo(json.dumps(report, ensure_ascii=False) if as_json else library.text(report))
    return 0 if report["ok"] else 1


def _against(
    checkpoint: Checkpoint | None, other: Checkpoint, ops: Ops | None, console: Console
) -> dict[str, Any]:
    from dgemma.reports.against import compare, logits

    if checkpoint is None:
        return {"skipped": "the checkpoint does not open"}
    with _progress(console, "comparing weights", in_bytes=True) as progress:
        found: dict[str, Any] = {"weights": compare(checkpoint, other, progress)}
    if ops is None:
        return found
    try:
        with _progress(console, "comparing logits", in_bytes=True) as progress:
            found["logits"] = logits(checkpoint, other, ops, progress)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        found["logits"] = {"skipped": f"out of memory ({_first_line(error)})"}
    return found


# ---- convert ------------------------------------------------------------------------------------


@main.command(context_settings=_HELP, short_help="Convert a checkpoint to another format.")
@click.argument("source")
@click.argument("dest", required=False, type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["mlx", "nvfp4", "bf16"]), required=True, help="Format to write.")
@click.option(
    "--preset",
    type=click.Choice(["quality", "balanced", "small"]),
    default="balanced",
    show_default=True,
    help="What each class of weight becomes.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="CLASS=FORMAT",
    help="Override a class (embed, attention, mlp, experts, router, self_conditioning, vision) or a module. "
    "Formats: bf16, nvfp4, mxfp4, mxfp8, and 2bit to 8bit, 8bit-g32 for groups of 32. Repeatable.",
)
@click.option("--plan", "plan_only", is_flag=True, help="Print what would be written, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
def convert(
    source: str,
    dest: Path | None,
    to: str,
    preset: str,
    settings: tuple[str, ...],
    plan_only: bool,
    as_json: bool,
) -> None:
    """Convert SOURCE, a folder or a hub id in any format, into the folder DEST.

    DEST appears when it is whole. An interrupted run goes on where it stopped when the same command is given
    again. Memory stays near the largest tensor.

    \b
    dgemma convert google/diffusiongemma-26B-A4B-it model-mlx --to mlx
    dgemma convert model-bf16 model-nvfp4 --to nvfp4
    dgemma convert model-bf16 --to mlx --set experts=mxfp4 --plan
    """
    from dgemma.checkpoint.checkpoint import EVERY_FILE, resolve
    from dgemma_convert.plan import make_plan, report, text
    from dgemma_convert.stream import convert as run

    if dest is None and not plan_only:
        raise click.UsageError("give the folder DEST to write, or --plan", click.get_current_context())
    files = ["config.json", "generation_config.json"] if plan_only else EVERY_FILE
    plan, checkpoint = make_plan(resolve(source, files=files), to, preset, settings, source)
    facts = report(plan)
    if plan_only or dest is None:
        click.echo(json.dumps(facts) if as_json else text(facts))
        return
    if checkpoint is None:
        raise CheckpointError(f"{source}: no .safetensors file here")
    with _progress(_console(), "converting", in_bytes=True) as update:
        written = run(plan, checkpoint, dest.expanduser(), update)
    click.echo(f"dgemma: {dest} {'is written' if written else 'was written before; nothing to do'}", err=True)
    if as_json:
        click.echo(json.dumps(facts | {"dest": str(dest)}))


# ---- selftest ------------------------------------------------------------------------------------


@main.command(context_settings=_HELP, short_help="Check the kernels on this machine's GPU.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "mlx", "cuda"]),
    default="auto",
    show_default=True,
    help="Whose kernels.",
)
@click.option("--device", metavar="NAME", help="A torch device, such as cuda:1; cuda backend only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def selftest(backend: str, device: str | None, as_json: bool) -> int:
    """Check the kernels on this machine's GPU against their plain twins, at the released sizes.

    On a Mac the Metal kernels are off until this has passed; what it finds is kept. The exit code is 1 if a
    kernel is wrong, and 0 where there is no GPU to check one on.
    """
    from dgemma.loading import choose

    report: Any
    with _console().status("checking") as status:
        if choose(backend, None, device) == "mlx":
            from dgemma_mlx import selftest as metal

            report = metal.run(status.update)
            readable = metal.text(report)
        else:
            report, readable = _selftest_cuda(device)
    click.echo(json.dumps(report) if as_json else readable)
    return 1 if report["ok"] is False else 0


def _selftest_cuda(device: str | None) -> tuple[Any, str]:
    from dgemma.loading import make_ops
    from dgemma.network.config import load_json, read_config
    from dgemma.released import RELEASED_DIR

    ops: Any = make_ops("cuda", None, device)
    from dgemma_cuda import selftest as library

    report = library.run(ops, read_config(load_json(RELEASED_DIR / "config.json")))
    return report, library.text(report)


# ---- bench --------------------------------------------------------------------------------------


@main.command(context_settings=_HELP, short_help="Time a denoising step at full size, without a download.")
@click.option("--backend", type=click.Choice(["cuda"]), default="cuda", show_default=True)
@click.option(
    "--geometry",
    default="released",
    show_default=True,
    metavar="NAME|FOLDER",
    help="released, tiny, or a folder with a config.json.",
)
@click.option(
    "--format", "form", type=click.Choice(["nvfp4", "fp8", "bf16"]), default="nvfp4", show_default=True
)
@click.option("--random-weights", is_flag=True, required=True, help="Make the weights on the device.")
@click.option(
    "--context", type=click.IntRange(1), default=1024, show_default=True, help="Tokens of a prompt."
)
@click.option("--rows", type=click.IntRange(1), default=1, show_default=True, help="Canvases at once.")
@click.option(
    "--skew", type=_Number(0), default=0.0, show_default=True, help="How unevenly experts are picked."
)
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Steps to time.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Type of activations.")
@click.option("--device", metavar="NAME", help="A torch device, such as cuda:1.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench(
    backend: str,
    geometry: str,
    form: str,
    random_weights: bool,
    context: int,
    rows: int,
    skew: float,
    steps: int,
    dtype: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Time a denoising step with random weights, part by part, against what the device allows.

    Nothing is downloaded. A part's floor follows from its bytes and products and the device's measured copy
    bandwidth and matrix throughput.
    """
    from dgemma.loading import make_ops

    _, config = read_geometry(geometry)
    ops: Any = make_ops(backend, dtype, device)
    from dgemma_cuda import bench as library

    with _console().status("starting") as status:
        report = library.run(ops, config, form, context, rows, skew, steps, status.update)
    click.echo(json.dumps(report) if as_json else library.text(report))


def read_geometry(name: str) -> tuple[Path, Config]:
    """The folder and the config of "released", of "tiny", or of a folder with a config.json."""
    from dgemma.network.config import load_json, read_config
    from dgemma.released import RELEASED_DIR
    from dgemma.tiny import MODEL_DIR

    folder = {"released": RELEASED_DIR, "tiny": MODEL_DIR}.get(name, Path(name))
    return folder, read_config(load_json(folder / "config.json"), str(folder / "config.json"))
