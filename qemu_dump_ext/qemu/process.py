"""QEMU's process on this host: which one it is, and what it has mapped.

The process is the one at the other end of a socket that this process is connected to, so that no
name, command line or pid file has to be trusted. It follows that a QEMU which is on another host,
or in another PID or network namespace, is not found rather than mistaken.

Source: proc(5).
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from qemu_dump_ext.errors import RequestError, SourceError
from qemu_dump_ext.host_limits import refused_as
from qemu_dump_ext.qemu.address import is_loopback, tcp_address, unix_path
from qemu_dump_ext.qemu.socket_tables import file_number, unix_peer_inode, unix_socket_of
from qemu_dump_ext.value import Value

_MAPS_LINE = re.compile(
    r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<flags>\S+) (?P<offset>[0-9a-f]+)"
    r" \S+ (?P<inode>\d+) *(?P<path>.*)"
)
_UCRED = struct.Struct("=iII")
_ACCEPTS = 1 << 16  # flag __SO_ACCEPTCON
_TCP_ESTABLISHED = "01"
_UNIX_CONNECTED = "03"
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")


class MemoryMapping(Value):
    """One line of `/proc/PID/maps`.

    Attributes:
        start: First address.
        end: First address behind it.
        writable: The process may write there.
        shared: Written through to the file, or to whom else maps it.
        offset: Of `start` in the file, in bytes.
        inode: Of the file; 0 for anonymous memory.
        path: As the process sees the file, with " (deleted)" behind it where it has no name.
    """

    start: int
    end: int
    writable: bool
    shared: bool
    offset: int
    inode: int
    path: str

    @property
    def is_private_anonymous(self) -> bool:
        """Tell whether a page that is not in the page map is a page of zeros."""
        return not self.shared and (self.inode == 0 or self.path.startswith("/anon_hugepage"))


def find_qemu_process(addresses: Sequence[str]) -> int:
    """Return the pid of the process behind the connection to one of `addresses`.

    Raises:
        SourceError: It is not on this host, or cannot be looked at; says why.
    """
    if not addresses:
        raise SourceError("no socket of QEMU's to find its process by")
    reasons = []
    for address in addresses:
        try:
            return _process_behind(address)
        except SourceError as error:
            reasons.append(str(error))
    raise SourceError("; ".join(dict.fromkeys(reasons)))


def find_listeners(path: str) -> list[int]:
    """Return the pids of the processes of this host that listen at a unix socket.

    Nobody is connected to.
    """
    rows = [line.split(maxsplit=7) for line in _lines(Path("/proc/net/unix"))]
    listening = [row for row in rows if len(row) == 8 and int(row[3], 16) & _ACCEPTS]
    absolute = {int(row[6]) for row in listening if _is_same(row[7], path)}
    last = Path(path).name
    relative = {
        int(row[6]): row[7]
        for row in listening
        if not row[7].startswith(("/", "@")) and Path(row[7]).name == last
    }
    if not absolute and not relative:
        return []
    return [
        pid
        for pid in _all_pids()
        if (absolute and _holds(pid, absolute))
        or any(
            _is_same(f"/proc/{pid}/cwd/{name}", path) and _holds(pid, {inode})
            for inode, name in relative.items()
        )
    ]


def read_mappings(pid: int) -> list[MemoryMapping]:
    """Read `/proc/PID/maps`.

    Raises:
        SourceError: Not permitted, or the process is gone.
    """
    try:
        text = Path(f"/proc/{pid}/maps").read_text("utf-8", "surrogateescape")
    except OSError as error:
        raise refusal(pid, error) from error
    return [
        MemoryMapping(
            int(match["start"], 16),
            int(match["end"], 16),
            "w" in match["flags"],
            "s" in match["flags"],
            int(match["offset"], 16),
            int(match["inode"]),
            match["path"],
        )
        for line in text.splitlines()
        if (match := _MAPS_LINE.match(line))
    ]


def refusal(pid: int, error: OSError) -> SourceError:
    """Return an error that says why the kernel does not let us look into process `pid`."""
    if not isinstance(error, PermissionError):
        return SourceError(f"QEMU's process {pid}: {os.strerror(error.errno or 0)}")
    owner = None
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text("utf-8", "replace")
        owner = int(status.partition("\nUid:")[2].split()[0])
    if owner is not None and owner != os.geteuid():
        return SourceError(
            f"QEMU's process {pid} belongs to user {owner}, not to {os.geteuid()}",
            hint="be that user, or have CAP_SYS_PTRACE",
        )
    with contextlib.suppress(OSError):
        scope = int(_YAMA.read_text("ascii"))
        if scope:
            return SourceError(
                f"Yama's ptrace_scope is {scope}: it forbids to read process {pid}",
                hint=f"sysctl {_YAMA.parent.name}.{_YAMA.name}=0, or have CAP_SYS_PTRACE",
            )
    return SourceError(
        f"QEMU's process {pid} must not be read: it is not dumpable, or a security policy forbids"
        " it",
        hint="have CAP_SYS_PTRACE",
    )


def _process_behind(address: str) -> int:
    found_any = False
    # By its name first: whatever else a name may mean takes long, where there are hundreds.
    for leads in (_is_named, _leads_to):
        for connection in _own_connections():
            if not leads(connection, address):
                continue
            found_any = True
            if pid := process_at_other_end(connection, address):
                return pid
        if found_any:
            raise SourceError(
                f"no process here that we may look at has the other end of {address}: QEMU is on"
                " another host, in another namespace, or of another user"
            )
    raise SourceError(f"no connection of this process leads to {address}")


def process_at_other_end(connection: socket.socket, address: str) -> int | None:
    """Return the pid of the process at the other end of a connection of ours.

    Args:
        connection: To QEMU.
        address: For the message.

    Returns:
        None if no process that we may look at is there.

    Raises:
        SourceError: Several are, or the one that is must not be looked at.
    """
    inodes = _peer_inodes(connection)
    credentials = _peer_pid(connection)
    if credentials and _holds(credentials, inodes):
        return credentials
    pids = [pid for pid in _all_pids() if _holds(pid, inodes)]
    if len(pids) == 1:
        return pids[0]
    if len(pids) > 1:
        raise SourceError(f"several processes have QEMU's end of {address}: {pids}")
    if credentials:
        try:
            for link in Path(f"/proc/{credentials}/fd").iterdir():
                link.readlink()
        except OSError as error:
            raise refusal(credentials, error) from error
    return None


def has_client(address: str) -> bool:
    """Tell whether somebody is connected to a socket that a process of this host listens at.

    A socket of TCP is taken for one of this host if it has the port.
    """
    target = tcp_address(address)
    if target is None:
        path = str(Path(unix_path(address)).absolute())
        rows = [line.split(maxsplit=7) for line in _lines(Path("/proc/net/unix"))]
        return any(len(row) == 8 and row[7] == path and row[5] == _UNIX_CONNECTED for row in rows)
    port = f":{target[1]:04X}"
    is_here = False
    with contextlib.suppress(RequestError):
        is_here = is_loopback(target[0])
    return is_here and any(
        len(row) > 3 and row[1].endswith(port) and row[3] == _TCP_ESTABLISHED
        for table in ("tcp", "tcp6")
        for row in map(str.split, _lines(Path(f"/proc/net/{table}")))
    )


def own_descriptor(address: str) -> int | None:
    """Return the descriptor of a connection of this process to `address`, or None."""
    for descriptor, connection in _own_descriptors():
        if _leads_to(connection, address):
            return descriptor
    return None


def give_way_at(address: str) -> None:
    """End the connections of this process to `address`: QEMU serves one client at a time there.

    What was sent there already, QEMU still takes.
    """
    with contextlib.suppress(SourceError):
        for connection in _own_connections():
            if _leads_to(connection, address):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


def _own_connections() -> Iterator[socket.socket]:
    return (connection for _, connection in _own_descriptors())


def _own_descriptors() -> Iterator[tuple[int, socket.socket]]:
    # Those of a library (QMP) or of the debugger around us (the stub) are not ours to ask for.
    with refused_as(SourceError, "look at /proc/self/fd"):
        links = list(Path("/proc/self/fd").iterdir())
    for link in links:
        try:
            if not str(link.readlink()).startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(link.name)))
        except OSError:
            continue
        with connection:
            yield int(link.name), connection


def _is_named(connection: socket.socket, address: str) -> bool:
    with contextlib.suppress(OSError):
        if connection.family == socket.AF_UNIX:
            return os.fsdecode(connection.getpeername()) == unix_path(address)
    return False


def _leads_to(connection: socket.socket, address: str) -> bool:
    try:
        peer = connection.getpeername()
    except OSError:
        return False
    if connection.family == socket.AF_UNIX:
        path = unix_path(address)
        return _is_path(peer, path) or _is_bound_to(connection, os.fsdecode(peer), path)
    if connection.family in {socket.AF_INET, socket.AF_INET6}:
        return _is_host_and_port(peer, tcp_address(address))
    return False


def _is_path(peer: str | bytes, path: str) -> bool:
    name = os.fsdecode(peer)
    if not name or name == path:
        return bool(name)
    if _is_same(name, path):
        return True
    # It was made by a path from the directory in which QEMU was started.
    return not name.startswith(("/", "\0")) and Path(path).name == Path(name).name


def _is_bound_to(connection: socket.socket, name: str, path: str) -> bool:
    """Tell whether the other end was bound to a path, which has another name for who bound it."""
    with contextlib.suppress(OSError, ValueError, struct.error):
        peer = unix_peer_inode(os.fstat(connection.fileno()).st_ino)
        other = unix_socket_of(peer) if peer else None
        if other is not None and other.file == file_number(path):
            return True
    pid = _peer_pid(connection)
    view = "root" if name.startswith("/") else "cwd/"
    return pid > 0 and bool(name) and _is_same(f"/proc/{pid}/{view}{name}", path)


def _is_same(name: str, path: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return name == path or Path(name).samefile(path)
    return False


def _is_host_and_port(peer: tuple[str, int], target: tuple[str, int] | None) -> bool:
    if target is None or peer[1] != target[1]:
        return False
    with contextlib.suppress(OSError):
        known = socket.getaddrinfo(*target, type=socket.SOCK_STREAM)
        return peer[0] in {entry[4][0] for entry in known}
    return False


def _peer_pid(connection: socket.socket) -> int:
    # Of the process that called listen(): the one that has the socket now may be a child of it.
    if connection.family != socket.AF_UNIX:
        return 0
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    except OSError:
        return 0
    return int(_UCRED.unpack(raw)[0])


def _peer_inodes(connection: socket.socket) -> set[int]:
    inode = os.fstat(connection.fileno()).st_ino
    if connection.family != socket.AF_UNIX:
        return _tcp_peer_inodes(connection)
    peer = None
    with contextlib.suppress(OSError, struct.error):
        peer = unix_peer_inode(inode)
    if peer is not None:
        return {peer}
    # A kernel without unix_diag: every socket of that name, also the listening one.
    name = connection.getpeername()
    wanted = os.fsdecode(name).replace("\0", "@") if isinstance(name, bytes) else str(name)
    rows = [line.split(maxsplit=7) for line in _lines(Path("/proc/net/unix"))]
    return {int(row[6]) for row in rows if len(row) == 8 and row[7] == wanted}


def _tcp_peer_inodes(connection: socket.socket) -> set[int]:
    ours, theirs = _tcp_row_of(connection)
    found = set()
    for table in ("tcp", "tcp6"):
        for line in _lines(Path(f"/proc/net/{table}")):
            row = line.split()
            if (
                len(row) > 9
                and row[3] == _TCP_ESTABLISHED
                and (_short(row[1]), _short(row[2])) == (theirs, ours)
            ):
                found.add(int(row[9]))
    return found - {0}


def _tcp_row_of(connection: socket.socket) -> tuple[str, str]:
    inode = str(os.fstat(connection.fileno()).st_ino)
    for table in ("tcp", "tcp6"):
        for line in _lines(Path(f"/proc/net/{table}")):
            row = line.split()
            if len(row) > 9 and row[9] == inode:
                return _short(row[1]), _short(row[2])
    return "", ""


def _short(address: str) -> str:
    # An IPv4 address in the table of IPv6 as it is in the table of IPv4.
    return address.removeprefix("0000000000000000FFFF0000")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "surrogateescape").splitlines()[1:]
    except OSError:
        return []


def _all_pids() -> list[int]:
    own = os.getpid()
    with refused_as(SourceError, "look at /proc"):
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [pid for pid in pids if pid != own]


def _holds(pid: int, inodes: set[int]) -> bool:
    wanted = {f"socket:[{inode}]" for inode in inodes}
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if str(link.readlink()) in wanted:
                    return True
    return False
