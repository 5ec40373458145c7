"""One client's socket: bounded both ways, so that a slow or a loud client costs only itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
from collections import deque

_READ_SIZE = 1 << 16
_INPUT_MAX = 1 << 18
_OUTPUT_LOW = 1 << 16
OUTPUT_MAX = 32 << 20
"""Bytes that may wait for a client; who lets more of them wait is disconnected."""
_DESCRIPTORS_MAX = 16


class Connection:
    """A connected socket without blocking.

    Attributes:
        descriptors: What came by SCM_RIGHTS, the oldest first.
        ended: No more input will come.
        gone: The peer is gone, and not only silent: nothing can be sent to it.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._loop = asyncio.get_running_loop()
        self._input = bytearray()
        self._output = bytearray()
        self._changed = asyncio.Event()
        self._drained = asyncio.Event()
        self._reading = self._writing = False
        self.descriptors: deque[int] = deque()
        self.ended = False
        self.gone = asyncio.Event()
        self._watch_input()

    async def read(self) -> bytes:
        """Return what has come, or b"" when nothing more will come."""
        while not self._input and not self.ended:
            self._changed.clear()
            await self._changed.wait()
        data = bytes(self._input)
        self._input.clear()
        if not self.ended:
            self._watch_input()
        return data

    def write(self, data: bytes) -> None:
        """Send `data` as soon as the client takes it."""
        if self.gone.is_set():
            return
        self._output += data
        if not self._writing:
            self._flush()
        if len(self._output) > OUTPUT_MAX:
            self.abort()

    @property
    def waiting(self) -> int:
        """Bytes that the client has not taken yet."""
        return len(self._output)

    async def drain(self) -> None:
        """Wait until the client has taken most of what was written, or is gone."""
        while len(self._output) > _OUTPUT_LOW and not self.gone.is_set():
            self._drained.clear()
            await self._drained.wait()

    async def finish(self, seconds: float) -> None:
        """Give the client some time to take the rest, then close."""
        deadline = self._loop.time() + seconds
        while self._output and not self.gone.is_set() and self._loop.time() < deadline:
            self._drained.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), seconds)
        self.abort()

    def abort(self) -> None:
        """Close at once; harmless when repeated."""
        if self._socket.fileno() < 0:
            return
        self._stop_reading()
        if self._writing:
            self._loop.remove_writer(self._socket)
        self._socket.close()
        self._output.clear()
        self.ended = True
        self.gone.set()
        self._changed.set()
        self._drained.set()
        while self.descriptors:
            os.close(self.descriptors.popleft())

    def _watch_input(self) -> None:
        if not self._reading and self._socket.fileno() >= 0:
            self._loop.add_reader(self._socket, self._readable)
            self._reading = True

    def _stop_reading(self) -> None:
        if self._reading:
            self._loop.remove_reader(self._socket)
            self._reading = False

    def _readable(self) -> None:
        try:
            data = self._receive()
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.abort()
            return
        self._input += data
        if not data:
            self.ended = True
            self._stop_reading()
            if self._hung_up():
                self.abort()
        elif len(self._input) >= _INPUT_MAX:
            self._stop_reading()
        self._changed.set()

    def _receive(self) -> bytes:
        if self._socket.family != socket.AF_UNIX:
            return self._socket.recv(_READ_SIZE)
        data, descriptors, _, _ = socket.recv_fds(self._socket, _READ_SIZE, _DESCRIPTORS_MAX)
        self.descriptors.extend(descriptors)
        while len(self.descriptors) > _DESCRIPTORS_MAX:
            os.close(self.descriptors.popleft())
        return data

    def _hung_up(self) -> bool:
        # Who only has no more to say still listens, as `echo info status | socat - UNIX:...` does.
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        return any(events & (select.POLLHUP | select.POLLERR) for _, events in poller.poll(0))

    def _flush(self) -> None:
        try:
            while self._output:
                sent = self._socket.send(memoryview(self._output)[:_READ_SIZE].tobytes())
                del self._output[:sent]
        except (BlockingIOError, InterruptedError):
            if not self._writing:
                self._loop.add_writer(self._socket, self._flush)
                self._writing = True
            if len(self._output) <= _OUTPUT_LOW:
                self._drained.set()
            return
        except OSError:
            self.abort()
            return
        if self._writing:
            self._loop.remove_writer(self._socket)
            self._writing = False
        self._drained.set()
