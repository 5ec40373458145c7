"""PA-RISC of 32 bits and, since QEMU 9, of 64.

Sources:
    Linux arch/parisc/include/asm/elf.h ELF_CORE_COPY_REGS, elf_fpregset_t; QEMU
    target/hppa/gdbstub.c, target/hppa/helper.c hppa_cpu_dump_state(); binutils
    include/elf/hppa.h (e_flags).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from qemu_dump_ext.architectures._declaration import Core, Register
from qemu_dump_ext.architectures._linux_notes import fpregset, numbered, prstatus
from qemu_dump_ext.architectures._undumped import g_packet, make_architecture
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.structures.c_struct import U32_MAX, fields_of
from qemu_dump_ext.structures.dialect import Dialect
from qemu_dump_ext.structures.elf import ELFOSABI_LINUX, EM_PARISC

_GPRS = numbered("gr", 31, first=1)
_SPACES = numbered("sr", 8)
_QUEUES = "iaoq_f iaoq_b iasq_f iasq_b"
_TEMPORARY = numbered("cr", 8, first=24)
_PR_REG = (
    f"psw {_GPRS} {_SPACES} {_QUEUES} sar iir isr ior ipsw cr0 {_TEMPORARY}"
    " cr8 cr9 cr12 cr13 cr10 cr15"
)
_FPRS = numbered("fr", 32)
_G_PACKET = (
    f"psw {_GPRS} sar iaoq_f iasq_f iaoq_b iasq_b cr15 iir isr ior ipsw goto sr4 sr0 sr1 sr2 sr3"
    f" sr5 sr6 sr7 cr0 cr8 cr9 cr10 cr12 cr13 {numbered('cr', 7, first=24)}"
)
_MONITOR_NAMES = {"PSW": "psw", "IIR": "iir"}
# Since QEMU 11.
_MONITOR_NAMES |= {"RC": "cr0", "PID1": "cr8", "PID2": "cr9", "CCR": "cr10", "SAR": "sar"}
_MONITOR_NAMES |= {"PID3": "cr12", "PID4": "cr13", "EIEM": "cr15", "ISR": "isr", "IOR": "ior"}
_MONITOR_NAMES |= {"IPSW": "ipsw"} | {f"TR{index}": f"cr{24 + index}" for index in range(8)}
_EFA_PARISC_1_1 = 0x210
_EFA_PARISC_2_0_WIDE = 0x80214
_PSW_C = 1 << 18


def _parse_monitor(text: str) -> Mapping[str, int]:
    """Read `GR04 …`, `SR04 …`, `PSW  …`, and `IA_F …`: offset, and space where code has one.

    QEMU 11 writes space and offset of `IA_F` apart, and all control registers and `FR04 …`. `wide`
    tells whether registers have 64 bits.
    """
    values: dict[str, int] = {}
    for kind, index, value in re.findall(r"\b(GR|SR)(\d\d) ([0-9a-f]{8,16})\b", text):
        if (name := f"{kind.lower()}{int(index)}") != "gr0":
            values[name] = int(value, 16)
        elif len(value) > 8:
            values["wide"] = 1
    for name, value in re.findall(r"\b([A-Z]+\d?) +([0-9a-f]{8,16})\b", text):
        if name in _MONITOR_NAMES:
            values[_MONITOR_NAMES[name]] = int(value, 16)
    for index, value in re.findall(r"\bFR(\d\d) ([0-9a-f]{16})\b", text):
        values[f"fr{int(index)}"] = int(value, 16)
    for end, space, value in re.findall(r"\bIA_([FB]) ([0-9a-f]{8}):([0-9a-f]{8,16})\b", text):
        values[f"iasq_{end.lower()}"] = int(space, 16)
        values[f"iaoq_{end.lower()}"] = int(value, 16)
    for end, value in re.findall(r"\bIA_([FB]) +([0-9a-f]{16})\b", text):
        values[f"iaoq_{end.lower()}"] = int(value, 16) & U32_MAX
        if values.get("psw", 0) & _PSW_C:
            values[f"iasq_{end.lower()}"] = int(value, 16) >> 32
    return values


def _core(word: str, uname_machine: str, e_flags: int) -> Core:
    word_size = 4 if word == "u32" else 8
    return Core(
        e_machine=EM_PARISC,
        byte_order="big",
        word_size=word_size,
        notes=(
            prstatus(
                "PA-RISC",
                word,
                fields_of(word, f"{_PR_REG} {numbered('zero', 16)}"),
                constants={"pr_fpvalid": 1},
            ),
            fpregset("u64", _FPRS),
        ),
        uname_machine=uname_machine,
        e_flags=e_flags,
        os_abi=ELFOSABI_LINUX,
    )


_NARROW = _core("u32", "parisc", _EFA_PARISC_1_1)
_WIDE = _core("u64", "parisc64", _EFA_PARISC_2_0_WIDE)


def _select_core(
    vcpus: Sequence[Vcpu], _blocks: Sequence[RamBlock], _dialect: Dialect, _machine: str
) -> Core:
    return _WIDE if vcpus and vcpus[0].registers.get("wide") else _NARROW


ARCHITECTURE = replace(
    make_architecture(
        "hppa",
        _NARROW,
        tuple(
            Register(name, gdb=name if name in f"{_G_PACKET} {_FPRS}".split() else None)
            for name in f"{_PR_REG} {_FPRS}".split()
        ),
        "iaoq_f",
        cpu_type_suffix="hppa-cpu",
        # Of 32 bits; halves of a register follow each other. QEMU that has 64 shows all by monitor.
        g_packet=g_packet((4, _G_PACKET), (8, _FPRS)),
        parse_monitor=_parse_monitor,
        # Takes registers of 32 and of 64 bits.
        gdb_settings=("set architecture powerpc:7400", "set endian big"),
    ),
    cores=(_NARROW, _WIDE),
    select_core=_select_core,
)
