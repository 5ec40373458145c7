"""Guest memory with other bytes laid over it; the guest itself is never written to."""

from __future__ import annotations

from collections.abc import Sequence

from qemu_dump_ext.guest.memory import GuestMemory, is_sparse


class PatchedMemory:
    """Guest memory as it would be if something had been stored in it.

    Attributes:
        name: Of the memory below, as the other members that it does not change.
    """

    def __init__(self, memory: GuestMemory, patches: Sequence[tuple[int, bytes]]) -> None:
        """Lay bytes over memory.

        Args:
            memory: What is below.
            patches: gpa and bytes, each inside one RAM block; later ones are on top.
        """
        self.name = memory.name
        self.is_slow = memory.is_slow
        self._memory = memory
        self._patches = tuple(patches)

    def populated(self, gpa: int, size: int) -> Sequence[tuple[int, int]]:
        """Return where there may be something else than zeros, as `SparseMemory` has it."""
        if not is_sparse(self._memory):
            return [(gpa, gpa + size)]
        found = [*self._memory.populated(gpa, size), *self._patched(gpa, gpa + size)]
        merged: list[tuple[int, int]] = []
        for low, high in sorted(found):
            if merged and low <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
            else:
                merged.append((low, high))
        return merged

    def _patched(self, gpa: int, end: int) -> list[tuple[int, int]]:
        parts = ((max(gpa, at), min(end, at + len(data))) for at, data in self._patches)
        return [(low, high) for low, high in parts if low < high]

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` from `gpa` on; errors as those of the memory below."""
        self._memory.read_into(gpa, buffer)
        end = gpa + len(buffer)
        for at, data in self._patches:
            low, high = max(gpa, at), min(end, at + len(data))
            if low < high:
                buffer[low - gpa : high - gpa] = data[low - at : high - at]

    def close(self) -> None:
        """Leave the memory below to its owner."""
