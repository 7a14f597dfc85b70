"""The model that a command's options name, once everything else that they say has been checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console

from dgemma.commands.options import as_typed
from dgemma.commands.progress import TerminalNotices, progress_bar
from dgemma.commands.streams import note
from dgemma.errors import ConfigError, PromptError
from dgemma.loading import Small, load
from dgemma.model import Model
from dgemma.settings import GenerationConfig, number


def check_temperatures(settings: Mapping[str, Any]) -> None:
    """UsageError where the sampler's options contradict each other."""
    t_max, t_min = settings["t_max"], settings["t_min"]
    if t_max is not None and t_min is not None and t_max < t_min:
        context = click.get_current_context()
        raise click.UsageError(f"--t-max {t_max} must not be below --t-min {t_min}", context)


def check_stops(stop: tuple[str, ...]) -> None:
    """UsageError for an empty text of --stop."""
    if not all(stop):
        raise click.BadParameter("an empty text ends nothing.", param_hint="--stop")


@contextmanager
def named_as_typed() -> Iterator[None]:
    """Errors of settings in here have the names of options."""
    try:
        yield
    except (ConfigError, PromptError) as error:
        raise type(error)(as_typed(str(error))) from None


def checked_sampler(small: Small, settings: Mapping[str, Any], seed: int | None) -> GenerationConfig:
    """The checkpoint's sampler with the options' settings; ConfigError for those, or a seed, out of range."""
    sampler = small.generation.override(**settings)
    if seed is not None:
        number("seed", seed)
    return sampler


def open_model(console: Console, model: str | None, check: Callable[[Small], None], **options: Any) -> Model:
    """The loaded model; `options` are those of `load`. A bar on the console shows how far it is.

    `check` raises for everything that can be wrong with a request, before minutes of loading.
    """

    def checked(small: Small) -> None:
        with named_as_typed():
            check(small)

    with progress_bar(console, "loading weights") as progress:
        if model is None:
            note("dgemma: no --model given, so the embedded model answers; it knows toy tasks only")
        return load(model, progress=progress, notices=TerminalNotices(console), check=checked, **options)
