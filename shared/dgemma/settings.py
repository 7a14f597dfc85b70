"""The sampler's numbers, and how generation_config.json spells them."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from dgemma.errors import ConfigError
from dgemma.files import MAX_SIZE, Reader, whole


class Range(NamedTuple):
    """The numbers that a setting may have: from `least` to `most`, without an end that is open."""

    least: float
    most: float
    whole: bool = False
    open_least: bool = False
    open_most: bool = False

    def __contains__(self, value: Any) -> bool:
        above = self.least < value if self.open_least else self.least <= value
        return bool(above and (value < self.most if self.open_most else value <= self.most))

    def __str__(self) -> str:
        least, most = (f"{end:d}" if isinstance(end, int) else f"{end:g}" for end in self[:2])
        above = "above" if self.open_least else "at least"
        return f"{above} {least} and {'below' if self.open_most else 'at most'} {most}"


# Every number is far inside what the arithmetic bears, and the ends are beyond any use. A million steps that
# never settle are a quarter of an hour for the embedded model and most of a day for the released one: more
# could not be told from a hang. Temperatures divide logits of at most 30 in float32, and entropies are
# compared in float32; a billion nats are more than any canvas has. Seeds and row ids key a counter-based
# generator with 64 bits each; what is beyond would silently draw another seed's noise.
RANGES: dict[str, Range] = {
    "steps": Range(1, 1_000_000, whole=True),
    "t_max": Range(1e-6, 1_000_000),
    "t_min": Range(1e-6, 1_000_000),
    "entropy_bound": Range(0, 1_000_000_000),
    "stability": Range(0, 1_000_000, whole=True),
    "confidence": Range(0, 1_000_000_000, open_least=True),
    "max_new_tokens": Range(1, MAX_SIZE, whole=True),
    "soft_bound": Range(0, 1, open_most=True),
    "threshold": Range(0, 1),
    "top_k": Range(0, MAX_SIZE, whole=True),
    "top_p": Range(0, 1, open_least=True),
    "majority": Range(1, 1000, whole=True),
    "deadline": Range(0, 1_000_000_000, open_least=True),
    "max_rows": Range(1, 4096, whole=True),
    "seed": Range(0, 2**64 - 1, whole=True),
    "row_ids": Range(0, 2**64 - 1, whole=True),
}


def number(name: str, value: Any) -> Any:
    """`value` as Python's int or float, within the range of `name`; ConfigError otherwise.

    NumPy's numbers are as good as Python's. A bool is no number, and a float is no whole one.
    """
    limits = RANGES[name]
    if not isinstance(value, Integral if limits.whole else Real) or isinstance(value, bool):
        raise ConfigError(f"{name} has the unusable value {shown(value)}")
    kind: Any = int if limits.whole else float
    try:
        if (given := kind(value)) in limits:  # NaN is in no range
            return given
    except OverflowError:  # of a whole number that no float holds
        pass
    raise ConfigError(f"{name} must be {limits}, not {shown(value)}")


def shown(value: Any) -> str:
    """A value for an error: short, whatever its size."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return f"{type(value).__name__} with thousands of digits"


class Settings(TypedDict, total=False):
    """What a call may change of a `GenerationConfig`; None keeps the old value. `speed` is one of SPEEDS."""

    speed: str | None
    steps: int | None
    t_max: float | None
    t_min: float | None
    entropy_bound: float | None
    stability: int | None
    confidence: float | None
    max_new_tokens: int | None
    stop_ids: tuple[int, ...] | None
    soft_bound: float | None
    allow_empty: bool | None
    threshold: float | None
    top_k: int | None
    top_p: float | None
    early_stop: bool | None
    majority: int | None


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
    # No file has what follows.
    soft_bound: float = 0.0  # probability that a soft embedding may leave out; 0 is exact
    # Whether a reply may begin with a stop id, or be padding: as the reference does.
    allow_empty: bool = False
    # Each of these is off by default, which is the reference.
    threshold: float = 0.0  # probability at which a step accepts a position, in place of the entropy bound
    top_k: int = 0  # tokens that a sample is drawn from; 0 are all
    top_p: float = 1.0  # probability that the tokens a sample is drawn from must reach
    early_stop: bool = False  # whether what lies behind a stop id counts for nothing when a canvas ends
    majority: int = 1  # last steps whose argmax canvases vote on what is committed

    def override(self, speed: str | None = None, **changes: Any) -> GenerationConfig:
        """A copy with the given fields changed, checked; None means unchanged, or as in the set `speed`."""
        if speed is not None:
            if not isinstance(speed, str) or speed not in SPEEDS:
                raise ConfigError(f"speed has the unusable value {shown(speed)}; known: {', '.join(SPEEDS)}")
            changes = dict(SPEEDS[speed]) | {k: v for k, v in changes.items() if v is not None}
        known = {f.name for f in fields(self)}
        if unknown := set(changes) - known:
            raise ConfigError(
                f"unknown sampler setting {sorted(unknown)[0]!r}; known: {', '.join(sorted(known))}"
            )
        given: dict[str, Any] = {
            name: _OTHER[name](name, value) if name in _OTHER else number(name, value)
            for name, value in changes.items()
            if value is not None
        }
        return replace(self, **given)._checked()

    def _checked(self) -> GenerationConfig:
        for field in fields(self):
            if field.name in RANGES:
                number(field.name, getattr(self, field.name))
        if self.t_max < self.t_min:
            raise ConfigError(f"t_max {self.t_max} must not be below t_min {self.t_min}")
        return self


# Named sets of settings; `benchmarks.tiny.evaluate --speed` measures them (docs/quality.md). The first is the
# checkpoint's own numbers.
SPEEDS: dict[str, Settings] = {
    "quality": {},
    "balanced": {"early_stop": True, "stability": 0},
    "fast": {"early_stop": True, "stability": 0, "confidence": 0.02, "steps": 24},
}


def _stop_id_list(name: str, value: Any) -> tuple[int, ...]:
    ids: Any = value if isinstance(value, list | tuple) else [None]
    for id in ids:
        if not isinstance(id, Integral) or isinstance(id, bool) or not 0 <= int(id) <= MAX_SIZE:
            raise ConfigError(f"{name} has the unusable value {shown(value)}")
    return tuple(int(id) for id in ids)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} has the unusable value {shown(value)}; it is true or false")
    return bool(value)


# How fields that are no numbers are read.
_OTHER: dict[str, Callable[[str, Any], Any]] = {
    "stop_ids": _stop_id_list,
    "allow_empty": _flag,
    "early_stop": _flag,
}

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
