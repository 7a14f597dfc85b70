"""Numbers and tables as text."""

from __future__ import annotations

from collections.abc import Sequence


def amount(value: float) -> str:
    """Bytes in powers of 1000, with one to three digits before the point below 1000 GB."""
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def count(value: float) -> str:
    """A number of parameters in short: 25.82 B, 3.4 M."""
    if value >= 1e9:
        return f"{value / 1e9:.2f} B"
    return (
        f"{value / 1e6:.1f} M" if value >= 1e6 else f"{value / 1e3:.1f} k" if value >= 1e3 else f"{value:.0f}"
    )


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows in columns of the least width, the first aligned to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
