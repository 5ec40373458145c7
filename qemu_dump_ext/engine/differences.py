"""How a dump that is made of another one differs from it, besides its format.

The names are those of the fields, as in the headers of the formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qemu_dump_ext.architectures import Core
from qemu_dump_ext.dump_readers import DumpFile
from qemu_dump_ext.engine.recognize import notes_of, vmcoreinfo_of
from qemu_dump_ext.plan.plan import DumpPlan
from qemu_dump_ext.structures.elf import PN_XNUM
from qemu_dump_ext.structures.utsname import UTSNAME_FIELDS
from qemu_dump_ext.structures.vmcoreinfo import PAGE_SIZES, VMCOREINFO_NOTE_NAME

_ELF = "elf"
_KDUMP = "kdump"


def differences(dump: DumpFile, core: Core, plan: DumpPlan, dump_format: str) -> Sequence[str]:
    """Say how a dump differs from the one of which it is made.

    Args:
        dump: The earlier one.
        core: Its form.
        plan: Of the new one.
        dump_format: Name of the new one's format.
    """
    found = list(_of_notes(dump, core, plan))
    if dump.reader == _KDUMP and dump_format.startswith(_KDUMP):
        found += _of_kdump_headers(dump, plan)
    elif dump.reader == _ELF == dump_format:
        found += _of_elf_headers(dump, plan)
    return found


def _of_notes(dump: DumpFile, core: Core, plan: DumpPlan) -> Iterator[str]:
    if plan.vmcoreinfo_span and not vmcoreinfo_of(dump):
        notes, fault = notes_of(dump)
        told = "the notes were damaged" if fault else "there was none"
        if any(note.name == VMCOREINFO_NOTE_NAME for note in notes):
            told = "the sub-header did not know of its note"
        yield f"VMCOREINFO: {told}"
    if core.of_others and not plan.core.of_others:
        yield "notes: laid out as Linux and its readers have them, not as QEMU does"


def _of_kdump_headers(dump: DumpFile, plan: DumpPlan) -> Iterator[str]:
    word = (1 << 8 * dump.word_size) - 1
    if dump.phys_base is not None and plan.phys_base & word != dump.phys_base & word:
        yield f"phys_base: {plan.phys_base & word:#x}, was {dump.phys_base:#x}"
    if dump.page_size in PAGE_SIZES and plan.page_size != dump.page_size:
        yield f"block_size: {plan.page_size}, was {dump.page_size}"
    for name, value in plan.utsname.encode().items():
        told = value.decode("utf-8", "replace")
        if name in UTSNAME_FIELDS and told != dump.header.get(name, ""):
            yield f"{name}: {told!r}, was {dump.header.get(name, '')!r}"


def _of_elf_headers(dump: DumpFile, plan: DumpPlan) -> Iterator[str]:
    header = dump.header
    ehdr_size = 64 if dump.word_size == 8 else 52
    if header["e_ehsize"] != ehdr_size:
        yield f"e_ehsize: {ehdr_size}, was {header['e_ehsize']}"
    if header["e_phoff"] != ehdr_size:
        yield f"e_phoff: {ehdr_size}, was {header['e_phoff']:#x}"
    if header["e_shnum"] and 1 + len(plan.segments) < PN_XNUM:
        yield f"e_shnum: 0, was {header['e_shnum']}"
