"""Read a connection of somebody else's in this process while that one does not.

gdb acknowledges each packet of QEMU's, and QEMU reads no acknowledgment before the monitor's answer
is complete. With some 600 packets under way on a unix socket, one for each line, each waits for the
other forever. Here, both can send as much as they like.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import socket
import struct
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.host_limits import start_needed_thread
from qemu_dump_ext.interrupts import leave_signals_to_main_thread, uninterrupted

_READ_SIZE = 1 << 16
_WAITING_MAX = 256 << 20
_END_SECONDS = 5.0


class _Direction:
    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        self.waiting = bytearray()
        self.ended = False

    def read(self) -> None:
        try:
            data = self.source.recv(_READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.waiting += data
        if not data or len(self.waiting) > _WAITING_MAX:
            self.ended = True

    def write(self) -> None:
        try:
            while self.waiting:
                del self.waiting[: self.sink.send(memoryview(self.waiting)[:_READ_SIZE].tobytes())]
        except BlockingIOError:
            return
        except OSError:
            self.waiting.clear()
            self.ended = True


class _Relay:
    """Stands between the owner of a descriptor and its peer, in a thread of its own."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._peer = socket.socket(fileno=os.dup(descriptor))
        self._was_blocking = os.get_blocking(descriptor)
        self._inner, self._outer = socket.socketpair()
        self._wake, self._woken = socket.socketpair()
        self._inner.setblocking(False)
        # Of the same open file as the owner's descriptor, which is another one from now on.
        self._peer.setblocking(False)
        os.set_blocking(self._outer.fileno(), self._was_blocking)
        os.dup2(self._outer.fileno(), descriptor, inheritable=False)
        self._decided = threading.Event()
        self._may_end = False
        self._thread = threading.Thread(target=self._serve, name="relay", daemon=True)
        try:
            start_needed_thread(self._thread, SourceError)
        except SourceError:
            os.dup2(self._peer.fileno(), descriptor, inheritable=False)
            os.set_blocking(descriptor, self._was_blocking)
            self._close()
            raise

    def end(self) -> None:
        """Give the owner its connection back, once everything has been passed on."""
        with contextlib.suppress(OSError):  # it has ended
            self._wake.send(b"x")
        self._decided.wait(_END_SECONDS)
        if not self._may_end:
            return  # the owner has not read it all: it keeps the relay, and loses nothing
        self._thread.join()
        os.dup2(self._peer.fileno(), self._descriptor, inheritable=False)
        os.set_blocking(self._descriptor, self._was_blocking)
        self._close()

    def _close(self) -> None:
        for one in (self._peer, self._inner, self._outer, self._wake, self._woken):
            one.close()

    def _serve(self) -> None:
        leave_signals_to_main_thread()
        to_peer = _Direction(self._inner, self._peer)
        to_owner = _Direction(self._peer, self._inner)
        ending = False
        with selectors.DefaultSelector() as selector:
            while not (to_peer.ended or to_owner.ended):
                for direction, other in ((to_peer, to_owner), (to_owner, to_peer)):
                    _watch(selector, direction.source, writes=bool(other.waiting))
                _watch(selector, self._woken, writes=False)
                ready = selector.select(0 if ending else None)
                if any(key.fileobj is self._woken for key, _ in ready):
                    self._woken.recv(1)
                    ending = True
                for direction in (to_peer, to_owner):
                    direction.read()
                    direction.write()
                passed_on = not (to_peer.waiting or to_owner.waiting or _unread(self._inner))
                if ending and passed_on:
                    ending = False
                    if self._decide():
                        return
        # The peer, or the owner, has ended it: the owner reads what is left, and then the end.
        self._close()
        self._decided.set()

    def _decide(self) -> bool:
        self._may_end = not _unread(self._outer)
        self._decided.set()
        return self._may_end


def _watch(selector: selectors.BaseSelector, one: socket.socket, *, writes: bool) -> None:
    events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writes else 0)
    if one.fileno() in selector.get_map():
        selector.modify(one, events)
    else:
        selector.register(one, events)


def _unread(one: socket.socket) -> int:
    count: int = struct.unpack("i", fcntl.ioctl(one.fileno(), termios.FIONREAD, bytes(4)))[0]
    return count


@contextmanager
def always_read(descriptor: int | None) -> Iterator[None]:
    """Read whatever comes on a connected socket, for its owner, inside a `with` block.

    Args:
        descriptor: The owner's; None: there is none, and nothing is done.
    """
    if descriptor is None:
        yield
        return
    # An interrupt in between would leave the owner without its connection.
    relay: _Relay | None = None
    try:
        with uninterrupted():
            relay = _Relay(descriptor)
        yield
    finally:
        if relay is not None:
            with uninterrupted():
                relay.end()
