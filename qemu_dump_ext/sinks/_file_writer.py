"""Write a file as fast as its disk takes it."""

from __future__ import annotations

import os
import threading
from collections import deque

from qemu_dump_ext.host_limits import Job, WorkerThreads, private_memory
from qemu_dump_ext.sinks._direct_io import DirectWriter
from qemu_dump_ext.sinks._writeback import Writeback

_AREA_SIZE = 4 << 20


class FileWriter:
    """Writes to an empty regular file, past the page cache where that is faster."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        # One is filled while the other one is written, in a thread of its own. The first of all:
        # where there is no memory for them, nothing else is left behind.
        self._areas = deque(private_memory(_AREA_SIZE) for _ in range(2))
        self._direct = DirectWriter(descriptor)
        self._writeback = Writeback(descriptor)
        self._lock = threading.Lock()
        self._filled = 0
        self._area_offset = 0
        self._pool = WorkerThreads(1, "writer")
        self._pending: Job[None] | None = None

    def write_at(self, offset: int, view: memoryview) -> None:
        """Write at `offset`, in bytes from the start of the file; from any thread.

        Raises:
            OSError: It cannot be written, or what was written earlier.
        """
        while view:
            written = self._direct.write(offset, view)
            if not written:
                written = os.pwrite(self._descriptor, view, offset)
                with self._lock:
                    self._writeback.advance(written)
            view = view[written:]
            offset += written

    def append(self, view: memoryview) -> None:
        """Write behind what was appended before; collected to large blocks.

        Raises:
            OSError: It cannot be written, or what was written earlier.
        """
        while view:
            some = view[: _AREA_SIZE - self._filled]
            end = self._filled + len(some)
            self._areas[0][self._filled : end] = some
            self._filled = end
            view = view[len(some) :]
            if end == _AREA_SIZE:
                self._write_area()

    def _write_area(self) -> None:
        self._collect()
        filled = self._areas[0][: self._filled]
        self._pending = self._pool.submit(self.write_at, self._area_offset, filled)
        self._area_offset += self._filled
        self._filled = 0
        self._areas.rotate()

    def _collect(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def finish(self) -> None:
        """Write what was collected, and wait until all is on the disk.

        Raises:
            OSError: Some of it could not be written.
        """
        self._write_area()
        self._collect()
        self._writeback.close()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Use the descriptor no more; harmless when repeated.

        Raises:
            OSError: What was written earlier could not be.
        """
        self._pool.close()
        self._direct.close()
        self._writeback.close()
