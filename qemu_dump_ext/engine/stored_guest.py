"""What a dump has of a guest, with the face of one that stands still."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property
from itertools import islice

from qemu_dump_ext.architectures import Architecture, Core
from qemu_dump_ext.dump_readers import DumpFile
from qemu_dump_ext.engine.differences import differences
from qemu_dump_ext.engine.guest_view import GuestView, Vmcoreinfo
from qemu_dump_ext.engine.recognize import (
    Recognized,
    notes_of,
    recognize,
    vmcoreinfo_of,
)
from qemu_dump_ext.errors import (
    CorruptDumpError,
    GuestMemoryFaultError,
    RequestError,
    SourceError,
)
from qemu_dump_ext.guest.memory import GuestMemory, ReadPacked
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.pages.page_set import PageSet
from qemu_dump_ext.paging.segments import Segment
from qemu_dump_ext.plan.plan import DumpPlan, EarlierDump, GuestSnapshot
from qemu_dump_ext.qemu.probe import ProbedGuest
from qemu_dump_ext.registers.from_dump_notes import encode_notes
from qemu_dump_ext.structures.dialect import MENDED, Dialect
from qemu_dump_ext.structures.elf import EM_X86_64
from qemu_dump_ext.structures.elf_notes import encode_note
from qemu_dump_ext.structures.utsname import UTSNAME_FIELDS, UtsName
from qemu_dump_ext.structures.vmcoreinfo import PAGE_SIZES, VMCOREINFO_NOTE_NAME
from qemu_dump_ext.structures.win_dmp import WindowsDump
from qemu_dump_ext.windows.stored import dump_of_header, vcpus_of_header, with_mode

_RANGES_MAX = 1 << 20
"""More than a guest's memory has with every page left out that makedumpfile can leave out."""
_MEMORY_MAX = 1 << 44
"""Bytes; headers of a small file may claim any number, and a page map has a bit for each page."""
_SHOWN_RANGES = 4
_4G = 1 << 32
_NOWHERE = 1 << 66


