"""Sockets that clients connect to: a unix socket of mode 0600, or TCP on the loopback."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from qemu_dump_ext.errors import ConnectError, RequestError
from qemu_dump_ext.qemu.address import (
    bindable,
    connectable,
    format_tcp_address,
    is_loopback,
    tcp_address,
    unix_path,
)

from .connection import Connection

_BACKLOG = 64
CLIENTS_MAX = 256
_MODE_MASK = 0o177


class Listener:
    """One socket, and everybody who is connected to it.

    Attributes:
        address: The address as the user gave it; with the port that was chosen where it was 0.
    """

    def __init__(
        self, address: str, serve: Callable[[Connection], Awaitable[None]], *, allow_remote: bool
    ) -> None:
        """Listen.

        Raises:
            RequestError: The address is not of this machine, or is in use.
            ConnectError: It cannot be listened at.
        """
        self.address = address
        self._serve = serve
        self._tasks: set[asyncio.Task[None]] = set()
        self._path: Path | None = None
        target = tcp_address(address)
        try:
            if target is None:
                self._socket = self._listen_unix(Path(unix_path(address)))
            else:
                self._socket = _listen_tcp(address, target, allow_remote=allow_remote)
        except OSError as error:
            reason = error.strerror or error  # a path that is too long has no number
            raise ConnectError(f"cannot listen at {address}: {reason}") from error
        if target is not None:
            self.address = format_tcp_address(target[0], self._socket.getsockname()[1])
        self._socket.setblocking(False)
        asyncio.get_running_loop().add_reader(self._socket, self._accept)

    def _listen_unix(self, path: Path) -> socket.socket:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX) as probe, connectable(f"unix:{path}") as where:
                try:
                    probe.connect(where)
                except ConnectionRefusedError:
                    path.unlink()  # left behind by a process that is gone
                else:
                    raise RequestError(f"{path}: somebody listens there already")
        elif path.exists():
            raise RequestError(f"{path} exists and is no socket")
        listening = socket.socket(socket.AF_UNIX)
        with bindable(path) as where:
            before = os.umask(_MODE_MASK)  # never open to others, not for a moment
            try:
                listening.bind(where)
            finally:
                os.umask(before)
        self._path = path
        self._inode = path.stat().st_ino
        listening.listen(_BACKLOG)
        return listening

    def _accept(self) -> None:
        try:
            connected, _ = self._socket.accept()
        except OSError:
            return
        if len(self._tasks) >= CLIENTS_MAX:
            connected.close()
            return
        if connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = asyncio.ensure_future(self._guarded(Connection(connected)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, connection: Connection) -> None:
        try:
            await self._serve(connection)
        finally:
            connection.abort()

    async def close(self) -> None:
        """End every client and remove the socket."""
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                if self._path.stat().st_ino == self._inode:
                    self._path.unlink()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


def _listen_tcp(address: str, target: tuple[str, int], *, allow_remote: bool) -> socket.socket:
    host, port = target
    if not is_loopback(host) and not allow_remote:
        raise RequestError(
            f"{address} can be reached from other machines, and a monitor is full control of the"
            " guest",
            hint="--allow-remote does it all the same",
        )
    family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
        listening.listen(_BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening
