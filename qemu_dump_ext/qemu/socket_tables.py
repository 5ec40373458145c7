"""The sockets of this host as the kernel lists them; nobody is connected to.

Source: sock_diag(7), struct unix_diag_req and unix_diag_msg in linux/unix_diag.h; proc(5).
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from qemu_dump_ext.value import Value

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_DUMP = 1, 0x300
_UDIAG_SHOW_NAME, _UDIAG_SHOW_VFS, _UDIAG_SHOW_PEER = 1, 2, 4
_UNIX_DIAG_NAME, _UNIX_DIAG_VFS, _UNIX_DIAG_PEER = 0, 1, 2
_ANY_STATE = _ANY_COOKIE = 0xFFFFFFFF
_NLMSGHDR = struct.Struct("=IHHII")
_UNIX_DIAG_REQ = struct.Struct("=BBHIIIII")
_UNIX_DIAG_MSG = struct.Struct("=BBBxIII")
_RTATTR = struct.Struct("=HH")
_DATAGRAM_MAX = 1 << 20
_TIMEOUT_SECONDS = 1.0
_ESTABLISHED, _LISTEN = 1, 10  # of TCP, which unix_diag uses as well
_ACCEPTS = 1 << 16  # flag __SO_ACCEPTCON of /proc/net/unix
_UNIX_CONNECTED = "03"
_FILE_MASK = 0xFFFFFFFF


class UnixSocket(Value):
    """One unix socket.

    Attributes:
        inode: Its number, which `/proc/PID/fd` shows.
        name: To which it, or what accepted it, was bound; begins with `@` where it is abstract.
        listens: It waits for clients.
        connected: It has another end.
        peer: Inode of the other end; 0 where there is none, or the kernel does not tell.
        file: Inode of the socket's file; 0 where there is none, or the kernel does not tell.
    """

    inode: int
    name: str
    listens: bool
    connected: bool
    peer: int = 0
    file: int = 0


class TcpSocket(Value):
    """One TCP socket.

    Attributes:
        inode: Its number, which `/proc/PID/fd` shows.
        local: Address and port of this end.
        remote: Address and port of the other end.
        listens: It waits for clients.
        connected: It has another end.
    """

    inode: int
    local: tuple[str, int]
    remote: tuple[str, int]
    listens: bool
    connected: bool


def unix_sockets(pid: int | None = None) -> dict[int, UnixSocket]:
    """Return the unix sockets of a network namespace, by inode.

    Args:
        pid: Of a process in it; None: this one's, of which more is known.
    """
    if pid is None:
        with contextlib.suppress(OSError, struct.error):
            return {entry.inode: entry for entry in _diagnosed(0, _NLM_F_DUMP)}
    return {entry.inode: entry for entry in _listed_unix(_net_table("unix", pid))}


def unix_peer_inode(inode: int) -> int | None:
    """Return the inode of the other end of a unix socket, or None where it has none.

    Raises:
        OSError: The kernel has no sock_diag for unix sockets, or forbids it.
    """
    found = unix_socket_of(inode)
    return (found.peer or None) if found else None


def unix_socket_of(inode: int) -> UnixSocket | None:
    """Return a unix socket of this network namespace; as `unix_peer_inode`."""
    return next(_diagnosed(inode, 0), None)


def file_number(path: str) -> int:
    """Return the inode of a file as `UnixSocket.file` has it.

    Raises:
        OSError: There is no such file.
    """
    return os.stat(path).st_ino & _FILE_MASK  # noqa: PTH116 - hundreds a second


def tcp_sockets(pid: int | None = None) -> dict[int, TcpSocket]:
    """Return the TCP sockets of a network namespace, by inode; those of nobody are left out.

    Args:
        pid: Of a process in it; None: this one's.
    """
    rows = (*_net_table("tcp", pid), *_net_table("tcp6", pid))
    found = filter(None, map(_tcp_socket, rows))
    return {entry.inode: entry for entry in found if entry.inode}


def _diagnosed(inode: int, flags: int) -> Iterator[UnixSocket]:
    shown = _UDIAG_SHOW_NAME | _UDIAG_SHOW_VFS | _UDIAG_SHOW_PEER
    request = _UNIX_DIAG_REQ.pack(
        socket.AF_UNIX, 0, 0, _ANY_STATE, inode, shown, _ANY_COOKIE, _ANY_COOKIE
    )
    header = _NLMSGHDR.pack(
        _NLMSGHDR.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | flags, 1, 0
    )
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(_TIMEOUT_SECONDS)
        netlink.send(header + request)
        while True:
            answer = netlink.recv(_DATAGRAM_MAX)
            position = 0
            while position + _NLMSGHDR.size <= len(answer):
                length, kind, _, _, _ = _NLMSGHDR.unpack_from(answer, position)
                if kind == _NLMSG_ERROR or length < _NLMSGHDR.size:
                    raise OSError(f"sock_diag refuses to tell of inode {inode}")
                if kind == _NLMSG_DONE:
                    return
                yield _unix_socket(answer[position + _NLMSGHDR.size : position + length])
                position += length + -length % 4
            if not flags:
                return


def _unix_socket(message: bytes) -> UnixSocket:
    _, _, state, inode, _, _ = _UNIX_DIAG_MSG.unpack_from(message)
    values: dict[int, bytes] = {}
    position = _UNIX_DIAG_MSG.size
    while position + _RTATTR.size <= len(message):
        size, attribute = _RTATTR.unpack_from(message, position)
        values[attribute] = message[position + _RTATTR.size : position + size]
        position += max(_RTATTR.size, size + -size % 4)
    name = os.fsdecode(values.get(_UNIX_DIAG_NAME, b""))
    if name.startswith("\0"):
        name = f"@{name[1:]}"
    return UnixSocket(
        inode,
        name.rstrip("\0"),
        state == _LISTEN,
        state == _ESTABLISHED,
        int.from_bytes(values.get(_UNIX_DIAG_PEER, b"")[:4], "little"),
        int.from_bytes(values.get(_UNIX_DIAG_VFS, b"")[:4], "little"),
    )


def _net_table(name: str, pid: int | None) -> list[str]:
    try:
        text = Path(f"/proc/{pid or 'self'}/net/{name}").read_text("utf-8", "surrogateescape")
    except OSError:
        return []
    return text.splitlines()[1:]


def _listed_unix(lines: list[str]) -> Iterator[UnixSocket]:
    for line in lines:
        row = line.split(maxsplit=7)
        if len(row) < 7:
            continue
        listens = bool(int(row[3], 16) & _ACCEPTS)
        name = row[7] if len(row) == 8 else ""
        yield UnixSocket(int(row[6]), name, listens, row[5] == _UNIX_CONNECTED)


def _tcp_socket(line: str) -> TcpSocket | None:
    row = line.split()
    if len(row) < 10:
        return None
    state = int(row[3], 16)
    local, remote = _tcp_end(row[1]), _tcp_end(row[2])
    return TcpSocket(int(row[9]), local, remote, state == _LISTEN, state == _ESTABLISHED)


def _tcp_end(text: str) -> tuple[str, int]:
    # Words of 32 bits in the byte order of the host.
    digits, _, port = text.rpartition(":")
    raw = bytes.fromhex(digits)
    words = (raw[start : start + 4] for start in range(0, len(raw), 4))
    swapped = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    address = ipaddress.ip_address(swapped)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address), int(port, 16)
