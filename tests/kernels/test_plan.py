"""The plan against a counting sort in NumPy: the kernel, and its twin in PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dgemma_cuda.kernels import plan as plans  # noqa: E402


def counting_sort(ids: np.ndarray, experts: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Slots by row, and experts by block, of what is used."""
    slots: list[int] = []
    owners: list[int] = []
    for expert in range(experts):
        mine = [int(slot) for slot in np.flatnonzero(ids.reshape(-1) == expert)]
        mine += [ids.size] * (-len(mine) % rows)
        slots += mine
        owners += [expert] * (len(mine) // rows)
    return np.array(slots), np.array(owners)


def routing(name: str, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Ids [N, K], every token's different, and how many experts there are."""
    if name == "one token":
        return np.array([[4, 0, 2]]), 5
    if name == "one pick":
        return rng.integers(0, 6, (33, 1)), 6
    if name == "one expert takes all":
        return np.full((40, 1), 3), 7
    if name == "most experts have no rows":
        return rng.choice([9, 17, 31], (21, 1)), 32
    if name == "zipf":
        return np.minimum(rng.zipf(1.5, (300, 4)) - 1, 15), 16
    if name == "a canvas":
        return np.argsort(rng.random((256, 128)), -1)[:, :8], 128
    return np.argsort(rng.random((24, 12)), -1)[:, :4], 12


NAMES = (
    "one token",
    "one pick",
    "one expert takes all",
    "most experts have no rows",
    "zipf",
    "a canvas",
    "random",
)


def check(plan: plans.Plan, ids: np.ndarray, experts: int) -> None:
    slots, owners = counting_sort(ids, experts, plan.rows)
    assert plan.slots.dtype == plan.experts.dtype == torch.int32
    assert plan.blocks == plans.blocks(ids.size, experts, plan.rows) >= len(owners)
    assert len(plan.slots) == plan.blocks * plan.rows
    found = plan.experts.cpu().numpy()
    np.testing.assert_array_equal(found[: len(owners)], owners)
    assert (found[len(owners) :] == experts).all()
    np.testing.assert_array_equal(plan.slots.cpu().numpy()[: len(slots)], slots)


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("name", NAMES)
def test_the_twin(name: str, rows: int) -> None:
    ids, experts = routing(name, np.random.default_rng(0))
    check(plans.plan_plain(torch.from_numpy(ids), experts, rows), ids, experts)


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("name", NAMES)
def test_the_kernel(place: Any, name: str, rows: int) -> None:
    ids, experts = routing(name, np.random.default_rng(0))
    check(plans.plan(torch.from_numpy(ids).to(place), experts, rows), ids, experts)


def test_integer_types_and_strides_make_no_difference(place: Any) -> None:
    ids, experts = routing("random", np.random.default_rng(1))
    wide = torch.from_numpy(np.concatenate([ids, ids], 1)).to(place)
    for picked in (wide[:, : ids.shape[1]], wide[:, : ids.shape[1]].int()):
        check(plans.plan(picked, experts, 16), ids, experts)


def test_the_worst_routing_fills_the_last_block() -> None:
    # One pick for all experts but the last, the rest for that one, one more than whole blocks.
    ids = np.array([*range(7), *[7] * 33])[:, None]
    plan = plans.plan_plain(torch.from_numpy(ids), 8, 16)
    assert plan.blocks == 10 and (plan.experts < 8).all()
