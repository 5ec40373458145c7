"""ELF structures and numbers that a core file needs.

Source: System V gABI (ELF header, program header, section header, note header); glibc elf.h.
"""

from __future__ import annotations

from collections.abc import Mapping

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.structures.c_struct import (
    Abi,
    BoundStruct,
    ByteOrder,
    Field,
    StructLayout,
    fields_of,
)
from qemu_dump_ext.value import Value

ELF_MAGIC = b"\x7fELF"
ELFCLASS32, ELFCLASS64 = 1, 2
ELFDATA: dict[ByteOrder, int] = {"little": 1, "big": 2}
EV_CURRENT = 1
ELFOSABI_LINUX = 3
ET_CORE = 4
PT_LOAD, PT_NOTE = 1, 4
SHT_STRTAB = 3
PN_XNUM = 0xFFFF
"""Value of e_phnum that says: the real number is sh_info of section header 0."""

EM_SPARC, EM_386, EM_68K, EM_MIPS, EM_PARISC, EM_PPC, EM_PPC64 = 2, 3, 4, 8, 15, 20, 21
EM_S390, EM_ARM = 22, 40
EM_SH, EM_SPARCV9, EM_X86_64, EM_OPENRISC, EM_XTENSA, EM_AARCH64 = 42, 43, 62, 92, 94, 183
EM_MICROBLAZE, EM_RISCV, EM_LOONGARCH, EM_ALPHA = 189, 243, 258, 0x9026

# Types of notes named CORE.
NT_PRSTATUS, NT_PRFPREG, NT_PRPSINFO = 1, 2, 3
# Of notes named LINUX, or CORE as QEMU does on PPC. Source: Linux include/uapi/linux/elf.h.
NT_PPC_VMX, NT_PPC_SPE, NT_PPC_VSX = 0x100, 0x101, 0x102
NT_386_TLS, NT_X86_XSTATE, NT_PRXFPREG = 0x200, 0x202, 0x46E62B7F
NT_S390_HIGH_GPRS, NT_S390_TIMER, NT_S390_TODCMP, NT_S390_TODPREG = 0x300, 0x301, 0x302, 0x303
NT_S390_CTRS, NT_S390_PREFIX = 0x304, 0x305
NT_S390_VXRS_LOW, NT_S390_VXRS_HIGH, NT_S390_GS_CB = 0x309, 0x30A, 0x30B
NT_S390_PV_CPU_DATA = 0x30E
NT_ARM_VFP, NT_ARM_TLS, NT_ARM_SVE, NT_ARM_PAC_MASK = 0x400, 0x401, 0x405, 0x406
NT_LOONGARCH_LSX, NT_LOONGARCH_LASX = 0xA02, 0xA03
NOTE_TYPE_NAMES = {value: name for name, value in list(globals().items()) if name[:3] == "NT_"}
"""Names of the types above."""
CORE_NOTE_TYPES = frozenset((NT_PRSTATUS, NT_PRFPREG, NT_PRPSINFO))
"""What only a note named CORE may have."""
NT_QEMU = 0
"""Type of the note named `QEMU` that carries the x86 CPU state."""

EHDR = StructLayout(
    "Ehdr",
    (
        Field("e_ident", "bytes", 16),
        *fields_of("u16", "e_type e_machine"),
        Field("e_version", "u32"),
        *fields_of("ulong", "e_entry e_phoff e_shoff"),
        Field("e_flags", "u32"),
        *fields_of("u16", "e_ehsize e_phentsize e_phnum e_shentsize e_shnum e_shstrndx"),
    ),
)
PHDR32 = StructLayout(
    "Elf32_Phdr",
    fields_of("u32", "p_type p_offset p_vaddr p_paddr p_filesz p_memsz p_flags p_align"),
)
PHDR64 = StructLayout(
    "Elf64_Phdr",
    (
        *fields_of("u32", "p_type p_flags"),
        *fields_of("u64", "p_offset p_vaddr p_paddr p_filesz p_memsz p_align"),
    ),
)
SHDR = StructLayout(
    "Shdr",
    (
        *fields_of("u32", "sh_name sh_type"),
        *fields_of("ulong", "sh_flags sh_addr sh_offset sh_size"),
        *fields_of("u32", "sh_link sh_info"),
        *fields_of("ulong", "sh_addralign sh_entsize"),
    ),
)
NHDR = StructLayout("Nhdr", fields_of("u32", "n_namesz n_descsz n_type"))
"""Three 32-bit words in both classes."""


def phdr_layout(word_size: int) -> StructLayout:
    """Return the program header of ELFCLASS32 (4) or ELFCLASS64 (8); their order differs."""
    return PHDR64 if word_size == 8 else PHDR32


def elf_abi(byte_order: ByteOrder, word_size: int) -> Abi:
    """Return the ABI of the ELF structures: naturally aligned, no padding arises."""
    return Abi(byte_order, word_size, max_align=word_size)


class ElfHead(Value):
    """What the beginning of QEMU's ELF dump tells.

    Attributes:
        header: Fields of the ELF header.
        phdr: Form of a program header.
        byte_order: The byte order of both headers.
        abi: The ABI of all structures.
    """

    header: Mapping[str, int]
    phdr: BoundStruct
    byte_order: ByteOrder
    abi: Abi


def parse_elf_head(content: bytes) -> ElfHead:
    """Take the ELF header at the start of `content` apart.

    Raises:
        SourceError: It is cut.
    """
    word_size = 8 if content[4:5] == bytes((ELFCLASS64,)) else 4
    byte_order: ByteOrder = "big" if content[5:6] == bytes((ELFDATA["big"],)) else "little"
    abi = elf_abi(byte_order, word_size)
    ehdr = EHDR.bind(abi)
    if len(content) < ehdr.size:
        raise SourceError("QEMU's dump is cut")
    header = ehdr.unpack_integers(content)
    return ElfHead(header, phdr_layout(word_size).bind(abi), byte_order, abi)


def parse_loads(content: bytes) -> list[tuple[int, int]] | None:
    """Return the guest physical memory that the PT_LOADs at the start of `content` stand for.

    Returns:
        First address, and the first one behind, of each, by ascending address; None where their
        headers are not all there.
    """
    try:
        head = parse_elf_head(content)
    except SourceError:
        return None
    header, phdr = head.header, head.phdr
    start, count = header["e_phoff"], header["e_phnum"]
    if count == PN_XNUM:
        shdr = SHDR.bind(head.abi)
        if len(content) < header["e_shoff"] + shdr.size:
            return None
        count = shdr.unpack_integers(content, header["e_shoff"])["sh_info"]
    if not start or len(content) < start + count * phdr.size:
        return None
    segments = (phdr.unpack_integers(content, start + phdr.size * i) for i in range(count))
    return sorted(
        (segment["p_paddr"], segment["p_paddr"] + segment["p_memsz"])
        for segment in segments
        if segment["p_type"] == PT_LOAD
    )
