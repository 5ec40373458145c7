"""What MIPS of both widths and both byte orders have in common.

Sources:
    Linux arch/mips/include/uapi/asm/reg.h (MIPS32_EF_*, MIPS64_EF_*), arch/mips/kernel/ptrace.c
    (fpr_get: 64-bit registers, FCSR, FIR); QEMU target/mips/gdbstub.c, target/mips/cpu.c
    mips_cpu_dump_state(); MIPS ABI supplement and binutils include/elf/mips.h (e_flags); MIPS
    architecture, volume III, "Virtual Memory" (segments that no TLB translates).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from qemu_dump_ext.architectures._declaration import (
    Architecture,
    Core,
    MachineRam,
    MigratedCpu,
    NoteLayout,
    Register,
    TargetClues,
    VcpuReadings,
    field_names,
)
from qemu_dump_ext.architectures._linux_notes import numbered, prstatus
from qemu_dump_ext.architectures._page_tables import AddressWindow, ones_above
from qemu_dump_ext.architectures._undumped import g_packet
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.structures.c_struct import U32_MAX, ByteOrder, Field, StructLayout, fields_of
from qemu_dump_ext.structures.dialect import Dialect
from qemu_dump_ext.structures.elf import EM_MIPS, NT_PRFPREG
from qemu_dump_ext.structures.vmcoreinfo import vmcoreinfo_number

if TYPE_CHECKING:
    from qemu_dump_ext.structures.migration import DeviceFields

_GPRS = numbered("r", 32)
_FPRS = numbered("f", 32)
_CONTROL = "lo hi pc badvaddr status cause"
_IN_STUB = f"{_GPRS} status lo hi badvaddr cause pc {_FPRS} fsr fir"
_MONITOR_NAMES = {"pc": "pc", "HI": "hi", "LO": "lo", "Status": "status", "Cause": "cause"}
_MONITOR_NAMES |= {"Config0": "config0", "Config1": "config1", "FCR0": "fir", "FCR31": "fsr"}

_EF_32R2_O32 = 0x70001000
_EF_64R2 = 0x80000000
_CONFIG0_BE = 1 << 15
_CONFIG0_AT = 3 << 13  # 0: a processor of 32 bits
_CONFIG1_FP = 1
_STATUS_FR = 1 << 26  # 32 registers of 64 bits instead of 16 pairs

_FLOATING_POINT = NoteLayout(
    "CORE",
    NT_PRFPREG,
    StructLayout("elf_fpregset_t", (*fields_of("u64", _FPRS), *fields_of("u32", "fsr fir"))),
    max_align=8,
)
_MACHINES = (  # QEMU hw/mips/malta.c
    MachineRam("malta", ((0, 0, 1 << 28), (0x90000000, 1 << 28, None))),
)
_FP_VALID = {"pr_fpvalid": 1}


_SEGMENT_SIZE = 1 << 29
_WINDOWS_32 = tuple(AddressWindow(gva, _SEGMENT_SIZE, 0) for gva in (0x80000000, 0xA0000000))
"""KSEG0 and KSEG1."""
_WINDOWS_64 = (
    *(AddressWindow(ones_above(32) | window.gva, _SEGMENT_SIZE, 0) for window in _WINDOWS_32),
    # XKPHYS: uncached, cached, and cached coherently.
    *(AddressWindow(1 << 63 | kind << 59, 1 << 59, 0) for kind in (2, 3, 5)),
)


def _linux_windows(vmcoreinfo: bytes, _phys_base: int | None) -> Sequence[AddressWindow]:
    """Return how the kernel sees memory without its TLB, which its code alone fills."""
    start = vmcoreinfo_number(vmcoreinfo, "SYMBOL(_stext)", 16)
    for windows in (_WINDOWS_32, _WINDOWS_64):
        if start is not None and windows[0].gva <= start < windows[0].gva + _SEGMENT_SIZE:
            return windows
    return ()


def _core32(byte_order: ByteOrder) -> Core:
    registers = (
        Field("pad_arguments", "bytes", 24),
        *fields_of("u32", f"{_GPRS} {_CONTROL} zero"),
    )
    return Core(
        e_machine=EM_MIPS,
        byte_order=byte_order,
        word_size=4,
        notes=(prstatus("MIPS o32", "u32", registers, constants=_FP_VALID), _FLOATING_POINT),
        uname_machine="mips",
        e_flags=_EF_32R2_O32,
    )


def _core64(byte_order: ByteOrder) -> Core:
    registers = fields_of("u64", f"{_GPRS} {_CONTROL} {numbered('zero', 7)}")
    return Core(
        e_machine=EM_MIPS,
        byte_order=byte_order,
        word_size=8,
        notes=(prstatus("MIPS n64", "u64", registers, constants=_FP_VALID), _FLOATING_POINT),
        uname_machine="mips64",
        e_flags=_EF_64R2,
    )


def _parse_monitor(text: str) -> Mapping[str, int]:
    """Read `pc=0x…`, `GPR04: a0 … a1 …`, `Status  0x…`, and `d:…` of ` f0: w:… d:… fd:…`."""
    values: dict[str, int] = {}
    for first, row in re.findall(r"^ *GPR(\d+):((?: +\w+ [0-9a-f]+)+) *$", text, re.MULTILINE):
        for index, value in enumerate(row.split()[1::2], int(first)):
            values[f"r{index}"] = int(value, 16)
    for name, value in re.findall(r"\b([A-Za-z]+\d*)(?:=| +)0x([0-9a-f]+)\b", text):
        if name in _MONITOR_NAMES:
            values[_MONITOR_NAMES[name]] = int(value, 16)
    for index, value in re.findall(r"^ *f(\d+): w:[0-9a-f]+ d:([0-9a-f]+)", text, re.MULTILINE):
        values[f"f{index}"] = int(value, 16)
    return values


def _reconcile(readings: VcpuReadings) -> Mapping[str, int]:
    values = {**readings.monitor, **readings.gdb}
    for name in ("status", "cause"):
        if values.get(name, 0) >> 31 == 1:  # shown as 32 bits; Linux keeps it sign-extended
            values[name] |= U32_MAX << 32
    fprs = _FPRS.split()
    if not values.get("config1", _CONFIG1_FP) & _CONFIG1_FP:
        values |= dict.fromkeys((*fprs, "fsr", "fir"), 0)
    elif not values.get("status", _STATUS_FR) & _STATUS_FR and fprs[0] in values:
        # The stub shows halves, the monitor pairs; Linux stores pairs.
        for even, odd in zip(fprs[::2], fprs[1::2], strict=True):
            if odd in readings.gdb:
                values[even] = (values[odd] & U32_MAX) << 32 | values[even] & U32_MAX
            values[odd] = 0
    return values


def _order_of(config0: int) -> ByteOrder:
    return "big" if config0 & _CONFIG0_BE else "little"


def _recognize_by(byte_order: ByteOrder) -> Callable[[TargetClues], bool]:
    def recognize(clues: TargetClues) -> bool:
        config0 = _parse_monitor(clues.register_text).get("config0", 0)
        return _order_of(config0) == byte_order

    return recognize


def _migrated(word_size: int, byte_order: ByteOrder) -> MigratedCpu:
    def recognize(section: DeviceFields) -> bool:
        config0 = section.integer("env.CP0_Config0")
        fits = len(section.data("env.active_tc.PC") or b"") == word_size
        return fits and config0 is not None and _order_of(config0) == byte_order

    def derive(section: DeviceFields) -> Mapping[str, int]:
        # Each is a vector of 16 bytes that begins with it.
        values = {name: section.data(f"env.active_fpu.fpr[{name[1:]}]") for name in _FPRS.split()}
        return {name: int.from_bytes(data[:8], "big") for name, data in values.items() if data}

    return MigratedCpu(
        recognize,
        {
            **field_names(_GPRS, "env.active_tc.gpr[{}]"),
            "pc": ("env.active_tc.PC",),
            "hi": ("env.active_tc.HI[0]",),
            "lo": ("env.active_tc.LO[0]",),
            "badvaddr": ("env.CP0_BadVAddr",),
            "status": ("env.CP0_Status",),
            "cause": ("env.CP0_Cause",),
            "config0": ("env.CP0_Config0",),
            "config1": ("env.CP0_Config1",),
            "fir": ("env.active_fpu.fcr0",),
            "fsr": ("env.active_fpu.fcr31",),
        },
        derive,
    )


def make_architecture(name: str, word_size: int, byte_order: ByteOrder) -> Architecture:
    """Declare MIPS of one width and byte order."""
    narrow = _core32(byte_order)
    cores = (narrow,) if word_size == 4 else (_core64(byte_order), narrow)

    def select_core(
        vcpus: Sequence[Vcpu], _blocks: Sequence[RamBlock], _dialect: Dialect, _machine: str
    ) -> Core:
        config0 = vcpus[0].registers.get("config0", _CONFIG0_AT) if vcpus else _CONFIG0_AT
        return cores[0] if config0 & _CONFIG0_AT else narrow

    return Architecture(
        name=name,
        cpu_type_suffix="-mips-cpu" if word_size == 4 else "-mips64-cpu",
        qemu_uname_machine="Unknown",
        registers=tuple(Register(register, gdb=register) for register in _IN_STUB.split()),
        cores=cores,
        program_counter="pc",
        page_size=4096,
        phys_base_key=None,
        dumped_by_qemu_since=None,
        select_core=select_core,
        parse_monitor=_parse_monitor,
        reconcile=_reconcile,
        recognize=_recognize_by(byte_order),
        g_packet=g_packet((word_size, f"{_IN_STUB} zero_fp")),
        kernel_page_tables=_linux_windows,
        migrated=_migrated(word_size, byte_order),
        machines=_MACHINES,
        gdb_settings=(
            f"set architecture mips:isa{8 * word_size}r2",
            f"set endian {byte_order}",
        ),
    )
