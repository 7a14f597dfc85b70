"""Draw a few steps of a generation, as `dgemma generate --live` shows them, into an SVG.

    python benchmarks/picture.py --out docs/canvas.svg

The embedded model runs on NumPy float64 with a seed, and no time is shown, so the same checkpoint gives
the same picture anywhere.
"""

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
import numpy as np
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

import dgemma
from dgemma.view.terminal import View

PROMPT = "Extract as JSON: name Quillan, age 36, city Oslo, color green"
# Ten times stricter than the checkpoint's: the embedded model is so sure that two steps would do.
ENTROPY_BOUND = 0.01
WIDTH = 88
THEME = TerminalTheme(
    (24, 26, 33),
    (226, 228, 235),
    [
        (60, 64, 78), (240, 113, 120), (140, 200, 130), (244, 190, 90),
        (110, 160, 240), (190, 140, 230), (100, 200, 210), (226, 228, 235),
    ],
)  # fmt: skip
# A picture in a README may load no fonts; the reader's own monospaced font takes their place.
FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.S).replace(
    "Fira Code, monospace", "'DejaVu Sans Mono', Menlo, Consolas, monospace"
)


def chosen(count: int, most: int = 5) -> list[int]:
    """Which of `count` steps to draw: the first, the last, and others evenly between."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()})


def frames(model: dgemma.Model, prompt: str, seed: int, bound: float) -> tuple[Console, str]:
    """A recording of the chosen steps of the first canvas, and the reply."""
    events = list(model.generate([{"role": "user", "content": prompt}], seed=seed, entropy_bound=bound))
    console = Console(record=True, width=WIDTH, height=20, file=io.StringIO(), force_terminal=True)
    heading(console, prompt, bound)
    drafts = [event for event in events if isinstance(event, dgemma.Draft) and event.canvas == 0]
    draw(console, View(model.tokenizer, model.generation), drafts, chosen(len(drafts)))
    done = next(event for event in events if isinstance(event, dgemma.Done))
    return console, done.text


def heading(console: Console, prompt: str, bound: float) -> None:
    console.print(Text(f'$ dgemma generate --entropy-bound {bound} --prompt \\\n    "{prompt}"', "bold"))
    console.print()


def draw(console: Console, view: View, drafts: Iterable[dgemma.Draft], steps: Sequence[int]) -> None:
    for index, draft in enumerate(drafts):
        view.update(draft)
        if index in steps:
            console.print(view)
            console.print()


CELL = 12.2  # width of a character in rich's SVG
_TEXT = re.compile(
    r'x="([\d.]+)" y="([\d.]+)" textLength="([\d.]+)"([^>]*)>((?:&#160;)*)([^<]*?)((?:&#160;)*)</text>'
)


def without_margins(svg: str) -> str:
    """Spaces around each text replaced by its place: some viewers drop them, and words run together."""

    def shift(found: re.Match[str]) -> str:
        left, right = (len(found[group]) // len("&#160;") for group in (5, 7))
        x = float(found[1]) + left * CELL
        length = float(found[3]) - (left + right) * CELL
        return f'x="{x:.1f}" y="{found[2]}" textLength="{length:.1f}"{found[4]}>{found[6]}</text>'

    return _TEXT.sub(shift, svg)


def legend(console: Console) -> None:
    line = Text("settled   ")
    line.append("uncertain", "underline yellow").append("   ").append("··· noise", "dim")
    console.print(line, end="")


@click.command()
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The SVG to write."
)
@click.option("--model", help="A checkpoint's folder or a hub id.  [default: the embedded model]")
@click.option("--prompt", default=PROMPT, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True)
@click.option("--entropy-bound", type=float, default=ENTROPY_BOUND, show_default=True)
def main(out: Path, model: str | None, prompt: str, seed: int, entropy_bound: float) -> None:
    """Write a picture of a canvas that settles, and print the reply."""
    console, reply = frames(dgemma.load(model, backend="numpy"), prompt, seed, entropy_bound)
    legend(console)
    svg = console.export_svg(title="dgemma", theme=THEME, code_format=FORMAT, unique_id="canvas")
    out.write_text(without_margins(svg), encoding="utf-8")
    click.echo(f"{reply}\n{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
