"""The domain: what a guest is to a dump, and what the engine wants from a door.

The protocols live here, with their user; memory sources, QMP and gdb implement them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class RamBlock:
    """A range of guest physical memory that `dump-guest-memory` includes.

    Attributes:
        gpa: First guest physical address.
        size: In bytes; need not be a multiple of a page.
        name: QEMU's memory region behind it.
        region_offset: Offset of `gpa` inside that region, in bytes.
    """

    gpa: int
    size: int
    name: str
    region_offset: int

    @property
    def end(self) -> int:
        """First guest physical address behind the block."""
        return self.gpa + self.size


@dataclass(frozen=True)
class Vcpu:
    """One guest CPU.

    Attributes:
        index: QEMU's cpu_index.
        registers: Values by register name of the architecture. A register that no source gives
            is an absent key, never 0.
    """

    index: int
    registers: Mapping[str, int]


class GuestMemory(Protocol):
    """Guest physical memory while the guest is stopped."""

    @property
    def name(self) -> str:
        """The word by which users ask for this source."""

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` with guest memory from `gpa` on; the range lies within one RAM block.

        Raises:
            GuestMemoryFaultError: It cannot be read.
        """

    def close(self) -> None:
        """Give back what the source holds; harmless when repeated."""


@runtime_checkable
class SparseMemory(GuestMemory, Protocol):
    """Guest memory of which it is known, without reading it, where nothing was ever stored.

    Optional: of memory that is no SparseMemory everything is read.
    """

    def populated(self, gpa: int, size: int) -> Sequence[tuple[int, int]]:
        """Return where there may be something else than zeros, as pairs of gpa and end.

        By ascending gpa, not overlapping, within the range, which lies within one RAM block.
        Everything else in the range is zero, and `read_into` is not asked for it: reading it
        could make QEMU's process allocate memory.

        Raises:
            GuestMemoryFaultError: It cannot be told.
        """


@runtime_checkable
class PartialMemory(GuestMemory, Protocol):
    """Guest memory that has some RAM blocks only; others come from another source."""

    @property
    def missing_blocks(self) -> Sequence[RamBlock]:
        """The blocks of the guest that cannot be read here, by ascending gpa."""


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
