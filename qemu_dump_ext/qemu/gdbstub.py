"""A client of QEMU's gdbstub, for what no monitor tells of vCPUs; and a stub for it where none is.

Who connects to a stub stops the guest, and who detaches lets it run: this is for a guest that
stands still already, and closes the connection without a word, which leaves the guest as it is.

Source: GDB manual, appendix Remote Protocol; QEMU gdbstub/gdbstub.c.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qemu_dump_ext.errors import GuestMemoryFaultError, SourceError
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.host_limits import refused_as
from qemu_dump_ext.interrupts import uninterrupted
from qemu_dump_ext.qemu.address import connectable
from qemu_dump_ext.qemu.guardian import Guardian
from qemu_dump_ext.qemu.shared_directory import shared_directory
from qemu_dump_ext.untrusted import parse_bytes, parse_unsigned

_SECONDS = 10.0
_PACKET_MAX = 1 << 17
_SKIPPED_MAX = 1 << 16
_MEMORY_PIECE = 1024
_THREADS_MAX = 1 << 16
_PEER = struct.Struct("=iII")
_REPEATED = re.compile(rb"(.)\*(.)", re.DOTALL)
_IS_THERE = re.compile(r"^gdb: filename=", re.MULTILINE)
_CHARDEVS = "info chardev"
_CLOSE = "gdbserver none"


class StubClient:
    """Connected; every answer is bounded, and comes in 10 s or not at all."""

    def __init__(self, connection: socket.socket, address: str) -> None:
        connection.settimeout(_SECONDS)
        self._connection = connection
        self._bytes = connection.makefile("rb")
        self._address = address

    def addresses(self) -> Sequence[str]:
        """Return where QEMU listens."""
        return (self._address,)

    def packet(self, text: str) -> str:
        """Send one packet and return the reply; "" where unsupported.

        Raises:
            SourceError: QEMU does not answer, or makes no sense.
        """
        data = text.encode()
        try:
            self._connection.sendall(b"$%s#%02x" % (data, sum(data) & 0xFF))
            reply = self._reply()
            self._connection.sendall(b"+")
        except OSError as error:
            raise SourceError(f"QEMU's gdbstub does not answer packet {text[:40]}") from error
        expanded = _REPEATED.sub(lambda match: match[1] * max(match[2][0] - 28, 0), reply)
        return expanded.decode("latin-1")

    def read(self, address: int, buffer: memoryview) -> None:
        """Fill `buffer` from `address` on."""
        for start in range(0, len(buffer), _MEMORY_PIECE):
            piece = buffer[start : start + _MEMORY_PIECE]
            reply = self.packet(f"m{address + start:x},{len(piece):x}")
            data = parse_bytes(reply, most=len(piece))
            if data is None or len(data) != len(piece):
                raise GuestMemoryFaultError(address + start, len(piece), reply or "no answer")
            piece[:] = data

    def flush(self) -> None:
        """Nothing is cached."""

    def vcpus(self) -> Iterator[int]:
        """Select each vCPU in turn; a thread of the stub is a vCPU, its number cpu_index + 1."""
        threads: list[str] = []
        answer = self.packet("qfThreadInfo")
        while answer.startswith("m") and len(threads) < _THREADS_MAX:
            threads += answer[1:].split(",")
            answer = self.packet("qsThreadInfo")
        for thread in threads:
            number = parse_unsigned(f"0x{thread}", 16, bits=17)
            if number and self.packet(f"Hg{number:x}") == "OK":
                yield number - 1

    def close(self) -> None:
        """Disconnect; the guest stays as it is."""
        self._bytes.close()
        self._connection.close()

    def _reply(self) -> bytes:
        skipped = 0
        while (byte := self._bytes.read(1)) != b"$":
            skipped += 1
            if not byte or skipped > _SKIPPED_MAX:
                raise SourceError("QEMU closed the gdbstub, or it is none")
        reply = bytearray()
        while (byte := self._bytes.read(1)) != b"#":
            if not byte or len(reply) > _PACKET_MAX:
                raise SourceError("an answer of QEMU's gdbstub never ends")
            reply += byte
        self._bytes.read(2)
        return bytes(reply)


@contextmanager
def stub_on_demand(access: GuestAccess, pid: int) -> Iterator[StubClient]:
    """Have QEMU open a gdbstub for the time of a `with` block, where it has none.

    It is closed again on every path, also when this process is killed.

    Args:
        access: The ways to the guest, which stands still.
        pid: Of QEMU's process, on this host.

    Raises:
        SourceError: It has one already, or opens none where this process can connect to it.
    """
    monitor = access.monitor
    if _IS_THERE.search(monitor.execute(_CHARDEVS)):
        raise SourceError(
            "it has a gdbstub, which is somebody else's", hint="--gdb ADDRESS uses it"
        )
    if access.rescue is None:
        raise SourceError("nobody could close it if this process were killed")
    with shared_directory() as directory:
        path = directory / "gdb"
        guardian = Guardian(*access.rescue, taken_back=f"gdbstub:{path}")
        try:
            said = monitor.execute(f"gdbserver unix:{path},server=on,wait=off").strip()
            with _connected(path, pid, said) as stub:
                yield stub
        finally:
            with uninterrupted():
                if _is_ours(monitor.execute(_CHARDEVS), path):
                    monitor.execute(_CLOSE)
                guardian.dismiss()


def _is_ours(devices: str, path: Path) -> bool:
    """Tell whether the stub that QEMU has is the one at a path."""
    here = rf"^gdb: filename=\S*unix:{re.escape(str(path))}[,\s]"
    return re.search(here, devices, re.MULTILINE) is not None


@contextmanager
def _connected(path: Path, pid: int, said: str) -> Iterator[StubClient]:
    if not path.is_socket():
        raise SourceError(f"QEMU opens no gdbstub at {path}: {said[:200]}")
    connection = socket.socket(socket.AF_UNIX)
    with contextlib.closing(connection):
        connection.settimeout(_SECONDS)
        with refused_as(SourceError, "connect to the gdbstub"), connectable(str(path)) as near:
            connection.connect(near)
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        if _PEER.unpack(peer)[0] != pid:
            raise SourceError(f"another process than {pid} listens at {path}")
        stub = StubClient(connection, os.fspath(path))
        try:
            yield stub
        finally:
            stub.close()
