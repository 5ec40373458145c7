"""Write large whole blocks past the page cache, while that is the faster way.

It saves a copy and the work of finding memory for it, leaves what the host has cached alone, and
what was written is on the disk. A slow disk takes longer for it than memory, and the guest would
stand still meanwhile: such a disk is noticed, and gets the page cache's help again.

Source: open(2) O_DIRECT.
"""

from __future__ import annotations

import os
import threading
import time

BLOCK_SIZE = 4096
"""Bytes; what is written begins, in memory and in the file, at a multiple of it."""
_SMALLEST = 64 << 10
_TRIAL = 64 << 20
"""Bytes after which the speed of the disk is known."""
_SLOW = 200 << 20
"""Bytes per second, as one thread sees it."""


class DirectWriter:
    """A second way to write to a file."""

    def __init__(self, descriptor: int) -> None:
        self._lock = threading.Lock()
        self._size = 0
        self._seconds = 0.0
        try:
            flags = os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC
            self._descriptor = os.open(f"/proc/self/fd/{descriptor}", flags)
        except OSError:  # not every file system can
            self._descriptor = -1

    def write(self, offset: int, view: memoryview) -> int:
        """Write the whole blocks that `view` begins with, or some of them; from any thread.

        Args:
            offset: The offset in bytes from the start of the file.
            view: What is to be there.

        Returns:
            Bytes written; 0: write it in the usual way.
        """
        size = len(view) // BLOCK_SIZE * BLOCK_SIZE
        if self._descriptor < 0 or offset % BLOCK_SIZE or size < _SMALLEST or self._is_slow():
            return 0
        started = time.perf_counter()
        try:
            written = os.pwrite(self._descriptor, view[:size], offset)
        except OSError:  # the usual way says what is wrong, if anything is
            return 0
        with self._lock:
            self._size += written
            self._seconds += time.perf_counter() - started
        return written

    def _is_slow(self) -> bool:
        return self._size >= _TRIAL and self._size < _SLOW * self._seconds

    def close(self) -> None:
        """Harmless when repeated."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
