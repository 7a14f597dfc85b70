"""What a refusal must look like."""

from collections.abc import Callable
from typing import Any

import pytest

from dgemma.errors import DgemmaError


def refused(call: Callable[[], Any], *parts: str, kind: type[DgemmaError] = DgemmaError) -> str:
    """The message of the error of this kind that `call` raises: one line that has all `parts`."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 2000
    for part in parts:
        assert part in message, message
    return message
