"""What the engine wants from a source of guest physical memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeAlias, TypeGuard, runtime_checkable

from qemu_dump_ext.guest.model import RamBlock

ReadPacked: TypeAlias = Callable[[Sequence[int]], Iterator[bytes | memoryview | None]]
"""Gets the gpas of pages, ascending, and yields each as it is packed; see `PackedMemory`."""


class GuestMemory(Protocol):
    """Guest physical memory while the guest is stopped."""

    @property
    def name(self) -> str:
        """The word by which users ask for this source."""

    @property
    def is_slow(self) -> bool:
        """Whether nothing should be read for convenience that the dump does not need."""

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` with guest memory from `gpa` on; the range lies within one RAM block.

        Raises:
            GuestMemoryFaultError: It cannot be read.
        """

    def close(self) -> None:
        """Give back what the source holds; harmless when repeated."""


class SparseMemory(GuestMemory, Protocol):
    """Guest memory of which it is known, without reading it, where nothing was ever stored.

    Optional: of memory for which `is_sparse` does not hold everything is read.
    """

    def populated(self, gpa: int, size: int) -> Sequence[tuple[int, int]]:
        """Return where there may be something else than zeros, as pairs of gpa and end.

        By ascending gpa, not overlapping, within the range, which lies within one RAM block.
        Everything else in the range is zero, and `read_into` is not asked for it: reading it
        could make QEMU's process allocate memory.

        Raises:
            GuestMemoryFaultError: It cannot be told.
        """


def is_sparse(memory: GuestMemory) -> TypeGuard[SparseMemory]:
    """Return whether `memory` is a SparseMemory.

    This is asked for single pages: a protocol that is checked takes longer to be looked for than a
    page to be read.
    """
    return hasattr(memory, "populated")


@runtime_checkable
class MemoryAtHand(GuestMemory, Protocol):
    """Guest memory of which a page is read again for little more than the cost of copying it.

    Optional: memory that is no MemoryAtHand is not at hand.
    """

    @property
    def is_at_hand(self) -> bool:
        """Whether it is."""


def is_at_hand(memory: GuestMemory) -> bool:
    """Return whether reading a page of `memory` again costs next to nothing."""
    return isinstance(memory, MemoryAtHand) and memory.is_at_hand


@runtime_checkable
class PackedMemory(GuestMemory, Protocol):
    """Guest memory whose pages are at hand as a codec has packed them, as those of a kdump are.

    Optional: of memory that is no PackedMemory pages are read and packed.
    """

    def packed_pages(self, codec: str, page_size: int) -> ReadPacked | None:
        """Return what reads packed pages, for any thread; None where they are packed otherwise.

        It yields less than a page where the page is packed, the page itself where the codec would
        not make it smaller, and None where that is not known. That a page unpacks, only reading it
        tells.

        Args:
            codec: Name of it.
            page_size: In bytes.
        """


@runtime_checkable
class ForetoldMemory(GuestMemory, Protocol):
    """Guest memory that reads ahead, and nothing in vain where it is told what will be read."""

    def foretell(self, parts: Sequence[RamBlock]) -> None:
        """Read nothing ahead but what lies in these parts of RAM blocks, by ascending gpa.

        Everything else can still be read.
        """


@runtime_checkable
class PartialMemory(GuestMemory, Protocol):
    """Guest memory that has some RAM blocks only; others come from another source."""

    @property
    def missing_blocks(self) -> Sequence[RamBlock]:
        """The blocks of the guest that cannot be read here, by ascending gpa."""
