"""The README and the pages under docs/ say what the program says: help texts, commands and files.

`python tests/test_docs.py` writes the program's help texts into docs/commands.md.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

from dgemma.cli import main

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
LOG = ROOT / "docs/log.md"  # its commands are those of their day
COMMANDS = ROOT / "docs/commands.md"
BLOCK = re.compile(r"(<!-- help: dgemma (.*?) -->\n```\n)(.*?)(```\n<!-- /help -->)", re.DOTALL)
HELP = [(block[2], block[3]) for block in BLOCK.finditer(COMMANDS.read_text(encoding="utf-8"))]


def commands() -> list[str]:
    """What is asked for help: the group, and each of its commands."""
    return ["--help", *(f"{name} --help" for name in main.list_commands(click.Context(main)))]


def help_text(command: str) -> str:
    """What `dgemma COMMAND` prints, 82 columns wide (click fits it to the terminal otherwise)."""
    environment = os.environ | {"COLUMNS": "82"}
    run = [sys.executable, "-m", "dgemma", *command.split()]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
    return done.stdout.replace("Usage: python -m dgemma", "Usage: dgemma")


def write_help() -> None:
    """Fill the blocks of docs/commands.md; a command that has none gets one at the end."""
    text = COMMANDS.read_text(encoding="utf-8")
    for command in commands():
        if f"<!-- help: dgemma {command} -->" not in text:
            heading = command.removesuffix(" --help").capitalize()
            text += f"\n## {heading}\n\n<!-- help: dgemma {command} -->\n```\n```\n<!-- /help -->\n"
    COMMANDS.write_text(BLOCK.sub(lambda b: b[1] + help_text(b[2]) + b[4], text), encoding="utf-8")


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_every_command_has_its_help() -> None:
    assert sorted(command for command, _ in HELP) == sorted(commands())


@pytest.mark.parametrize("command, text", HELP, ids=[command for command, _ in HELP])
def test_help_is_the_programs_own(command: str, text: str) -> None:
    assert text == help_text(command), "docs/commands.md is behind: run `python tests/test_docs.py`"


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)(?:#[^)\s]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page != LOG], ids=title)
def test_named_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    modules = re.findall(r"python -m (\w+(?:\.\w+)*)", text)
    files = re.findall(r"(?:python|pytest)(?: -\w+)* ((?:\w+/)[\w/]+(?:\.py)?)", text)
    files += re.findall(r"benchmarks/\w+\.sh", text)
    missing = [file for file in files if not (ROOT / file).exists()]
    assert missing + [module for module in modules if not is_module(module)] == []


EXAMPLES = [
    pytest.param(code, id=f"{title(page)}-{n}")
    for page in PAGES
    for n, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_python_examples_run(code: str) -> None:
    """Every example stands alone, on the embedded model."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if "asyncio" in code:
        assert done.stdout.split() == ["savnac", "132", "aeilmnrt", "cancelled"]


CONSOLE = re.findall(r"```console\n(.*?)```", COMMANDS.read_text(encoding="utf-8"), re.DOTALL)
SHELL = [
    (line.partition("\n")[0], line.partition("\n")[2])
    for line in re.split(r"^\$ ", "".join(CONSOLE), flags=re.MULTILINE)[1:]
]


@pytest.mark.parametrize("command, answer", SHELL, ids=[command[:40] for command, _ in SHELL])
def test_console_examples_print_what_they_say(command: str, answer: str, tmp_path: Path) -> None:
    (tmp_path / "dgemma").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dgemma "$@"\n')
    (tmp_path / "dgemma").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == answer


def test_shells_complete() -> None:
    environment = os.environ | {
        "_DGEMMA_COMPLETE": "bash_complete",
        "COMP_WORDS": "dgemma in",
        "COMP_CWORD": "1",
    }
    code = "import sys; sys.argv[0] = 'dgemma'; from dgemma.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert {"plain,info", "plain,infill"} <= set(done.stdout.split())


def is_module(module: str) -> bool:
    """Whether `python -m MODULE` finds something, in this repository or, of one word, installed."""
    path = module.replace(".", "/")
    homes = (ROOT / top / f"{path}{end}" for top in ("", "shared", "convert") for end in ("", ".py"))
    return any(home.exists() for home in homes) or ("." not in module and find_spec(module) is not None)


if __name__ == "__main__":
    write_help()
