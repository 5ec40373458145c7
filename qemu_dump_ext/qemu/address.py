"""Addresses of QEMU's sockets, as users write them: the one parser of them all."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qemu_dump_ext.errors import ConnectError, RequestError

_TCP_PREFIX = re.compile(r"^tcp[46]?:")
_UNIX_PREFIX = "unix:"
_PORT_MAX = 0xFFFF
_SUN_PATH_MAX = 107
"""Bytes: sizeof(sockaddr_un.sun_path) without the final NUL."""


def tcp_address(address: str) -> tuple[str, int] | None:
    """Return host and port of an address of TCP, or None: it is the path of a unix socket.

    Args:
        address: HOST:PORT, where HOST may be an IPv6 address in brackets or empty, which is this
            machine; `tcp:` may stand before it, as gdb writes it.
    """
    if address.startswith(_UNIX_PREFIX):
        return None
    host, colon, port = _TCP_PREFIX.sub("", address).rpartition(":")
    if not colon or not (port.isascii() and port.isdecimal()) or "/" in address:
        return None
    if int(port) > _PORT_MAX:
        return None
    return host.removeprefix("[").removesuffix("]") or "localhost", int(port)


def unix_path(address: str) -> str:
    """Return the path of a unix socket; `unix:` may stand before it, as gdb writes it."""
    return address.removeprefix(_UNIX_PREFIX)


@contextmanager
def connectable(address: str) -> Iterator[str | tuple[str, int]]:
    """Return what to connect a socket to, valid in the `with` block: a path, or host and port.

    A path that is longer than the kernel's address of a unix socket goes by a descriptor,
    which children of this process find, too.

    Raises:
        OSError: Nothing is at a path that is so long.
    """
    target = tcp_address(address) or unix_path(address)
    if not isinstance(target, str) or _fits(target) or not _descriptors().is_dir():
        yield target
        return
    descriptor = os.open(target, os.O_PATH | os.O_CLOEXEC)
    try:
        yield str(_descriptors() / str(descriptor))
    finally:
        os.close(descriptor)


@contextmanager
def bindable(path: Path) -> Iterator[str]:
    """Return what to bind a unix socket to, valid in the `with` block, so that it is at `path`.

    Raises:
        OSError: The directory is not there.
        ConnectError: The name alone is longer than the kernel's address of a unix socket.
    """
    if _fits(str(path)) or not _descriptors().is_dir():
        yield str(path)
        return
    descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        short = str(_descriptors() / str(descriptor) / path.name)
        if not _fits(short):
            most = _SUN_PATH_MAX - len(short.removesuffix(path.name))
            raise ConnectError(
                f"cannot listen at {path}: the name of a socket has at most {most} bytes",
                hint="the directories before it may have as many as they like",
            )
        yield short
    finally:
        os.close(descriptor)


def _descriptors() -> Path:
    return Path(f"/proc/{os.getpid()}/fd")


def _fits(path: str) -> bool:
    return len(os.fsencode(path)) <= _SUN_PATH_MAX


def format_tcp_address(host: str, port: int) -> str:
    """Write HOST:PORT so that `tcp_address` reads it; an IPv6 address gets brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Tell whether every address of `host` is of this machine alone.

    Raises:
        RequestError: It has no address.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise RequestError(f"{host}: {error.strerror}") from error
    return all(ipaddress.ip_address(str(entry[4][0])).is_loopback for entry in found)
