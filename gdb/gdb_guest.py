"""The guest as gdb sees it: monitor, packets, memory and registers through QEMU's gdbstub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from gdb_boundary import selection_kept

import gdb
from qemu_dump_ext.errors import ConnectError, GuestMemoryFaultError, SourceError
from qemu_dump_ext.guest_probe import GuestAccess
from qemu_dump_ext.native_notes import dump_byte_through_file
from qemu_dump_ext.sync_qmp import connect_qmp

_GONE = "the guest is gone: QEMU closed the connection to gdb"


class GdbMonitor:
    """QEMU's monitor by gdb's `monitor` command."""

    def execute(self, command: str) -> str:
        """Return the answer with plain line ends."""
        try:
            answer = gdb.execute(f"monitor {command}", from_tty=False, to_string=True)
        except gdb.error as error:
            raise _lost_or(error, f"monitor {command}") from error
        return answer.replace("\r\n", "\n")


class GdbStub:
    """QEMU's gdbstub by gdb's own connection."""

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
            reply = connection.send_packet(text)
        except gdb.error as error:
            raise _lost_or(error, f"packet {text}") from error
        return (reply or b"").decode("ascii", "replace")

    def read(self, address: int, buffer: memoryview) -> None:
        """Fill `buffer` from `address` on."""
        try:
            content = gdb.selected_inferior().read_memory(address, len(buffer))
            buffer[:] = memoryview(content).cast("B")
        except gdb.MemoryError as error:
            if not _connected():
                raise SourceError(_GONE) from error
            raise GuestMemoryFaultError(address, len(buffer), str(error)) from error
        except gdb.error as error:
            raise _lost_or(error, "reading memory") from error

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
    # So gdb is made to read: what we told the stub ourselves, gdb would not know of.
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


def _require_stopped_guest(stub: GdbStub) -> None:
    if not _connected():
        raise ConnectError(
            "gdb is not connected to a guest",
            hint="'target remote :1234' for a QEMU started with -s or -gdb tcp::1234",
        )
    if any(thread.is_running() for thread in gdb.selected_inferior().threads()):
        raise SourceError("the guest is running in gdb", hint="'interrupt' it first")
    if not stub.packet("qqemu.PhyMemMode"):
        raise SourceError("the remote target is no gdbstub of QEMU")


@contextmanager
def guest_access(qmp: str | None) -> Iterator[GuestAccess]:
    """Open the ways to the guest that gdb is attached to.

    Args:
        qmp: QMP socket for what the monitor is asked, or None: through the stub as well.

    Raises:
        SourceError: There is no guest, or it is not stopped.
    """
    stub = GdbStub()
    _require_stopped_guest(stub)
    if qmp is None:
        monitor = GdbMonitor()
        native_dump = partial(dump_byte_through_file, monitor)
        yield GuestAccess(monitor, stub, native_dump, stub.addresses())
    else:
        with connect_qmp(qmp) as qmp_monitor:
            addresses = (qmp, *stub.addresses())
            yield GuestAccess(qmp_monitor, stub, qmp_monitor.native_dump, addresses)
