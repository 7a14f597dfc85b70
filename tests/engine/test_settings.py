"""Numbers that the Python API takes: NumPy's are as good as Python's, and each has a stated end."""

import json
import warnings
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma.errors import ConfigError
from dgemma.settings import RANGES, SPEEDS, GenerationConfig
from tests.checkpoints import make_checkpoint, small

CONFIG = GenerationConfig(48, 0.8, 0.4, 0.1, 1, 0.005, 256, (1, 106))
HUGE = 10**5000  # more digits than Python writes
FIELDS = [name for name in RANGES if hasattr(CONFIG, name)]
WHOLE = [name for name in FIELDS if RANGES[name].whole]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dgemma.Model:
    folder = make_checkpoint(tmp_path_factory.mktemp("model"), small(vocab_size=480))
    return dgemma.load(folder, backend="numpy")


def refused(**settings: Any) -> str:
    with pytest.raises(ConfigError) as error:
        CONFIG.override(**settings)
    text = str(error.value)
    assert len(text) < 200 and "\n" not in text and next(iter(settings)) in text
    return text


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    "value",
    [
        *(True, False, np.True_, "3", b"3", "", [], [3], (3,), {}, 3j, Decimal(3), object()),
        *(float("nan"), float("inf"), -float("inf"), np.float32("nan"), np.float64("-inf")),
        *(HUGE, -HUGE, 2**64, 10**30, -1, np.int64(-1), -1e308, np.array([3, 4]), np.array("x")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_no_setting_may_be(field: str, value: Any) -> None:
    refused(**{field: value})


@pytest.mark.parametrize("field", FIELDS)
def test_the_ends(field: str) -> None:
    limits = RANGES[field]
    step = 1 if limits.whole else 1e-9
    other = {"t_max": {"t_min": 1e-6}, "t_min": {"t_max": 1_000_000}}.get(field, {})
    for end, is_open, beyond in (
        (limits.least, limits.open_least, limits.least - step),
        (limits.most, limits.open_most, limits.most * 1.001 + step if not limits.whole else limits.most + 1),
    ):
        if is_open:
            assert str(limits) in refused(**{field: end})
        else:
            assert getattr(CONFIG.override(**{field: end, **other}), field) == end
        assert str(limits) in refused(**{field: beyond, **other})


@pytest.mark.parametrize("field", WHOLE)
@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.int64, np.uint64])
def test_whole_numbers_of_numpy(field: str, kind: Any) -> None:
    value = getattr(CONFIG.override(**{field: kind(3)}), field)
    assert value == 3 and type(value) is int
    refused(**{field: np.float64(3)})
    refused(**{field: 3.0})


@pytest.mark.parametrize("field", ["t_max", "entropy_bound", "confidence"])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int64, int, Fraction])
@pytest.mark.filterwarnings("error")
def test_numbers_of_numpy(field: str, kind: Any) -> None:
    value = getattr(CONFIG.override(**{field: kind(2)}), field)
    assert value == 2 and type(value) is float


@pytest.mark.parametrize("value", [1e308, 1e-320, 10**400, np.float64(1e300)])
def test_no_number_beyond_reason_warns(value: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for field in ("t_max", "t_min"):
            refused(**{field: value})


def test_stop_ids() -> None:
    assert CONFIG.override(stop_ids=(np.int64(5), 6)).stop_ids == (5, 6)
    assert CONFIG.override(stop_ids=[]).stop_ids == ()  # type: ignore[arg-type]
    for ids in ((-1,), (True,), ("a",), (1.0,), (2**40,), (HUGE,), 5, "12", {1}, (None,)):
        refused(stop_ids=ids)


def test_temperatures_that_contradict_each_other() -> None:
    assert refused(t_max=0.1) == "t_max 0.1 must not be below t_min 0.4"
    assert refused(t_min=2) == "t_max 0.8 must not be below t_min 2.0"


def test_a_speed_is_a_set_of_settings_and_a_setting_wins_over_it() -> None:
    assert next(iter(SPEEDS)) == "quality" and CONFIG.override(speed="quality") == CONFIG
    for name, own in SPEEDS.items():
        assert CONFIG.override(speed=name) == CONFIG.override(**own)
        assert CONFIG.override(speed=name, stability=3, steps=None).stability == 3
    assert CONFIG.override(speed="fast", early_stop=False).early_stop is False
    for value in ("slow", 3, "", ["fast"]):
        assert "quality, balanced, fast" in refused(speed=value)


@pytest.mark.parametrize("field", ["allow_empty", "early_stop"])
def test_what_is_true_or_false(field: str) -> None:
    assert getattr(CONFIG.override(**{field: True}), field) is True
    for value in (1, 0, "true", 1.0, np.True_, []):
        refused(**{field: value})


# ---- seeds and ids ------------------------------------------------------------------------------


def done(model: dgemma.Model, **options: Any) -> dgemma.Done:
    events = model.generate([3, 4, 5], max_new_tokens=4, steps=2, **options)
    return next(event for event in events if isinstance(event, dgemma.Done))


@pytest.mark.parametrize("kind", [int, np.int8, np.uint8, np.int64, np.uint64])
def test_seeds_of_numpy(kind: Any, model: dgemma.Model) -> None:
    reply = done(model, seed=kind(7), row_ids=[kind(9)])
    assert reply.tokens == done(model, seed=7, row_ids=[9]).tokens
    assert json.loads(json.dumps(reply.json()))["seed"] == 7
    assert done(model, seed=1, row_ids=np.array([9], np.int64)).tokens


def test_the_largest_seeds(model: dgemma.Model) -> None:
    assert done(model, seed=2**64 - 1).stats.seed == 2**64 - 1
    assert done(model, seed=np.uint64(2**64 - 1), row_ids=[2**64 - 1]).stats.seed == 2**64 - 1


@pytest.mark.parametrize(
    "value",
    [-1, 2**64, 10**30, HUGE, True, 1.0, np.float64(1), "1", b"1", [1], np.nan, 1j, np.int64(-3), np.True_],
    ids=lambda value: type(value).__name__,
)
def test_what_no_seed_may_be(value: Any, model: dgemma.Model) -> None:
    """A seed beyond 64 bits would draw the noise of another one."""
    for name, given in (("seed", value), ("row_ids", [value])):
        with pytest.raises(ConfigError, match=name) as error:
            model.generate([3, 4, 5], **{name: given})  # type: ignore[arg-type]
        assert len(str(error.value)) < 200


@pytest.mark.parametrize("ids", [5, 1.5, True, object()])
def test_ids_that_are_no_list(ids: Any, model: dgemma.Model) -> None:
    with pytest.raises(ConfigError, match="row_ids"):
        model.generate([3, 4, 5], row_ids=ids)


def test_a_file_beyond_reason_names_the_file(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, small(vocab_size=480))
    path = folder / "generation_config.json"
    for key, value in (("max_denoising_steps", 10**7), ("t_max", 1e9), ("confidence_threshold", 1e20)):
        old = path.read_text()
        path.write_text(json.dumps(json.loads(old) | {key: value}))
        with pytest.raises(ConfigError, match=r"generation_config\.json: "):
            dgemma.load(folder, backend="numpy")
        path.write_text(old)
