"""Checkpoints of which any file was changed: an answer, or a refusal in one line that verify sees coming.

`python -m benchmarks.fuzz` runs ten thousand.
"""

from __future__ import annotations

from collections import Counter

from benchmarks.fuzz.run import run


def test_three_hundred_mutations() -> None:
    results = list(run(300, seed=12))
    assert [result for result in results if result["outcome"] == "fault"] == []
    outcomes = Counter(result["outcome"] for result in results)
    assert outcomes["answer"] > 30 and outcomes["refusal"] > 100  # both are tried
