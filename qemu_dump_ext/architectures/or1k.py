"""OpenRISC 1000.

Sources:
    Linux arch/openrisc/include/uapi/asm/ptrace.h (user_regs_struct: gpr, pc, sr); QEMU
    target/openrisc/gdbstub.c, target/openrisc/translate.c openrisc_cpu_dump_state().
"""

from __future__ import annotations

from qemu_dump_ext.architectures._declaration import Core, Register
from qemu_dump_ext.architectures._linux_notes import numbered, prstatus
from qemu_dump_ext.architectures._undumped import g_packet, make_architecture
from qemu_dump_ext.structures.c_struct import fields_of
from qemu_dump_ext.structures.elf import EM_OPENRISC

_GPRS = numbered("r", 32)

ARCHITECTURE = make_architecture(
    "or1k",
    Core(
        e_machine=EM_OPENRISC,
        byte_order="big",
        word_size=4,
        notes=(prstatus("OpenRISC", "u32", fields_of("u32", f"{_GPRS} pc sr")),),
        uname_machine="openrisc",
        u64_align=4,
    ),
    (
        *(
            Register(name, gdb=name, monitor=(f"R{index:02}",))
            for index, name in enumerate(_GPRS.split())
        ),
        Register("pc", gdb="npc", monitor=("PC",)),
        Register("sr", gdb="sr"),
    ),
    "pc",
    cpu_type_suffix="-or1k-cpu",
    page_size=8192,
    g_packet=g_packet((4, f"{_GPRS} ppc npc sr")),
    # A gdb without OpenRISC: any architecture with enough registers of 32 bits can connect.
    gdb_settings=("set architecture sh4", "set endian big"),
)
