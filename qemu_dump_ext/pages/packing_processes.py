"""Pack pages in processes of our own, which no interpreter's lock makes wait for each other.

A process shares the buffers of guest memory with us, and packs in place. Through its connection
go numbers only: which bytes of pages of which size, and back the packed size of each page. It knows
nothing of the guest, and so is there before anybody knows which guest it is.
"""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
from array import array
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue

from qemu_dump_ext.errors import DumpWriteError
from qemu_dump_ext.interrupts import uninterrupted
from qemu_dump_ext.pages.packing import Packer
from qemu_dump_ext.pages.page_packing import ORDER, PAGE_SIZES, READY, Compression
from qemu_dump_ext.pages.pipeline import PIECE_SIZE, Buffer, buffer_count
from qemu_dump_ext.third_party import interpreter

_PROGRAM = (
    "import sys; sys.path[:] = {path!r};"
    " from qemu_dump_ext.pages.page_packing import serve; serve(**{job!r})"
)
"""With its words in it: to import what reads them takes as long as all that packs."""
_NO_INTERPRETER = "false"
"""Ends at once, so that pages are packed here."""
_ANSWER_MAX = 1 << 16
"""Bytes: more than the sizes of the pages of a piece take."""


class _PackingProcess:
    """One of them.

    Raises:
        OSError: The host allows no more processes, or descriptors.
    """

    def __init__(self, memory: int, compression: Compression) -> None:
        # A message each: an order is a few bytes, its answer four for each page.
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            program = _PROGRAM.format(
                path=[str(Path(__file__).parents[2]), *sys.path],
                job={"connection": theirs.fileno(), "memory": memory, **asdict(compression)},
            )
            self._process = subprocess.Popen(
                (interpreter() or _NO_INTERPRETER, "-S", "-c", program),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), memory),
                start_new_session=True,  # Ctrl-C is ours
            )
        self._is_ready: bool | None = None

    def is_ready(self) -> bool:
        """Tell, once that is known, whether the process has all that it needs."""
        if self._is_ready is None:
            try:
                self._is_ready = self._connection.recv(_ANSWER_MAX) == READY
            except OSError:
                self._is_ready = False
        return self._is_ready

    def pack(self, offset: int, size: int, page_size: int) -> array[int]:
        sizes = array(PAGE_SIZES)
        try:
            order = ORDER.pack(offset, size, page_size)
            self._connection.send(order, socket.MSG_NOSIGNAL)
            sizes.frombytes(self._connection.recv(_ANSWER_MAX))
        except OSError as error:
            raise self._has_ended() from error
        if not sizes:
            raise self._has_ended()
        return sizes

    def _has_ended(self) -> DumpWriteError:
        return DumpWriteError(
            f"a process that packed pages has ended with status {self._process.wait()}"
        )

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()


class PackingProcesses(Packer):
    """A pool of them; of fewer, where the host does not allow so many.

    Raises:
        OSError: The host has no memory to share with them.
    """

    def __init__(self, compression: Compression, count: int) -> None:
        super().__init__(compression)
        self._processes: list[_PackingProcess] = []
        self._idle: SimpleQueue[_PackingProcess | None] = SimpleQueue()
        self._memory = os.memfd_create("guest-pages", os.MFD_CLOEXEC)
        try:
            size = buffer_count(count) * PIECE_SIZE
            os.ftruncate(self._memory, size)
            whole = memoryview(mmap.mmap(self._memory, size))
            self.buffers = [
                Buffer(whole[at : at + PIECE_SIZE], at) for at in range(0, size, PIECE_SIZE)
            ]
            for _ in range(count):
                process = None
                with uninterrupted(), suppress(OSError):
                    process = _PackingProcess(self._memory, compression)
                    self._processes.append(process)
                self._idle.put(process)
        except BaseException:
            self.close()
            raise

    def pack(self, buffer: Buffer, page_size: int) -> array[int]:
        """Have a process pack it; where none came up, pack it here."""
        process = self._idle.get()
        try:
            if process is not None and process.is_ready():
                return process.pack(buffer.offset, len(buffer.view), page_size)
            return super().pack(buffer, page_size)
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        with uninterrupted():
            for process in self._processes:
                process.end()
            self._processes.clear()
            self.buffers = ()  # whose memory has a descriptor of its own
            os.close(self._memory)


def start_packer(compression: Compression, count: int) -> Packer:
    """Return a pool of `count` packing processes, or what packs without them, for a `with` block.

    A process costs memory that the host may not give.
    """
    try:
        return PackingProcesses(compression, count)
    except OSError:
        return Packer(compression)
