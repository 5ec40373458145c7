"""What the engine wants from a door: the monitor, the gdbstub and QMP of one guest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from qemu_dump_ext.guest.model import RamBlock


class Monitor(Protocol):
    """QEMU's human monitor, whatever carries it."""

    def execute(self, command: str) -> str:
        """Return the answer of one HMP command, with plain line ends.

        Raises:
            SourceError: The monitor cannot be reached.
        """


@runtime_checkable
class AsyncMonitor(Monitor, Protocol):
    """A monitor that need not be waited for.

    Optional: other work is done one after the other.
    """

    def begin(self, command: str) -> Callable[[], str]:
        """Have a command executed; what is returned waits for its answer, as `execute` does."""


class DescriptorMonitor(Protocol):
    """QEMU's QMP, through a socket that passes descriptors."""

    def begin_qmp(
        self, command: str, arguments: dict[str, object] | None = None
    ) -> Callable[[], Any]:
        """Have a QMP command executed.

        Returns:
            Waits for its answer, and returns that; raises MonitorAnswerError where QEMU refuses
            the command, SourceError where the monitor cannot be reached.
        """

    def hand_over(self, descriptor: int, name: str) -> None:
        """Give QEMU a descriptor, which a command can ask for by `name`; ours stays open.

        Raises:
            SourceError: It cannot be passed this way.
        """


class Stub(Protocol):
    """A gdbstub of QEMU with a debugger in front of it."""

    def packet(self, text: str) -> str:
        """Send one packet of the remote protocol and return the reply; "" where unsupported."""

    def read(self, address: int, buffer: memoryview) -> None:
        """Fill `buffer` from `address` on, in the address space that the stub is set to."""

    def flush(self) -> None:
        """Drop what the debugger has cached of memory."""

    def vcpus(self) -> Iterator[int]:
        """Yield the cpu_index of each vCPU; until the next one, packets are about it."""


@dataclass(frozen=True)
class GuestAccess:
    """The ways to a guest that a door has.

    Attributes:
        monitor: QEMU's human monitor.
        stub: The gdbstub, or None.
        native_dump: Lets QEMU dump one byte at a gpa and returns the ELF file; raises
            SourceError where that is not possible.
        addresses: Of QEMU's sockets to which this process is connected: a path or HOST:PORT.
        target_name: Returns QEMU's name of the target, such as `mipsel`, or None where it does
            not tell; None where the door cannot ask.
        qmp: QEMU's QMP, or None.
    """

    monitor: Monitor
    stub: Stub | None
    native_dump: Callable[[int], bytes]
    addresses: Sequence[str] = ()
    target_name: Callable[[], str | None] | None = None
    qmp: DescriptorMonitor | None = None

    def source_context(self, ram_blocks: Sequence[RamBlock]) -> SourceContext:
        """Return what memory sources may use to get at `ram_blocks`."""
        return SourceContext(self.monitor, self.stub, ram_blocks, self.addresses, self.qmp)


@dataclass(frozen=True)
class SourceContext:
    """What a source may use to get at memory.

    Attributes:
        monitor: QEMU's human monitor.
        stub: The gdbstub, where the door has one.
        ram_blocks: Of the guest, by ascending gpa.
        addresses: Of QEMU's sockets to which this process is connected: a path or HOST:PORT.
        qmp: QEMU's QMP, where the door has one.
    """

    monitor: Monitor
    stub: Stub | None
    ram_blocks: Sequence[RamBlock]
    addresses: Sequence[str] = ()
    qmp: DescriptorMonitor | None = None
