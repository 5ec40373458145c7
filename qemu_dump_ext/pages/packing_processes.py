"""Pack pages in processes of our own, which no interpreter's lock makes wait for each other.

A process shares the buffers of guest memory with us, and packs in place. Through its connection
go numbers only: which bytes of pages of which size, and back the packed size of each page. It knows
nothing of the guest, and so is there before anybody knows which guest it is.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
from array import array
from contextlib import ExitStack, suppress
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
_ENDS_SECONDS = 0.1
"""What takes longer to end still packs, or was stopped: it is killed."""
_KILLED = "a process that packed pages has ended: was it killed?"


class _PackingProcess:
    """One of them: the other side of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._is_ready: bool | None = None

    def is_ready(self) -> bool:
        """Tell, once that is known, whether the process has all that it needs."""
        if self._is_ready is None:
            try:
                self._is_ready = self._connection.recv(_ANSWER_MAX) == READY
            except OSError:
                self._is_ready = False
        return self._is_ready

    @property
    def has_packed(self) -> bool:
        return bool(self._is_ready)

    def pack(self, offset: int, size: int, page_size: int) -> array[int]:
        sizes = array(PAGE_SIZES)
        try:
            order = ORDER.pack(offset, size, page_size)
            self._connection.send(order, socket.MSG_NOSIGNAL)
            sizes.frombytes(self._connection.recv(_ANSWER_MAX))
        except OSError as error:
            raise DumpWriteError(_KILLED) from error
        if not sizes:
            raise DumpWriteError(_KILLED)
        return sizes

    def dismiss(self) -> None:
        with suppress(OSError):  # it has ended already
            self._connection.shutdown(socket.SHUT_WR)

    def has_ended(self) -> bool:
        """Tell whether it has, or does at once."""
        self._connection.settimeout(_ENDS_SECONDS)
        try:
            while self._connection.recv(_ANSWER_MAX):
                pass
        except TimeoutError:
            return False
        except OSError:
            pass
        return True

    def close(self) -> None:
        self._connection.close()


class PackingProcesses(Packer):
    """A pool of them; of fewer, where the host does not allow so many.

    One is started, and divides when it has come up: what it imports takes ten times as long.

    Raises:
        OSError: The host has no memory to share with them.
    """

    def __init__(self, compression: Compression, count: int) -> None:
        super().__init__(compression)
        self._first: subprocess.Popen[bytes] | None = None
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
            with uninterrupted(), suppress(OSError):  # the host allows no more
                self._start(count)
            for process in self._processes:
                self._idle.put(process)
            for _ in range(count - len(self._processes)):
                self._idle.put(None)
        except BaseException:
            self.close()
            raise

    def _start(self, count: int) -> None:
        with ExitStack() as handed_over:
            theirs = []
            with suppress(OSError):  # the host allows no more: so many, then
                for _ in range(count):
                    # A message each: an order is a few bytes, its answer four for each page.
                    ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                    self._processes.append(_PackingProcess(ours))
                    theirs.append(handed_over.enter_context(other).fileno())
            job = {"connections": theirs, "memory": self._memory, **asdict(self._compression)}
            path = [str(Path(__file__).parents[2]), *sys.path]
            program = _PROGRAM.format(path=path, job=job)
            self._first = subprocess.Popen(
                (interpreter() or _NO_INTERPRETER, "-S", "-c", program),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(*theirs, self._memory),
                start_new_session=True,  # Ctrl-C is ours
            )

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
            if self._first is not None:
                self._end(self._first)
            for process in self._processes:
                process.close()
            self._processes.clear()
            self.buffers = ()  # whose memory has a descriptor of its own
            os.close(self._memory)

    def _end(self, first: subprocess.Popen[bytes]) -> None:
        # Those that have packed end by themselves, so that the time that they took is known.
        has_packed = any(process.has_packed for process in self._processes)
        for process in self._processes:
            process.dismiss()
        if not has_packed or not self._have_ended():
            with suppress(ProcessLookupError):
                os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        self._have_ended()

    def _have_ended(self) -> bool:
        return all(process.has_ended() for process in self._processes)


def start_packer(compression: Compression, count: int) -> Packer:
    """Return a pool of `count` packing processes, or what packs without them, for a `with` block.

    A process costs memory that the host may not give.
    """
    try:
        return PackingProcesses(compression, count)
    except OSError:
        return Packer(compression)
