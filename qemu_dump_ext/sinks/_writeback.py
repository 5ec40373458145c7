"""Let the kernel write a growing file to its disk meanwhile, so that the last sync is short."""

from __future__ import annotations

import os

from qemu_dump_ext.host_limits import Job, WorkerThreads

_STEP = 64 << 20


class Writeback:
    """Syncs a file in a thread of its own, each time that it has grown by some MiB."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._pool = WorkerThreads(1, "writeback")
        self._pending: Job[None] | None = None
        self._size = 0

    def advance(self, size: int) -> None:
        """Count `size` more bytes that were written.

        Raises:
            OSError: Earlier ones could not be written to the disk.
        """
        self._size += size
        if self._size >= _STEP and (self._pending is None or self._pending.is_done()):
            self._size = 0
            self._collect()
            self._pending = self._pool.submit(os.fdatasync, self._descriptor)

    def close(self) -> None:
        """Wait until the descriptor is not used any more; harmless when repeated.

        Raises:
            OSError: A part could not be written to the disk.
        """
        self._pool.close()
        self._collect()

    def _collect(self) -> None:
        # The kernel tells an error once: what this sync was told, the last one will not be.
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
