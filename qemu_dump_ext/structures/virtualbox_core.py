"""What VirtualBox writes of a vCPU into a core of its guest: `VBoxManage debugvm NAME dumpvmcore`.

Source: VirtualBox include/VBox/vmm/dbgfcorefmt.h, struct DBGFCORECPU. Version 0x00010003 of the
format has no flags, and those before it have a vCPU as VirtualBox has it inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qemu_dump_ext.errors import CorruptDumpError
from qemu_dump_ext.structures.c_struct import Abi, Field, StructLayout, fields_of
from qemu_dump_ext.structures.elf_notes import Note
from qemu_dump_ext.structures.fxsave import registers_of_fxsave

_CORE, _CPU = ("VBCORE", 0xB00), ("VBCPU", 0xB01)
_MAGIC = 0xC01AC0DE
_VERSIONS = range(0x00010004, 0x00010007)
"""Of the format, in which what is wanted of a vCPU lies alike."""
_VCPUS_MAX = 1 << 10
"""More than VirtualBox makes."""

_ABI = Abi("little", word_size=8, max_align=8)
_DESCRIPTOR = StructLayout(
    "DBGFCOREDESCRIPTOR",
    fields_of("u32", "u32Magic u32FmtVersion cbSelf u32VBoxVersion u32VBoxRevision cCpus"),
).bind(_ABI)
_SELECTORS = "cs ds es fs gs ss"


def _selector(name: str) -> tuple[Field, ...]:
    """Declare DBGFCORESEL."""
    return (
        Field(f"{name}_base", "u64"),
        *fields_of("u32", f"{name}_limit {name}_attr"),
        *fields_of("u16", f"{name}_selector {name}_reserved0"),
        Field(f"{name}_reserved1", "u32"),
    )


def _table(name: str) -> tuple[Field, ...]:
    """Declare DBGFCOREXDTR."""
    return (Field(f"{name}_base", "u64"), *fields_of("u32", f"{name}_limit {name}_reserved"))


_CPU_STATE = StructLayout(
    "DBGFCORECPU",
    (
        *fields_of("u64", "rax rbx rcx rdx rsi rdi r8 r9 r10 r11 r12 r13 r14 r15 rip rsp rbp"),
        Field("eflags", "u64"),
        *(member for name in _SELECTORS.split() for member in _selector(name)),
        *fields_of("u64", "cr0 cr2 cr3 cr4 dr0 dr1 dr2 dr3 dr4 dr5 dr6 dr7"),
        *_table("gdt"),
        *_table("idt"),
        *_selector("ldt"),
        *_selector("tr"),
        *fields_of("u64", "sysenter_cs sysenter_eip sysenter_esp efer star pat lstar cstar sfmask"),
        Field("kernel_gs_base", "u64"),
    ),
).bind(_ABI)
"""Up to what is wanted of it; behind it are more of the model-specific registers, and then what
XSAVE stores, where it ends: how much of them there is depends on the version and on the host."""
_XSAVE_UNIT = 4096
"""Bytes; X86XSAVEAREA is one or several."""
_XSAVE_OFFSETS = range(_CPU_STATE.size + 24, _CPU_STATE.size + 49, 8)
_REGISTERS = frozenset(
    (
        *"rax rbx rcx rdx rsi rdi rsp rbp rip eflags r8 r9 r10 r11 r12 r13 r14 r15".split(),
        *"cr0 cr2 cr3 cr4 dr0 dr1 dr2 dr3 dr6 dr7 efer kernel_gs_base".split(),
        *(
            f"{name}_{part}"
            for name in f"{_SELECTORS} ldt tr gdt idt".split()
            for part in ("selector", "base", "limit")
        ),
    )
)
_ATTRIBUTES = 0xF0FF
"""Bits of a selector's attributes but those of the limit, as in the upper half of a descriptor."""


def is_of_virtualbox(notes: Sequence[Note]) -> bool:
    """Tell whether a core whose notes these are is VirtualBox's."""
    return any((note.name, note.type) == _CORE for note in notes)


def virtualbox_vcpus(notes: Sequence[Note]) -> Sequence[Mapping[str, int]]:
    """Return the registers of each vCPU, by our names; empty where they are of no known form.

    Raises:
        CorruptDumpError: The notes are not as VirtualBox writes them.
    """
    core = next(note.descriptor for note in notes if (note.name, note.type) == _CORE)
    if len(core) < _DESCRIPTOR.size:
        raise CorruptDumpError(f"VirtualBox's note VBCORE has {len(core)} bytes")
    told = _DESCRIPTOR.unpack_integers(core)
    if told["u32Magic"] != _MAGIC:
        raise CorruptDumpError(
            f"VirtualBox's note VBCORE has magic {told['u32Magic']:#x}, not {_MAGIC:#x}"
        )
    if told["u32FmtVersion"] not in _VERSIONS:
        return ()
    found = [note.descriptor for note in notes if (note.name, note.type) == _CPU]
    if len(found) != told["cCpus"] or len(found) > _VCPUS_MAX:
        raise CorruptDumpError(f"VirtualBox's core of {told['cCpus']} vCPUs has {len(found)}")
    return [_registers(descriptor) for descriptor in found]


def _registers(descriptor: bytes) -> Mapping[str, int]:
    if len(descriptor) < _CPU_STATE.size:
        raise CorruptDumpError(f"VirtualBox's note VBCPU has {len(descriptor)} bytes")
    values = _CPU_STATE.unpack_integers(descriptor)
    flags = {
        f"{name}_flags": (values[f"{name}_attr"] & _ATTRIBUTES) << 8
        for name in f"{_SELECTORS} ldt tr".split()
    }
    # What has no selector and no attributes.
    none = {f"{name}_{part}": 0 for name in ("gdt", "idt") for part in ("selector", "flags")}
    found = {**{name: values[name] for name in _REGISTERS & values.keys()}, **flags, **none}
    xsave = len(descriptor) % _XSAVE_UNIT
    if xsave in _XSAVE_OFFSETS and len(descriptor) > xsave:
        found |= registers_of_fxsave(descriptor[xsave:])
    return found
