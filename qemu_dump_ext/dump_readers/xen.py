"""Read what Xen writes of a domain whose page frames it translates: `xl dump-core DOMAIN FILE`."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from sys import byteorder

from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.dump_readers._declaration import DumpReader, Fit
from qemu_dump_ext.dump_readers._extent_index import ExtentIndex
from qemu_dump_ext.dump_readers._image import DumpImage
from qemu_dump_ext.dump_readers._made_notes import MadeNotes, verify_registers_and_memory
from qemu_dump_ext.dump_readers._page_table_proof import page_tables_lead
from qemu_dump_ext.dump_readers.elf import CoreOf, ElfCoreFile
from qemu_dump_ext.errors import CorruptDumpError, UnsupportedTargetError
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.structures.dialect import MENDED
from qemu_dump_ext.structures.elf import ELF_MAGIC, EM_X86_64
from qemu_dump_ext.structures.xen_core import (
    FRAMES_SECTION,
    MACHINE_FRAMES_SECTION,
    NO_FRAME,
    NOTE_SECTION,
    PAGES_SECTION,
    VCPU_SECTION,
    parse_xen_header,
    xen_vcpus,
)

_NOTES_SIZE_MAX = 1 << 20
_VCPUS_SIZE_MAX = 64 << 20
_FRAMES_AT_ONCE = 1 << 16
_FRAME_SIZE = 8
_CR4_PAE = 1 << 5
_LONG_MODE = 0x500
"""Of EFER, which Xen does not tell: LME and LMA."""
_FRAMES_MAX = 1 << 52


class XenFile(MadeNotes, ElfCoreFile):
    """An open core of a domain of Xen.

    Attributes:
        xen_header: What its header note tells.
    """

    core_of = CoreOf.XEN
    what = "core"

    def __init__(self, image: DumpImage, format_suffix: str = "") -> None:
        super().__init__(image, format_suffix)
        self.format = f"xen{format_suffix}"
        self.page_size = self.xen_header.page_size
        self._vcpus = self._read_vcpus()
        if self._vcpus:
            self.architecture = all_architectures()["x86_64"]
            self.core = self.architecture.select_core(self._vcpus, (), MENDED, "")

    def _section(self, name: str, most: int) -> bytes:
        place, size = self.sections.get(name, (0, 0))
        if size > most:
            raise CorruptDumpError(f"the section {name} of a core of Xen has {size:#x} bytes")
        return self.image.read(place, size)

    def _index_memory(self) -> ExtentIndex:
        if MACHINE_FRAMES_SECTION in self.sections:
            raise UnsupportedTargetError(
                "the core is of a paravirtualized domain of Xen, whose page tables hold addresses"
                " of the machine: this is not read"
            )
        notes = self._section(NOTE_SECTION, _NOTES_SIZE_MAX)
        self.xen_header = header = parse_xen_header(notes, self.byte_order)
        (frames, frames_size), (pages, pages_size) = (
            self.sections.get(name, (0, 0)) for name in (FRAMES_SECTION, PAGES_SECTION)
        )
        count = header.pages
        if frames_size != count * _FRAME_SIZE or pages_size != count * header.page_size:
            raise CorruptDumpError(
                f"a core of Xen of {count} pages has {frames_size:#x} bytes of their numbers, and"
                f" {pages_size:#x} bytes of pages"
            )
        self.image.check(frames, frames_size)
        index = ExtentIndex()
        for first, frame, run in self._runs(frames, count):
            place = pages + first * header.page_size
            index.append(frame * header.page_size, run * header.page_size, place)
        index.settle()
        return index

    def _runs(self, place: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Yield number of the first page, its frame, and how many frames follow each other."""
        first = frame = run = 0
        for start in range(0, count, _FRAMES_AT_ONCE):
            size = min(_FRAMES_AT_ONCE, count - start) * _FRAME_SIZE
            frames = array("Q", self.image.read(place + start * _FRAME_SIZE, size))
            if self.byte_order != byteorder:
                frames.byteswap()
            for number, told in enumerate(frames, start):
                if run and told == frame + run:
                    run += 1
                    continue
                if run:
                    yield first, frame, run
                run = int(told != NO_FRAME)
                first, frame = number, told
                if run and told >= _FRAMES_MAX:
                    raise CorruptDumpError(f"a core of Xen has a page of frame {told:#x}")
        if run:
            yield first, frame, run

    def _read_vcpus(self) -> Sequence[Vcpu]:
        if self.header["e_machine"] != EM_X86_64:
            return ()
        contexts = self._section(VCPU_SECTION, _VCPUS_SIZE_MAX)
        found = enumerate(xen_vcpus(contexts, self.xen_header.vcpus))
        return tuple(self._with_mode(Vcpu(number, values)) for number, values in found)

    def _with_mode(self, vcpu: Vcpu) -> Vcpu:
        """Return a vCPU with the register that tells of long mode, where its page tables do."""
        long = Vcpu(vcpu.index, {**vcpu.registers, "efer": _LONG_MODE})
        if long.registers["cr4"] & _CR4_PAE:
            architecture = all_architectures()["x86_64"]
            blocks = [RamBlock(gpa, size, "", 0) for gpa, size in self.memory_ranges()]
            if page_tables_lead(self, blocks, architecture, long):
                return long
        return vcpu

    @property
    def vcpus(self) -> Sequence[Vcpu]:
        """The vCPUs, in the order of their section; empty where they are of no form we know."""
        return self._vcpus

    def covered_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (gpa, size) of the guest's memory, ascending, merged."""
        return self.memory_ranges()


READER = DumpReader(
    name="xen",
    probe=lambda head: Fit.MAYBE if head.startswith(ELF_MAGIC) else Fit.NO,
    open=XenFile,
    describe=lambda dump: {
        "vcpus": lambda: dump.xen_header.vcpus,
        "page_count": lambda: dump.xen_header.pages,
        "sections": lambda: " ".join(filter(None, dump.sections)),
    },
    verify=verify_registers_and_memory,
)
