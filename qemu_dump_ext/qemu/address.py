"""Addresses of QEMU's sockets, as users write them."""

from __future__ import annotations

import ipaddress
import socket

from qemu_dump_ext.errors import RequestError


def split_host(address: str) -> tuple[str, int] | None:
    """Return host and port of HOST:PORT, or None for a path."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or "/" in address:
        return None
    return host.removeprefix("[").removesuffix("]") or "localhost", int(port)


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


def tcp_address(address: str) -> tuple[str, int] | None:
    """Return host and port of HOST:PORT, or None: it is the path of a unix socket."""
    host, colon, port = address.rpartition(":")
    is_tcp = bool(colon) and port.isascii() and port.isdecimal() and "/" not in address
    return (host, int(port)) if is_tcp else None
