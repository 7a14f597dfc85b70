"""Counts the kernels that Triton has made so far, for someone who waits for them."""

from __future__ import annotations

from functools import cache

made = 0


def progress() -> str:
    """How far a warm-up is, after a comma; nothing before the first kernel."""
    return f", {made} kernels compiled" if made else ""


@cache
def watch() -> None:
    """Count from here on in `made` each kernel that is compiled, or taken from Triton's cache."""
    from triton import knobs

    before = knobs.runtime.jit_post_compile_hook

    def another(**event: object) -> bool | None:
        global made
        made += 1
        return before(**event) if before else None

    knobs.runtime.jit_post_compile_hook = another
