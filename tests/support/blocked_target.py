"""A target that takes no more of a dump than a pipe holds, until it is told to."""

from __future__ import annotations

import fcntl
import os
import struct
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_READ_SIZE = 1 << 20


class BlockedTarget:
    """A FIFO with a reader.

    Attributes:
        path: Of the FIFO.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self._reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._draining: threading.Thread | None = None

    def is_written_to(self) -> bool:
        """Tell whether something of the dump has come."""
        return _held(self._reader) > 0

    def drain(self) -> None:
        """Take everything from now on."""
        os.set_blocking(self._reader, True)
        self._draining = threading.Thread(target=self._drain, daemon=True)
        self._draining.start()

    def _drain(self) -> None:
        while os.read(self._reader, _READ_SIZE):
            pass

    def close(self) -> None:
        """Let whoever writes fail."""
        if self._draining is None:
            os.close(self._reader)


def _held(descriptor: int) -> int:
    count: int = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))[0]
    return count


@contextmanager
def blocked_target(folder: Path) -> Iterator[BlockedTarget]:
    """Make one in `folder`."""
    target = BlockedTarget(folder / "blocked")
    try:
        yield target
    finally:
        target.close()
