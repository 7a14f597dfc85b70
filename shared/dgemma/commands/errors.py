"""Errors of commands, one line each."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from dgemma.commands import process, streams
from dgemma.errors import DgemmaError, visible

HELP = {"help_option_names": ["-h", "--help"]}
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# What the frameworks, NumPy and the system raise for it. Each has an exception of its own, and importing a
# framework only to name it would cost seconds: the words tell.
OUT_OF_MEMORY = (MemoryError, RuntimeError, OSError, ImportError)
_SIGNS = (
    "out of memory",  # CUDA, MPS, PyTorch
    "outofmemory",  # kIOGPUCommandBufferCallbackErrorOutOfMemory, torch.OutOfMemoryError
    "insufficient memory",  # Metal
    "not enough memory",  # PyTorch on Windows
    "can't allocate memory",  # PyTorch's DefaultCPUAllocator
    "cannot allocate memory",  # ENOMEM, of dlopen and of mmap
    "unable to allocate",  # MLX's [malloc], NumPy
    "failed to allocate",
    "[metal::malloc]",
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, and cuDNN's
    "bad_alloc",
    "unable to mmap",
    "failed to map segment",  # a library that finds no room for itself
    "start new thread",  # nor does the stack of a thread
    "paging file is too small",  # Windows
)
_MEMORY_ADVICE = "take a shorter prompt, fewer rows or --dtype bfloat16; `dgemma info` says what is needed"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of OUT_OF_MEMORY says that memory is short."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    text = f"{type(error).__name__}: {error}".lower()
    return any(sign in text for sign in _SIGNS)


def out_of_memory(error: BaseException) -> str:
    """What a command says of such an exception, on one line."""
    return f"out of memory ({first_line(error)}); {_MEMORY_ADVICE}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, at most 200 characters."""
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _fail(message: str, code: int) -> NoReturn:
    streams.note(f"dgemma: error: {visible(message)}")
    sys.exit(code)


def _show_help(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        streams.answer(ctx.get_help())
        ctx.exit()


class OneLine(click.Command):
    """A command whose errors are one line each.

    Called without `args` it takes the process's command line, and with it the process's streams and signals.
    """

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """Click's option, but its text is an answer like any other."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.callback = _show_help
        return option

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:  # the caller wants the exceptions
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        if args is None:
            process.take_over()
            streams.prepare()
        try:
            if args is None:
                with process.unwinding():
                    code = self._call(sys.argv[1:], prog_name, complete_var, extra)
            else:
                code = self._call(list(args), prog_name, complete_var, extra)
        except (click.Abort, KeyboardInterrupt):
            streams.note("dgemma: interrupted")
            sys.exit(INTERRUPTED)
        except DgemmaError as error:
            _fail(str(error), 1)
        except click.UsageError as error:
            hint = f"; see {error.ctx.command_path} --help" if error.ctx else ""
            _fail(error.format_message().rstrip(".") + hint, error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except OUT_OF_MEMORY as error:
            if not is_out_of_memory(error):
                raise
            _fail(out_of_memory(error), 1)
        sys.exit(code if isinstance(code, int) else 0)  # some commands return their exit code

    def _call(self, args: list[str], prog_name: str | None, complete_var: str | None, extra: Any) -> Any:
        # Click's own `main` takes any broken pipe for stdout's, and the end of any file for an interrupt.
        name = prog_name or os.path.basename(sys.argv[0])
        extra.pop("windows_expand_args", None)
        self._main_shell_completion(extra, name, complete_var)
        try:
            with self.make_context(name, args, **extra) as context:
                return self.invoke(context)
        except click.exceptions.Exit as end:
            return end.exit_code
