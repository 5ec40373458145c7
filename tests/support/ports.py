"""A TCP port for a program of the test's own to listen at."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a port of the loopback that the kernel gives nobody else.

    Connections are refused until a program listens there, with SO_REUSEADDR, which it may do in
    the `with` block as often as it likes.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
