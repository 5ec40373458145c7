"""Alpha.

Sources:
    Linux arch/alpha/kernel/process.c dump_elf_thread() (r0 to r29, sp, pc, unique),
    dump_elf_task_fp(); QEMU target/alpha/gdbstub.c, target/alpha/helper.c
    alpha_cpu_dump_state().
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from qemu_dump_ext.architectures._declaration import Core, Register
from qemu_dump_ext.architectures._linux_notes import fpregset, numbered, prstatus
from qemu_dump_ext.architectures._undumped import g_packet, make_architecture
from qemu_dump_ext.structures.c_struct import fields_of
from qemu_dump_ext.structures.elf import EM_ALPHA

_GPRS = (
    "v0 t0 t1 t2 t3 t4 t5 t6 t7 s0 s1 s2 s3 s4 s5 fp a0 a1 a2 a3 a4 a5 t8 t9 t10 t11 ra t12 at gp"
    " sp"
)
_FPRS = f"{numbered('f', 31)} fpcr"
_REGISTERS = f"{_GPRS} pc unique {_FPRS}".split()


def _parse_monitor(text: str) -> Mapping[str, int]:
    """Read `v0      0000…`."""
    found = re.findall(r"\b(PC|[a-z]\w+) +([0-9a-f]{16})\b", text)
    values = {name.lower(): int(value, 16) for name, value in found}
    return {name: value for name, value in values.items() if name in _REGISTERS}


ARCHITECTURE = make_architecture(
    "alpha",
    Core(
        e_machine=EM_ALPHA,
        byte_order="little",
        word_size=8,
        notes=(
            prstatus(
                "Alpha",
                "u64",
                fields_of("u64", f"{_GPRS} pc unique"),
                constants={"pr_fpvalid": 1},
            ),
            fpregset("u64", _FPRS),
        ),
        uname_machine="alpha",
    ),
    tuple(Register(name, gdb=name) for name in _REGISTERS),
    "pc",
    cpu_type_suffix="-alpha-cpu",
    page_size=8192,
    g_packet=g_packet((8, f"{_GPRS} zero {_FPRS} pc zero_vfp unique")),
    parse_monitor=_parse_monitor,
    gdb_settings=("set architecture alpha",),
)
