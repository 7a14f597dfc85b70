"""Bucketed contexts: all that tests/graph/test_context.py asks of a cache, and how its arrays lie.

Buckets are of 8 slots here, as contexts there are short: most appends go beyond one.
"""

from __future__ import annotations

import numpy as np
import pytest

from dgemma.model import Model
from dgemma.network.cache import Cache
from dgemma.network.numpy_ops import NumpyOps
from tests.graph.test_context import *  # noqa: F403
from tests.graph.test_context import SLACK
from tests.oracle import oracle, our_model, tokens

torch = pytest.importorskip("torch")

from dgemma_cuda import cache as module  # noqa: E402
from tests.cuda.recording import BucketOps  # noqa: E402


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "bucket", lambda slots: -(-slots // 8) * 8)


@pytest.fixture(scope="module")
def model() -> Model:
    return our_model(BucketOps(), oracle("window"))


def test_sliding_layers_hold_what_they_need(model: Model) -> None:
    """In arrays of their own: a view would hold what it was cut from."""
    cache = model.encode(tokens(4, 2, 100), chunk=30).cache
    for layer, (k, v), pair in zip(model.config.layers, cache.read(), cache._layers, strict=True):
        assert k.shape[2] == v.shape[2] == (layer.window - 1 if layer.window else 104)
        held = layer.window - 1 + SLACK if layer.window else 104
        for x in pair:
            assert x.shape[2] == held and x.is_contiguous()
            assert x.untyped_storage().nbytes() == x.nbytes


def most(cache: Cache) -> int:
    """How many slots `trim` takes back."""
    with pytest.raises(ValueError, match="at most") as error:
        cache.trim(cache.length + 1)
    return int(str(error.value).rpartition(" ")[2])


@pytest.mark.parametrize("length", [7, 20, 26, 27, 28, 31, 50])
def test_padding_is_not_taken_back(model: Model, length: int) -> None:
    """What a sliding layer has dropped is gone, however often the context is cut and grows."""
    plain = our_model(NumpyOps(), oracle("window"))
    ids, more = tokens(26, 1, length), tokens(29, 1, 4)
    ours, wanted = (m.encode(ids) for m in (model, plain))
    for count in (0, 5, 2):
        ours, wanted = ours.trim(count), wanted.trim(count)
        assert most(ours.cache) == most(wanted.cache)
        ours, wanted = model.encode(more, ours), plain.encode(more, wanted)
        assert most(ours.cache) == most(wanted.cache)


def test_padding_is_what_attention_masks(model: Model) -> None:
    """Before the first token, and nowhere else."""
    cache = model.encode(tokens(27, 1, 21), model.encode(tokens(28, 1, 6))).cache
    keys = cache.read()[-1][0]
    empty = (keys == 0).all(dim=3)[0]
    assert np.flatnonzero(empty[0].numpy()).tolist() == list(range(32 - 27))
