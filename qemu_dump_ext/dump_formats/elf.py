"""ELF core: headers, notes, then all guest memory as it is.

Source: System V gABI; QEMU dump/dump.c write_elf_header(), write_elf_section_headers(),
write_elf_phdr_loads(), create_vmcore().
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from qemu_dump_ext.dump_formats._declaration import DumpFormat, FormatFamily, ProgressCallback
from qemu_dump_ext.dump_formats._memory_image import Area, MemoryImage, places_of, write_image
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.paging.segments import Segment
from qemu_dump_ext.plan.plan import DumpPlan
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.sinks import Sink
from qemu_dump_ext.structures.elf import (
    EHDR,
    ELF_MAGIC,
    ELFCLASS32,
    ELFCLASS64,
    ELFDATA,
    ET_CORE,
    EV_CURRENT,
    PN_XNUM,
    PT_LOAD,
    PT_NOTE,
    SHDR,
    SHT_STRTAB,
    elf_abi,
    phdr_layout,
)
from qemu_dump_ext.value import Value

_STRING_TABLE = b"\0.shstrtab\0"
_QEMU_SECTION_COUNT = 2
_QEMU_E_EHSIZE = 8
_4G = 1 << 32


class ElfLayout(Value):
    """Everything of the file but guest memory.

    Attributes:
        head: From the start of the file to the first byte of guest memory.
        tail: Behind guest memory.
        size: Of the whole file, in bytes.
    """

    head: bytes
    tail: bytes
    size: int


def lay_out(plan: DumpPlan) -> ElfLayout:
    """Compute all headers."""
    word_size = plan.core.word_size
    if not plan.dialect.elf32_truncates and plan.ram_blocks[-1].end > _4G:
        word_size = 8
    abi = elf_abi(plan.core.byte_order, word_size)
    ehdr, shdr, phdr = (layout.bind(abi) for layout in (EHDR, SHDR, phdr_layout(word_size)))
    phdr_count = 1 + len(plan.segments)
    extended = phdr_count >= plan.dialect.extended_from
    # Where e_phnum is too small for the count, section header 0 holds it.
    section_count = _QEMU_SECTION_COUNT if plan.dialect.sections_first else int(extended)
    sections_size = section_count * shdr.size
    if plan.dialect.sections_first:
        shoff, phoff = ehdr.size, ehdr.size + sections_size
        notes_offset = phoff + phdr_count * phdr.size
    else:
        phoff = ehdr.size
        notes_offset = phoff + phdr_count * phdr.size + sections_size
        shoff = notes_offset - sections_size if section_count else 0
    notes_end = notes_offset + len(plan.notes)
    memory_offset = notes_end + -notes_end % plan.dialect.memory_alignment
    memory_end = memory_offset + plan.memory_size

    head = bytearray(
        ehdr.pack(
            e_ident=ELF_MAGIC
            + bytes(
                (
                    ELFCLASS64 if word_size == 8 else ELFCLASS32,
                    ELFDATA[plan.core.byte_order],
                    EV_CURRENT,
                    plan.core.os_abi,
                )
            ),
            e_type=ET_CORE,
            e_machine=plan.core.e_machine,
            e_version=EV_CURRENT,
            e_phoff=phoff,
            e_shoff=shoff,
            e_flags=plan.core.e_flags,
            e_ehsize=_QEMU_E_EHSIZE if plan.dialect.sections_first else ehdr.size,
            e_phentsize=phdr.size,
            e_phnum=PN_XNUM if extended else phdr_count,
            e_shentsize=shdr.size if section_count else 0,
            e_shnum=section_count,
            e_shstrndx=section_count - 1 if plan.dialect.sections_first else 0,
        )
    )
    first_section = shdr.pack(sh_info=phdr_count if extended else 0)
    if plan.dialect.sections_first:
        # QEMU leaves this header in the byte order of its host.
        host = SHDR.bind(elf_abi("little", word_size))
        head += first_section + host.pack(
            sh_name=1, sh_type=SHT_STRTAB, sh_offset=memory_end, sh_size=len(_STRING_TABLE)
        )
    head += phdr.pack(
        p_type=PT_NOTE,
        p_offset=notes_offset,
        p_filesz=len(plan.notes),
        p_memsz=len(plan.notes),
    )
    limit = (1 << 8 * word_size) - 1
    for segment, offset, size in _places(plan, memory_offset):
        head += phdr.pack(
            p_type=PT_LOAD,
            p_offset=offset & limit,
            p_vaddr=segment.gva & limit,
            p_paddr=segment.gpa & limit,
            p_filesz=size & limit,
            p_memsz=segment.size & limit,
        )
    if section_count and not plan.dialect.sections_first:
        head += first_section
    tail = _STRING_TABLE if plan.dialect.sections_first else b""
    gap = bytes(memory_offset - notes_end)
    return ElfLayout(bytes(head) + plan.notes + gap, tail, memory_end + len(tail))


def _places(plan: DumpPlan, memory_offset: int) -> Iterator[tuple[Segment, int, int]]:
    """Yield each segment with its offset and size in the file.

    As in QEMU, a segment has what the block with its first byte has of it, and no block means no
    offset, all bits set.
    """
    blocks = plan.ram_blocks
    starts = [block.gpa for block in blocks]
    offsets = places_of(blocks, memory_offset)
    for segment in plan.segments:
        index = bisect_right(starts, segment.gpa) - 1
        if index < 0 or segment.gpa >= blocks[index].end:
            yield segment, -1, 0
            continue
        inside = segment.gpa - starts[index]
        size = min(segment.size, blocks[index].end - segment.gpa)
        yield segment, offsets[index] + inside, size


def _check(request: DumpRequest) -> None:
    if request.level_of_pages and request.paging and request.exact:
        raise RequestError(
            "QEMU's list of mapped segments has all pages: no dump level goes with it",
            hint="leave out --exact or -p",
        )
    if request.level is not None or request.omit_zero:
        raise RequestError("--level and --omit-zero are for kdumps", hint="add -z")


def _write(
    request: DumpRequest,
    plan: DumpPlan,
    memory: GuestMemory,
    sink: Sink,
    progress: ProgressCallback,
) -> None:
    layout = lay_out(plan)
    areas = (Area(block.gpa, block.size, (block,)) for block in plan.ram_blocks)
    write_image(
        request, MemoryImage(layout.head, tuple(areas), layout.tail), memory, sink, progress
    )


def _failure(has_begun: bool, reason: str) -> str:
    return f"dump: failed to {'save memory' if has_begun else 'write elf header'}: {reason}"


FORMATS = FormatFamily(
    "elf",
    lambda: (
        DumpFormat("elf", "elf", write=_write, check=_check, is_of_qemu=True, failure=_failure),
    ),
)
