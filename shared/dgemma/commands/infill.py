"""`dgemma infill`: the holes of a text are filled, and all the rest of it stays as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from dgemma.commands.documents import Lines, Place, about, read_document, spans
from dgemma.commands.errors import HELP, OneLine
from dgemma.commands.opened import check_temperatures, checked_sampler, open_model
from dgemma.commands.options import Text, Whole, document_options, model_options
from dgemma.commands.progress import progress_bar, stderr_console
from dgemma.commands.streams import answer_exactly, answer_json, check_stdout
from dgemma.engine.infill import check_holes
from dgemma.errors import PromptError
from dgemma.loading import Small
from dgemma.settings import RANGES
from dgemma.text.holes import Hole, emptied, in_order, marked
from dgemma.text.tokenizer import needed
from dgemma.text.wording import to_infill


@click.command(cls=OneLine, context_settings=HELP)
@click.argument("file", type=Text(), metavar="FILE")
@click.option("--instruction", type=Text(), metavar="TEXT", help="What the text is to be.")
@click.option("--hole", "mark", type=Text(), metavar="MARK", help="What marks a hole.  [default: <<>>]")
@click.option(
    "--at", "places", type=Place(), multiple=True, metavar="LINE:COL",
    help="A hole before a column of a line; repeatable. Marks are text then.",
)  # fmt: skip
@click.option(
    "--lines", "ranges", type=Lines(), multiple=True, metavar="A-B",
    help="A hole in the place of lines; repeatable. Marks are text then.",
)  # fmt: skip
@click.option(
    "--length", "lengths", type=Whole(1, int(RANGES["max_new_tokens"].most)), multiple=True, metavar="N",
    help="Tokens of a hole: given once for all holes, or once for each. Without it lengths are found.",
)  # fmt: skip
@model_options
@document_options
def infill(
    file: str,
    instruction: str | None,
    mark: str | None,
    places: list[tuple[int, int]],
    ranges: list[tuple[int, int]],
    lengths: list[int],
    model: str | None,
    backend: str,
    dtype: str | None,
    activations: str | None,
    device: str | None,
    force: bool,
    seed: int | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Fill the holes in a text, and print it.

    A hole is marked <<>>, or <<5>> if it is to have five tokens; --at and --lines make holes in a text as it
    is. What stands outside of them is printed byte for byte. FILE "-" is stdin.

    \b
    echo '{"name": "<<>>", "age": 41}' | dgemma infill - --instruction 'Extract as JSON: name Ada, age 41'
    dgemma infill main.py --lines 12-20 --model google/diffusiongemma-26B-A4B-it
    """
    check_stdout()
    check_temperatures(settings)
    if mark is not None and (places or ranges):
        raise click.UsageError(
            "--hole marks holes in the text, and --at and --lines say where else they are."
        )
    if mark == "":
        raise click.BadParameter("an empty text marks nothing.", param_hint="--hole")
    text = read_document(file)
    with about(file):
        found = spans(text, places, ranges)
        text, holes = emptied(text, found) if found else marked(text, mark)
        if not holes:
            raise PromptError(f"has no hole; mark one with {mark or '<<>>'}, or say --at or --lines")
        holes = in_order(text, _with_lengths(holes, lengths))

    def check(small: Small) -> None:
        checked_sampler(small, settings, seed)
        with about(file):
            check_holes(small.config, needed(small.tokenizer), text, holes, to_infill(instruction, ""))

    console = stderr_console()
    loaded = open_model(
        console, model, check,
        backend=backend, dtype=dtype, device=device, activations=activations, force=force,
    )  # fmt: skip
    with about(file), progress_bar(console, "reading the prompt") as bar:
        done = loaded.infill(text, holes, instruction=instruction, seed=seed, watch=bar, **settings)
    if as_json:
        kind = loaded.ops.activations or loaded.ops.dtype_name
        answer_json(done.json() | {"model": model or "embedded", "dtype": kind})
    else:
        answer_exactly(done.text)


def _with_lengths(holes: list[Hole], lengths: list[int]) -> list[Hole]:
    """The holes, in the order of the text, with the lengths of --length."""
    if not lengths:
        return holes
    if len(lengths) not in (1, len(holes)):
        raise PromptError(
            f"{len(lengths)} lengths for {len(holes)} holes; give --length once, or once for each"
        )
    each = lengths * len(holes) if len(lengths) == 1 else lengths
    return [replace(hole, length=length) for hole, length in zip(holes, each, strict=True)]
