"""What Xen writes of a domain: `xl dump-core`.

An ELF core without program headers; what there is has sections. Of a domain whose page frames Xen
translates (HVM, PVH, Arm), `.xen_pfn` has the number of each frame in `.xen_pages`.

Source: Xen docs/misc/dump-core-format.txt; xen/include/public/arch-x86/xen.h and xen-x86_64.h,
struct vcpu_guest_context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qemu_dump_ext.errors import CorruptDumpError
from qemu_dump_ext.structures.c_struct import Abi, ByteOrder, Field, StructLayout, fields_of
from qemu_dump_ext.structures.elf_notes import Note, parse_notes
from qemu_dump_ext.structures.fxsave import FXSAVE_SIZE, registers_of_fxsave
from qemu_dump_ext.value import Value

NOTE_SECTION, VCPU_SECTION = ".note.Xen", ".xen_prstatus"
FRAMES_SECTION, PAGES_SECTION = ".xen_pfn", ".xen_pages"
MACHINE_FRAMES_SECTION = ".xen_p2m"
"""Instead of the first, of a paravirtualized domain: with the frames of the machine as well."""
NO_FRAME = (1 << 64) - 1
"""In `.xen_pfn`: the page is none of the domain's."""

_HEADER_NOTE = ("Xen", 0x2000001)
_MAGICS = (0xF00FEBED, 0xF00FEBEE)
_PAGE_SIZES = (4096, 16384, 65536)
_VCPUS_MAX = 1 << 12
_HEADER = StructLayout(
    "xen_dumpcore_elfnote_header_desc",
    fields_of("u64", "xch_magic xch_nr_vcpus xch_nr_pages xch_page_size"),
)


def _segment(name: str, *behind: Field) -> tuple[Field, ...]:
    return (Field(f"{name}_selector", "u16"), *behind, Field(f"pad_{name}", "bytes", 6))


_CONTEXT_X86_64 = StructLayout(
    "vcpu_guest_context",
    (
        Field("fpu_ctxt", "bytes", FXSAVE_SIZE),
        Field("flags", "u64"),
        *fields_of("u64", "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi"),
        *fields_of("u32", "error_code entry_vector"),
        Field("rip", "u64"),
        *_segment("cs"),
        *fields_of("u64", "eflags rsp"),
        *(member for name in ("ss", "es", "ds", "fs", "gs") for member in _segment(name)),
        Field("trap_ctxt", "bytes", 256 * 16),
        *fields_of("u64", "ldt_base ldt_ents"),
        Field("gdt_frames", "bytes", 16 * 8),
        *fields_of("u64", "gdt_ents kernel_ss kernel_sp"),
        *fields_of("u64", "cr0 cr1 cr2 cr3 cr4 cr5 cr6 cr7 dr0 dr1 dr2 dr3 dr4 dr5 dr6 dr7"),
        *fields_of("u64", "event_callback_eip failsafe_callback_eip syscall_callback_eip"),
        *fields_of("u64", "vm_assist fs_base gs_base_kernel gs_base_user"),
    ),
).bind(Abi("little", word_size=8, max_align=8))
_REGISTERS = (
    *"rax rbx rcx rdx rsi rdi rsp rbp rip eflags r8 r9 r10 r11 r12 r13 r14 r15".split(),
    *"cr0 cr2 cr3 cr4 dr0 dr1 dr2 dr3 dr6 dr7 fs_base".split(),
    *(f"{name}_selector" for name in "cs ds es fs gs ss".split()),
)


_FPU_VALID = 1 << 0
"""VGCF_i387_valid: the vCPU has used its floating point."""


class XenHeader(Value):
    """What the header note tells.

    Attributes:
        vcpus: How many there are.
        pages: Likewise.
        page_size: In bytes.
    """

    vcpus: int
    pages: int
    page_size: int


def parse_xen_header(notes: bytes, byte_order: ByteOrder) -> XenHeader:
    """Return what the section `.note.Xen` tells.

    Raises:
        CorruptDumpError: It has no header, or one that cannot be.
    """
    header = _HEADER.bind(Abi(byte_order, word_size=8, max_align=8))
    found = (one for one in parse_notes(notes, byte_order) if _is_header(one, header.size))
    note = next(found, None)
    if note is None:
        raise CorruptDumpError("a core of Xen without a header note")
    told = header.unpack_integers(note.descriptor)
    if (
        told["xch_magic"] not in _MAGICS
        or told["xch_page_size"] not in _PAGE_SIZES
        or told["xch_nr_vcpus"] > _VCPUS_MAX
    ):
        raise CorruptDumpError(f"the header note of a core of Xen is damaged: {told}")
    return XenHeader(told["xch_nr_vcpus"], told["xch_nr_pages"], told["xch_page_size"])


def _is_header(note: Note, size: int) -> bool:
    return (note.name, note.type) == _HEADER_NOTE and len(note.descriptor) >= size


def xen_vcpus(contexts: bytes, count: int) -> Sequence[Mapping[str, int]]:
    """Return the registers of each vCPU of x86_64, by our names; empty where they are no such ones.

    Args:
        contexts: The section `.xen_prstatus`.
        count: Of the vCPUs.
    """
    size = _CONTEXT_X86_64.size
    if len(contexts) != count * size:
        return ()
    return [_registers(contexts[at : at + size]) for at in range(0, count * size, size)]


def _registers(context: bytes) -> Mapping[str, int]:
    values = _CONTEXT_X86_64.unpack_integers(context)
    bases = values["gs_base_kernel"], values["gs_base_user"]
    # The one that is in use depends on where the vCPU is.
    used, other = bases if not values["cs_selector"] & 3 else reversed(bases)
    found = {name: values[name] for name in _REGISTERS}
    if values["flags"] & _FPU_VALID:
        found |= registers_of_fxsave(context)
    return {**found, "gs_base": used, "kernel_gs_base": other}
