"""Read an ELF core of a guest: 32 and 64 bit, both byte orders, headers in any place.

Source: System V gABI; QEMU dump/dump.c (section headers before the program headers since 7.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cached_property
from operator import itemgetter
from types import MappingProxyType
from typing import Any

from qemu_dump_ext.dump_readers._declaration import LISTED_MAX, DumpReader, Fit
from qemu_dump_ext.dump_readers._elf_verifier import verify_elf_core
from qemu_dump_ext.dump_readers._extent_dump import ZEROES, ExtentDump
from qemu_dump_ext.dump_readers._extent_index import ExtentIndex
from qemu_dump_ext.dump_readers._image import DumpImage
from qemu_dump_ext.errors import AnothersDumpError, CorruptDumpError, NotADumpError
from qemu_dump_ext.printable import printable
from qemu_dump_ext.structures.c_struct import ByteOrder
from qemu_dump_ext.structures.elf import (
    EHDR,
    ELF_MAGIC,
    ELFCLASS32,
    ELFCLASS64,
    ELFDATA,
    ET_CORE,
    PN_XNUM,
    PT_LOAD,
    PT_NOTE,
    SHDR,
    elf_abi,
    phdr_layout,
)
from qemu_dump_ext.structures.virtualbox_core import is_of_virtualbox
from qemu_dump_ext.structures.xen_core import NOTE_SECTION

_IDENT_SIZE = 16
_EI_CLASS, _EI_DATA = 4, 5
_WORD_SIZES = {ELFCLASS32: 4, ELFCLASS64: 8}
_BYTE_ORDERS: dict[int, ByteOrder] = {number: order for order, number in ELFDATA.items()}
_PHDRS_MAX = 1 << 20
"""More program headers than a paged dump of any guest was seen to have."""
_PHDRS_AT_ONCE = 4096
_OFFSET_END = 1 << 63
_SECTIONS_MAX = 64
_SECTION_NAMES_SIZE_MAX = 4096


class CoreOf(Enum):
    """Of what an ELF core is; other readers read what is none of a guest by QEMU or a kernel."""

    GUEST = "a guest"
    PROCESS = "a process"
    VIRTUALBOX = "a guest of VirtualBox"
    XEN = "a domain of Xen"


@dataclass(frozen=True, slots=True)
class Segment:
    """One PT_LOAD; the names are those of the program header, in bytes.

    Attributes:
        number: The number of the program header, from 0.
    """

    number: int
    p_offset: int
    p_vaddr: int
    p_paddr: int
    p_filesz: int
    p_memsz: int


class ElfCoreFile(ExtentDump):
    """An open ELF core.

    Attributes:
        segments: The PT_LOADs, in the order of the file.
        headers_end: Offset behind the last program header.
        core_of: Of what it is the core.
    """

    page_size = 1
    core_of = CoreOf.GUEST

    def __init__(self, image: DumpImage, format_suffix: str = "") -> None:
        self.image = image
        self.format = f"elf{format_suffix}"
        ident = image.read(0, _IDENT_SIZE)
        try:
            self.word_size = _WORD_SIZES[ident[_EI_CLASS]]
            self.byte_order = _BYTE_ORDERS[ident[_EI_DATA]]
        except KeyError:
            raise CorruptDumpError(
                f"ELF class {ident[_EI_CLASS]} and data {ident[_EI_DATA]}"
                f" at offset {_EI_CLASS:#x} are not 1 or 2"
            ) from None
        abi = elf_abi(self.byte_order, self.word_size)
        layout = EHDR.bind(abi)
        self._ehdr = layout.unpack_integers(image.read(0, layout.size))
        if self._ehdr["e_type"] != ET_CORE:
            raise NotADumpError(f"ELF file of type {self._ehdr['e_type']} is not a core")
        self.header = MappingProxyType(dict(self._ehdr))
        self.ehdr_size = layout.size
        self._phdr = phdr_layout(self.word_size).bind(abi)
        self._shdr = SHDR.bind(abi)
        self.segments: list[Segment] = []
        self._notes: list[tuple[int, int]] = []
        self._read_program_headers()
        found = self._find_kind()
        if found is not self.core_of:
            raise AnothersDumpError(
                f"it is the core of {found.value}, and not of {self.core_of.value}"
            )
        self.index = self._index_memory()

    def _read_program_headers(self) -> None:
        start, size = self._ehdr["e_phoff"], self._phdr.size
        count = self.program_header_count
        if self._ehdr["e_phentsize"] != size:
            raise CorruptDumpError(f"e_phentsize is {self._ehdr['e_phentsize']}, not {size}")
        if count > _PHDRS_MAX:
            raise CorruptDumpError(f"{count} program headers are more than any dump has")
        self.headers_end = start + count * size
        self.image.check(start, count * size)
        place = self._phdr.offsets
        names = [name for name in Segment.__slots__ if name != "number"]
        order = {name: index for index, name in enumerate(place)}
        kind, offset, filesz = (order[name] for name in ("p_type", "p_offset", "p_filesz"))
        wanted = itemgetter(*(order[name] for name in names))
        for first in range(0, count, _PHDRS_AT_ONCE):
            number = min(_PHDRS_AT_ONCE, count - first)
            data = self.image.read(start + first * size, number * size)
            for index, phdr in enumerate(self._phdr.codec.iter_unpack(data), first):
                if phdr[kind] == PT_NOTE:
                    self._notes.append((phdr[offset], phdr[filesz]))
                elif phdr[kind] == PT_LOAD:
                    self.segments.append(Segment(index, *wanted(phdr)))

    @cached_property
    def program_header_count(self) -> int:
        """Number of program headers, from section header 0 where e_phnum has no room for it."""
        if self._ehdr["e_phnum"] != PN_XNUM:
            return self._ehdr["e_phnum"]
        section = self._shdr.unpack_integers(
            self.image.read(self._ehdr["e_shoff"], self._shdr.size)
        )
        return section["sh_info"]

    def _find_kind(self) -> CoreOf:
        if _is_of_process(self.segments):
            return CoreOf.PROCESS
        if not self.segments and NOTE_SECTION in self.sections:
            return CoreOf.XEN
        with suppress(CorruptDumpError):
            if is_of_virtualbox(self._read_notes()):
                return CoreOf.VIRTUALBOX
        return CoreOf.GUEST

    def _index_memory(self) -> ExtentIndex:
        index = ExtentIndex()
        for segment in self.segments:
            if (
                segment.p_memsz >= _OFFSET_END
                or segment.p_paddr + segment.p_memsz > 1 << 64
                or (segment.p_filesz and segment.p_offset + segment.p_filesz > _OFFSET_END)
            ):
                raise CorruptDumpError(f"program header {segment.number} has impossible sizes")
            if segment.p_memsz > segment.p_filesz:
                index.append(segment.p_paddr, segment.p_memsz, ZEROES)
        for segment in self.segments:
            # Later extents win: what one mapping has cut off, another may have.
            if size := min(segment.p_filesz, segment.p_memsz):
                index.append(segment.p_paddr, size, segment.p_offset)
        index.settle()
        return index

    @property
    def has_notes(self) -> bool:
        """Whether there is a PT_NOTE."""
        return bool(self._notes)

    def section_headers(self) -> list[dict[str, int]]:
        """Return the section headers, of which a dump has none or two, by member.

        Raises:
            CorruptDumpError: They are not inside the file.
        """
        count, size = self._ehdr["e_shnum"], self._shdr.size
        if not count:
            return []
        if self._ehdr["e_shentsize"] != size:
            raise CorruptDumpError(f"e_shentsize is {self._ehdr['e_shentsize']}, not {size}")
        data = self.image.read(self._ehdr["e_shoff"], count * size)
        return [self._shdr.unpack_integers(data, index * size) for index in range(count)]

    @cached_property
    def sections(self) -> Mapping[str, tuple[int, int]]:
        """Offset and size of the sections that have names, by name; empty where they are damaged.

        What a dump is may be told by them, and readers of dumps need none.
        """
        try:
            if self._ehdr["e_shnum"] > _SECTIONS_MAX:
                return {}
            headers = self.section_headers()
            names = headers[self._ehdr["e_shstrndx"]] if headers else {"sh_offset": 0, "sh_size": 0}
            size = min(names["sh_size"], _SECTION_NAMES_SIZE_MAX)
            text = self.image.read(names["sh_offset"], size)
        except (CorruptDumpError, IndexError):
            return {}
        found = {}
        for header in headers:
            name = text[header["sh_name"] :].partition(b"\0")[0]
            found[printable(name.decode("latin-1"))] = header["sh_offset"], header["sh_size"]
        return found

    def _note_areas(self) -> list[tuple[int, int]]:
        return self._notes

    def covered_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (gpa, size) of the segments that have any data, ascending, merged.

        Those without are memory that a page table maps and the guest has not.
        """
        index = ExtentIndex()
        for segment in self.segments:
            if segment.p_filesz and segment.p_memsz:
                index.append(segment.p_paddr, segment.p_memsz, 0)
        index.settle()
        return index.ranges()


def _is_of_process(segments: Sequence[Segment]) -> bool:
    """Tell whether no segment has a physical address, as Linux and gdb write a process."""
    return (
        len(segments) > 1
        and not any(segment.p_paddr for segment in segments)
        and all(segment.p_vaddr for segment in segments)
    )


def _describe(dump: ElfCoreFile) -> Mapping[str, Callable[[], Any]]:
    return {
        "segment_count": lambda: len(dump.segments),
        "segments": lambda: [asdict(segment) for segment in dump.segments[:LISTED_MAX]],
    }


READER = DumpReader(
    name="elf",
    probe=lambda head: Fit.SURE if head.startswith(ELF_MAGIC) else Fit.NO,
    open=ElfCoreFile,
    describe=_describe,
    verify=verify_elf_core,
)
