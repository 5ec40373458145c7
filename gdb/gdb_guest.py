"""The guest as gdb sees it: monitor, packets, memory and registers through QEMU's gdbstub."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from gdb_boundary import selection_kept

import gdb
from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.connections.target import GuestTarget, open_guest
from qemu_dump_ext.errors import ConnectError, GuestMemoryFaultError, SourceError
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.qemu.command_line import GDBSTUB
from qemu_dump_ext.qemu.monitor_text import RUNNING
from qemu_dump_ext.qemu.process import own_descriptor
from qemu_dump_ext.qemu.qemu_processes import find_qemu_processes
from qemu_dump_ext.qemu.run_state import read_run_state
from qemu_dump_ext.qemu.socket_relay import always_read

ResultT = TypeVar("ResultT")

_PACKET_SIZE = re.compile(r"PacketSize=([0-9a-f]{1,6})(?:;|$)")
_SMALLEST_PACKET = 256
_PACKET_MARGIN = 64
_GONE = "the guest is gone: QEMU closed the connection to gdb"


def _whole(exchange: Callable[[], ResultT]) -> ResultT:
    """Raise an interrupt only behind a complete question and answer.

    One interrupt may end two calls of gdb: it is noted both in gdb and in its Python. The second
    may be a call that cleans up, so it is repeated; every exchange of ours may be.
    """
    try:
        return exchange()
    except KeyboardInterrupt:
        exchange()
        raise


class GdbMonitor:
    """QEMU's monitor by gdb's `monitor` command."""

    def __init__(self, addresses: Sequence[str]) -> None:
        # Whose answers may be longer than the sockets hold between QEMU and gdb.
        self._descriptor = next(filter(None, map(own_descriptor, addresses)), None)

    def execute(self, command: str) -> str:
        """Return the answer with plain line ends."""
        try:
            with always_read(self._descriptor):
                answer = _whole(
                    lambda: gdb.execute(f"monitor {command}", from_tty=False, to_string=True)
                )
        except gdb.error as error:
            raise _lost_or(error, f"monitor {command}") from error
        return answer.replace("\r\n", "\n")


class GdbStub:
    """QEMU's gdbstub by gdb's own connection."""

    def __init__(self) -> None:
        self._packet_bytes: int | None = None

    def addresses(self) -> Sequence[str]:
        """Return what the user told gdb to connect to."""
        connection = gdb.selected_inferior().connection
        return () if connection is None or not connection.details else (connection.details,)

    def packet(self, text: str) -> str:
        """Send one packet and return the reply."""
        connection = gdb.selected_inferior().connection
        if not isinstance(connection, gdb.RemoteTargetConnection):
            raise SourceError(_GONE)
        try:
            reply = _whole(lambda: connection.send_packet(text))
        except gdb.error as error:
            raise _lost_or(error, f"packet {text}") from error
        return (reply or b"").decode("ascii", "replace")

    def read(self, address: int, buffer: memoryview) -> None:
        """Fill `buffer` from `address` on.

        By packets of ours: as fast as gdb's own reading, and gdb 16 ends with an internal error
        behind one that finds the connection lost.
        """
        size = self._bytes_in_packet()
        for start in range(0, len(buffer), size):
            piece = buffer[start : start + size]
            reply = self.packet(f"m{address + start:x},{len(piece):x}")
            if len(reply) != 2 * len(piece):
                raise GuestMemoryFaultError(address + start, len(piece), reply or "no answer")
            piece[:] = bytes.fromhex(reply)

    def _bytes_in_packet(self) -> int:
        if self._packet_bytes is None:
            told = _PACKET_SIZE.search(self.packet("qSupported"))
            letters = int(told[1], 16) if told else _SMALLEST_PACKET
            # Somewhat less: QEMU is slow where a packet is full to the last letter.
            self._packet_bytes = max(letters, _SMALLEST_PACKET) // 2 - _PACKET_MARGIN
        return self._packet_bytes

    def flush(self) -> None:
        """Drop gdb's cache of memory."""
        with contextlib.suppress(gdb.error):
            gdb.execute("maintenance flush dcache", to_string=True)

    def vcpus(self) -> Iterator[int]:
        """Select each vCPU in turn; one vCPU is one thread, its number cpu_index + 1."""
        try:
            with selection_kept():
                for thread in gdb.selected_inferior().threads():
                    thread.switch()
                    _make_stub_select(thread)
                    yield thread.ptid[1] - 1
        except gdb.error as error:
            raise _lost_or(error, "selecting a vCPU") from error


