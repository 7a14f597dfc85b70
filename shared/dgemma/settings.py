"""The sampler's numbers, and how generation_config.json spells them."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any, TypedDict

from dgemma.errors import ConfigError
from dgemma.files import Reader, whole


class Settings(TypedDict, total=False):
    """The fields of a `GenerationConfig` that a call may change; None keeps the old value."""

    steps: int | None
    t_max: float | None
    t_min: float | None
    entropy_bound: float | None
    stability: int | None
    confidence: float | None
    max_new_tokens: int | None
    stop_ids: tuple[int, ...] | None
    soft_bound: float | None


@dataclass(frozen=True)
class GenerationConfig:
    """Sampler and stopping numbers of generation_config.json (model.md: "The sampler, exactly")."""

    steps: int  # N, denoising steps a canvas at most
    t_max: float
    t_min: float
    entropy_bound: float  # nats
    stability: int  # steps for which the argmax canvas must not change
    confidence: float  # nats, mean entropy
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    soft_bound: float = 0.0  # probability that a soft embedding may leave out; no file has it, 0 is exact

    def override(self, **changes: Any) -> GenerationConfig:
        """A copy with the given fields changed (None means unchanged), checked."""
        known = {f.name for f in fields(self)}
        if unknown := set(changes) - known:
            raise ConfigError(
                f"unknown sampler setting {sorted(unknown)[0]!r}; known: {', '.join(sorted(known))}"
            )
        given = {k: v for k, v in changes.items() if v is not None}
        for name, value in given.items():
            whole = name in ("steps", "stability", "max_new_tokens")
            kind = tuple if name == "stop_ids" else int if whole else (int, float)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ConfigError(f"{name} has the unusable value {reprlib.repr(value)}")
            if isinstance(value, float) and not isfinite(value):
                raise ConfigError(f"{name} must be a finite number")
        return replace(self, **given)._checked()

    def _checked(self) -> GenerationConfig:
        rules = {
            "steps must be at least 1": self.steps >= 1,
            "t_min must be above 0": self.t_min > 0,
            "t_max must not be below t_min": self.t_max >= self.t_min,
            "entropy_bound must not be negative": self.entropy_bound >= 0,
            "stability must not be negative": self.stability >= 0,
            "confidence must be above 0": self.confidence > 0,
            "max_new_tokens must be at least 1": self.max_new_tokens >= 1,
            "soft_bound must be at least 0 and below 1": 0 <= self.soft_bound < 1,
        }
        for rule, holds in rules.items():
            if not holds:
                raise ConfigError(rule)
        return self


# The meaning of an absent or null value, as in every file that transformers saves untouched: transformers'
# own defaults, which are the released numbers.
_SAMPLER_DEFAULTS: dict[str, Any] = {
    "max_denoising_steps": 48,
    "t_max": 0.8,
    "t_min": 0.4,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "max_new_tokens": 256,
    "sampler_config": {},
}


def read_generation_config(
    data: Mapping[str, Any] | None,
    vocab_size: int,
    where: str = "generation_config.json",
    config: Mapping[str, Any] | None = None,
) -> GenerationConfig:
    """GenerationConfig from the dictionary of generation_config.json; `data` is None without that file.

    `config` is the dictionary of config.json. Its own "generation_config" (mlx-community) stands in for
    the file. Missing stop ids are taken from there, then from its eos_token_id, then from its text_config's.
    `vocab_size` bounds them. Absent or null numbers take the reference's defaults. ConfigError for a sampler
    other than the entropy-bound one, and for a value of the wrong type or outside its range.
    """
    config, beside = config or {}, str(Path(where).with_name("config.json"))
    embedded = config.get("generation_config")
    if data is None:
        data, where = embedded or {}, f"{beside}: generation_config"
    given = Reader(data, where).data
    top = Reader(_SAMPLER_DEFAULTS | {k: v for k, v in given.items() if v is not None}, where)
    sampler = top.sub("sampler_config")
    name = sampler.get("_cls_name", str, "EntropyBoundSamplerConfig")
    if name != "EntropyBoundSamplerConfig":
        raise ConfigError(f"{sampler.where}: sampler {reprlib.repr(name)} is not supported")
    result = GenerationConfig(
        steps=top.size("max_denoising_steps"),
        t_max=top.number("t_max"),
        t_min=top.number("t_min"),
        entropy_bound=sampler.number("entropy_bound", 0.1),
        stability=top.get("stability_threshold", int),
        confidence=top.number("confidence_threshold"),
        max_new_tokens=top.size("max_new_tokens"),
        # The file wins: config.json's list lacks <|tool_response>, and a tool call would never end.
        stop_ids=_stop_ids(
            [(given, where)] + [(x, beside) for x in (embedded, config, config.get("text_config"))],
            vocab_size,
        ),
    )
    try:
        return result._checked()
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _stop_ids(places: Iterable[tuple[Any, str]], vocab_size: int) -> tuple[int, ...]:
    """The eos_token_id of the first of these objects, each with its file, that has any; () if none has."""
    found = ((x.get("eos_token_id"), where) for x, where in places if isinstance(x, Mapping))
    stops, where = next(((stops, where) for stops, where in found if stops not in (None, [])), ([], ""))
    stop_ids = tuple(whole(stop) for stop in (stops if isinstance(stops, list) else [stops]))
    for stop in stop_ids:
        if type(stop) is not int or not 0 <= stop < vocab_size:
            shown = reprlib.repr(stop)
            raise ConfigError(f"{where}: eos_token_id {shown} is outside the vocabulary of {vocab_size}")
    return stop_ids
