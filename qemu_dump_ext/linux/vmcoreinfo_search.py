"""Find the VMCOREINFO that a Linux kernel keeps in guest memory, and tell which kernel is live.

A kernel keeps it twice, each copy at the start of a page of its own: the text, and the ELF note
made of it. Memory may have those of other kernels as well: of an earlier boot, of a nested guest,
of the kernel loaded for kdump, or made up by a hostile guest. The live one is told by evidence.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from enum import IntEnum
from itertools import chain, product

from qemu_dump_ext.architectures import Architecture, PageTableRoot, Translation
from qemu_dump_ext.errors import GuestMemoryFaultError, RequestError, SourceError
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.guest.model import RamBlock, Vcpu, block_at
from qemu_dump_ext.linux.kernel_memory import utsname_offsets
from qemu_dump_ext.linux.vmcoreinfo_pointers import NotePointers
from qemu_dump_ext.pages.pipeline import populated_ranges
from qemu_dump_ext.paging.tables import TableReader, kernel_translations, roots_of_vcpus
from qemu_dump_ext.paging.walk import translate, translate_by
from qemu_dump_ext.structures.c_struct import ByteOrder
from qemu_dump_ext.structures.elf_notes import encode_note
from qemu_dump_ext.structures.utsname import UTSNAME_TOTAL_SIZE, UtsName, parse_new_utsname
from qemu_dump_ext.structures.vmcoreinfo import (
    MAX_VMCOREINFO_SIZE,
    PAGE_SIZES,
    VMCOREINFO_NOTE_NAME,
    note_at_page_start,
    vmcoreinfo_number,
    vmcoreinfo_text,
    vmcoreinfo_value,
)
from qemu_dump_ext.value import Value

_PAGE = min(PAGE_SIZES)
_PIECE = 4 << 20
_HEAD = 24
"""Bytes at the start of a page that tell whether to look closer: up to `VMCOREINFO`, NUL, NUL."""
_TEXT_START = b"OSRELEASE="
_LINES_WANTED = (b"\nPAGESIZE=", b"\nSYMBOL(")
_SLOW_SECONDS = 20.0
_CODE_MAX = 64 << 20
_CANDIDATES_MAX = 64
_CHUNK = 64 << 20
"""Bytes; the last ones of memory are searched first, for there the kernel allocates at boot."""
_CHUNKS = 16
"""Of one RAM block; what is before them is searched in one go."""
_RECENT: deque[int] = deque(maxlen=16)
"""Where this process found the live kernel's last: of each guest, it stays where it is."""


class Evidence(IntEnum):
    """How sure it is that a kernel is the one that runs."""

    TEXT = 0
    BANNER = 1
    CODE = 2
    LIVE = 3


_IN_WORDS = {
    Evidence.TEXT: "nothing else in memory bears it out",
    Evidence.BANNER: "its own page tables lead to the kernel's name",
    Evidence.CODE: "a vCPU is in its code, and its own page tables lead to the kernel's name",
    Evidence.LIVE: "the page tables of a vCPU lead to the kernel's name as it says",
}


class KernelNote(Value):
    """A VMCOREINFO in guest memory.

    Attributes:
        gpa: Where it was found.
        note: The ELF note, header included.
        text: The text of the note.
        evidence: What tells that its kernel is the live one.
    """

    gpa: int
    note: bytes
    text: bytes
    evidence: Evidence

    @property
    def release(self) -> str:
        """The kernel's release, as `uname -r` prints it."""
        return vmcoreinfo_value(self.text, "OSRELEASE") or "unknown"


class SearchResult(Value):
    """What the search found.

    Attributes:
        chosen: The kernel that is live as far as can be told, or that was asked for; None: none.
        remarks: The remarks for the report.
    """

    chosen: KernelNote | None
    remarks: tuple[str, ...]


