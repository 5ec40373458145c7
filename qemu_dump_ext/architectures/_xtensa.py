"""What Xtensa of both byte orders have in common.

All is in `info registers`: what the stub's packets hold depends on the processor's configuration.

Sources:
    Linux arch/xtensa/include/asm/elf.h (xtensa_gregset_t), arch/xtensa/kernel/ptrace.c
    ptrace_getregs() (physical registers, by number); QEMU target/xtensa/translate.c
    xtensa_cpu_dump_state(), overlay_tool.h and core-*/gdb-config.c.inc (pc is the first register).
"""

from __future__ import annotations

from collections.abc import Mapping

from qemu_dump_ext.architectures._declaration import Architecture, Core, Register, VcpuReadings
from qemu_dump_ext.architectures._linux_notes import numbered, prstatus
from qemu_dump_ext.architectures._register_text import parse_named_values
from qemu_dump_ext.architectures._undumped import (
    g_packet,
    make_architecture,
    recognize_by_byte_order,
)
from qemu_dump_ext.structures.c_struct import ByteOrder, Field, fields_of
from qemu_dump_ext.structures.elf import EM_XTENSA

_ALWAYS = "pc ps sar"
_CONFIGURED = "lbeg lend lcount windowstart windowbase threadptr"
_WINDOWED = numbered("ar", 64)
_G_BEGIN = g_packet((4, "pc"))


def _parse_pc(text: str) -> Mapping[str, int]:
    return {name.lower(): value for name, value in parse_named_values(text).items() if name == "PC"}


def _reconcile(readings: VcpuReadings) -> Mapping[str, int]:
    values = dict(readings.monitor)
    if "pc" in values:
        # A processor that was built without some of these has none to show.
        values = dict.fromkeys(f"{_CONFIGURED} {_WINDOWED}".split(), 0) | values
    return values


def make_xtensa(name: str, byte_order: ByteOrder) -> Architecture:
    """Declare Xtensa of one byte order."""
    return make_architecture(
        name,
        Core(
            e_machine=EM_XTENSA,
            byte_order=byte_order,
            word_size=4,
            notes=(
                prstatus(
                    "Xtensa",
                    "u32",
                    (
                        *fields_of("u32", "pc ps lbeg lend lcount sar windowstart windowbase"),
                        Field("threadptr", "u32"),
                        Field("pad_reserved", "bytes", 4 * 55),
                        *fields_of("u32", _WINDOWED),
                    ),
                ),
            ),
            uname_machine="xtensa",
        ),
        (
            *(
                Register(register, monitor=(register.upper(),))
                for register in f"{_ALWAYS} {_CONFIGURED}".split()
            ),
            *(
                Register(register, monitor=(f"AR{index:02}",))
                for index, register in enumerate(_WINDOWED.split())
            ),
        ),
        "pc",
        cpu_type_suffix="-xtensa-cpu",
        g_packet=_G_BEGIN,
        reconcile=_reconcile,
        recognize=recognize_by_byte_order(name, byte_order, _G_BEGIN, _parse_pc),
        # gdb knows one configuration. This connects to most others: to `g` packets of 420 to 768
        # bytes.
        gdb_settings=("set architecture powerpc:7400", f"set endian {byte_order}"),
    )
