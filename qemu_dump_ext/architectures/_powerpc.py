"""What 32-bit and 64-bit PowerPC have in common.

Sources:
    Linux arch/powerpc/include/uapi/asm/ptrace.h (struct pt_regs), elf.h (ELF_NGREG 48,
    ELF_NFPREG 33, ELF_NVRREG 34), arch/powerpc/kernel/ptrace/ptrace-view.c (order of the notes,
    their owner LINUX, where VSCR stands); QEMU target/ppc/arch_dump.c
    ppc_write_elf_vmxregset() and its siblings, cpu_get_dump_info(); target/ppc/gdbstub.c
    ppc_maybe_bswap_register().
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from qemu_dump_ext.architectures._declaration import (
    Architecture,
    Core,
    MigratedCpu,
    NoteLayout,
    Register,
    VcpuReadings,
    field_names,
)
from qemu_dump_ext.architectures._linux_notes import numbered, prstatus_layout, wide_fields
from qemu_dump_ext.architectures._register_text import parse_rows
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.structures.c_struct import (
    U32_MAX,
    U64_MAX,
    ByteOrder,
    Field,
    StructLayout,
    fields_of,
)
from qemu_dump_ext.structures.dialect import Dialect
from qemu_dump_ext.structures.elf import NT_PPC_SPE, NT_PPC_VMX, NT_PPC_VSX, NT_PRFPREG, NT_PRSTATUS

if TYPE_CHECKING:
    from qemu_dump_ext.structures.migration import DeviceFields

_GPRS = numbered("r", 32)
_FPRS = numbered("f", 32)
_VMX = numbered("vr", 32)
_VSX_LOW = " ".join(f"vs{index}h" for index in range(32))
_SPE_HIGH = " ".join(f"ev{index}h" for index in range(32))
_NGREG = 48
_PT_REGS = f"{_GPRS} nip msr orig_gpr3 ctr link xer ccr softe trap dar dsisr result"
_UNUSED_GREGS = numbered("unused", _NGREG - len(_PT_REGS.split()))
_SAME_NAME_IN_STUB = "msr ctr xer fpscr vscr vrsave lpcr hid0 pvr"
_BEHIND_FPSCR = f"{_VMX} vscr vrsave {_VSX_LOW}".split()
_OPTIONAL = (*_BEHIND_FPSCR, *_SPE_HIGH.split(), "spe_acc", "spe_fscr")
_VECTOR_SIZE = 16

_MSR_ILE = 1 << 16
_LPCR_ILE = 1 << 25
_HID0_HILE = 1 << 44
_HID0_HILE_POWER9 = 1 << 59
_FIRST_ISA_3_PVRS = frozenset((0x4E, 0x80))  # POWER9, POWER10
_MSR_LE_BYTE = 1
_PSERIES = "pseries"

_REGISTERS = (
    *(
        Register(name, gdb=name)
        for name in f"{_GPRS} {_FPRS} {_VMX} {_VSX_LOW} {_SPE_HIGH} {_SAME_NAME_IN_STUB}".split()
    ),
    Register("nip", gdb="pc"),
    Register("link", gdb="lr"),
    Register("ccr", gdb="cr"),
    Register("spe_acc", gdb="acc"),
    Register("spe_fscr", gdb="spefscr"),
)
_MONITOR_NAMES = {
    "NIP": "nip",
    "LR": "link",
    "CTR": "ctr",
    "XER": "xer",
    "MSR": "msr",
    "HID0": "hid0",
    "CR": "ccr",
    "FPSCR": "fpscr",
    "PVR": "pvr",
    "VRSAVE": "vrsave",
    "LPCR": "lpcr",
}


def _make_cores(
    e_machine: int, word_size: int, uname_machines: Mapping[ByteOrder, str]
) -> Mapping[tuple[ByteOrder, bool, bool], Core]:
    """Declare every form: by byte order, by QEMU's layouts or Linux's, with or without pid."""
    cores: dict[tuple[ByteOrder, bool, bool], Core] = {}
    for byte_order, machine in uname_machines.items():
        for by_qemu in (False, True):
            for without_pid in (False, True):
                cores[byte_order, by_qemu, without_pid] = Core(
                    e_machine=e_machine,
                    byte_order=byte_order,
                    word_size=word_size,
                    notes=_notes(word_size, by_qemu=by_qemu, without_pid=without_pid),
                    uname_machine=machine,
                    of_others=by_qemu or without_pid,
                )
    return cores


def _notes(word_size: int, *, by_qemu: bool, without_pid: bool) -> tuple[NoteLayout, ...]:
    word = "u64" if word_size == 8 else "u32"
    pid = Field("no_pid" if without_pid else "pr_pid", "u32")
    owner = "CORE" if by_qemu else "LINUX"
    if by_qemu and word_size == 4:
        # The prefix of the 64-bit structure, 32-bit registers, and one word less of padding.
        status = prstatus_layout(
            "PowerPC by QEMU",
            "u64",
            (*fields_of("u32", _PT_REGS), Field("pad_registers", "bytes", 36)),
            pid=pid,
        )
    else:
        registers = fields_of(word, f"{_PT_REGS} {_UNUSED_GREGS}")
        status = prstatus_layout("PowerPC", word, registers, pid=pid)
    fpscr = Field("fpscr", word if by_qemu else "u64")
    floating_point = StructLayout("elf_fpregset_t", (*fields_of("u64", _FPRS), fpscr))
    vscr: tuple[Field, ...] = (Field("vscr", "wide", 16), Field("vrsave", "u32"))
    high = fields_of("u32", _SPE_HIGH)
    if by_qemu:
        vscr = (Field("pad_vscr", "bytes", 12), *fields_of("u32", "vscr zero_vrsave"))
        high = fields_of("u32", numbered("zero", 32))
    vmx = StructLayout("elf_vrregset_t", (*wide_fields(_VMX, 16), *vscr, Field("pad", "bytes", 12)))
    spe = StructLayout("thread.evr", (*high, Field("spe_acc", "u64"), Field("spe_fscr", "u32")))
    return (
        NoteLayout("CORE", NT_PRSTATUS, status, max_align=word_size),
        NoteLayout("CORE", NT_PRFPREG, floating_point, max_align=word_size),
        NoteLayout(owner, NT_PPC_VMX, vmx, max_align=4),
        NoteLayout(owner, NT_PPC_VSX, StructLayout("vsx", fields_of("u64", _VSX_LOW)), max_align=8),
        NoteLayout(owner, NT_PPC_SPE, spe, max_align=4),
    )


def _select_by(
    cores: Mapping[tuple[ByteOrder, bool, bool], Core],
) -> Callable[[Sequence[Vcpu], Sequence[RamBlock], Dialect, str], Core]:
    """Return the function that selects among `cores`."""

    def select(
        vcpus: Sequence[Vcpu], _blocks: Sequence[RamBlock], dialect: Dialect, machine: str
    ) -> Core:
        registers = vcpus[0].registers if vcpus else {}
        hypervisor = dialect.hypervisor_decides_byte_order or not machine.startswith(_PSERIES)
        little = _interrupts_little_endian(registers, hypervisor=hypervisor)
        order: ByteOrder = "little" if little and ("little", True, True) in cores else "big"
        return cores[order, dialect.qemu_note_layouts, dialect.pid_unconverted]

    return select


def _interrupts_little_endian(registers: Mapping[str, int], *, hypervisor: bool) -> bool:
    """Tell in which byte order the kernel is entered, so that it is built for that."""
    if "lpcr" not in registers:
        return registers.get("msr", 0) & _MSR_ILE != 0
    if not hypervisor:
        return registers["lpcr"] & _LPCR_ILE != 0
    isa_3 = registers.get("pvr", 0) >> 16 in _FIRST_ISA_3_PVRS
    return registers.get("hid0", 0) & (_HID0_HILE_POWER9 if isa_3 else _HID0_HILE) != 0


def _parse_monitor(text: str) -> Mapping[str, int]:
    """Read rows (`GPR04 …`, `FPR04 …`) and pairs (`NIP …`) of `info registers`."""
    values = parse_rows(text, "GPR", "r", 32) | parse_rows(text, "FPR", "f", 32)
    for name, value in re.findall(r"\b([A-Z][A-Z0-9]+) +([0-9a-f]{8,16})\b", text):
        if name in _MONITOR_NAMES:
            values.setdefault(_MONITOR_NAMES[name], int(value, 16))
    # On a 32-bit processor with SPE the rows show the high halves of its registers as well; a
    # 64-bit processor has no SPE.
    word = U32_MAX if re.search(r"\bNIP [0-9a-f]{8}\b", text) else U64_MAX
    for index in range(32):
        if (both := values.get(f"r{index}")) is not None:
            values |= {
                f"r{index}": both & word,
                f"ev{index}h": both >> 32 if word == U32_MAX else 0,
            }
    return values


def _reconcile(readings: VcpuReadings) -> Mapping[str, int]:
    """Merge the sources; what the processor does not have is zero, and not missing."""
    values = {**readings.native, **readings.monitor, **readings.gdb}
    # The stub shows the low halves of these.
    for name in ("fpscr", "xer"):
        for wide in (readings.monitor, readings.native):
            if name in wide and wide[name] & U32_MAX == values[name] & U32_MAX:
                values[name] = wide[name]
    if readings.gdb:
        absent = set(_OPTIONAL) - values.keys()
        if "vr1" in values:
            absent.discard("vr0")  # it is there, and the stub hides it
        values |= dict.fromkeys(absent, 0)
    return values


def _correct_stub(registers: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """Undo that QEMU 11 answers each number from that of vr0 on with the register behind it.

    Before them comes fpscr, which hides vr0: that one cannot be had.
    """
    if not 0 < len(registers.get("vr31", b"")) < _VECTOR_SIZE:
        return registers
    shifted = {
        name: registers[before]
        for before, name in pairwise(_BEHIND_FPSCR)
        if name in registers and before in registers
    }
    kept = {name: value for name, value in registers.items() if name != "vr0"}
    return kept | shifted


def _stub_byte_order(registers: Mapping[str, bytes]) -> ByteOrder:
    """Tell the byte order of the stub's values: that of the vCPU's data at this moment.

    MSR.LE is the lowest bit of the last byte in big-endian order; sent little-endian, that is
    the first byte, whose lowest bit is never set in big-endian order.
    """
    msr = registers.get("msr", b"")
    return "little" if msr[:1] and msr[0] & _MSR_LE_BYTE else "big"


_SPR_NUMBERS = {"xer": 1, "link": 8, "ctr": 9, "vrsave": 256, "pvr": 287, "lpcr": 318, "hid0": 1008}


def _derive_migrated(section: DeviceFields) -> Mapping[str, int]:
    # The halves of a vector in the order of the host's memory: taken for a little-endian one.
    vectors = {name: section.data(f"cpu/altivec/env.vsr[{name[2:]}]") for name in _VMX.split()}
    values = {
        name: int.from_bytes(data[8:] + data[:8], "big") for name, data in vectors.items() if data
    }
    fields = section.integers("env.crf")
    if len(fields) == 8:
        values["ccr"] = sum((value & 0xF) << 28 - 4 * index for index, value in enumerate(fields))
    return values


def _migrated(word_size: int) -> MigratedCpu:
    return MigratedCpu(
        recognize=lambda section: len(section.data("env.nip") or b"") == word_size,
        fields={
            **field_names(_GPRS, "env.gpr[{}]"),
            **field_names(_SPE_HIGH, "env.gprh[{}]"),
            **field_names(_FPRS, "cpu/fpu/env.vsr[{}]"),
            **field_names(_VSX_LOW, "cpu/vsx/env.vsr[{}]"),
            **{name: (f"env.spr[{number}]",) for name, number in _SPR_NUMBERS.items()},
            "nip": ("env.nip",),
            "msr": ("env.msr",),
            "fpscr": ("cpu/fpu/env.fpscr",),
            "vscr": ("cpu/altivec/vscr",),
            "spe_acc": ("env.spe_acc",),
        },
        derive=_derive_migrated,
    )


def make_architecture(
    name: str,
    e_machine: int,
    word_size: int,
    *,
    cpu_type_suffix: str,
    machine_page_sizes: Mapping[str, int] | None = None,
) -> Architecture:
    """Declare PowerPC of one word size; the arguments are attributes of Architecture and Core."""
    cores = _make_cores(e_machine, word_size, {"big": name, "little": f"{name}le"})
    return Architecture(
        name=name,
        cpu_type_suffix=cpu_type_suffix,
        qemu_uname_machine="Unknown",
        gdb_name="powerpc:common64" if word_size == 8 else "powerpc:common",
        registers=_REGISTERS,
        cores=tuple(cores.values()),
        program_counter="nip",
        page_size=4096,
        phys_base_key=None,
        select_core=_select_by(cores),
        parse_monitor=_parse_monitor,
        reconcile=_reconcile,
        machine_page_sizes=machine_page_sizes or {},
        stub_byte_order=_stub_byte_order,
        correct_stub=_correct_stub,
        migrated=_migrated(word_size),
    )