class NoteSearch:
    """A search through the memory of one guest."""

    def __init__(
        self,
        architecture: Architecture,
        byte_order: ByteOrder,
        memory: GuestMemory,
        ram_blocks: Sequence[RamBlock],
        vcpus: Sequence[Vcpu] = (),
        *,
        advance: Callable[[int], None] = lambda _size: None,
        seconds: float = math.inf,
    ) -> None:
        """Prepare.

        Args:
            architecture: The architecture of the guest.
            byte_order: The byte order of the guest.
            memory: The memory of the guest.
            ram_blocks: Where it has memory.
            vcpus: Whose page tables tell which kernel is live; may be empty.
            advance: Is told the bytes of each piece that is searched; may raise.
            seconds: How long the search may take; memory that is read slowly gets 20 at most.
        """
        self._architecture = architecture
        self._byte_order = byte_order
        self._memory = memory
        self._blocks = ram_blocks
        self._tables = TableReader(memory, ram_blocks)
        self._vcpus = vcpus
        self._translations: Sequence[Translation] = ()
        with suppress(SourceError):  # a register is missing: there is that much less evidence
            self._translations = roots_of_vcpus(architecture, vcpus, native=False)
        self._roots = [root for root in self._translations if isinstance(root, PageTableRoot)]
        self._pointers = NotePointers(architecture, memory, ram_blocks, byte_order=byte_order)
        self._advance = advance
        self._incomplete = ""
        self._searched = 0
        self._is_slow = memory.is_slow
        self._seconds = min(seconds, _SLOW_SECONDS) if self._is_slow else seconds
        self._started = time.monotonic()

    def find(self, wanted: str | None = None, *, everywhere: bool = True) -> SearchResult:
        """Search until a kernel is found that is live beyond doubt.

        Args:
            wanted: Release of the kernel whose note is asked for, or the gpa of the note as
                hexadecimal; it is searched for however long that takes.
            everywhere: Search all of memory, and not only where one was found before.

        Raises:
            RequestError: There is no such kernel; says which there are.
        """
        found: list[KernelNote] = []
        if wanted is not None:
            self._seconds = math.inf
        self._started = time.monotonic()
        for candidate in self.candidates(everywhere=everywhere):
            if any(candidate.text == other.text for other in found):
                continue
            found.append(candidate)
            is_it = wanted in {None, candidate.release, hex(candidate.gpa)}
            if is_it and candidate.evidence >= Evidence.CODE:
                if candidate.gpa not in _RECENT:
                    _RECENT.append(candidate.gpa)
                break
            if len(found) >= _CANDIDATES_MAX:
                self._incomplete = f"the search ended at the {len(found)}th"
                break
        if not found and not everywhere:
            return SearchResult(None, ("VMCOREINFO was not looked for in all of guest memory",))
        return self._choose(sorted(found, key=lambda one: one.gpa), wanted)

    def _choose(self, found: list[KernelNote], wanted: str | None) -> SearchResult:
        remarks = [self._incomplete] if self._incomplete else []
        ranked = sorted(found, key=lambda one: (-one.evidence, one.gpa))
        if wanted is not None:
            ranked = [one for one in ranked if wanted in {one.release, hex(one.gpa)}]
            if not ranked:
                there_are = ", ".join(f"{one.release} at {one.gpa:#x}" for one in found) or "none"
                raise RequestError(f"no VMCOREINFO of kernel {wanted}", hint=f"found: {there_are}")
        if not ranked:
            return SearchResult(None, ("VMCOREINFO was not found in guest memory", *remarks))
        chosen = ranked[0]
        remarks.insert(
            0,
            f"VMCOREINFO of kernel {_shown(chosen.release)} was found in guest memory at"
            f" {chosen.gpa:#x}: {_IN_WORDS[chosen.evidence]}",
        )
        remarks += [
            f"not taken: that of kernel {_shown(other.release)} at {other.gpa:#x}:"
            f" {_IN_WORDS[other.evidence]} (--kernel {other.gpa:#x} takes it)"
            for other in found
            if other is not chosen
        ]
        return SearchResult(chosen, tuple(remarks))

    def candidates(self, *, everywhere: bool = True) -> Iterator[KernelNote]:
        """Yield what looks like a VMCOREINFO.

        First where one was found before and where the kernel points to, then from the end on.
        """
        for gpa in self._page_starts(everywhere=everywhere):
            note = self._note_at(gpa)
            if note is None:
                continue
            text = vmcoreinfo_text(note, self._byte_order)
            if vmcoreinfo_number(text, "PAGESIZE") not in PAGE_SIZES:
                continue
            if gpa % (vmcoreinfo_number(text, "PAGESIZE") or _PAGE):
                continue
            yield KernelNote(gpa, note, text, self._evidence(text))

    def _page_starts(self, *, everywhere: bool) -> Iterator[int]:
        """Yield the pages that begin like a text or a note."""
        hints = chain(_RECENT, self._pointed_to() if everywhere else ())
        for gpa in hints:
            block = block_at(self._blocks, gpa)
            if block is not None and self._is_start(self._read(gpa, min(_HEAD, block.end - gpa))):
                yield gpa
        for first, last in self._chunks() if everywhere else ():
            for start, end in populated_ranges(self._memory, first, last):
                page = -(-start // _PAGE) * _PAGE
                search = self._one_by_one if self._is_slow else self._in_pieces
                yield from search(page, end)
                if self._is_late():
                    return

    def _pointed_to(self) -> Iterator[int]:
        targets = self._pointers.targets(
            self._vcpus, self._translations, self._tables, self._advance
        )
        for pages in targets:
            if self._is_late():
                return
            if all(map(self._is_populated, pages)):
                yield from pages

    def _is_populated(self, gpa: int) -> bool:
        if block_at(self._blocks, gpa) is None:
            return False
        return any(populated_ranges(self._memory, gpa, gpa + 1))

    def _chunks(self) -> Iterator[tuple[int, int]]:
        for block in reversed(self._blocks):
            end = block.end
            for _ in range(_CHUNKS):
                first = max(block.gpa, (end - 1) // _CHUNK * _CHUNK)
                yield first, end
                end = first
                if end == block.gpa:
                    break
            else:
                yield block.gpa, end

    def _is_late(self) -> bool:
        if time.monotonic() - self._started < self._seconds:
            return False
        slowly = "guest memory is read slowly here, and" if self._is_slow else "guest memory"
        self._incomplete = self._incomplete or (
            f"{slowly} was searched for VMCOREINFO from its end on for {self._seconds:g} s only:"
            f" {self._searched >> 20} MiB"
        )
        return True

    def _one_by_one(self, first: int, end: int) -> Iterator[int]:
        for gpa in range(first, end - _HEAD + 1, _PAGE):
            self._advance(_HEAD)
            self._searched += _PAGE
            if self._is_start(self._read(gpa, _HEAD)):
                yield gpa
            if self._is_late():
                return

    def _in_pieces(self, first: int, end: int) -> Iterator[int]:
        # One byte of each page: of n_namesz 11 that is not 0, and the first letter of the text.
        clues = (
            (0 if self._byte_order == "little" else 3, len(VMCOREINFO_NOTE_NAME) + 1),
            (0, _TEXT_START[0]),
        )
        buffer = memoryview(bytearray(min(_PIECE, max(end - first, 0))))
        for gpa in range(first, end, _PIECE):
            if self._is_late():
                return
            piece = buffer[: end - gpa]
            self._advance(len(piece))
            self._searched += len(piece)
            try:
                self._memory.read_into(gpa, piece)
            except GuestMemoryFaultError as error:
                self._incomplete = f"not all memory was searched for VMCOREINFO: {error}"
                continue
            places = {
                index * _PAGE
                for offset, wanted in clues
                for index, value in enumerate(bytes(piece[offset::_PAGE]))
                if value == wanted
            }
            for place in sorted(places):
                if self._is_start(bytes(piece[place : place + _HEAD])):
                    yield gpa + place
                    if self._is_late():
                        return

    @staticmethod
    def _is_start(head: bytes) -> bool:
        return head.startswith(_TEXT_START) or head[12:] == VMCOREINFO_NOTE_NAME.encode() + b"\0\0"

    def _read(self, gpa: int, size: int) -> bytes:
        data = bytearray(size)
        try:
            self._memory.read_into(gpa, memoryview(data))
        except GuestMemoryFaultError:
            return bytes(size)
        return bytes(data)

    def _note_at(self, gpa: int) -> bytes | None:
        block = block_at(self._blocks, gpa)
        end = gpa if block is None else block.end
        content = self._read(gpa, min(MAX_VMCOREINFO_SIZE, end - gpa))
        if not content.startswith(_TEXT_START):
            return note_at_page_start(content, self._byte_order)
        text = content.partition(b"\0")[0]
        if not text.endswith(b"\n") or not all(line in text for line in _LINES_WANTED):
            return None
        return encode_note(VMCOREINFO_NOTE_NAME, 0, text, self._byte_order)

    def _evidence(self, text: bytes) -> Evidence:
        address = vmcoreinfo_number(text, "SYMBOL(init_uts_ns)", 16)
        if address is None:
            return Evidence.TEXT
        release = vmcoreinfo_value(text, "OSRELEASE")
        places = [address + offset for offset in utsname_offsets(text)]

        def leads_to_name(found: tuple[int, int] | None) -> bool:
            return found is not None and self._utsname(found[0]).release == release

        for root, place in product(self._roots, places):
            if leads_to_name(translate(root, self._tables, place)):
                return Evidence.LIVE
        own = kernel_translations(self._architecture, text, self._blocks)
        if any(leads_to_name(translate_by(own, self._tables, place)) for place in places):
            return Evidence.CODE if self._runs_code_of(text) else Evidence.BANNER
        return Evidence.TEXT

    def _runs_code_of(self, text: bytes) -> bool:
        """Tell whether a vCPU whose page tables are not known is where only this kernel is."""
        first = vmcoreinfo_number(text, "SYMBOL(_stext)", 16)
        is_elsewhere_at_each_boot = vmcoreinfo_number(text, "KERNELOFFSET", 16)
        if first is None or not is_elsewhere_at_each_boot or self._translations:
            return False
        counters = (vcpu.registers.get(self._architecture.program_counter) for vcpu in self._vcpus)
        return any(first <= counter < first + _CODE_MAX for counter in counters if counter)

    def _utsname(self, gpa: int) -> UtsName:
        data = self._tables(gpa, UTSNAME_TOTAL_SIZE)
        return parse_new_utsname(data) or UtsName(release="\0")


def _shown(release: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in release[:64])
