"""Guest memory that outlives its source: when one fails in the middle, the next one goes on.

The guest is stopped all the while, so that both show the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qemu_dump_ext.errors import GuestMemoryFaultError, SourceError
from qemu_dump_ext.guest.memory import ForetoldMemory, GuestMemory, is_at_hand, is_sparse
from qemu_dump_ext.guest.model import RamBlock


class LastingMemory:
    """Guest memory of the first source, and of others as those before them fail."""

    def __init__(
        self, memory: GuestMemory, open_next: Callable[[str, SourceError], GuestMemory]
    ) -> None:
        """Begin with `memory`.

        Args:
            memory: The memory to read from.
            open_next: Returns what to read from after the memory of a name failed so; raises
                SourceError where there is nothing.
        """
        self._memories = [memory]
        self._foretold: Sequence[RamBlock] | None = None
        self._open_next = open_next

    @property
    def name(self) -> str:
        """The sources in the order of their use."""
        return " then ".join(memory.name for memory in self._memories)

    @property
    def is_slow(self) -> bool:
        """Whether the one in use is."""
        return self._memories[-1].is_slow

    @property
    def is_at_hand(self) -> bool:
        """Whether the one in use is."""
        return is_at_hand(self._memories[-1])

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` from `gpa` on."""
        while True:
            memory = self._memories[-1]
            try:
                memory.read_into(gpa, buffer)
            except GuestMemoryFaultError:
                raise  # the source works, and the guest has nothing there
            except SourceError as error:
                self._memories.append(self._open_next(memory.name, error))
                if self._foretold is not None:
                    self.foretell(self._foretold)
            else:
                return

    def foretell(self, parts: Sequence[RamBlock]) -> None:
        """Read nothing ahead but what lies in these parts of RAM blocks, by ascending gpa."""
        self._foretold = parts
        memory = self._memories[-1]
        if isinstance(memory, ForetoldMemory):
            memory.foretell(parts)

    def close(self) -> None:
        """Give back what all of them hold."""
        for memory in self._memories:
            memory.close()


class LastingSparseMemory(LastingMemory):
    """The same, of which the first source knows where nothing was ever stored."""

    def populated(self, gpa: int, size: int) -> Sequence[tuple[int, int]]:
        """Return where there may be something else than zeros."""
        memory = self._memories[-1]
        if is_sparse(memory):
            return memory.populated(gpa, size)
        return [(gpa, gpa + size)]


def lasting(
    memory: GuestMemory, open_next: Callable[[str, SourceError], GuestMemory]
) -> LastingMemory:
    """Return memory that goes on when its source fails; see `LastingMemory`."""
    kind = LastingSparseMemory if is_sparse(memory) else LastingMemory
    return kind(memory, open_next)
