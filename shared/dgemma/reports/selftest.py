"""The report of a selftest: each kernel of a backend beside its plain twin, in one form for all backends.

A backend's package has `selftest.check_all(device, progress)`, which returns `found` or `nothing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dgemma.reports.tables import columns

SLACK = 1.02  # a kernel may take this many times its twin's time, as timings wobble


@dataclass(frozen=True)
class Check:
    """A kernel beside its twin: largest difference over the largest value, milliseconds a call, bytes moved.

    `broken` is the framework's message if the kernel did not run. `switchable`: the twin replaces the kernel
    if the kernel is slower.
    """

    kernel: str
    what: str
    dtype: str
    error: float | None
    bound: float
    ms: float | None = None
    plain_ms: float | None = None
    nbytes: int | None = None
    broken: str | None = None
    switchable: bool = False

    @property
    def ok(self) -> bool:
        """Whether the kernel is right, however slow."""
        return not self.broken and self.error is not None and self.error <= self.bound  # NaN is not

    @property
    def fault(self) -> str | None:
        """Why the kernel should not run by this check, or None."""
        if self.broken:
            return f"does not run: {self.broken}"
        if not self.ok:
            return f"wrong by {self.error} in {self.dtype}, {self.what}"
        if self.switchable and self.ms and self.plain_ms and self.ms > SLACK * self.plain_ms:
            return f"slower: {self.ms:.3f} ms for {self.plain_ms:.3f} ms, {self.what}"
        return None

    def json(self) -> dict[str, Any]:
        """The whole check, ready for JSON."""
        return asdict(self) | {"name": f"{self.kernel}, {self.what}", "ok": self.ok, "fault": self.fault}


def difference(got: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    """Largest difference over the largest value, over all pairs of arrays of one shape; NaN if one is NaN."""
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        # np.maximum keeps NaN, Python's max may drop it.
        worst = np.maximum(worst, np.abs(a - b).max() / np.abs(b).max())
    return float(worst)


def found(device: str, checks: Sequence[Check], **more: Any) -> dict[str, Any]:
    """The report, ready for JSON: `ok` says whether every kernel is right."""
    ok = all(check.ok for check in checks)
    return {"device": device, "ok": ok, "why": None, "checks": [check.json() for check in checks], **more}


def nothing(device: str, why: str, **more: Any) -> dict[str, Any]:
    """The report if nothing could be checked; `ok` is None."""
    return {"device": device, "ok": None, "why": why, "checks": [], **more}


def text(report: Mapping[str, Any]) -> str:
    """The report as text."""
    if report["ok"] is None:
        return (
            f"{report['device']}: no kernel was checked, because {report['why']}. "
            "The backend runs without them, on its framework's own operations."
        )
    copy = report["ceilings"]["bytes_per_s"] if "ceilings" in report else None
    head = report["device"] + (f"; a copy moves {copy / 1e9:,.0f} GB/s" if copy else "")
    rows = [["kernel", "", "format", "error", "bound", "ms", "plain ms", *_speed(None, copy), ""]]
    for c in report["checks"]:
        error = "" if c["error"] is None else f"{c['error']:.1e}"
        times = ["" if c[key] is None else f"{c[key]:.3f}" for key in ("ms", "plain_ms")]
        said = "ok" if c["fault"] is None else c["fault"].partition(":")[0]
        cells = [c["kernel"], c["what"], c["dtype"], error, f"{c['bound']:.1e}", *times, *_speed(c, copy)]
        rows.append([*cells, said])
    return "\n".join([head, "", *columns(rows), *_switches(report)])


def _speed(c: Mapping[str, Any] | None, copy: float | None) -> list[str]:
    """A check's bytes a second and their share of a copy's, or the two headings; empty without a copy."""
    if copy is None:
        return []
    if c is None:
        return ["GB/s", "of a copy"]
    if not c["nbytes"] or not c["ms"]:
        return ["", ""]
    speed = 1e3 * c["nbytes"] / c["ms"]
    return [f"{speed / 1e9:,.0f}", f"{speed / copy:.0%}"]


def _switches(report: Mapping[str, Any]) -> list[str]:
    """Which kernels run from now on, if the selftest decides that."""
    if "off" not in report:
        return []
    on = [name for name, why in report["off"].items() if why is None]
    off = [f"Off: {name}, {why}." for name, why in report["off"].items() if why is not None]
    return ["", f"On from now on: {', '.join(on) or 'none'}.", *off]
