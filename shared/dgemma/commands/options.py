"""Options that commands share."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any, TypeVar

import click

from dgemma.backends import ACTIVATIONS, BACKENDS, DTYPES

HELP = {"help_option_names": ["-h", "--help"]}


class Number(click.FloatRange):
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
_NOT_NEGATIVE = Number(min=0)
_POSITIVE = Number(min=0, min_open=True)
_SHARE = Number(min=0, max=1, max_open=True)
_JSON_FILE = click.File(encoding="utf-8")

prompt_options = _options(
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
        help='A conversation in JSON: a list of messages, or an object with "messages" and "tools", such as '
        'a request for OpenAI\'s chat API. "-" is stdin.',
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
    click.option(
        "--continue",
        "continue_final_message",
        is_flag=True,
        help="Go on with the last message of the conversation, which is the beginning of the answer.",
    ),
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
)


def number_option(name: str, kind: click.ParamType, help: str, *field: str) -> Callable[[_F], _F]:
    return click.option(name, *field, type=kind, metavar="N", help=help)


# Options have the names of GenerationConfig's fields. The checkpoint's number holds for a missing one.
sampler_options = _options(
    number_option("--max-tokens", _AT_LEAST_1, "Tokens of a reply at most.", "max_new_tokens"),
    number_option("--steps", _AT_LEAST_1, "Denoising steps a canvas at most."),
    number_option("--entropy-bound", _NOT_NEGATIVE, "Nats of doubt that one step may accept."),
    number_option("--t-max", _POSITIVE, "Temperature that a canvas begins with."),
    number_option("--t-min", _POSITIVE, "Temperature that its last steps approach."),
    number_option("--confidence", _POSITIVE, "Mean entropy in nats below which a stable canvas is done."),
    number_option("--stability", _AT_LEAST_1, "Steps for which a canvas must not have changed."),
    number_option("--soft-bound", _SHARE, "Probability that a soft embedding may leave out; 0 keeps all."),
)

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
