"""Progress of long work as one line of text: how much, how fast, how long still."""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Callable

_INTERVAL_SECONDS = 0.2
_JSON_SECONDS = 1.0
_RECENT_SECONDS = 5.0
_MIB = 1 << 20


def terminal_columns() -> int:
    """Return how wide the terminal is, at which somebody looks."""
    return shutil.get_terminal_size((80, 24)).columns


class ProgressMeter:
    """Counts bytes and shows them a few times a second."""

    def __init__(
        self,
        show: Callable[[str], None] | None,
        clock: Callable[[], float] = time.monotonic,
        *,
        as_json: bool = False,
    ) -> None:
        """Prepare.

        Args:
            show: Shows a line that is meant to replace the one before; None: nothing is shown.
            clock: Seconds.
            as_json: Show objects of JSON instead, for programs: one a second.
        """
        self._show = show
        self._clock = clock
        self._as_json = as_json
        self._interval = _JSON_SECONDS if as_json else _INTERVAL_SECONDS
        self._total = self._done = 0
        self._made = self._shown = clock()
        self._recent = deque([(self._shown, 0)])

    def start(self, total: int) -> None:
        """Begin with `total` bytes of guest memory ahead."""
        self._total, self._done = total, 0
        self._shown = self._clock()
        self._recent = deque([(self._shown, 0)])

    def advance(self, size: int) -> None:
        """Count `size` more bytes."""
        self._done += size
        now = self._clock()
        if self._show is not None and now - self._shown >= self._interval:
            self._shown = now
            self._show(self.json_line(now) if self._as_json else self.line(now))

    def search(self, what: str) -> None:
        """Show that something is still searched for, before there is anything to count."""
        now = self._clock()
        if self._show is None or self._as_json or now - self._shown < self._interval:
            return
        self._shown = now
        self._show(f"searching for {what}  {_duration(now - self._made)}")

    def line(self, now: float) -> str:
        """Return the line for this moment."""
        done, rate, left = self._figures(now)
        return (
            f"{100 * done / max(self._total, 1):5.1f} %"
            f"  {done // _MIB} of {self._total // _MIB} MiB"
            f"  {rate / _MIB:.{0 if rate >= 10 * _MIB else 1}f} MiB/s  {_duration(left)} left"
        )

    def json_line(self, now: float) -> str:
        """Return this moment for a program: bytes, bytes per second, seconds."""
        done, rate, left = self._figures(now)
        content = {"done": done, "total": self._total, "rate": round(rate)}
        return json.dumps({"progress": content | {"seconds_left": round(left, 1)}})

    def _figures(self, now: float) -> tuple[int, float, float]:
        """Return what is done, how fast that goes of late, and how many seconds are left."""
        done = min(self._done, self._total)
        self._recent.append((now, done))
        while len(self._recent) > 2 and now - self._recent[1][0] >= _RECENT_SECONDS:
            self._recent.popleft()
        since, before = self._recent[0]
        rate = (done - before) / max(now - since, 1e-6)
        return done, rate, (self._total - done) / rate if rate > 0 else 0.0


class OneLine:
    """A line of a terminal that replaces itself, and leaves nothing behind."""

    def __init__(
        self, write: Callable[[str], None], columns: Callable[[], int] = terminal_columns
    ) -> None:
        """Prepare.

        Args:
            write: Writes to the terminal.
            columns: Tells how wide it is now.
        """
        self._write = write
        self._columns = columns
        self._length = 0

    def show(self, line: str) -> None:
        """Show a line; parts at its end that do not fit are left out."""
        room = max(1, self._columns() - 1)
        while len(line) > room and "  " in line.strip():
            line = line.rpartition("  ")[0]
        line = line[:room]
        self._write(f"\r{line:<{min(self._length, room)}}\r")
        self._length = len(line)

    def clear(self) -> None:
        """Leave an empty line, where there was one."""
        if self._length:
            self.show("")


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
