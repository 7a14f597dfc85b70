"""Options that commands share."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Callable
from math import isfinite
from typing import Any, TypeVar

import click

from dgemma.backends import ACTIVATIONS, BACKENDS, DTYPES
from dgemma.settings import RANGES, SPEEDS


class Whole(click.IntRange):
    """A whole number in plain digits; Python would also take 1_000 and the digits of every script."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, str) and not re.fullmatch(r"[+-]?[0-9]{1,40}", value.strip()):
            self.fail(f"{reprlib.repr(value)} is not a valid integer.", param, ctx)
        return int(super().convert(value, param, ctx))


class Number(click.FloatRange):
    """A finite number; click lets NaN and infinity pass any range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(
                "no" if isinstance(value, str) and ("_" in value or not value.isascii()) else value
            )
        except ValueError:
            self.fail(f"{reprlib.repr(value)} is not a valid number.", param, ctx)
        if not isfinite(number):
            self.fail(f"{reprlib.repr(value)} is not a finite number.", param, ctx)
        return float(super().convert(number + 0.0, param, ctx))  # -0.0 is 0


class Text(click.ParamType):
    """Text of the command line, which is UTF-8 in every locale."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            # Bytes that the locale does not know have come as half surrogate pairs.
            return os.fsencode(value).decode("utf-8") if re.search("[\ud800-\udfff]", value) else str(value)
        except UnicodeError:
            self.fail(f"{reprlib.repr(value)} is not UTF-8 text.", param, ctx)


_F = TypeVar("_F", bound=Callable[..., Any])


def _options(*options: Callable[[_F], _F]) -> Callable[[_F], _F]:
    """Several decorators as one, the first on top."""

    def decorate(function: _F) -> _F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _setting(field: str) -> click.ParamType:
    limits = RANGES[field]
    if limits.whole:
        return Whole(int(limits.least), int(limits.most))
    return Number(limits.least, limits.most, limits.open_least, limits.open_most)


_JSON_FILE = click.File(encoding="utf-8")

conversation_options = _options(
    click.option("--system", type=Text(), metavar="TEXT", help="A system message to begin with."),
    click.option(
        "--tools", type=_JSON_FILE, metavar="FILE", help="A JSON list of tools that the model may call."
    ),
    click.option(
        "--thinking/--no-thinking",
        default=False,
        help="Think before answering; thoughts go to stderr.  [default: off]",
    ),
)

ending_options = _options(
    click.option(
        "--stop",
        type=Text(),
        multiple=True,
        metavar="TEXT",
        help="End the reply before this text; repeatable.",
    ),
    click.option(
        "--deadline",
        type=_setting("deadline"),
        metavar="SECONDS",
        help="End the reply after so many seconds.",
    ),
)

prompt_options = _options(
    click.argument("texts", type=Text(), nargs=-1, metavar="[PROMPT]..."),
    click.option(
        "--prompt",
        "prompts",
        type=Text(),
        multiple=True,
        metavar="TEXT",
        help="The same as PROMPT, for a text that begins with a dash.",
    ),
    click.option(
        "--messages",
        type=_JSON_FILE,
        metavar="FILE",
        help='A conversation in JSON: a list of messages, or {"messages": […], "tools": […]}, as in '
        'a request for OpenAI\'s chat API. "-" is stdin.',
    ),
    conversation_options,
    click.option(
        "--continue",
        "continue_final_message",
        is_flag=True,
        help="Go on with the last message of the conversation, which is the beginning of the answer.",
    ),
    click.option(
        "--max-rows",
        type=_setting("max_rows"),
        default=8,
        show_default=True,
        metavar="N",
        help="Prompts that run together at most; others wait.",
    ),
    ending_options,
    click.option(
        "--control-tokens/--no-control-tokens",
        default=False,
        help="Let control tokens that a message spells count, such as <turn|>. They are text otherwise: "
        "no text can end its turn or forge another.  [default: off]",
    ),
)

model_options = _options(
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
        help="Type of weights and activations.  [default: bfloat16 on a GPU, float32 on a CPU]",
    ),
    click.option(
        "--activations",
        type=click.Choice(ACTIVATIONS),
        help="Quantize what goes into experts in NVFP4, too: answers change. Blackwell only.",
    ),
    click.option("--device", metavar="NAME", help="A torch device, such as cuda:1; cuda backend only."),
    click.option("--force", is_flag=True, help="Load a model that exceeds all memory."),
)


def number_option(name: str, kind: click.ParamType, help: str, *field: str) -> Callable[[_F], _F]:
    return click.option(name, *field, type=kind, metavar="N", help=help)


# Options have the names of GenerationConfig's fields. The checkpoint's value holds for a missing one.
seed_option = number_option("--seed", _setting("seed"), "Makes the reply repeatable.  [default: drawn anew]")
step_options = _options(
    click.option(
        "--speed",
        type=click.Choice(list(SPEEDS)),
        help="A set of what follows; each option wins over it. quality is the checkpoint's own.",
    ),
    number_option("--steps", _setting("steps"), "Denoising steps a canvas at most."),
    number_option("--entropy-bound", _setting("entropy_bound"), "Nats of doubt that one step may accept."),
    number_option("--t-max", _setting("t_max"), "Temperature that a canvas begins with."),
    number_option("--t-min", _setting("t_min"), "Temperature that its last steps approach."),
    number_option(
        "--confidence", _setting("confidence"), "Mean entropy in nats below which a stable canvas is done."
    ),
    number_option("--stability", _setting("stability"), "Steps for which a canvas must not have changed."),
    click.option(
        "--early-stop/--no-early-stop",
        default=None,
        help="A canvas is done when it is stable and sure up to its first stop token; what lies behind does "
        "not count.",
    ),
    number_option(
        "--threshold",
        _setting("threshold"),
        "Accept positions whose best token has this probability, in place of the entropy bound; 0 is off.",
    ),
    number_option(
        "--top-k", _setting("top_k"), "Draw a position's sample from its N most probable tokens; 0 is all."
    ),
    number_option(
        "--top-p",
        _setting("top_p"),
        "Draw a position's sample from the fewest tokens whose probabilities reach N.",
    ),
    number_option(
        "--majority", _setting("majority"), "Last steps of a canvas that vote on its tokens; 1 is the last."
    ),
    click.option(
        "--allow-empty/--no-allow-empty",
        default=None,
        help="Let a reply end at once, or be padding, as the reference does.",
    ),
    number_option(
        "--soft-bound",
        _setting("soft_bound"),
        "Probability that a soft embedding may leave out; 0 keeps all.",
    ),
)
sampler_options = _options(
    number_option("--max-tokens", _setting("max_new_tokens"), "Tokens of a reply at most.", "max_new_tokens"),
    step_options,
)

# Those of a text with holes.
document_options = _options(
    seed_option,
    number_option(
        "--max-tokens",
        _setting("max_new_tokens"),
        "Tokens of a hole at most.  [default: a quarter of a canvas]",
        "max_new_tokens",
    ),
    step_options,
    click.option("--json", "as_json", is_flag=True, help="Print the text and what it took as a JSON object."),
)


# An option's own range is checked by itself; these are what settings can be wrong in together.
_TYPED = {"t_max": "--t-max", "t_min": "--t-min", "max_new_tokens": "--max-tokens"}


def as_typed(message: str) -> str:
    """An error about settings, with the names of options as they are typed in place of the fields'."""
    return re.sub("|".join(_TYPED), lambda name: _TYPED[name[0]], message)


output_options = _options(
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
