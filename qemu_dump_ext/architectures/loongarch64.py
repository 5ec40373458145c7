"""64-bit LoongArch.

Sources:
    Linux arch/loongarch/include/uapi/asm/ptrace.h (user_pt_regs, user_fp_state), asm/elf.h
    (ELF_NGREG 45); QEMU target/loongarch/arch_dump.c (since 9.2), gdb-xml/loongarch-*.xml.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from qemu_dump_ext.architectures._declaration import (
    Architecture,
    Core,
    NoteLayout,
    Register,
    VcpuReadings,
)
from qemu_dump_ext.architectures._linux_notes import numbered, prstatus
from qemu_dump_ext.c_struct import Field, StructLayout, fields_of
from qemu_dump_ext.dialect import Dialect
from qemu_dump_ext.elf_structs import EM_LOONGARCH, NT_PRFPREG
from qemu_dump_ext.guest import RamBlock, Vcpu

_GPRS = numbered("r", 32)
_FPRS = numbered("f", 32)
_CONTROL = "crmd prmd euen ecfg estat"
_CONDITION_FLAGS = numbered("fcc", 8).split()
_FP_VALID = {"pr_fpvalid": 1}


def _core(registers: str, tail: str, floating_point_end: tuple[Field, ...]) -> Core:
    return Core(
        e_machine=EM_LOONGARCH,
        byte_order="little",
        word_size=8,
        notes=(
            prstatus(
                "LoongArch",
                "u64",
                fields_of("u64", f"{_GPRS} orig_a0 {registers} {tail}"),
                constants=_FP_VALID,
            ),
            NoteLayout(
                "CORE",
                NT_PRFPREG,
                StructLayout(
                    "user_fp_state", (*fields_of("u64", f"{_FPRS} fcc"), *floating_point_end)
                ),
                max_align=4,
            ),
        ),
        uname_machine="loongarch64",
    )


_MENDED = _core(f"pc badv {_CONTROL}", numbered("reserved", 5), fields_of("u32", "fcsr pad_end"))
_BY_QEMU = _core("era badv", numbered("reserved", 10), (Field("fcsr", "u32"),))


def _select_core(
    _vcpus: Sequence[Vcpu], _blocks: Sequence[RamBlock], dialect: Dialect, _machine: str
) -> Core:
    return _BY_QEMU if dialect.qemu_note_layouts else _MENDED


def _parse_monitor(text: str) -> Mapping[str, int]:
    """Read ` GPR04: r4 0000… r5 …`, ` f4 0000…`, `FCSR0 0x…`, `ERA=0000…`, `CRMD   b0`."""
    values = {
        name: int(value, 16)
        for name, value in re.findall(r"\b([rf]\d{1,2}) ([0-9a-f]{16})\b", text)
    }
    for name, value in re.findall(r"\b([A-Z][A-Z0-9]+)(?:=| +0x| +)([0-9a-f]{1,16})\b", text):
        if name.lower() in {"fcsr0", "era", "badv", *_CONTROL.split()}:
            values["fcsr" if name == "FCSR0" else name.lower()] = int(value, 16)
    return values


def _reconcile(readings: VcpuReadings) -> Mapping[str, int]:
    values = {**readings.native, **readings.monitor, **readings.gdb}
    if all(name in values for name in _CONDITION_FLAGS):
        # Since QEMU 10 the stub shows each flag on its own.
        values["fcc"] = sum(
            (values[name] & 0xFF) << 8 * index for index, name in enumerate(_CONDITION_FLAGS)
        )
    return values


ARCHITECTURE = Architecture(
    name="loongarch64",
    cpu_type_suffix="-loongarch-cpu",
    qemu_uname_machine="Unknown",
    registers=(
        *(Register(name, gdb=name) for name in f"{_GPRS} {_FPRS} badv fcc fcsr".split()),
        *(Register(name, gdb=name) for name in _CONDITION_FLAGS),
        Register("pc", gdb="pc", monitor=("PC",)),
        Register("era"),
        *(Register(name) for name in _CONTROL.split()),
    ),
    cores=(_MENDED, _BY_QEMU),
    program_counter="pc",
    dumped_by_qemu_since=(9, 2, 0),
    page_size=4096,
    phys_base_key=None,
    kernel_map_base=None,
    select_core=_select_core,
    parse_monitor=_parse_monitor,
    reconcile=_reconcile,
    # Most have no LoongArch: any little-endian architecture with registers of 64 bits can connect.
    gdb_settings=("set architecture alpha",),
)