def _make_stub_select(thread: gdb.InferiorThread) -> None:
    # gdb tells the stub which thread is meant when it reads registers and remembers what it told.
    # So gdb is made to read: what we told the stub ourselves, gdb would not know of. Nor is what
    # gdb remembers of the guest of use, which may have run, or been reset, without gdb.
    gdb.execute("maintenance flush register-cache", to_string=True)
    # Where gdb does not understand the stub's registers, it has asked for them all the same.
    with contextlib.suppress(gdb.error):
        gdb.newest_frame()
    if not _connected():
        raise SourceError(_GONE)
    if not thread.is_valid():
        raise SourceError("gdb lost a vCPU")


def _connected() -> bool:
    return isinstance(gdb.selected_inferior().connection, gdb.RemoteTargetConnection)


def _lost_or(error: gdb.error, what: str) -> SourceError:
    return SourceError(f"{what}: {error}" if _connected() else _GONE)


def _require_stopped_guest() -> None:
    if not _connected() or not gdb.selected_inferior().pid:  # without a process: extended-remote
        raise ConnectError("gdb is not connected to a guest", hint=_how_to_connect())
    # Not threads(): it sends a packet, and a packet stops a guest that gdb did not let run.
    if gdb.selected_thread().is_running():
        raise SourceError("the guest is running in gdb", hint="'interrupt' it first")


def _how_to_connect() -> str:
    ways = "'target remote :1234' for a QEMU started with -s or -gdb tcp::1234"
    unknown = ", ".join(_unknown_targets())
    return f"{ways}; gdb-multiarch for {unknown}, unknown to this gdb" if unknown else ways


def _unknown_targets() -> Sequence[str]:
    """Return the targets on this host that have a gdbstub to which this gdb cannot connect."""
    try:
        processes = find_qemu_processes()
    except SourceError:
        return ()
    architectures = all_architectures()
    known = set(gdb.architecture_names())
    return sorted(
        {
            process.target
            for process in processes
            if process.target in architectures
            and architectures[process.target].name_in_gdb not in known
            and any(channel.use == GDBSTUB for channel in process.command_line.channels)
        }
    )


def _require_qemu(stub: GdbStub) -> None:
    if not stub.packet("qqemu.PhyMemMode"):
        raise SourceError(
            "the remote target is no gdbstub of QEMU", hint="'target remote' one of QEMU >= 4.1"
        )


@contextmanager
def guest_access(target: GuestTarget) -> Iterator[GuestAccess]:
    """Open the ways to the guest that gdb is attached to.

    Args:
        target: What is asked what the monitor tells; nothing: the stub is, as well.

    Raises:
        SourceError: There is no guest, or it is not stopped.
    """
    stub = GdbStub()
    _require_stopped_guest()
    if not target.is_told:
        _require_qemu(stub)
        yield GuestAccess.by_monitor(GdbMonitor(stub.addresses()), stub=stub)
    else:
        with open_guest(target, stub) as access:
            # The first packet would stop it, and what gdb knows of it is old.
            if read_run_state(access) == RUNNING:
                raise SourceError(
                    "the guest runs, though gdb did not let it: somebody resumed it",
                    hint="stop it by its monitor, then 'maintenance flush register-cache' in gdb",
                )
            _require_qemu(stub)
            yield access
