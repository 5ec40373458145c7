"""Wait for what another process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

SECONDS = 240.0
"""Far more than anything takes, on a busy machine as well; what does not come fails then."""
_POLL_SECONDS = 0.005
_T = TypeVar("_T")


def wait_until(
    condition: Callable[[], _T], what: str = "it happens", seconds: float = SECONDS
) -> _T:
    """Return what `condition` returns once it is true; fail with `what` when it never is."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(_POLL_SECONDS)
    return result
