"""`dgemma edit`: a text is changed where it must be, and the difference is shown or written."""

from __future__ import annotations

from difflib import unified_diff
from typing import Any

import click

from dgemma.commands.documents import BACKUP, Lines, about, read_document, spans, title, write_document
from dgemma.commands.errors import HELP, OneLine
from dgemma.commands.opened import check_temperatures, checked_sampler, open_model
from dgemma.commands.options import Text, document_options, model_options
from dgemma.commands.progress import progress_bar, stderr_console
from dgemma.commands.streams import answer_exactly, answer_json, check_stdout, note
from dgemma.engine.infill import check_text
from dgemma.loading import Small
from dgemma.text.holes import in_order
from dgemma.text.tokenizer import needed
from dgemma.text.wording import to_edit


@click.command(cls=OneLine, context_settings=HELP)
@click.argument("file", type=Text(), metavar="FILE")
@click.option("--instruction", type=Text(), required=True, metavar="TEXT", help="What to change.")
@click.option(
    "--lines", "ranges", type=Lines(), multiple=True, metavar="A-B",
    help="Lines that may change; repeatable.  [default: all]",
)  # fmt: skip
@click.option("--write", is_flag=True, help=f"Write FILE; what it was goes to FILE{BACKUP}.")
@model_options
@document_options
def edit(
    file: str,
    instruction: str,
    ranges: list[tuple[int, int]],
    write: bool,
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
    """Change a text as an instruction asks, and print the difference.

    What the model is least sure of may change, within --lines if they are given. The rest stays byte for
    byte. The instruction may quote the text; if it does not, the text is put behind it. FILE "-" is stdin.

    \b
    dgemma edit broken.json --instruction "Repair this JSON: $(cat broken.json)"
    dgemma edit main.py --lines 12-20 --instruction 'Handle an empty list.' --write
    """
    check_stdout()
    check_temperatures(settings)
    if write and file == "-":
        raise click.UsageError("--write needs a file: stdin cannot be written.", click.get_current_context())
    text = read_document(file)
    with about(file):
        regions = spans(text, [], ranges)
        regions = in_order(text, regions) if regions else []

    def check(small: Small) -> None:
        checked_sampler(small, settings, seed)
        with about(file):
            check_text(small.config, needed(small.tokenizer), text, to_edit(instruction, text))

    console = stderr_console()
    loaded = open_model(
        console, model, check,
        backend=backend, dtype=dtype, device=device, activations=activations, force=force,
    )  # fmt: skip
    with about(file), progress_bar(console, "reading the prompt") as bar:
        done = loaded.edit(text, instruction, regions=regions, seed=seed, watch=bar, **settings)
    diff = difference(text, done.text, title(file))
    if done.text == text:
        note("dgemma: nothing changes")
    elif write:
        note(f"dgemma: {file} is written; what it was is in {write_document(file, text, done.text)}")
    if as_json:
        kind = loaded.ops.activations or loaded.ops.dtype_name
        answer_json(done.json() | {"diff": diff, "model": model or "embedded", "dtype": kind})
    elif diff:
        answer_exactly(diff)


def difference(old: str, new: str, name: str) -> str:
    """The unified diff of two texts, as `patch` reads it; "" if they are equal."""
    lines = [f"{text}\n".split("\n")[:-1] if text else [] for text in (old, new)]
    # Only \\n ends a line, and a text that does not end with one says so.
    ended = [
        [line + "\n" for line in some[:-1]]
        + ([f"{some[-1]}\n\\ No newline at end of file\n"] if some[-1] else [])
        for some in lines
    ]
    return "".join(unified_diff(ended[0], ended[1], name, name))
