"""The README says what the program says: help texts, commands and files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HELP = re.findall(r"<!-- help: dgemma (.*?) -->\n```\n(.*?)```\n<!-- /help -->", README, re.DOTALL)


def help_text(command: str) -> str:
    """What `dgemma COMMAND` prints, 82 columns wide (click fits it to the terminal otherwise)."""
    environment = os.environ | {"COLUMNS": "82"}
    run = [sys.executable, "-m", "dgemma", *command.split()]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
    return done.stdout.replace("Usage: python -m dgemma", "Usage: dgemma")


def test_there_is_help_to_check() -> None:
    assert [command for command, _ in HELP] == ["generate --help", "convert --help", "verify --help"]


@pytest.mark.parametrize("command, text", HELP, ids=[command for command, _ in HELP])
def test_help_is_the_programs_own(command: str, text: str) -> None:
    assert text == help_text(command), f"README.md: paste the output of `COLUMNS=82 dgemma {command}`"


def test_named_files_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    modules = re.findall(r"python -m ([\w.]+)", README)
    scripts = re.findall(r"python (\w+/[\w/]+\.py)", README)
    for path in (*links, *scripts):
        assert (ROOT / path).exists(), path
    for module in modules:
        path = module.replace(".", "/")
        homes = [ROOT / path, ROOT / f"{path}.py", ROOT / "shared" / f"{path}.py", ROOT / "shared" / path]
        assert any(home.exists() for home in homes), module
