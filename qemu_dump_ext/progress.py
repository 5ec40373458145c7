"""Progress of long work as one line of text: how much, how fast, how long still."""

from __future__ import annotations

import time
from collections.abc import Callable

_INTERVAL_SECONDS = 0.2
_MIB = 1 << 20


class ProgressMeter:
    """Counts bytes and shows them a few times a second."""

    def __init__(
        self,
        show: Callable[[str], None] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show lines with `show`, each meant to replace the one before; None: show nothing."""
        self._show = show
        self._clock = clock
        self._total = self._done = 0
        self._started = self._shown = clock()

    def start(self, total: int) -> None:
        """Begin with `total` bytes of guest memory ahead."""
        self._total, self._done = total, 0
        self._started = self._shown = self._clock()

    def advance(self, size: int) -> None:
        """Count `size` more bytes."""
        self._done += size
        now = self._clock()
        if self._show is not None and now - self._shown >= _INTERVAL_SECONDS:
            self._shown = now
            self._show(self.line(now))

    def line(self, now: float) -> str:
        """Return the line for this moment."""
        done = min(self._done, self._total)
        elapsed = max(now - self._started, 1e-6)
        rate = done / elapsed
        left = (self._total - done) / rate if rate else 0.0
        return (
            f"{100 * done / max(self._total, 1):5.1f} %"
            f"  {done // _MIB} of {self._total // _MIB} MiB"
            f"  {rate / _MIB:.0f} MiB/s  {_duration(left)} left"
        )


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
