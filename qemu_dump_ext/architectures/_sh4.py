"""What SH-4 of both byte orders have in common.

Sources:
    Linux arch/sh/include/uapi/asm/ptrace_32.h (struct pt_regs is pr_reg), arch/sh/include/asm/
    user.h (user_fpu_struct); QEMU target/sh4/gdbstub.c (which has one of the two banks of
    floating-point registers), target/sh4/translate.c superh_cpu_dump_state(); binutils
    include/elf/sh.h (e_flags, by which gdb knows that there is floating point).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from qemu_dump_ext.architectures._declaration import Architecture, Core, Register
from qemu_dump_ext.architectures._linux_notes import fpregset, numbered, prstatus
from qemu_dump_ext.architectures._undumped import (
    g_packet,
    make_architecture,
    recognize_by_byte_order,
)
from qemu_dump_ext.structures.c_struct import ByteOrder, fields_of
from qemu_dump_ext.structures.elf import EM_SH

_GPRS = numbered("r", 16)
_CONTROL = "pc pr sr gbr mach macl"
_FPRS = numbered("fr", 16)
_FP_CONTROL = "fpscr fpul"
_IN_STUB = f"{_GPRS} {_CONTROL} {_FPRS} {_FP_CONTROL}"
_OTHER_BANK = numbered("xf", 16)
_G_PACKET = g_packet(
    (4, f"{_GPRS} pc pr gbr vbr mach macl sr fpul fpscr {_FPRS} ssr spc"),
    (4, " ".join(f"r{index}b{bank}" for bank in range(2) for index in range(8))),
)
_EF_SH4 = 9
_SR_MD_RB = 1 << 30 | 1 << 29
_BANKED = 8


def _parse_monitor(text: str) -> Mapping[str, int]:
    """Read `pc=0x…` and `r0=0x…`; r16 to r23 are r0 to r7 of the other bank."""
    values = {
        name: int(value, 16) for name, value in re.findall(r"\b([a-z]+\d*)=0x([0-9a-f]{8})\b", text)
    }
    if values.get("sr", 0) & _SR_MD_RB == _SR_MD_RB:
        for index in range(_BANKED):
            if f"r{16 + index}" in values:
                values[f"r{index}"] = values[f"r{16 + index}"]
    return {name: value for name, value in values.items() if name in _IN_STUB.split()}


def make_sh4(name: str, byte_order: ByteOrder) -> Architecture:
    """Declare SH-4 of one byte order."""
    return make_architecture(
        name,
        Core(
            e_machine=EM_SH,
            byte_order=byte_order,
            word_size=4,
            notes=(
                prstatus(
                    "SH-4",
                    "u32",
                    fields_of("u32", f"{_GPRS} {_CONTROL} tra"),
                    constants={"pr_fpvalid": 1},
                ),
                fpregset("u32", f"{_FPRS} {_OTHER_BANK} {_FP_CONTROL}"),
            ),
            uname_machine="sh4" if byte_order == "little" else "sh4eb",
            e_flags=_EF_SH4,
            u64_align=4,
        ),
        (
            *(Register(register, gdb=register) for register in _IN_STUB.split()),
            *(Register(register) for register in _OTHER_BANK.split()),
        ),
        "pc",
        cpu_type_suffix="-superh-cpu",
        g_packet=_G_PACKET,
        parse_monitor=_parse_monitor,
        recognize=recognize_by_byte_order(name, byte_order, _G_PACKET, _parse_monitor),
        gdb_settings=("set architecture sh4", f"set endian {byte_order}"),
    )
