"""Addresses of QEMU's sockets, as users write them: the one parser of them all."""

from __future__ import annotations

import ipaddress
import re
import socket

from qemu_dump_ext.errors import RequestError

_TCP_PREFIX = re.compile(r"^tcp[46]?:")
_UNIX_PREFIX = "unix:"
_PORT_MAX = 0xFFFF


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


def socket_address(address: str) -> str | tuple[str, int]:
    """Return what a socket is connected to: a path, or host and port."""
    return tcp_address(address) or unix_path(address)


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