def _bounded(ranges: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return (gpa, size) of some memory.

    Raises:
        CorruptDumpError: They are more than any guest has.
    """
    found = list(islice(ranges, _RANGES_MAX + 1))
    if len(found) > _RANGES_MAX:
        raise CorruptDumpError(f"memory in more than {_RANGES_MAX} ranges: no guest has so many")
    return found


def _check_memory(dump: DumpFile) -> None:
    """Refuse a dump that has nothing of the guest's memory.

    Raises:
        CorruptDumpError: It has not.
    """
    if next(dump.readable_ranges(), None) is None:
        lost = next(dump.stored_ranges(), None)
        left_out = next(dump.covered_ranges(), None)
        why = ": cut off or lost" if lost else ": all was left out" if left_out else ""
        raise CorruptDumpError(f"nothing of the guest's memory is in the dump{why}")


class _DumpMemory:
    """A dump as guest memory; it begins at the gpa that the dump counts as 0.

    Where the dump is damaged, there is no memory: the rest of it is read all the same.
    """

    name = "dump"
    is_slow = False
    is_at_hand = True

    def __init__(self, dump: DumpFile, *, pfn_from_phys_base: bool) -> None:
        self._dump = dump
        self.first = 0
        ranges = _bounded(dump.readable_ranges())
        base = dump.phys_base
        if pfn_from_phys_base and base is not None and ranges:
            # QEMU's own dumps count from 0 nevertheless.
            self.first = base if ranges[0][0] < base else 0
        self.blocks = self.blocks_of(ranges)

    def blocks_of(self, ranges: Iterable[tuple[int, int]]) -> list[RamBlock]:
        """Return where ranges of the dump are in the guest."""
        return [RamBlock(self.first + gpa, size, "", 0) for gpa, size in ranges]

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` from `gpa` on."""
        try:
            self._dump.read_into(gpa - self.first, buffer)
        except CorruptDumpError as error:
            raise GuestMemoryFaultError(gpa, len(buffer), str(error)) from error

    def populated(self, gpa: int, size: int) -> Sequence[tuple[int, int]]:
        """Return where there may be something else than zeros."""
        first = self.first
        return [
            (start + first, end + first) for start, end in self._dump.populated(gpa - first, size)
        ]

    def packed_pages(self, codec: str, page_size: int) -> ReadPacked | None:
        """Return what reads packed pages, where the dump has such."""
        read, first = self._dump.packed_pages(codec, page_size), self.first
        if read is None or first % page_size:
            return None
        return lambda gpas: read([gpa - first for gpa in gpas])

    def close(self) -> None:
        """Leave the dump to its owner."""


def _memories_of(dump: DumpFile) -> Callable[[Architecture], _DumpMemory]:
    """Return what gives a dump as the memory of a guest of some architecture."""
    # Most are of the same memory, and where a large dump has pages takes long to find out.
    make = cache(lambda *, from_base: _DumpMemory(dump, pfn_from_phys_base=from_base))
    return lambda architecture: make(from_base=architecture.pfn_from_phys_base)


class _NoPause:
    """Of a guest that is in a file, which does not change."""

    left = taken_over = None

    def seconds(self) -> float:
        """It never ran."""
        return 0.0

    def check(self) -> None:
        """Nobody can let it run."""


class StoredGuest(GuestView):
    """The guest in a dump.

    Attributes:
        dump: Stays its opener's to close.
    """

    def __init__(
        self,
        dump: DumpFile,
        *,
        search_seconds: float = math.inf,
        target: str | None = None,
        keep: bool = False,
    ) -> None:
        """Find out what guest it was.

        Args:
            dump: Not used by anyone else meanwhile.
            search_seconds: How long VMCOREINFO may be searched for, where the dump has none.
            target: Name of the architecture, where the dump does not tell it; None: it does.
            keep: A dump that is made of it says what this one says, be it right or not.

        Raises:
            UnsupportedTargetError: Nothing tells.
            RequestError: There is no such architecture.
            CorruptDumpError: The dump's headers or notes are damaged, or nothing of the guest's
                memory is in it.
        """
        super().__init__()
        _check_memory(dump)
        self.dump = dump
        self._keep = keep
        self._search_seconds = search_seconds
        memory_of = _memories_of(dump)
        self._notes, self._fault = notes_of(dump)
        self._recognized = found = recognize(dump, memory_of, target)
        self.architecture = found.architecture
        self._memory = memory_of(found.architecture)
        self.ram_blocks = self._memory.blocks
        self.core = _written_core(found, self.ram_blocks)
        self.vcpus = dump.vcpus or found.notes.vcpus or self._vcpus_of_windows()
        self.pause = _NoPause()
        self.probed = self._probed()
        self.lacking = tuple(self._lacking())
        if self.left_out:
            self.remarks = (f"{_in_words(self.left_out)} were left out of the earlier dump",)
        if keep:
            self.dialect = replace(
                MENDED,
                name="as the earlier dump",
                vcpus_as_made=True,
                pfn_from_zero=not self._memory.first,
            )

    @property
    def memory(self) -> GuestMemory:
        """Guest physical memory, as far as it is in the dump."""
        return self._memory

    def _probed(self) -> ProbedGuest:
        known = self._known_vmcoreinfo()
        return ProbedGuest(
            version=(0, 0, 0),
            architecture=self.architecture,
            ram_blocks=self.ram_blocks,
            readable_ranges=[(block.gpa, block.end) for block in self.ram_blocks],
            vcpus=self.vcpus,
            guest_note=known.note if known else b"",
            native_refusal=None,
        )

    @cached_property
    def _covered(self) -> list[tuple[int, int]]:
        return _bounded(self.dump.covered_ranges())

    @cached_property
    def _stored(self) -> list[tuple[int, int]]:
        return _bounded(self.dump.stored_ranges())

    @cached_property
    def left_out(self) -> Sequence[tuple[int, int]]:
        """First gpa and end of what was left out of the dump on purpose."""
        return self._in_guest(_without(self._covered, self._stored))

    @cached_property
    def lost(self) -> Sequence[tuple[int, int]]:
        """First gpa and end of what the dump is to have, and has not."""
        return self._in_guest(_without(self._stored, _bounded(self.dump.readable_ranges())))

    @property
    def lost_in_words(self) -> str | None:
        """What was lost, in words; None: nothing."""
        if not self.lost:
            return None
        return f"{_in_words(self.lost)} are not in the earlier dump: cut off or lost"

    def _in_guest(self, ranges: Iterable[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        first = self._memory.first
        return [(first + start, first + end) for start, end in ranges]

    def _lacking(self) -> Sequence[str]:
        """Return what the dump has not."""
        words = list(self.dump.lacking)
        if self._fault is not None:
            words.append(f"the notes of the earlier dump are damaged: {self._fault}")
        if (lost := self.lost_in_words) is not None:
            words.append(lost)
        if not self.vcpus and self._recognized.notes.as_they_are in {None, b""}:
            words.append("the earlier dump has no registers")
        return words

    def _vcpus_of_windows(self) -> Sequence[Vcpu]:
        header = self.dump.windows_header
        if header is None:
            return ()
        try:
            return vcpus_of_header(header, self.architecture, self._memory, self.ram_blocks)
        except (RequestError, SourceError):
            return ()

    @property
    def covered_blocks(self) -> Sequence[RamBlock]:
        """What memory the dump is about, with what was left out of it or lost."""
        return self._memory.blocks_of(self._covered)

    @property
    def windows_note(self) -> bytes:
        """The note with the header that a driver has left; empty where there is none."""
        notes = (note for note in self._notes if note.name == VMCOREINFO_NOTE_NAME)
        found = next(notes, None)
        order = self.dump.byte_order
        return encode_note(found.name, found.type, found.descriptor, order) if found else b""

    def describe_windows(self, note: bytes | None, dialect: Dialect) -> WindowsDump:
        """Return what a Windows dump has besides memory: of such a dump, its own header."""
        header = self.dump.windows_header
        if header is not None:
            return dump_of_header(header)
        # Notes have no EFER: the form of the dump says whether vCPUs were in long mode.
        self.vcpus = with_mode(self.vcpus, long=self.core.e_machine == EM_X86_64)
        return super().describe_windows(note, dialect)

    def _known_vmcoreinfo(self) -> Vmcoreinfo | None:
        text = vmcoreinfo_of(self.dump)
        if not text:
            descriptors = (
                note.descriptor for note in self._notes if note.name == VMCOREINFO_NOTE_NAME
            )
            text = next(descriptors, b"").partition(b"\0")[0]
        if not text:
            return Vmcoreinfo() if self._keep else None
        return Vmcoreinfo(encode_note(VMCOREINFO_NOTE_NAME, 0, text, self.core.byte_order), text)

    def read_utsname(self, vmcoreinfo: Vmcoreinfo) -> UtsName:
        """Return what the kernel calls itself, in its memory or else in the dump's header."""
        stored = self.dump.utsname
        if self._keep:
            return stored
        found = super().read_utsname(vmcoreinfo)
        names = {
            name: getattr(found, name) or getattr(stored, name)
            for name in UTSNAME_FIELDS
            if name != "machine"  # in which QEMU has its own name of the target
        }
        return UtsName(**names, machine=found.machine)

    def complete(self, snapshot: GuestSnapshot) -> GuestSnapshot:
        """Return what a dump is planned from, with what the dump says besides."""
        notes, dump = self._recognized.notes, self.dump
        of_vcpus = notes.as_they_are
        if dump.windows_header is not None and self.vcpus:
            of_vcpus = None
        if self._keep:
            of_vcpus = encode_notes(self._notes, dump.byte_order)
        size = sum(size for _, size in self._covered)
        if size > _MEMORY_MAX:
            raise CorruptDumpError(f"{size >> 40} TiB of memory: more than any guest has")
        absent = sorted((*self.left_out, *self.lost))
        sub_header = getattr(dump.files[0], "sub_header", {})
        earlier = EarlierDump(
            core=self._recognized.core if self._keep else self.core,
            vcpu_notes=of_vcpus,
            vcpu_count=len(self.vcpus) or sum(note.is_prstatus for note in self._notes),
            other_notes=b"" if self._keep else notes.others,
            absent=PageSet(1, absent),
            dump_level=sub_header.get("dump_level", 0) if self.left_out else 0,
            phys_base=dump.phys_base,
            page_size=dump.page_size if dump.page_size in PAGE_SIZES else None,
            segments=self._kept_segments() if self._keep else None,
            kept=self._keep,
        )
        return replace(
            snapshot,
            ram_blocks=self._memory.blocks_of(self._covered),
            guest_note=b"" if self._keep else snapshot.guest_note,
            earlier=earlier,
        )

    def differences(self, plan: DumpPlan, dump_format: str) -> Sequence[str]:
        """Say how a dump that is made of this one differs from it, besides its format."""
        return differences(self.dump, self._recognized.core, plan, dump_format)

    def _kept_segments(self) -> Sequence[Segment] | None:
        segments = getattr(self.dump, "segments", None)
        if segments is None or self.lost or self.left_out:
            return None
        return [Segment(one.p_vaddr, one.p_paddr, one.p_memsz) for one in segments]


def _written_core(found: Recognized, blocks: Sequence[RamBlock]) -> Core:
    """Return the form of a dump that readers want of this guest."""
    core = found.core
    fitting = [
        one
        for one in found.architecture.cores
        if (one.e_machine, one.byte_order) == (core.e_machine, core.byte_order)
        and not one.of_others
    ]
    wide = bool(blocks) and blocks[-1].end > _4G
    fitting.sort(key=lambda one: (wide and one.word_size < 8, one.word_size != core.word_size))
    return fitting[0] if fitting else core


def _without(
    some: Iterable[tuple[int, int]], others: Iterable[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """Yield first and end of what of (first, size) ranges is in none of others; all ascending."""
    rest = iter(others)
    taken, taken_end = 0, 0
    for first, size in some:
        start, end = first, first + size
        while start < end:
            while taken_end <= start:
                taken, length = next(rest, (_NOWHERE, 1))
                taken_end = taken + length
            stop = min(taken, end)
            if stop > start:
                yield start, stop
            start = min(taken_end, end)


def _in_words(ranges: Sequence[tuple[int, int]]) -> str:
    shown = ", ".join(f"{start:#x}-{end - 1:#x}" for start, end in ranges[:_SHOWN_RANGES])
    more = f" and {len(ranges) - _SHOWN_RANGES} more" if len(ranges) > _SHOWN_RANGES else ""
    size = sum(end - start for start, end in ranges)
    in_words = f"{size / (1 << 20):.1f} MiB" if size >= 1 << 20 else f"{size / 1024:g} KiB"
    return f"{in_words} of guest memory ({shown}{more})"
