"""How a dump is spelt: as the readers want it, or as one version of QEMU writes it.

A dialect is a set of named differences. `MENDED` is the default; with `--exact` the dialect of the
attached QEMU reproduces its dumps byte for byte, known defects included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

from qemu_dump_ext.structures.elf import PN_XNUM
from qemu_dump_ext.value import Value

QemuVersion = tuple[int, int, int]


class Dialect(Value):
    """The differences between writers of one and the same dump.

    Attributes:
        name: What messages call it.
        sections_first: Two section headers and a string table surround the program headers, and
            e_ehsize is the size of a pointer (QEMU since 7.2). makedumpfile, and crash before
            7.2.9, want the program headers right behind the ELF header.
        vaddr_is_paddr: An unpaged PT_LOAD has its physical address as p_vaddr (QEMU since 4.0);
            with 0, gdb maps all blocks over each other.
        kernel_gs_base: When the note `QEMU` has its last member: QEMU since 3.0 `always`, before
            `never`; where it is not `known`, it is better absent than zero.
        utsname: What a kdump header says of the kernel. `facts`: all that the guest tells;
            libkdumpfile, and drgn with it, refuses a header without. `target`: only a machine
            name, and only for some targets. `unknown`: the machine name "Unknown".
        phys_base_is_hex: NUMBER(phys_base) is read as hexadecimal though Linux writes it in
            decimal; wrong whenever KASLR moved the kernel.
        first_vcpu_decides: Word size and notes follow the first vCPU, even where another one is
            in long mode already.
        vcpus_as_made: Notes are in the order in which QEMU made the vCPUs; a reader takes the
            first for that of the kernel's first CPU, and so on.
        notes_of_one_size: The notes of all vCPUs are reckoned to be as large as those of the first;
            where they are not, as on boards with and without FPU, no dump comes out right.
        pid_unconverted: Process ids as QEMU wrote them before 9.1: none on PowerPC, in the byte
            order of QEMU's host on s390x.
        hypervisor_decides_byte_order: A pseries guest's byte order is taken from a register of
            the hypervisor mode, which such a guest has not (QEMU before 8.1): little-endian
            guests are dumped as big-endian.
        qemu_note_layouts: Notes are laid out as QEMU does it where Linux, and so every reader,
            does it otherwise: PowerPC (32-bit prstatus with the prefix of the 64-bit one, every
            note named CORE, VRSAVE and the high halves of SPE always zero, VSCR of little-endian
            guests in the wrong word), LoongArch (no control registers, the address of the last
            exception instead of the pc, short floating-point note), s390x (PSW with a condition
            code that is stale under TCG).
        elf32_truncates: ELFCLASS32 even where guest memory does not fit into it.
        pfn_from_zero: Page frames of a kdump count from gpa 0 on every target; on 32-bit Arm the
            readers count from phys_base.
        packed_sub_header: A 32-bit kdump sub-header is packed on every target, as only i386
            has it.
        fixed_page_size: kdump blocks have a size that depends on the target alone; otherwise it
            is the page size of the guest's kernel, without which libkdumpfile and makedumpfile
            miscount.
        whole_pages_only: max_mapnr is rounded down, and every block has its own descriptor for
            a page that several blocks share, so that all later ones are off.
        names_wrong_parameters: Messages say what a parameter should be, not only that it is
            invalid.
        memory_alignment: In an ELF core, the first byte of guest memory stands at a multiple of
            this many bytes; where that is a page, readers can map it, and it need not go through
            the page cache. QEMU puts it right behind the notes.
        extended_from: Number of program headers from which section header 0 holds the number.
        windows_as_qemu: A Windows dump has what QEMU gets wrong in it: with 32-bit pointers, its
            size cut to 32 bits, and 4 bytes overwritten behind the registers of each vCPU; with
            64-bit pointers, no registers of x87 and SSE where it says that there are; parts
            of what could not be read as a whole; runs that do not ascend, or are no memory.
        names_missing_note: Messages tell a guest without a note from one whose note is no header
            of a Windows dump.
        native_mappings: A paged dump has QEMU's list of mappings, with what is wrong in it.
    """

    name: str
    sections_first: bool
    vaddr_is_paddr: bool
    kernel_gs_base: Literal["always", "known", "never"]
    utsname: Literal["facts", "target", "unknown"]
    phys_base_is_hex: bool
    first_vcpu_decides: bool
    vcpus_as_made: bool
    notes_of_one_size: bool
    pid_unconverted: bool
    hypervisor_decides_byte_order: bool
    qemu_note_layouts: bool
    elf32_truncates: bool
    pfn_from_zero: bool
    packed_sub_header: bool
    fixed_page_size: bool
    whole_pages_only: bool
    names_wrong_parameters: bool
    memory_alignment: int
    extended_from: int
    windows_as_qemu: bool
    names_missing_note: bool
    native_mappings: bool


MENDED = Dialect(
    name="as the readers want it",
    sections_first=False,
    vaddr_is_paddr=True,
    kernel_gs_base="known",
    utsname="facts",
    phys_base_is_hex=False,
    first_vcpu_decides=False,
    vcpus_as_made=False,
    notes_of_one_size=False,
    pid_unconverted=False,
    hypervisor_decides_byte_order=False,
    qemu_note_layouts=False,
    elf32_truncates=False,
    pfn_from_zero=False,
    packed_sub_header=False,
    fixed_page_size=False,
    whole_pages_only=False,
    names_wrong_parameters=True,
    memory_alignment=4096,
    extended_from=PN_XNUM,
    windows_as_qemu=False,
    names_missing_note=True,
    native_mappings=False,
)


_QEMU_0 = Dialect(
    name="QEMU",
    sections_first=False,
    vaddr_is_paddr=False,
    kernel_gs_base="never",
    utsname="target",
    phys_base_is_hex=True,
    first_vcpu_decides=True,
    vcpus_as_made=True,
    notes_of_one_size=True,
    pid_unconverted=True,
    hypervisor_decides_byte_order=True,
    qemu_note_layouts=True,
    elf32_truncates=True,
    pfn_from_zero=True,
    packed_sub_header=True,
    fixed_page_size=True,
    whole_pages_only=True,
    names_wrong_parameters=False,
    memory_alignment=1,
    extended_from=PN_XNUM - 1,
    windows_as_qemu=True,
    names_missing_note=False,
    native_mappings=True,
)
# What each version of QEMU changed, oldest first.
_CHANGES: tuple[tuple[QemuVersion, Callable[[Dialect], Dialect]], ...] = (
    ((3, 0, 0), partial(replace, kernel_gs_base="always")),
    ((4, 0, 0), partial(replace, vaddr_is_paddr=True)),
    ((7, 2, 0), partial(replace, sections_first=True, extended_from=PN_XNUM)),
    ((8, 1, 0), partial(replace, hypervisor_decides_byte_order=False)),
    ((9, 1, 0), partial(replace, pid_unconverted=False, names_wrong_parameters=True)),
    ((9, 2, 0), partial(replace, utsname="unknown")),
    ((11, 0, 0), partial(replace, names_missing_note=True)),
)


def qemu_dialect(version: QemuVersion) -> Dialect:
    """Return how QEMU of this version spells its own dumps."""
    dialect = replace(_QEMU_0, name="QEMU {}.{}.{}".format(*version))
    for since, change in _CHANGES:
        if version >= since:
            dialect = change(dialect)
    return dialect
