"""The console log of a guest: new lines with a pattern, and what it said last."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

TAIL_BYTES = 256 << 10
_READ_MAX = 1 << 20
_LINE_MAX = 4096


class ConsoleLog:
    """A file to which QEMU appends; it may not be there yet, and may begin anew."""

    def __init__(self, path: Path, patterns: Sequence[re.Pattern[str]]) -> None:
        self.path = path
        self._patterns = patterns
        self._rest = b""
        self._position = self.size()

    def skip(self) -> None:
        """Take everything that is there for seen."""
        self._position, self._rest = self.size(), b""

    def look(self) -> str | None:
        """Return the first new line that has one of the patterns, or None.

        At most 1 MiB is looked at; of a longer line, its last 4096 bytes.
        """
        size = self.size()
        if size == self._position:
            return None
        if size < self._position:  # it was begun anew
            self._position, self._rest = 0, b""
        try:
            with self.path.open("rb") as file:
                file.seek(max(self._position, size - _READ_MAX))
                data = self._rest + file.read(_READ_MAX)
                self._position = file.tell()
        except OSError:
            return None
        *lines, self._rest = data.split(b"\n")
        self._rest = self._rest[-_LINE_MAX:]
        for line in lines:
            text = line[-_LINE_MAX:].decode("utf-8", "replace").strip("\r")
            if any(pattern.search(text) for pattern in self._patterns):
                return text
        return None

    def size(self) -> int:
        """Return how long the file is now, in bytes; 0 where there is none."""
        try:
            return os.stat(self.path).st_size  # noqa: PTH116 - for hundreds of guests a second
        except OSError:
            return 0


def read_tail(path: Path) -> bytes | None:
    """Return the last part of a console log, at most `TAIL_BYTES`, or None: it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            return file.read(TAIL_BYTES)
    except OSError:
        return None
