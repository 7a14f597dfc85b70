"""The house stands as docs/house.md draws it: its table has every import, for types and in functions, too."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOMES = {"shared/": "dgemma", "convert/": "dgemma_convert", "": "dgemma_mlx dgemma_cuda benchmarks tests"}
FILES = {
    ".".join(path.relative_to(ROOT / home).with_suffix("").parts).removesuffix(".__init__"): path
    for home, packages in HOMES.items()
    for package in packages.split()
    for path in (ROOT / home / package).rglob("*.py")
}
PAGE = (
    (ROOT / "docs/house.md").read_text("utf-8").partition("## Who may import whom")[2].partition("\n## ")[0]
)
ROWS = re.findall(r"^\| `([\w.]+)` \| (.*?) \|", PAGE, re.MULTILINE)
TABLE = {room: set(re.findall(r"`([\w.]+)`", may)) for room, may in ROWS}


def imports(module: str) -> Iterator[str]:
    """The modules of this repository that a module imports."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(FILES[module].read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{name}" if f"{base}.{name}" in FILES else base for name in names]
        yield from (name for name in names if name in FILES and name != module)


def room(module: str) -> str:
    """The longest name in the table that a module is, or lies in."""
    parts = module.split(".")
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next(name for name in names if name in TABLE)


def test_every_import_is_in_the_table() -> None:
    strangers = {
        f"{module} imports {other}: {room(module)} may not import {room(other)}"
        for module in FILES
        for other in imports(module)
        if room(other) not in TABLE[room(module)] | {room(module)}
    }
    assert not strangers, "\n".join(sorted(strangers))


def test_the_table_names_no_import_that_is_not_made() -> None:
    made = {(room(module), room(other)) for module in FILES for other in imports(module)}
    unused = {(one, other) for one, may in TABLE.items() for other in may if (one, other) not in made}
    assert not unused, sorted(unused)


@pytest.mark.parametrize("level", ["rooms", "files"])
def test_no_import_goes_in_a_circle(level: str) -> None:
    name = room if level == "rooms" else str
    graph: dict[str, set[str]] = {}
    for module in FILES:
        below = {name(other) for other in imports(module)} - {name(module)}
        graph.setdefault(name(module), set()).update(below)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_everything_imports_where_there_is_no_unix() -> None:
    """Without the modules that Windows lacks, the wheel's packages and so the commands are still there."""
    elsewhere = ("tests", "benchmarks", "dgemma_mlx", "dgemma_cuda.kernels.device")  # no MLX, no Triton there
    missing = () if find_spec("torch") else ("dgemma_cuda",)
    wheel = [module for module in FILES if not module.startswith(elsewhere + missing)]
    hide = "import sys; sys.modules.update(dict.fromkeys(['fcntl', 'resource', 'termios', 'pwd', 'grp']))"
    code = "\n".join([hide, *(f"import {module}" for module in wheel)])
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
