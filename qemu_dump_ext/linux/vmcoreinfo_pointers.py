"""Find VMCOREINFO by the kernel's own pointers to it, which lie in the kernel's image.

A kernel keeps three variables next to each other: where its text is, how long that is, and where
its note is. The image is where a vCPU is while it is in the kernel, and where its table of
interrupts is: of all memory, a few MiB are looked at.

Source: Linux kernel/vmcore_info.c (kernel/crash_core.c before v6.9): vmcoreinfo_data,
vmcoreinfo_size, vmcoreinfo_note.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice

from qemu_dump_ext.architectures import Architecture, PageTableRoot, Translation
from qemu_dump_ext.errors import GuestMemoryFaultError
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.guest.model import RamBlock, Vcpu, block_at
from qemu_dump_ext.pages.pipeline import populated_ranges
from qemu_dump_ext.pages.zero_pages import numpy_if_loaded
from qemu_dump_ext.paging.walk import ReadTable, translate_by
from qemu_dump_ext.structures.c_struct import ByteOrder
from qemu_dump_ext.structures.vmcoreinfo import PAGE_SIZES

_PIECE = 1 << 20
_PIECES_BEHIND, _PIECES_BEFORE = 48, 8
"""Data lie behind the code of an image; the largest are of 48 MiB."""
_PIECES_MAX = 128
"""Of all places together: a vCPU in a program is anywhere."""
_SLOW_PIECES, _SLOW_PIECES_MAX = 2, 8
_IN_PAGE = min(PAGE_SIZES) - 1
_TRIPLES_MAX = 1024
"""A hostile guest has any number of them."""
_MAP_ALIGNMENT = 1 << 30
"""With this alignment a kernel maps all of memory somewhere."""
_MAPS_MAX = 4096
_MEMORY_BITS = 44
"""Both are in one map of all memory, which is not larger."""
_ONE_FOR_ZERO = bytes([1]) + bytes(255)
_ONE_FOR_OTHERS = bytes([0]) + b"\1" * 255


class NotePointers:
    """What points to VMCOREINFO near the code that the vCPUs of a guest run."""

    def __init__(
        self,
        architecture: Architecture,
        memory: GuestMemory,
        ram_blocks: Sequence[RamBlock],
        *,
        byte_order: ByteOrder,
    ) -> None:
        self._architecture = architecture
        self._byte_order = byte_order
        self._memory = memory
        self._blocks = ram_blocks
        # Kept: the kernel would have to find memory anew for each piece.
        self._buffer, self._room = (memoryview(mmap.mmap(-1, _PIECE)) for _ in range(2))

    def targets(
        self,
        vcpus: Sequence[Vcpu],
        translations: Sequence[Translation],
        read_table: ReadTable,
        advance: Callable[[int], None],
    ) -> Iterator[tuple[int, int]]:
        """Yield where the pages of text and note may be, what is near the vCPUs first.

        Not all of these places are memory, and of most nothing was ever stored there.

        Args:
            vcpus: The vCPUs of the guest.
            translations: What translates their addresses; may be empty.
            read_table: Reads their page tables.
            advance: Is told the bytes of each piece that is looked at; may raise.
        """
        names = (*self._architecture.kernel_pointers, self._architecture.program_counter)
        addresses = [vcpu.registers.get(name) for vcpu in vcpus for name in names]
        found = [
            translate_by(translations, read_table, address)
            for address in addresses
            if address is not None
        ]
        places = {place[0] for place in found if place is not None}
        if vcpus and not translations:  # as of arm64 by QMP: a kernel is loaded low, if anywhere
            places = {block.gpa for block in self._blocks[:1]}
        word_size = self._word_size(translations)
        left = _TRIPLES_MAX
        for start, end in self._pieces(places):
            advance(end - start)
            for text, note in self._triples(start, end, word_size):
                yield from ((gpa, gpa + note - text) for gpa in self._mapped_at(text))
                left -= 1
                if not left:
                    return

    def _word_size(self, translations: Sequence[Translation]) -> int:
        bits = {one.geometry.address_bits for one in translations if isinstance(one, PageTableRoot)}
        if bits:
            return 8 if max(bits) > 32 else 4
        return max(core.word_size for core in self._architecture.cores)

    def _mapped_at(self, pointer: int) -> Iterator[int]:
        """Yield the pages that the kernel may have mapped there with all of memory."""
        places = (
            gpa
            for block in self._blocks
            for gpa in range(
                block.gpa + (pointer - block.gpa) % _MAP_ALIGNMENT, block.end, _MAP_ALIGNMENT
            )
        )
        return islice(places, _MAPS_MAX)

    def _pieces(self, gpas: Collection[int]) -> Iterator[tuple[int, int]]:
        """Yield first gpa and end of what is populated around some, each part once."""
        seen: set[int] = set()
        places = sorted({gpa // _PIECE for gpa in gpas})
        behind, before, most = _PIECES_BEHIND, _PIECES_BEFORE, _PIECES_MAX
        if self._memory.is_slow:
            behind, before, most = _SLOW_PIECES, _SLOW_PIECES, _SLOW_PIECES_MAX
        for step in range(max(behind, before)):
            for place in places:
                steps = {place + step} if step < behind else set()
                steps |= {place - step} if step < before else set()
                for piece in sorted(steps - seen):
                    if len(seen) >= most:
                        return
                    seen.add(piece)
                    block = block_at(self._blocks, piece * _PIECE)
                    if block is not None:
                        first, end = piece * _PIECE, min((piece + 1) * _PIECE, block.end)
                        yield from populated_ranges(self._memory, first, end)

    def _triples(self, start: int, end: int, word_size: int) -> Iterator[tuple[int, int]]:
        """Yield two pointers to pages that have what may be a size between them."""
        content = self._buffer[: (end - start) // word_size * word_size]
        try:
            self._memory.read_into(start, content)
        except GuestMemoryFaultError:
            return
        for index in self._small_numbers(content, word_size):
            first = (index - 1) * word_size
            text, note = (
                int.from_bytes(content[place : place + word_size], self._byte_order)
                for place in (first, first + 2 * word_size)
            )
            if text and note and not (text | note) & _IN_PAGE and not (text ^ note) >> _MEMORY_BITS:
                yield text, note

    def _small_numbers(self, content: memoryview, word_size: int) -> Iterable[int]:
        """Return the indexes of words of more than 8 bits and no more than 16, between others."""
        numpy = numpy_if_loaded()
        if numpy is None:
            return self._small_numbers_by_bytes(bytes(content), word_size)
        order = "<" if self._byte_order == "little" else ">"
        words = numpy.frombuffer(content, dtype=f"{order}u{word_size}")[1:-1]
        # Smaller numbers become the largest ones.
        above = numpy.frombuffer(self._room, dtype=f"u{word_size}")[: len(words)]
        numpy.subtract(words, words.dtype.type(1 << 8), out=above)
        indexes: list[int] = (numpy.flatnonzero(above < (1 << 16) - (1 << 8)) + 1).tolist()
        return indexes

    def _small_numbers_by_bytes(self, content: bytes, word_size: int) -> Iterator[int]:
        # All words at once, byte by byte: looking at each by itself takes ten times as long.
        parts = [content[part::word_size] for part in range(word_size)]
        if self._byte_order == "big":
            parts.reverse()
        tests = [parts[1].translate(_ONE_FOR_ZERO)]
        tests += [part.translate(_ONE_FOR_OTHERS) for part in parts[2:]]
        failed = 0
        for test in tests:
            failed |= int.from_bytes(test, "little")
        verdicts = failed.to_bytes(len(content) // word_size, "little")
        index = verdicts.find(0, 1)
        while 0 < index < len(verdicts) - 1:
            yield index
            index = verdicts.find(0, index + 1)
