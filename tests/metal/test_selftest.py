"""`dgemma selftest` for MLX: what it finds on a Mac (imitated), and where nothing can run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dgemma.cli import main
from dgemma.reports.selftest import Check, text
from dgemma.tiny import MODEL_DIR
from dgemma_mlx import selftest, verdict
from dgemma_mlx.kernels import norms
from tests.metal import simulator


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verdict, "folder", lambda: tmp_path)


def invoke(*args: str) -> Any:
    return CliRunner().invoke(main, ["selftest", "--backend", "mlx", *args])


def only(monkeypatch: pytest.MonkeyPatch, *kernels: str) -> None:
    """Fewer cases, so that a test is quick."""
    every = selftest.cases
    monkeypatch.setattr(selftest, "cases", lambda data: [c for c in every(data) if c.kernel in kernels])


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Imitated: the simulator is Metal, and kernels are checked at a small size and not timed."""
    if reason := simulator.available():
        pytest.skip(reason)
    checks = selftest._checks

    def small(folder: Path, context: int, timed: bool, progress: selftest.Progress) -> list[Check]:
        return checks(MODEL_DIR, 40, False, progress)

    monkeypatch.setattr(selftest, "on_metal", lambda: True)
    monkeypatch.setattr(selftest, "_checks", small)
    with simulator.installed():
        yield


def test_in_the_simulator_every_kernel_is_right(mac: None) -> None:
    shown = invoke("--json")
    assert shown.exit_code == 0, shown.output
    report = json.loads(shown.stdout)
    assert report["ok"] is True and report["why"] is None
    assert {check["kernel"] for check in report["checks"]} == set(verdict.KERNELS)
    assert {check["dtype"] for check in report["checks"]} == {"bfloat16", "float32"}
    assert all(check["fault"] is None and check["ms"] is None for check in report["checks"])
    assert verdict.read() == dict.fromkeys(verdict.KERNELS) == report["off"]
    shown_text = text(report)
    assert "Off" not in shown_text and shown_text.count(" ok") == len(report["checks"])


def test_a_wrong_kernel_is_found(mac: None, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "rms_norm", "heads")
    source = norms.NORM.source.replace("/ D + eps", "/ (D + 1) + eps")
    assert source != norms.NORM.source
    monkeypatch.setattr(norms, "NORM", replace(norms.NORM, source=source))
    shown = invoke()
    assert shown.exit_code == 1
    assert "wrong by" in shown.stdout and shown.stdout.count(" ok") > 2


def test_a_kernel_that_does_not_compile_is_said(mac: None, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "rms_norm")
    monkeypatch.setattr(norms, "NORM", replace(norms.NORM, source="out[0] = nonsense;"))
    shown = invoke()
    assert shown.exit_code == 1 and "does not run" in shown.stdout


def test_without_metal_nothing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "on_metal", lambda: False)
    shown = invoke()
    assert shown.exit_code == 0 and "no kernel was checked, because there is no Metal device" in shown.stdout
    report = json.loads(invoke("--json").stdout)
    assert report["ok"] is None and report["checks"] == []
    assert verdict.read() is None  # nothing was proven of a Mac


def test_on_a_mac_the_verdict_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imitated: the simulator is Metal, the embedded model's sizes are the released ones."""
    only(monkeypatch, "rms_norm", "join_branches")
    monkeypatch.setattr(selftest, "on_metal", lambda: True)
    monkeypatch.setattr(selftest, "RELEASED_DIR", MODEL_DIR)
    times = {"rms_norm": iter([1.0, 2.0] * 9), "join_branches": iter([3.0, 2.0] * 9)}
    order = iter(["rms_norm"] * 2 + ["join_branches"] * 2)
    monkeypatch.setattr(selftest, "clock", lambda call: next(times[next(order)]))
    with simulator.installed():
        report = selftest.check_all()
    assert report["ok"] is True and report["why"] is None
    kept = verdict.read()
    assert kept is not None and kept["rms_norm"] is None
    assert str(kept["join_branches"]).startswith("slower: 3.000 ms for 2.000 ms")
    assert verdict.enabled(kept) == {"rms_norm"}
    shown_text = text(report)
    assert "On from now on: rms_norm" in shown_text and "Off: join_branches, slower" in shown_text
