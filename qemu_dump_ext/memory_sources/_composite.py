"""Guest memory of several sources: each RAM block from the one that has it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from qemu_dump_ext.errors import GuestMemoryFaultError
from qemu_dump_ext.guest.memory import ForetoldMemory, GuestMemory, is_at_hand, is_sparse
from qemu_dump_ext.guest.model import RamBlock


class CompositeMemory:
    """Guest memory, block by block."""

    def __init__(self, blocks: Mapping[RamBlock, GuestMemory]) -> None:
        """Read each of `blocks`, which go by ascending gpa, from its memory."""
        self._blocks = list(blocks)
        self._starts = [block.gpa for block in self._blocks]
        self._memories = list(blocks.values())

    @property
    def name(self) -> str:
        """Those of all of them."""
        return "+".join(dict.fromkeys(memory.name for memory in self._memories))

    @property
    def is_slow(self) -> bool:
        """Whether one of them is."""
        return any(memory.is_slow for memory in self._memories)

    @property
    def is_at_hand(self) -> bool:
        """Whether all of them are."""
        return all(is_at_hand(memory) for memory in self._memories)

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` from `gpa` on."""
        self._memory_at(gpa).read_into(gpa, buffer)

    def populated(self, gpa: int, size: int) -> Sequence[tuple[int, int]]:
        """Return where there may be something else than zeros."""
        memory = self._memory_at(gpa)
        if is_sparse(memory):
            return memory.populated(gpa, size)
        return [(gpa, gpa + size)]

    def foretell(self, parts: Sequence[RamBlock]) -> None:
        """Read nothing ahead but what lies in these parts of RAM blocks, by ascending gpa."""
        for memory in dict.fromkeys(self._memories):
            if isinstance(memory, ForetoldMemory):
                memory.foretell([part for part in parts if self._memory_at(part.gpa) is memory])

    def close(self) -> None:
        """Give back what all of them hold."""
        for memory in self._memories:
            memory.close()

    def _memory_at(self, gpa: int) -> GuestMemory:
        index = bisect_right(self._starts, gpa) - 1
        if index < 0 or gpa >= self._blocks[index].end:
            raise GuestMemoryFaultError(gpa, 1, "no RAM block is there")
        return self._memories[index]
