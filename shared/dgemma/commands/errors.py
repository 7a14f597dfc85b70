"""Errors of commands, one line each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from dgemma.errors import DgemmaError

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"dgemma: error: {' '.join(message.split())}", err=True)
    sys.exit(code)


# Each framework has its own exception for this. Importing one only to name it would cost seconds.
_OUT_OF_MEMORY = ("out of memory", "insufficient memory", "[metal::malloc]", "not enough memory")
_MEMORY_ADVICE = "take a shorter prompt, fewer rows or --dtype bfloat16; `dgemma info` says what is needed"


def is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in _OUT_OF_MEMORY)


def first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__


class OneLine(click.Command):
    """A command whose errors are one line each."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        run: Callable[..., Any] = super().main
        if not standalone_mode:  # the caller wants the exceptions
            return run(*args, standalone_mode=False, **extra)
        try:
            code = run(*args, standalone_mode=False, **extra)
        except click.Abort:
            click.echo("dgemma: interrupted", err=True)
            sys.exit(INTERRUPTED)
        except DgemmaError as error:
            _fail(str(error), 1)
        except (MemoryError, RuntimeError) as error:  # PyTorch and MLX raise RuntimeError
            if not is_out_of_memory(error):
                raise
            _fail(f"out of memory ({first_line(error)}); {_MEMORY_ADVICE}", 1)
        except click.UsageError as error:
            hint = f"; see {error.ctx.command_path} --help" if error.ctx else ""
            _fail(error.format_message().rstrip(".") + hint, error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        sys.exit(code if isinstance(code, int) else 0)  # some commands return their exit code
